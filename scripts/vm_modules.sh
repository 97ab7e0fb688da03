# For scripts/vm and scripts/vm-arm64 (sourced): the kernel's modules in an initial file system.

# pack_modules FILES FOLDER MODULE...: copies these and what they need, unpacked, from where
# scripts/kernels left them, and prints the lines of a busybox script that load them.
pack_modules() {
	local files=$1 folder=$2 release module name
	release="$(cat "$files/complete")"
	shift 2
	mkdir -p "$folder/modules"
	for module; do
		modprobe -d "$files" -S "$release" --show-depends "$module" | awk '$1 == "insmod" { print $2 }'
	done | awk '!seen[$0]++' | while read -r module; do
		name="$(basename "${module%.xz}")"
		if [[ $module == *.xz ]]; then xz -dc "$module"; else cat "$module"; fi >"$folder/modules/$name"
		echo "\$B insmod /modules/$name"
	done
}
