"""Rules that need entries, in nftables and iptables, and who wrote them."""

from __future__ import annotations

import json
import re
import shlex
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any, Optional

from ctrace.errors import CtraceError
from ctrace.host import commands

IPV4, IPV6 = "ipv4", "ipv6"

# grep nf_ct_netns_get net/netfilter: what of nftables needs an entry ("notrack" does not).
NFT_USERS = {
    "ct": "ct",
    "ct count": "ct count",
    "ct helper": "ct helper",
    "ct timeout": "ct timeout",
    "ct expectation": "ct expectation",
    "dnat": "dnat",
    "snat": "snat",
    "masquerade": "masquerade",
    "redirect": "redirect",
    "flow": "flow add",
    "synproxy": "synproxy",
}
NFT_FAMILIES = {
    "ip": (IPV4,),
    "ip6": (IPV6,),
    "inet": (IPV4, IPV6),
    "bridge": (IPV4, IPV6),  # nf_ct_netns_get(NFPROTO_BRIDGE) takes the inet ones too
}
XT_MATCHES = {
    "conntrack",
    "state",
    "connmark",
    "connlimit",
    "connbytes",
    "connlabel",
    "cluster",
    "helper",
}
XT_TARGETS = {
    "CONNMARK",
    "CONNSECMARK",
    "CT",
    "SNAT",
    "DNAT",
    "MASQUERADE",
    "REDIRECT",
    "NETMAP",
    "SYNPROXY",
}
NAT = {"dnat", "snat", "masquerade", "redirect", "SNAT", "DNAT", "MASQUERADE", "REDIRECT", "NETMAP"}

OWNERS = (
    ("kube-proxy", r"\bKUBE-|^kube-proxy$|kubernetes"),
    ("Calico", r"\bcali-|^calico"),
    ("Cilium", r"\bCILIUM_"),
    ("Flannel", r"\bFLANNEL-"),
    ("CNI", r"\bCNI-"),
    ("Docker", r"\bDOCKER\b|\bDOCKER-|docker"),
    ("Podman (netavark)", r"\bNETAVARK|^netavark"),
    ("firewalld", r"^firewalld"),
    ("ufw", r"\bufw6?-"),
    ("fail2ban", r"\bf2b-"),
    ("libvirt", r"\bLIBVIRT_|^libvirt"),
    ("Tailscale", r"\bts-(input|forward|postrouting)\b"),
    ("Istio", r"\bISTIO_"),
    ("LXC", r"^lxc|\blxc-net\b|^incus|^lxd"),
    ("ctrace", r"^ctrace|\bctrace:|\bCTRACE_"),
)
"""Who writes rules, by the names of their tables, chains, jump targets and comments."""


@dataclass(frozen=True)
class User:
    """One rule or object that keeps conntrack active."""

    backend: str
    """``nftables``, ``iptables`` or ``iptables-legacy``."""
    families: tuple[str, ...]
    """``ipv4``, ``ipv6``: where this one turns tracking on."""
    table: str
    """``inet filter`` or, for iptables, ``filter``."""
    chain: str
    handle: Optional[int]
    """nftables' handle; None for iptables, whose rules have a position instead."""
    position: Optional[int]
    uses: tuple[str, ...]
    """``ct state``, ``MASQUERADE``...: the parts that need an entry."""
    rule: str
    owner: str


def users_of_nft(
    ruleset: dict[str, Any],
    skip: set[tuple[str, str]] = frozenset(),  # type: ignore[assignment]
) -> Iterator[User]:
    """Rules and objects of ``nft -j list ruleset`` that keep conntrack active.

    ``skip``: (family, table) pairs that iptables-nft-save has printed already.
    """
    for item in ruleset.get("nftables", ()):
        (what, body), *_ = item.items()
        if not isinstance(body, dict) or body.get("family") not in NFT_FAMILIES:
            continue
        if (body["family"], body.get("table")) in skip:
            continue
        if what == "rule":
            uses = tuple(dict.fromkeys(nft_uses(body.get("expr", ()))))
            text = _nft_text(body)
        elif what in ("ct helper", "ct timeout", "ct expectation"):
            uses, text = (what,), f"{what} {body.get('name', '')}"
        else:
            continue
        if not uses:
            continue
        names = (body.get("table", ""), body.get("chain", ""), body.get("comment", ""))
        yield User(
            "nftables",
            NFT_FAMILIES[body["family"]],
            f"{body['family']} {body.get('table', '')}",
            body.get("chain", ""),
            body.get("handle"),
            None,
            uses,
            text,
            owner_of(*names, *_jumps(body.get("expr", ()))),
        )


def users_of_save(text: str, backend: str, family: str) -> Iterator[User]:
    """Rules of an ``iptables-save`` text that keep conntrack active."""
    table = ""
    position: dict[str, int] = {}
    for line in text.splitlines():
        if line.startswith("*"):
            table, position = line[1:].strip(), {}
        if not line.startswith("-A "):
            continue
        try:
            words = shlex.split(line)
        except ValueError:
            words = line.split()
        chain = words[1]
        position[chain] = position.get(chain, 0) + 1
        uses = tuple(dict.fromkeys(xt_uses(words)))
        if uses:
            comments = [words[i + 1] for i, w in enumerate(words[:-1]) if w in ("--comment", "-j")]
            yield User(
                backend,
                (family,),
                table,
                chain,
                None,
                position[chain],
                uses,
                line,
                owner_of(chain, *comments),
            )


def owner_of(*names: str) -> str:
    """Who wrote a rule with these table, chain, comment and jump names; ``unknown`` if nobody
    known."""
    for name in names:
        for owner, pattern in OWNERS:
            if name and re.search(pattern, name):
                return owner
    return "unknown"


def nft_uses(node: Any) -> Iterator[str]:
    """Every statement or expression below ``node`` that needs an entry."""
    if isinstance(node, dict):
        for key, value in node.items():
            if key == "ct" and isinstance(value, dict):
                yield f"ct {value.get('key', '')}".strip()
            elif key in NFT_USERS:
                yield NFT_USERS[key]
            elif key == "xt" and isinstance(value, dict):
                # iptables-nft's extension without its arguments: CT may be a mere NOTRACK.
                name = str(value.get("name", ""))
                if name in XT_MATCHES or (name in XT_TARGETS and name != "CT"):
                    yield name
            yield from nft_uses(value)
    elif isinstance(node, list):
        for value in node:
            yield from nft_uses(value)


def xt_uses(words: Sequence[str]) -> Iterator[str]:
    """The same of a rule as iptables-save prints it."""
    for flag, value in zip(words, words[1:]):
        if flag == "-m" and value in XT_MATCHES:
            yield f"-m {value}"
        elif flag == "-j" and value in XT_TARGETS and not (value == "CT" and "--notrack" in words):
            yield value


def _jumps(expr: Any) -> Iterator[str]:
    for statement in expr:
        for key in ("jump", "goto"):
            if isinstance(statement, dict) and isinstance(statement.get(key), dict):
                yield str(statement[key].get("target", ""))


def _nft_text(body: dict[str, Any]) -> str:
    """The rule as nft itself prints it, by its handle; its JSON where that fails."""
    family, table, chain = body["family"], body.get("table", ""), body.get("chain", "")
    text, problem = output(["nft", "-a", "list", "chain", family, table, chain])
    if not problem:
        mark = f"# handle {body.get('handle')}"
        for line in text.splitlines():
            if line.rstrip().endswith(mark):
                return line.rsplit("# handle", 1)[0].strip()
    return json.dumps(body.get("expr", ()))


def output(argv: Sequence[str]) -> tuple[str, str]:
    """A tool's standard output, and its error: ``missing`` without the program, empty if none."""
    if not commands.have(argv[0]):
        return "", "missing"
    try:
        status, text, complaint = commands.output(argv)
    except CtraceError as error:
        return "", str(error)
    return text, "" if status == 0 else complaint or f"exit status {status}"
