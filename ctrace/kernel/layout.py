"""Where the running kernel keeps what the hooks read: BTF turned into the programs' constants.

One table of fields. A field that a kernel lacks simply has no value, and the C
code tests for that (``HAS(CT_MARK)``); only a handful are indispensable. Where
behaviour changed between versions, the presence of a field that came or went with
the change decides, never a version number.
"""

from __future__ import annotations

import json
import os
import re
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Final, Optional

from ctrace.errors import CtraceError
from ctrace.host.kernel import lockdown
from ctrace.kernel import btf, disk_cache, trial
from ctrace.kernel.ticks import ticks_per_second

# constant: (struct, member path). Names say the struct first.
_REQUIRED: Final = {
    "SKB_NFCT": ("sk_buff", "_nfct"),
    "SKB_HEAD": ("sk_buff", "head"),
    "SKB_NETWORK": ("sk_buff", "network_header"),
    "SKB_DEV": ("sk_buff", "dev"),
    "SKB_SK": ("sk_buff", "sk"),
    "CT_TIMEOUT": ("nf_conn", "timeout"),
    "CT_TUPLEHASH": ("nf_conn", "tuplehash"),
    "CT_STATUS": ("nf_conn", "status"),
    "CT_NET": ("nf_conn", "ct_net"),
    "CT_PROTO": ("nf_conn", "proto"),
    "HASH_TUPLE": ("nf_conntrack_tuple_hash", "tuple"),
    "HASH_PPREV": ("nf_conntrack_tuple_hash", "hnnode.pprev"),
    "TUPLE_SRC": ("nf_conntrack_tuple", "src.u3"),
    "TUPLE_SPORT": ("nf_conntrack_tuple", "src.u"),
    "TUPLE_L3NUM": ("nf_conntrack_tuple", "src.l3num"),
    "TUPLE_DST": ("nf_conntrack_tuple", "dst.u3"),
    "TUPLE_DPORT": ("nf_conntrack_tuple", "dst.u"),
    "TUPLE_PROTO": ("nf_conntrack_tuple", "dst.protonum"),
    "NET_INUM": ("net", "ns.inum"),
}

_OPTIONAL: Final = {
    "TUPLE_DIR": ("nf_conntrack_tuple", "dst.dir"),
    "CT_ZONE": ("nf_conn", "zone.id"),
    "CT_MARK": ("nf_conn", "mark"),
    "CT_EXT": ("nf_conn", "ext"),
    "SKB_IIF": ("sk_buff", "skb_iif"),
    "SKB_DST": ("sk_buff", "_skb_refdst"),
    "DST_DEV": ("dst_entry", "dev"),
    "DEV_NET": ("net_device", "nd_net.net"),
    "DEV_IFINDEX": ("net_device", "ifindex"),
    "SOCK_NET": ("sock", "__sk_common.skc_net.net"),
    # nf_conn.proto, for the lifetime of a dying entry
    "TCP_STATE": ("ip_ct_tcp", "state"),
    "TCP_RETRANS": ("ip_ct_tcp", "retrans"),
    "TCP_LAST_INDEX": ("ip_ct_tcp", "last_index"),
    "TCP_LAST_WIN": ("ip_ct_tcp", "last_win"),
    "TCP_FLAGS0": ("ip_ct_tcp", "seen[0].flags"),
    "TCP_FLAGS1": ("ip_ct_tcp", "seen[1].flags"),
    "UDP_STREAM_TS": ("nf_ct_udp", "stream_ts"),
    "SCTP_STATE": ("ip_ct_sctp", "state"),
    # the namespace's timeouts, in jiffies
    "NET_TCP_TIMEOUTS": ("net", "ct.nf_ct_proto.tcp.timeouts"),
    "NET_TCP_MAX_RETRANS": ("net", "ct.nf_ct_proto.tcp.tcp_max_retrans"),
    "NET_UDP_TIMEOUTS": ("net", "ct.nf_ct_proto.udp.timeouts"),
    "NET_ICMP_TIMEOUT": ("net", "ct.nf_ct_proto.icmp.timeout"),
    "NET_ICMPV6_TIMEOUT": ("net", "ct.nf_ct_proto.icmpv6.timeout"),
    "NET_GENERIC_TIMEOUT": ("net", "ct.nf_ct_proto.generic.timeout"),
    "NET_SCTP_TIMEOUTS": ("net", "ct.nf_ct_proto.sctp.timeouts"),
    "NET_GRE_TIMEOUTS": ("net", "ct.nf_ct_proto.gre.timeouts"),
    # conntrack -S, per CPU
    "NET_STAT": ("net", "ct.stat"),
    "STAT_DROP": ("ip_conntrack_stat", "drop"),
    "STAT_INSERT_FAILED": ("ip_conntrack_stat", "insert_failed"),
    "STAT_CHAIN": ("ip_conntrack_stat", "chaintoolong"),
    # the hook's context
    "BPF_NF_STATE": ("bpf_nf_ctx", "state"),
    "BPF_NF_SKB": ("bpf_nf_ctx", "skb"),
    "STATE_HOOK": ("nf_hook_state", "hook"),
    "STATE_OUT": ("nf_hook_state", "out"),
    "STATE_NET": ("nf_hook_state", "net"),
    "DEV_PRIV_FLAGS": ("net_device", "priv_flags"),
    # who
    "TASK_FLAGS": ("task_struct", "flags"),
    "TASK_TGID": ("task_struct", "tgid"),
    "TASK_LEADER": ("task_struct", "group_leader"),
    "TASK_STARTED": ("task_struct", "start_boottime"),  # 5.5; real_start_time before
    "TASK_REAL_START": ("task_struct", "real_start_time"),
    "TASK_COMM": ("task_struct", "comm"),
    "TASK_CGROUPS": ("task_struct", "cgroups"),
    "TASK_NSPROXY": ("task_struct", "nsproxy"),
    "NSPROXY_NET": ("nsproxy", "net_ns"),
    # the number behind an open sysctl file
    "TASK_FILES": ("task_struct", "files"),
    "FILES_FDT": ("files_struct", "fdt"),
    "FDT_FD": ("fdtable", "fd"),
    "FILE_INODE": ("file", "f_inode"),
    "PROC_VFS_INODE": ("proc_inode", "vfs_inode"),
    "PROC_SYSCTL_ENTRY": ("proc_inode", "sysctl_entry"),
    "CTL_DATA": ("ctl_table", "data"),
    "CSS_SET_CGROUP": ("css_set", "dfl_cgrp"),
    "CGROUP_KN": ("cgroup", "kn"),
    "KN_ID": ("kernfs_node", "id"),
    "KN_NAME": ("kernfs_node", "name"),
    "KN_PARENT": ("kernfs_node", "parent"),
    "KN_PARENT_RCU": ("kernfs_node", "__parent"),  # its name from 6.15 on
    "TASK_PREEMPT": ("task_struct", "thread_info.preempt_count"),  # not on x86
    "TASK_CFS": ("task_struct", "se.cfs_rq"),
    "CFS_RQ": ("cfs_rq", "rq"),
    "RQ_CURR": ("rq", "curr"),
}

_SIZES: Final = {"TUPLEHASH_SIZE": "nf_conntrack_tuple_hash"}

_ENUMS: Final = {
    "DROP_REASON": ("SKB_DROP_REASON_NETFILTER_DROP", "skb_drop_reason"),
    "NO_REASON": ("SKB_DROP_REASON_NOT_SPECIFIED", "skb_drop_reason"),
    "L3MDEV_MASTER": ("IFF_L3MDEV_MASTER", "netdev_priv_flags"),
    "EXT_TIMEOUT": ("NF_CT_EXT_TIMEOUT", "nf_ct_ext_id"),
}

# Offsets in the per-CPU section (ctrace/kernel/percpu.py says how it is found).
_PERCPU: Final = {
    "PERCPU_RUNQUEUES": "runqueues",
    "PERCPU_OFFSET": "this_cpu_off",
    "PERCPU_PREEMPT": "__preempt_count",
    "PERCPU_CURRENT": "current_task",
}
# 6.2 to 6.14, x86: both in pcpu_hot
_PERCPU_HOT: Final = {"PERCPU_PREEMPT": "preempt_count", "PERCPU_CURRENT": "current_task"}


# What is found by trying.
_TRIED: Final = ("RDONLY_CAST", "RDONLY_TYPE", "FETCH_ADD")

_STACK_FUNCTIONS: Final = ("early_drop", "gc_worker", "nf_conntrack_free")


# Names that a field has had: now, and before or, in the second case, after.
_RENAMED: Final = {"TASK_STARTED": "TASK_REAL_START", "KN_PARENT": "KN_PARENT_RCU"}

# Fields of nf_conn.proto.
_PROTO: Final = (
    "TCP_STATE",
    "TCP_RETRANS",
    "TCP_LAST_INDEX",
    "TCP_LAST_WIN",
    "TCP_FLAGS0",
    "TCP_FLAGS1",
    "UDP_STREAM_TS",
    "SCTP_STATE",
)

ENTRY_BYTES: Final = 8 * 36
"""Bytes of ``struct entry`` in bpf/ct.h: the most that the programs can hold."""


@dataclass(frozen=True)
class Layout:
    """Offsets, sizes, enum values and BTF ids of the running kernel."""

    constants: Mapping[str, int]

    def __contains__(self, name: str) -> bool:
        return name in self.constants

    def __getitem__(self, name: str) -> int:
        return self.constants[name]


@cache
def running() -> Layout:
    """The running kernel's layout.

    Raises CtraceError when it has no BTF, when conntrack is not in it, or when reading it is not
    permitted.
    """
    if lockdown() == "confidentiality":
        raise CtraceError(
            "the kernel is locked down (confidentiality), so BPF programs may not read its memory: "
            "use --hooks netlink, or boot with lockdown=integrity"
        )
    name = disk_cache.name("layout", disk_cache.this_kernel(), Path(__file__).read_bytes())
    known = disk_cache.load(name)
    if known is not None:
        return Layout(_loadable(json.loads(known)))
    kernel = btf.kernel()
    if kernel is None:
        raise CtraceError(
            "this kernel has no BTF (/sys/kernel/btf/vmlinux), which the BPF hooks need: "
            "use --hooks netlink, or a kernel built with CONFIG_DEBUG_INFO_BTF"
        )
    found = from_btf(kernel, btf.kernel("nf_conntrack"), hz=ticks_per_second())
    disk_cache.store(name, json.dumps(found.constants).encode())
    return Layout(_loadable(found.constants))


def names() -> set[str]:
    """The names of every constant that may be found."""
    tables = (_REQUIRED, _OPTIONAL, _SIZES, _ENUMS, _PERCPU)
    every = {name: 8 for table in tables for name in table}
    return {*every, *_places_in_entry(every), *_TRIED, "HZ", "CT_LISTS", "TASK_BTF"}


def _loadable(constants: Mapping[str, int]) -> Mapping[str, int]:
    """Adds what the kernel accepts in programs, found by trying: it depends on the JIT too."""
    found = dict(constants)
    if "RDONLY_CAST" in found and not trial.can_cast(found["RDONLY_CAST"], found["RDONLY_TYPE"]):
        del found["RDONLY_CAST"], found["RDONLY_TYPE"]
    # for bpf/ring.h, which needs a machine that keeps stores in order
    if os.uname().machine == "x86_64" and trial.can_fetch_add():
        found["FETCH_ADD"] = 1
    return found


def from_btf(kernel: btf.Btf, module: Optional[btf.Btf] = None, *, hz: int = 250) -> Layout:
    """A layout from BTF; ``module`` is nf_conntrack's, where it is a module with BTF.

    Raises CtraceError when an indispensable field is missing.
    """
    found: dict[str, int] = {"HZ": hz}
    sources = [kernel] if module is None else [kernel, module]
    for table in (_REQUIRED, _OPTIONAL):
        for define, (struct, path) in table.items():
            offset = next((o for s in sources if (o := s.offset(struct, path)) is not None), None)
            if offset is not None:
                found[define] = offset
            elif table is _REQUIRED:
                raise CtraceError(
                    f"this kernel's BTF has no {struct}.{path}: nf_conntrack is not built in "
                    "and its types are unknown; load it (modprobe nf_conntrack) and try again"
                )
    for define, struct in _SIZES.items():
        size = next((o for s in sources if (o := s.size_of(struct)) is not None), None)
        if size is None:
            raise CtraceError(f"this kernel's BTF has no struct {struct}")
        found[define] = size
    for define, (name, enum) in _ENUMS.items():
        value = next((o for s in sources if (o := s.enum_value(name, enum)) is not None), None)
        if value is not None:
            found[define] = value
    found.update(_percpu(kernel))
    if kernel.func("bpf_get_current_task_btf"):  # a helper of 5.11
        found["TASK_BTF"] = 1
    cast, bytes_ = kernel.func("bpf_rdonly_cast"), kernel.find(btf.STRUCT, "in6_addr")
    if cast and bytes_:
        found.update(RDONLY_CAST=cast, RDONLY_TYPE=bytes_)
    for now, then in _RENAMED.items():
        if then in found:
            found.setdefault(now, found[then])
    found["CT_LISTS"] = int(_has_unconfirmed_lists(sources))
    return Layout({**found, **_places_in_entry(found)})


def _places_in_entry(found: Mapping[str, int]) -> dict[str, int]:
    """The fields of an entry's two tuples, and of its protocol, from the entry's start."""
    tuples = {
        "ORIG": found["CT_TUPLEHASH"] + found["HASH_TUPLE"],
        "REPLY": found["CT_TUPLEHASH"] + found["TUPLEHASH_SIZE"] + found["HASH_TUPLE"],
    }
    places = dict(tuples)
    for side, start in tuples.items():
        for name in ("SRC", "SPORT", "L3NUM", "DST", "DPORT", "PROTO"):
            places[f"{side}_{name}"] = start + found[f"TUPLE_{name}"]
        for name in ("SRC", "DST"):  # the second half of an IPv6 address
            places[f"{side}_{name}8"] = start + found[f"TUPLE_{name}"] + 8
    for name in _PROTO:
        if name in found:
            places[f"CT_{name}"] = found["CT_PROTO"] + found[name]
    places["CT_PPREV"] = found["CT_TUPLEHASH"] + found["HASH_PPREV"]
    # the reply's unused node, until the insert: __nf_conntrack_alloc()
    places["CT_HASH_SAVED"] = places["CT_PPREV"] + found["TUPLEHASH_SIZE"]
    places["CT_BYTES"] = found["CT_PROTO"] + 64
    if places["CT_BYTES"] + 8 > ENTRY_BYTES:
        raise CtraceError(f"struct nf_conn is larger than known here: CT_PROTO {found['CT_PROTO']}")
    if "TUPLE_DIR" in found:
        places["HASH_DIR"] = found["HASH_TUPLE"] + found["TUPLE_DIR"]
    return places


def _percpu(kernel: btf.Btf) -> dict[str, int]:
    """Where the per-CPU variables we need lie in their section."""
    places = {define: kernel.percpu_offset(name) for define, name in _PERCPU.items()}
    if not any(place is not None for place in places.values()):
        return _percpu_symbols()
    hot = kernel.percpu_offset("pcpu_hot")
    for define, member in _PERCPU_HOT.items():
        inner = kernel.offset("pcpu_hot", member)
        if hot is not None and inner is not None:
            places[define] = hot + inner
    return {define: place for define, place in places.items() if place is not None}


def _percpu_symbols() -> dict[str, int]:
    """The same from /proc/kallsyms, for BTF made before it described variables.

    Only x86-64 keeps these symbols as offsets in the section (KALLSYMS_ABSOLUTE_PERCPU),
    and only KALLSYMS_ALL lists them.
    """
    if os.uname().machine != "x86_64":
        return {}
    text = Path("/proc/kallsyms").read_text(encoding="ascii", errors="replace")
    names = "|".join(_PERCPU.values())
    places = {
        name: int(place, 16)
        for place, name in re.findall(rf"^([0-9a-f]+) \w ({names})$", text, re.M)
    }
    found = {define: places[name] for define, name in _PERCPU.items() if name in places}
    # hidden addresses read as zero, and no section is as large as this
    return found if all(0 < place < 1 << 24 for place in found.values()) else {}


def _has_unconfirmed_lists(sources: list[btf.Btf]) -> bool:
    """Whether entries outside the table sit on per-CPU lists (up to 5.18).

    Then ``pprev`` says nothing, and IPS_CONFIRMED is set exactly for entries that were
    ever in the table; from 5.19 on it is the other way round (commit 8a75a2c17410).
    """
    return any(
        s.find(btf.STRUCT, "ct_pcpu") is not None and s.offset("ct_pcpu", "unconfirmed") is not None
        for s in sources
    )


def function_range(name: str) -> Optional[tuple[int, int]]:
    """Start and end of a kernel function from /proc/kallsyms, compiler suffixes included.

    None when it is not there or addresses are hidden (kptr_restrict).
    """
    return _functions().get(name)


def address(symbol: str) -> int:
    """Address of a variable of the core kernel, from /proc/kallsyms (KALLSYMS_ALL); 0 if not
    listed."""
    try:
        text = Path("/proc/kallsyms").read_text(encoding="ascii", errors="replace")
    except OSError:
        return 0
    found = re.search(rf"^([0-9a-f]+) \w {re.escape(symbol)}$", text, re.M)
    return int(found.group(1), 16) if found else 0


@cache
def _functions() -> dict[str, tuple[int, int]]:
    """The few functions that are looked for in call stacks.

    kallsyms lists the core kernel by address, so the next line with a higher address
    is a function's end; modules need not be sorted, so the nearest of a few is taken.
    """
    name = disk_cache.name("functions", disk_cache.this_boot(), Path(__file__).read_bytes())
    known = disk_cache.load(name)
    if known is not None:
        return {name: (start, end) for name, (start, end) in json.loads(known).items()}
    found = _listed()
    if found:  # hidden addresses may be shown another time
        disk_cache.store(name, json.dumps(found).encode())
    return found


def _listed() -> dict[str, tuple[int, int]]:
    text = Path("/proc/kallsyms").read_bytes()
    result: dict[str, tuple[int, int]] = {}
    for name in _STACK_FUNCTIONS:
        pattern = rb"([0-9a-f]+) [tT] %s(?:\.(?!cold)\w+)*(?=[\t\n])" % name.encode()
        at = text.find(f" {name}".encode())
        while at >= 0 and name not in result:
            line = text.rfind(b"\n", 0, at) + 1
            found = re.compile(pattern).match(text, line, line + 200)
            if found and (start := int(found.group(1), 16)):
                result[name] = (start, _next_symbol(text, line, start))
            at = text.find(f" {name}".encode(), at + 1)
    return result


def _next_symbol(text: bytes, line: int, start: int) -> int:
    around = text[line : line + 4096].split(b"\n")[:-1]
    later = (int(row.split(b" ", 1)[0], 16) for row in around if row)
    return min((address for address in later if address > start), default=start + 1024)
