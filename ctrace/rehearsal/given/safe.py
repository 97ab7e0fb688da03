"""Which parts of a stranger's rules may be given to nft, iptables-restore and ipset, which run as
root.

These tools read files, run modprobe and ask name servers when a text tells them to. What is
loaded is only what their own listings print.
"""

from __future__ import annotations

import re
from typing import Final

from ctrace.errors import CtraceError

MOST_ELEMENTS: Final = 1 << 20
"""The ``size`` of a set: the kernel may reserve room for all of it."""

_COMMAND: Final = re.compile(
    r"(?m)(?:^|[;{}])[^\S\n]*(?:"
    r"(?:include|define|redefine|undefine)\b|(?:list|monitor|export|import|describe|flush)\s)"
)
_SIZE: Final = re.compile(r"\bsize[^\S\n]+([0-9]\w*)")
_EXPIRES: Final = re.compile(r"\bexpires (?:\d+(?:ms|[dhmsw]))+")
_TABLE: Final = re.compile(r"^table (?:(ip6?|inet|arp|bridge|netdev) )?(\S+) \{")
_HOST: Final = re.compile(
    r"\b(?:[sd]addr|nexthop|[ds]nat(?: ip6?)? to|addr) (?:[!=<>]+ )?\{? ?([A-Za-z][\w-]*[\w.-]*)"
)
_WORDS: Final = {
    "and", "map", "vmap", "set", "ip", "ip6", "ether", "arp", "numgen", "jhash", "symhash", "ct",
    "meta", "th", "tcp", "udp", "fib", "type", "iif", "oif", "iifname", "oifname", "mark",
    "timeout", "counter", "limit", "accept", "drop", "random", "fully-random", "persistent",
}  # fmt: skip
"""Words that may follow an address's name and are not hosts."""


def nft(text: str, without: set[tuple[str, str]]) -> str:
    """``nft list ruleset`` fit for ``nft -f``, without some tables. Raises CtraceError."""
    # Python ends lines at more characters than nft does: what is looked at is what is loaded.
    text = "\n".join(text.splitlines()) + "\n"
    if "\\\n" in text or _COMMAND.search(text):
        raise CtraceError("the nft rules include files or have commands, which no listing has")
    if any(_more(size) for size in _SIZE.findall(text)):
        raise CtraceError(f"a set of the nft rules has room for more than {MOST_ELEMENTS:,}")
    out, keep = [], True
    for line in text.splitlines():
        said = _TABLE.match(line)
        if said:
            keep = (said[1] or "ip", said[2]) not in without
        if keep:
            out.append(line)
    kept = "\n".join(out) + "\n"
    bare = re.sub(r'"[^"\n]*"', '""', re.sub(r"(?m)#.*$", "", kept))
    for name in _HOST.findall(bare):
        if name not in _WORDS and not _is_hex(name):
            raise CtraceError(f"the nft rules name a host, {name[:40]}: no listing does")
    if re.search(r"\bxt (match|target) ", bare) or "# xt_" in kept:
        raise CtraceError(
            "nft's text lacks what iptables' extensions were given: add iptables-save"
        )
    # An element that expires would do so in the middle of a rehearsal.
    return _EXPIRES.sub("", kept)


def _more(size: str) -> bool:
    """Whether it is more than sets may have, or no number as listings print it."""
    return re.fullmatch(r"[0-9]{1,9}", size) is None or int(size) > MOST_ELEMENTS


def _is_hex(word: str) -> bool:
    return re.fullmatch(r"[0-9a-fA-F]{1,4}", word) is not None


_SHORT: Final = {"-A", "-s", "-d", "-i", "-o", "-p", "-m", "-j", "-g", "-f", "-N", "-P"}
_MODPROBE: Final = re.compile(
    r"(?:^|[\s\"'])(?:-[A-Za-z]*M|--m(?:o(?:d(?:p\w*)?)?)?(?=[\s=\"']|$))"
)
_RULE: Final = re.compile(r"^(?:\[\d{1,20}:\d{1,20}\] )?-A [\w.:+/@~-]{1,40}(?: |$)")
_CHAIN: Final = re.compile(r"^:[\w.:+/@~-]{1,40} (?:ACCEPT|DROP|QUEUE|RETURN|-)(?: \[\d+:\d+\])?$")
_TABLES: Final = re.compile(r"^\*(raw|mangle|nat|filter|security)$")
_READS: Final = re.compile(r" --(?:object-pinned|path|fromfile|bytecode-file|log-file)\b")
_OTHER_ADDRESS: Final = re.compile(r" -[sd] (?![0-9a-fA-F.:]+(?:/[0-9a-fA-F.:]+)?(?: |$))")
_NO_DECISION: Final = re.compile(r" -j (?:AUDIT|LED|IDLETIMER)(?: |$)")
"""Targets that decide nothing, and report each packet to the whole machine."""


def save(text: str) -> str:
    """``iptables-save`` fit for ``iptables-restore -c``. Raises CtraceError."""
    out = []
    for raw in text.splitlines():
        line = raw.rstrip()
        if not line or line.startswith("#"):
            continue
        if _RULE.match(line):
            _rule(line)
            if _NO_DECISION.search(line):
                continue
        elif not (_CHAIN.match(line) or _TABLES.match(line) or line == "COMMIT"):
            raise CtraceError(f"iptables-save prints no such line: {line[:60]}")
        out.append(line)
    if out and out[-1] != "COMMIT":
        raise CtraceError("what iptables-save printed is cut off: its last table has no COMMIT")
    return "\n".join(out) + "\n"


def _rule(line: str) -> None:
    if _MODPROBE.search(line) or _READS.search(line):
        raise CtraceError(f"a rule of iptables names a program or file: {line[:80]}")
    if _OTHER_ADDRESS.search(line):
        raise CtraceError(f"a rule of iptables names a host, which no listing does: {line[:80]}")
    for word in re.sub(r'"(?:[^"\\]|\\.)*"', '""', line).split():
        if not (word in _SHORT or re.match(r"[^-]|--|-\d+$", word)):
            raise CtraceError(f"iptables-save prints no {word[:20]}: {line[:80]}")


_SET: Final = re.compile(r"^(create|add) ([^\s]{1,31}) (.*)$")


def ipsets(text: str) -> str:
    """``ipset save`` fit for ``ipset restore``, with elements that stay. Raises CtraceError."""
    out = []
    for line in text.splitlines():
        if not line.strip() or line.startswith("#"):
            continue
        said = _SET.match(line)
        if not said:
            raise CtraceError(f"ipset save prints no such line: {line[:60]}")
        rest = said[3]
        if re.search(r"(?:^|\s)-", re.sub(r'"[^"]*"', '""', rest)):
            raise CtraceError(f"ipset save prints no option with a dash: {line[:60]}")
        if said[1] == "create":
            rest = re.sub(r"\s+(?:hashsize|bucketsize|initval)\s+\S+", "", rest)
            if any(_more(size) for size in re.findall(r"\ssize\s+(\S+)", rest)):
                raise CtraceError(f"ipset {said[2]} has room for more than {MOST_ELEMENTS:,}")
        else:
            rest = re.sub(r" timeout \d+", " timeout 0", rest)
        out.append(f"{said[1]} {said[2]} {rest}")
    return "\n".join(out) + "\n" if out else ""
