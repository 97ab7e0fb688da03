# Shared by the scripts beside it (sourced): install what is missing, and say so.
# Sets ROOT, the checkout; VENV, its virtual environment; PYTHON, that one's interpreter.

# A tool is never looked for in the folder that the caller happens to stand in.
set -f
IFS=: read -ra folders <<<"$PATH"
PATH=
for folder in "${folders[@]}"; do [[ $folder != /* ]] || PATH+=${PATH:+:}$folder; done
set +f
unset "${!PYTHON@}" # what Python runs is not for variables to say; pip's own children heed them
umask 022 # nor may others write what root installs to run
ROOT=$(cd "$(dirname "$(readlink -f "${BASH_SOURCE[0]}")")/.." && pwd)

# --help prints a script's first lines, and nothing is installed for it; ctrace has its own.
case ${0##*/}:${1:-} in
ctrace:*) ;;
*:-h | *:--help)
	sed -n '2,/^[^#]/s/^# \{0,1\}//p' "$0"
	exit 0
	;;
esac

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
		die "no apt-get or dnf here to install ${debian[*]} with: install what these hold yourself"
		;;
	esac
}

# The first interpreter that is new enough: the distribution's own, then any other.
find_python() {
	local python
	for python in /usr/bin/python3 python3 python3.{14,13,12,11,10,9}; do
		if "$python" -I -c 'import sys; sys.exit(sys.version_info < (3, 9))' 2>/dev/null; then
			command -v "$python"
			return
		fi
	done
	die "Python 3.9 or later is needed: install it (python3, python3.11 or python39)"
}

# What an environment is made of.
stamp() {
	echo "$(cat "$ROOT/pyproject.toml" "$ROOT"/packaging/locks/{bundle,dev,metrics,parquet,run}.txt 2>/dev/null | sha256sum | cut -c1-16) $ROOT"
}

# fits VENV EXTRA: it was made for this checkout as it is, with that extra or for development.
fits() {
	local want have
	want=$(stamp)
	have=$(cat "$1/.ctrace-stamp" 2>/dev/null) || return
	[ "$have" = "$want dev" ] || [ "$have" = "$want $2" ]
}

# The environment's place: in the checkout or, where that cannot be written (an image, a
# network mount, another user's), where this user's programs keep what they can make again.
find_venv() {
	local venv=$ROOT/.venv cache=/var/cache
	# what root runs is not for a variable to say
	if [ -n "${CTRACE_VENV:-}" ] && [ "$(id -u)" != 0 ]; then echo "$CTRACE_VENV"; return; fi
	if fits "$venv" "" || [ -w "$venv" ] || { ! [ -e "$venv" ] && [ -w "$ROOT" ]; }; then
		echo "$venv"
		return
	fi
	[ "$(id -u)" = 0 ] || cache=${XDG_CACHE_HOME:-${HOME:-/nonexistent}/.cache}
	echo "$cache/ctrace/venv-$(echo "$ROOT" | sha256sum | cut -c1-16)"
}

# trusted FOLDER: what root runs from there, nobody else may write. Everyone's is refused,
# another user's is named (a container often sees its host's). Who called sudo may be root anyway.
trusted() {
	[ "$(id -u)" = 0 ] || return 0
	local mine=(-uid 0) found place=$1
	[[ ! ${SUDO_UID:-} =~ ^[0-9]+$ ]] || mine+=(-o -uid "$SUDO_UID")
	found=$(find "$1" -path "$1/.git" -prune -o ! -type l -perm -o+w -print -quit 2>/dev/null) || true
	# A folder above that everyone may write is one in which this one can be replaced, unless
	# its sticky bit says that only owners may.
	while [ -z "$found" ] && [ "$place" != / ]; do
		place=$(dirname "$place")
		found=$(find "$place" -maxdepth 0 -perm -o+w ! -perm -1000 2>/dev/null) || true
	done
	[ -z "$found" ] || die "every user of this host may write $found, so root does not run it: chmod -R o-w $found"
	found=$(find "$1" -path "$1/.git" -prune -o ! -type l ! \( "${mine[@]}" \) -print -quit 2>/dev/null) || true
	[ -z "$found" ] || echo "ctrace: root runs what user $(stat -c %U "$found") may change: $found" >&2
}

trusted "$ROOT"
VENV=$(find_venv)
case $VENV in "$ROOT"/*) ;; *) [ ! -e "$VENV" ] || trusted "$VENV" ;; esac
PYTHON=$VENV/bin/python

# make_venv EXTRA: the virtual environment, made or refreshed when pyproject.toml or a lock changed.
make_venv() {
	local extra=${1:-} python
	! fits "$VENV" "$extra" || return 0
	# one that was made for development stays so
	[ "$extra" ] || ! grep -q " dev$" "$VENV/.ctrace-stamp" 2>/dev/null || extra=dev
	python=$(find_python)
	mkdir -p "$(dirname "$VENV")" 2>/dev/null || true
	[ -O "$(dirname "$VENV")" ] && [ -w "$(dirname "$VENV")" ] || [ -w "$VENV" ] ||
		die "cannot write $VENV, and Python packages need a folder$([ "$(id -u)" = 0 ] ||
			echo ': name one with CTRACE_VENV=FOLDER')"
	"$python" -I -c 'import ensurepip, venv' 2>/dev/null || install_packages python3-venv -- python3
	echo "ctrace: installing Python packages into $VENV" >&2
	"$python" -I -m venv --system-site-packages "$VENV" >/dev/null ||
		die "could not make the virtual environment $VENV"
	pip_install "$extra"
	echo "$(stamp) $extra" >"$VENV/.ctrace-stamp"
}

# pip_install EXTRA: this checkout into the environment, with an extra or none. What it needs comes
# with the versions and the hashes of packaging/locks (scripts/lock), and from nowhere else.
pip_install() {
	local said why pip=("$VENV/bin/pip" install -q --disable-pip-version-check --no-warn-script-location)
	said=$("${pip[@]}" --require-hashes -r "$ROOT/packaging/locks/${1:-run}.txt" 2>&1 &&
		"${pip[@]}" --no-deps --no-build-isolation --no-index -e "$ROOT" 2>&1) && return
	why=$(grep -oiE 'no space left|(connection|network|name resolution|no matching distribution).*' \
		<<<"$said" | tail -n 1) || why=$(grep . <<<"$said" | tail -n 1)
	die "pip could not install the Python packages into $VENV; is there a network? ($why) Without one, use the single file of docs/install.md"
}

# want_extra EXTRA MODULE: what a verb needs beyond the rest, when it is first asked for.
want_extra() {
	"$PYTHON" -I -c "import importlib.util as u, sys; sys.exit(u.find_spec('$2') is None)" && return
	[ -w "$VENV" ] || die "$2 is missing and $VENV cannot be written: run this once as its owner"
	echo "ctrace: installing $2 into $VENV" >&2
	pip_install "$1"
}
