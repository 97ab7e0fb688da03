# Shared by the scripts beside it (sourced): install what is missing, and say so.
# Sets ROOT, the checkout, and PYTHON, its virtual environment's interpreter.

ROOT=$(cd "$(dirname "$(readlink -f "${BASH_SOURCE[0]}")")/.." && pwd)
VENV=${CTRACE_VENV:-$ROOT/.venv}
PYTHON=$VENV/bin/python
# BCC's Python package belongs to the distribution's own interpreter.
SYSTEM_PYTHON=/usr/bin/python3

die() {
	echo "ctrace: $*" >&2
	exit 1
}

# The package manager: apt, dnf or none.
manager() {
	if command -v apt-get >/dev/null; then echo apt
	elif command -v dnf >/dev/null; then echo dnf
	else echo none; fi
}

# install_packages DEBIAN-NAMES -- FEDORA-NAMES: installs those that are missing.
install_packages() {
	local debian=() fedora=() missing=() seen=0 name
	for name in "$@"; do
		if [ "$name" = -- ]; then seen=1
		elif [ $seen = 0 ]; then debian+=("$name")
		else fedora+=("$name"); fi
	done
	case $(manager) in
	apt)
		for name in "${debian[@]}"; do
			[ "$(dpkg-query -W -f '${db:Status-Status}' "$name" 2>/dev/null)" = installed ] || missing+=("$name")
		done
		[ ${#missing[@]} = 0 ] && return
		[ "$(id -u)" = 0 ] || die "these packages are missing: ${missing[*]}; run this once with sudo"
		echo "ctrace: installing ${missing[*]} with apt-get" >&2
		apt-get install -y -qq --no-install-recommends "${missing[@]}" >/dev/null 2>&1 ||
			{ apt-get update -qq >&2 &&
				DEBIAN_FRONTEND=noninteractive apt-get install -y -qq --no-install-recommends \
					"${missing[@]}" >/dev/null; } ||
			die "apt-get could not install ${missing[*]}: see its message above"
		;;
	dnf)
		for name in "${fedora[@]}"; do
			rpm -q --quiet "$name" || missing+=("$name")
		done
		[ ${#missing[@]} = 0 ] && return
		[ "$(id -u)" = 0 ] || die "these packages are missing: ${missing[*]}; run this once with sudo"
		echo "ctrace: installing ${missing[*]} with dnf" >&2
		dnf install -y -q "${missing[@]}" >&2 || die "dnf could not install ${missing[*]}"
		;;
	none)
		die "no apt-get or dnf here: install Python 3.10 or later with venv, and BCC's Python package"
		;;
	esac
}

# make_venv EXTRA: the virtual environment, made or refreshed when pyproject.toml changed.
make_venv() {
	local extra=${1:-} stamp=$VENV/.ctrace-stamp want
	want="$(sha256sum <"$ROOT/pyproject.toml" | cut -c1-16) $ROOT"
	if [ -f "$stamp" ]; then
		local have
		have=$(cat "$stamp")
		# An environment with the development extra serves for everything else.
		[ "$have" = "$want dev" ] && return
		[ "$have" = "$want $extra" ] && return
	fi
	"$SYSTEM_PYTHON" -c 'import sys; sys.exit(sys.version_info < (3, 10))' 2>/dev/null ||
		die "Python 3.10 or later is needed as $SYSTEM_PYTHON"
	[ -w "$(dirname "$VENV")" ] || die "cannot write $(dirname "$VENV"): run this once with sudo"
	echo "ctrace: installing Python packages into $VENV" >&2
	"$SYSTEM_PYTHON" -m venv --system-site-packages "$VENV" ||
		die "could not make the virtual environment $VENV"
	pip_install "$extra"
	echo "$want $extra" >"$stamp"
}

# pip_install EXTRA: this checkout into the environment, with an extra or none.
pip_install() {
	local said
	said=$("$VENV/bin/pip" install -q --disable-pip-version-check --no-warn-script-location \
		-e "$ROOT${1:+[$1]}" 2>&1) || { echo "$said" >&2; die "pip could not install the packages"; }
}

# want_extra EXTRA MODULE: what a verb needs beyond the rest, when it is first asked for.
want_extra() {
	"$PYTHON" -c "import importlib.util as u, sys; sys.exit(u.find_spec('$2') is None)" && return
	[ -w "$VENV" ] || die "cannot write $VENV: run this once with sudo"
	echo "ctrace: installing $2 into $VENV" >&2
	pip_install "$1"
}
