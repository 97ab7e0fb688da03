# What an emulated machine lacks of a plain host: modules, control groups, trace files. Run in
# there by scripts/vm and scripts/vm-arm64.
modprobe -qa nf_conntrack nf_conntrack_netlink nf_tables nft_ct nft_chain_nat nf_nat \
	nft_reject_inet nft_masq nft_redir nft_queue nfnetlink_queue nft_compat xt_conntrack \
	xt_CT xt_nat xt_MASQUERADE xt_REDIRECT xt_state xt_comment xt_tcpudp ipt_REJECT \
	iptable_filter iptable_nat iptable_raw ip6table_filter ip6table_nat ip6table_raw \
	veth 2>/dev/null || true
mountpoint -q /sys/fs/cgroup || mount -t cgroup2 none /sys/fs/cgroup 2>/dev/null || true
mountpoint -q /sys/kernel/debug || mount -t debugfs none /sys/kernel/debug 2>/dev/null || true
mountpoint -q /sys/kernel/tracing || mount -t tracefs none /sys/kernel/tracing 2>/dev/null || true
mkdir -p /run/netns
ip link set lo up
