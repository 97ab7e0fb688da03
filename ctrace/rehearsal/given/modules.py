"""Kernel modules that rules need: missing ones are named, and none is loaded unasked."""

from __future__ import annotations

import os
import re
from collections.abc import Iterable
from typing import Final, Optional

from ctrace.errors import CtraceError

_NFT: Final = {
    r"\bct\b": "nft_ct", r"\bct count\b": "nft_connlimit", r"\blimit\b": "nft_limit",
    r"\blog\b": "nft_log", r"\bmasquerade\b": "nft_masq", r"\b[sd]nat\b": "nft_nat",
    r"\bredirect\b": "nft_redir", r"\breject\b": "nft_reject", r"\bfib\b": "nft_fib",
    r"\btproxy\b": "nft_tproxy", r"\bsocket\b": "nft_socket", r"\bsynproxy\b": "nft_synproxy",
    r"\bnumgen\b": "nft_numgen", r"\b(?:jhash|symhash)\b": "nft_hash", r"\bqueue\b": "nft_queue",
    r"\bquota\b": "nft_quota", r"\bflow (?:add|offload)\b": "nft_flow_offload",
    r"\bosf\b": "nft_osf", r"\bipsec\b": "nft_xfrm", r"\bdup\b": "nft_dup_netdev",
    r"\bfwd\b": "nft_fwd_netdev", r"\btype nat\b": "nft_chain_nat",
}  # fmt: skip
"""A word of a rule set to the module behind it (net/netfilter/Makefile)."""
_HELPER: Final = re.compile(
    r'\btype "([\w.-]{1,20})" protocol|"type": "([\w.-]{1,20})", "protocol"'
    r'|-j CT\b[^\n]* --helper "?([\w.-]{1,20})'
)
"""A helper that rules give to connections (nf_conntrack_helper.c asks for its module)."""
_HELPERS: Final = {"ftp", "tftp", "sip", "irc", "pptp", "amanda", "sane", "snmp", "netbios_ns"}
_LOGS: Final = ("nf_log_syslog", "nf_log_ipv4", "nf_log_ipv6", "nf_log_common")
"""What LOG writes with: the first since 5.13."""
_BUILT_IN: Final = {"icmp", "icmp6", "icmpv6", "ACCEPT", "DROP", "RETURN", "QUEUE", "standard"}
_ALIAS: Final = {"state": "conntrack", "tcp": "tcpudp", "udp": "tcpudp", "udplite": "tcpudp",
                 "SNAT": "nat", "DNAT": "nat", "NOTRACK": "CT", "CONNMARK": "connmark",
                 "MARK": "mark", "SET": "set", "DSCP": "DSCP", "TOS": "DSCP", "tos": "dscp",
                 "TTL": "HL", "ttl": "hl"}  # fmt: skip


def missing(
    nft: str, saves: Iterable[tuple[str, str, str]], ipsets: str, root: str = "/"
) -> list[str]:
    """Modules to load first, by name; none where the kernel has no modules, or no list of them."""
    here = _loaded(root)
    if here is None:
        return []
    wanted: dict[str, tuple[str, ...]] = {"nf_tables": ("nf_tables",)}
    if nft:
        bare = _of_json(nft) if nft.startswith("{") else re.sub(r'"[^"\n]*"', "", nft)
        wanted.update({name: (name,) for word, name in _NFT.items() if re.search(word, bare)})
        wanted.update(_beside(nft))
        if re.search(r"\blog\b(?! group)", bare):
            wanted["nf_log_syslog"] = _LOGS
    for tool, family, text in saves:
        wanted.update(_of_save(tool, family, text))
        wanted.update(_beside(text))
    if ipsets:
        kinds = set(re.findall(r"(?m)^create \S+ (\S+)", ipsets))
        names = ["ip_set", *(f"ip_set_{kind.replace(':', '_').replace(',', '')}" for kind in kinds)]
        wanted.update({name: (name,) for name in names})
    found = sorted(name for name, any_of in wanted.items() if not here.intersection(any_of))
    for name in found:  # a command that is shown to be pasted names them
        if not re.fullmatch(r"[A-Za-z0-9_-]{1,60}", name):
            raise CtraceError(f"no module is called {name[:60]!r}")
    return found


def _beside(text: str) -> dict[str, tuple[str, ...]]:
    """What the kernel loads for the values of rules: helpers and their like, by whatever tool."""
    found: list[str] = []
    for said in _HELPER.findall(text):
        name = next(filter(None, said)).replace("-", "_")
        base = name if name in _HELPERS else name.partition("_")[0]  # ftp-2121
        known = "h323" if name in ("RAS", "Q.931", "H.245") else base if base in _HELPERS else ""
        found.append(f"nf_conntrack_{known}" if known else "nfnetlink_cthelper")
    found += [f"ts_{algo}" for algo in re.findall(r" --algo (bm|kmp|fsm)\b", text)]
    if re.search(r" -j CT\b[^\n]* --timeout ", text):
        found.append("nfnetlink_cttimeout")
    if re.search(r" -j NFLOG\b|\blog [^\n]*group \d|\"group\": \d", text):
        found.append("nfnetlink_log")
    if re.search(r"\bflowtable \w+ \{|\"flowtable\": \{", text):
        found.append("nf_flow_table")
    out: dict[str, tuple[str, ...]] = {name: (name,) for name in found}
    if re.search(r" -j LOG\b", text):
        out["nf_log_syslog"] = _LOGS
    return out


def _of_json(nft: str) -> str:
    """The words of nft's JSON that are not names or values, as its text would have them."""
    keys = sorted(set(re.findall(r'"([a-z0-9 ]+)": ', nft)))
    kinds = ["type nat"] if '"type": "nat"' in nft else []
    return ";".join([*keys, *kinds, *(["flow add"] if "flow" in keys else [])])


def _of_save(tool: str, family: str, text: str) -> dict[str, tuple[str, ...]]:
    found: dict[str, tuple[str, ...]] = {}
    mark = "6" if family == "ip6" else ""
    for table in re.findall(r"(?m)^\*(\w+)", text):
        name = f"ip{mark}table_{table}" if tool == "iptables-legacy" else "nft_compat"
        found[name] = (name,)
        if table == "nat" and tool != "iptables-legacy":
            found["nft_chain_nat"] = ("nft_chain_nat",)
    own = set(re.findall(r"(?m)^:(\S+)", text))
    for word in set(re.findall(r" -[mj] (\S+)", text)) - _BUILT_IN - own:
        name = _ALIAS.get(word, word)
        found[f"xt_{name}"] = (
            f"xt_{name}",
            f"ip{mark}t_{name}",
            f"xt_{word}",
            f"ipt_{word}",
            f"ip6t_{word}",
            f"nft_{name.lower()}",
        )
    return found


def _loaded(root: str) -> Optional[set[str]]:
    """Modules loaded or built in; None where there is no list of modules at all."""
    try:
        with open(os.path.join(root, "proc/modules")) as file:
            found = {line.split(" ", 1)[0] for line in file}
    except OSError:
        return None
    builtin = os.path.join(root, "lib/modules", os.uname().release, "modules.builtin")
    try:
        with open(builtin) as file:
            found |= {
                os.path.basename(line.strip()).split(".ko")[0].replace("-", "_") for line in file
            }
    except OSError:
        pass
    return found
