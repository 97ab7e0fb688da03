#!/bin/sh
# Gathers what this host can tell of its connection tracking, and prints it as a tar.gz:
#
#     ctrace collect --print | ssh HOST sh > evidence.tar.gz      then: ctrace report evidence.tar.gz
#
# It needs a shell and nothing else: what is not there is left out. It changes nothing, loads no
# module, and leaves nothing behind. As root it sees more. It takes about 10 seconds, 90 at most.

set -u
umask 077
LC_ALL=C TZ=UTC PATH=${PATH:-/bin}:/usr/bin:/bin:/usr/sbin:/sbin
export LC_ALL TZ PATH

[ -t 1 ] && {
    echo "collect: this prints a tar.gz: send it to a file" >&2
    exit 2
}
child= guard= made=
# Set before the folder is made: no moment is left in which a signal would leave it behind.
trap 'for p in $child $guard; do kill -9 "$p"; done; [ -z "$made" ] || rm -rf "$d"' EXIT
trap 'exit 1' HUP INT TERM PIPE
exec 3>&2 2>/dev/null # bash tells of each job that is ended
set -- /tmp /var/tmp /run /var/run /dev/shm "$PWD"
[ -z "${TMPDIR:-}" ] || set -- "$TMPDIR"
for place in "$@"; do
    d=$place/ctrace-collect.$$
    made=yes
    mkdir "$d" && break
    made=
done
[ -n "$made" ] || {
    echo "collect: no folder can be made below ${TMPDIR:-/tmp}: set TMPDIR to a place with room" >&3
    exit 1
}

now() { date +%s 2>/dev/null || echo 0; }
began=$(now) last=60 # seconds after which no command is begun

# A quarter of what is free there, for on a router that is memory; at most 256 MiB a file.
set -- $(df -Pk "$d" 2>/dev/null | tail -n 1)
case ${4:-none} in
    *[!0-9]*) room=65536 ;; # in a chroot df may know of no mount, and print its heading alone
    *) room=$(($4 / 4)) ;;
esac
[ "$room" -gt 262144 ] && room=262144
[ "$room" -ge 1024 ] ||
    echo "collect: there is little room below $place, so long texts are cut off: set TMPDIR to a place with more" >&3

# keep FILE SECONDS COMMAND...: its output in FILE, cut off after so long or so much.
keep() {
    file=$d/$1 limit=$2
    shift 2
    command -v "$1" >/dev/null 2>&1 || return 0
    [ $(($(now) - began)) -lt "$last" ] || return 0
    mkdir -p "${file%/*}"
    (
        ulimit -f "$room"
        exec "$@" >"$file" </dev/null
    ) &
    child=$!
    (
        while [ "$limit" -gt 0 ]; do
            sleep 1
            limit=$((limit - 1))
        done
        kill -9 "$child"
    ) >/dev/null &
    guard=$!
    wait "$child"
    ended=$?
    child= # and never with TERM: a subshell that has just begun may still have our trap for it
    kill -9 "$guard"
    wait "$guard"
    guard=
    if [ ! -s "$file" ]; then
        rm -f "$file"
    elif [ "$ended" -gt 128 ]; then # a signal: it had too much to tell, or took too long
        printf '\n...\n' >>"$file"
    fi
}

loaded() { # built in, or loaded already: asking it then loads nothing
    [ ! -e /proc/modules ] || grep -q "^$1 " /proc/modules 2>/dev/null ||
        grep -q "/$1.ko" "/lib/modules/$(uname -r)/modules.builtin" 2>/dev/null
}

# table FOLDER COMMAND...: the entries as they are now, how many, and the kernel's counters.
table() {
    folder=$1
    shift
    keep "$folder/epoch" 5 date +%s
    keep "$folder/proc/sys/net/netfilter/nf_conntrack_count" 5 "$@" \
        cat /proc/sys/net/netfilter/nf_conntrack_count
    if [ -r /proc/net/nf_conntrack ]; then
        keep "$folder/proc/net/nf_conntrack" 20 "$@" cat /proc/net/nf_conntrack
    elif [ -r /proc/net/ip_conntrack ]; then
        keep "$folder/proc/net/ip_conntrack" 20 "$@" cat /proc/net/ip_conntrack
    elif loaded nf_conntrack_netlink; then
        keep "$folder/conntrack_-L" 20 "$@" conntrack -L -o extended
    fi
    keep "$folder/proc/net/stat/nf_conntrack" 5 "$@" cat /proc/net/stat/nf_conntrack
}

# about FOLDER COMMAND...: what does not change from one moment to the next.
about() {
    folder=$1
    shift
    keep "$folder/sysctl_-a" 10 "$@" sh -c '
        for f in /proc/sys/net/netfilter/nf_conntrack_* /proc/sys/net/ipv4/netfilter/ip_conntrack_* \
            /proc/sys/net/ipv4/ip_forward /proc/sys/net/ipv4/ip_local_port_range \
            /proc/sys/net/ipv4/ip_local_reserved_ports /proc/sys/net/ipv4/tcp_fin_timeout \
            /proc/sys/net/ipv4/tcp_tw_reuse /proc/sys/net/ipv6/conf/all/forwarding; do
            [ -r "$f" ] && echo "$f = $(cat "$f" 2>/dev/null)"
        done
        for f in ipv4/conf/*/rp_filter ipv4/conf/*/forwarding ipv4/conf/*/route_localnet \
            ipv4/conf/*/accept_local ipv4/conf/*/src_valid_mark ipv4/fwmark_reflect \
            ipv4/tcp_fwmark_accept ipv4/ip_nonlocal_bind ipv6/conf/*/forwarding \
            ipv6/conf/*/disable_ipv6 ipv6/fwmark_reflect; do
            grep -H . "/proc/sys/net/"$f 2>/dev/null
        done'
    # With its details where this ip has them: busybox has none.
    keep "$folder/ip_-d_addr" 5 "$@" ip -d addr
    [ -s "$d/$folder/ip_-d_addr" ] || keep "$folder/ip_addr" 5 "$@" ip addr
    for family in -4 -6; do
        keep "$folder/ip_${family}_route_show_table_all" 10 "$@" ip "$family" route show table all
        keep "$folder/ip_${family}_rule" 5 "$@" ip "$family" rule
    done
    keep "$folder/tc_qdisc" 5 "$@" tc qdisc
    keep "$folder/tc_filters" 5 "$@" sh -c '
        tc qdisc | while read -r _ kind _ _ dev _; do
            case $kind in clsact) sides="ingress egress" ;; ingress) sides=ingress ;; *) continue ;; esac
            for side in $sides; do
                found=$(tc filter show dev "$dev" "$side") || continue
                echo "tc filter show dev $dev $side: $(echo $found | head -c 4000 | grep . || echo none)"
            done
        done'
    keep "$folder/tables_names" 5 "$@" sh -c '
        for f in ip_tables_names ip6_tables_names ip_vs; do
            [ -e /proc/net/$f ] && [ ! -r /proc/net/$f ] && continue # only root may know
            echo "/proc/net/$f: $(head -n 40 /proc/net/$f 2>/dev/null | tr "\n" " " | grep . || echo none)"
        done'
    if loaded ip_set; then
        keep "$folder/ipset_save" 10 "$@" ipset save
    fi
    if loaded nf_tables; then
        keep "$folder/nft_-j_list_ruleset" 10 "$@" nft -j list ruleset
        keep "$folder/nft_list_ruleset" 10 "$@" nft list ruleset
    fi
    for family in ip ip6; do
        [ -s "/proc/net/${family}_tables_names" ] || loaded nf_tables || continue
        keep "$folder/${family}tables-save" 10 "$@" "${family}tables-save" -c
    done
    if loaded tcp_diag; then
        keep "$folder/ss_-lntup" 10 "$@" ss -lntup
    else
        keep "$folder/netstat_-lntup" 10 "$@" netstat -lntup
    fi
}

each_namespace() { # each_namespace FUNCTION FOLDER
    n=0
    for space in /var/run/netns/* /run/netns/*; do
        name=${space##*/}
        case $name in *[!A-Za-z0-9_.:-]* | '') continue ;; esac
        [ -e "$space" ] && [ ! -e "$d/seen/$2/$name" ] && [ "$n" -lt 32 ] || continue
        mkdir -p "$d/seen/$2/$name"
        n=$((n + 1))
        "$1" "$2/netns/$name" ip netns exec "$name"
    done
}

echo "made by ctrace collect" >"$d/README"
keep epoch 5 date +%s
keep proc/uptime 5 cat /proc/uptime
keep uname 5 uname -a
table dump1
each_namespace table dump1
first=$(now)
about host
each_namespace about host
keep proc/modules 5 cat /proc/modules
keep slabinfo 5 grep nf_conntrack /proc/slabinfo
keep dmesg 10 sh -c 'dmesg | grep -E "conntrack|suppressed" | tail -n 20000'
[ -s "$d/dmesg" ] ||
    keep journalctl 10 sh -c 'journalctl -k -o short-iso -n 200000 --no-pager |
        grep -E "conntrack|suppressed" | tail -n 20000'
while [ $(($(now) - first)) -lt 5 ] && [ "$first" -gt 0 ]; do sleep 1; done
last=70 # also where other commands have been slow
table dump2
each_namespace table dump2
rm -rf "$d/seen"

if command -v tar >/dev/null 2>&1; then
    if command -v gzip >/dev/null 2>&1; then
        tar -cf - -C "$d" . 2>&3 | gzip -c 2>&3
    else
        tar -cf - -C "$d" . 2>&3
    fi
else # one text that says what each part is
    show() {
        for file in "$1"/*; do
            if [ -d "$file" ]; then
                show "$file"
            elif [ -f "$file" ]; then
                echo "==> ${file#"$d"/} <=="
                cat "$file"
            fi
        done
    }
    show "$d"
fi
