"""``iptables-save`` text as chains of the common model."""

from __future__ import annotations

import re
import shlex
from dataclasses import replace
from typing import Final, Optional

from ctrace.record import PROTO_NUMBERS
from ctrace.ruleset.model import (
    CT_EXTRA,
    CT_OTHER,
    Bits,
    Chain,
    Match,
    Rule,
    Use,
    Value,
    Verdict,
    address_span,
)
from ctrace.ruleset.notrack import CHAINS, TAG

_HOOKS: Final = {
    "PREROUTING": "prerouting",
    "INPUT": "input",
    "FORWARD": "forward",
    "OUTPUT": "output",
    "POSTROUTING": "postrouting",
}
_PRIORITIES: Final = {"raw": -300, "mangle": -150, "nat": -100, "filter": 0, "security": 50}

IGNORED_TARGETS: Final = frozenset(
    ("LOG", "NFLOG", "ULOG", "AUDIT", "TRACE", "CLASSIFY", "TCPMSS", "DSCP", "TOS", "TTL", "HL",
     "SET", "CHECKSUM", "SECMARK", "HMARK", "IDLETIMER", "RATEEST", "LED", "ECN", "TEE",
     "TCPOPTSTRIP", "ACCOUNT")
)  # fmt: skip
_FLAGS: Final = {"FIN": 1, "SYN": 2, "RST": 4, "PSH": 8, "ACK": 16, "URG": 32}
_FLAGS_WORD: Final = {"ALL": 63, "NONE": 0}
_ICMP: Final = {
    "echo-reply": 0,
    "destination-unreachable": 3,
    "echo-request": 8,
    "time-exceeded": 11,
    "parameter-problem": 12,
}
_ICMP6: Final = {"destination-unreachable": 1, "packet-too-big": 2, "time-exceeded": 3,
                 "parameter-problem": 4, "echo-request": 128, "echo-reply": 129,
                 "router-solicitation": 133, "router-advertisement": 134,
                 "neighbour-solicitation": 135, "neighbor-solicitation": 135,
                 "neighbour-advertisement": 136, "neighbor-advertisement": 136}  # fmt: skip

_ODD: Final = re.compile(r"[\"'\\]|[^\S \t\r\n]")
_SIMPLE: Final = re.compile(r"(?: *(?:\"(?:[^\"\\]|\\[\"\\])+\"|[^\s\"'\\]+)(?= |$))+ *")
"""Words, each of them bare or in quotes as a whole."""
_WORD: Final = re.compile(r"\"((?:[^\"\\]|\\[\"\\])+)\"|([^\s\"'\\]+)")
_ESCAPED: Final = re.compile(r"\\([\"\\])")
QUIET: Final = frozenset(("--comment", "--limit-burst"))
"""Options that decide nothing on their own."""
_SILENT_MODULES: Final = frozenset(
    ("tcp", "udp", "udplite", "sctp", "icmp", "icmp6", "ipv6-icmp", "multiport", "conntrack",
     "state", "mark", "addrtype", "comment", "standard")
)  # fmt: skip


def parse(text: str, tool: str, family: str) -> tuple[list[Chain], list[str]]:
    """Chains in the output of a ``*-save`` command, and sentences on what is unclear in it.

    ``family`` is ``ip`` or ``ip6``. ctrace's own chains and rules are left out.
    """
    chains: dict[tuple[str, str], Chain] = {}
    rules: dict[tuple[str, str], list[Rule]] = {}
    gaps: list[str] = []
    table = ""
    for line in text.splitlines():
        if line.startswith("*"):
            table = line[1:].strip()
        elif line.startswith(":"):
            name, policy = line[1:].split()[:2]
            if name in CHAINS:
                continue
            hook = _HOOKS.get(name, "") if policy != "-" else ""
            chains[table, name] = Chain(
                tool=tool,
                family=family,
                table=table,
                name=name,
                hook=hook,
                # nat works at 100 (source NAT) in postrouting and input.
                priority=100
                if table == "nat" and hook in ("postrouting", "input")
                else _PRIORITIES.get(table, 0),
                policy="drop" if policy == "DROP" else "accept",
                type="nat" if table == "nat" else "filter",
            )
        elif line.startswith(("-A", "[")):
            counted, _, body = line.partition("] ") if line.startswith("[") else ("", "", line)
            words = _split(body)
            if words is None or len(words) < 2:
                gaps.append(f"a rule of {tool} {table} could not be read: {body[:80]}")
                continue
            chain = words[1]
            if any(word.startswith(TAG) for word in words) or chain in CHAINS:
                continue
            here = rules.setdefault((table, chain), [])
            packets = int(counted[1:].partition(":")[0]) if counted else None
            rule = _Words(words[2:], family).rule()
            here.append(replace(rule, position=len(here), packets=packets))
    return [replace(c, rules=tuple(rules.get(key, ()))) for key, c in chains.items()], gaps


def _split(line: str) -> Optional[list[str]]:
    if not _ODD.search(line):
        return line.split()
    if _SIMPLE.fullmatch(line):  # as save prints it, and twenty times as fast as shlex
        found = _WORD.findall(line)
        return [_ESCAPED.sub(r"\1", quoted) if quoted else bare for quoted, bare in found]
    try:
        return shlex.split(line)
    except ValueError:
        return None


class _Words:
    """One rule's words, read from left to right."""

    def __init__(self, words: list[str], family: str) -> None:
        self.words = words
        self.family = family
        self.at = 0
        self.module = ""
        self.decided: set[str] = set()  # modules that yielded a condition
        self.modules: list[str] = []
        self.matches: list[Match] = []
        self.ct_state = False

    def rule(self) -> Rule:
        """The rule; an unknown condition becomes a match that may be either true or false."""
        verdict: Optional[Verdict] = None
        uses: list[Use] = []
        while self.at < len(self.words):
            negate = self._take("!")
            option = self._next()
            negate = negate or self._take("!")
            if option in ("-j", "-g"):
                verdict, uses = self._target(option, self._next())
                break
            if option in ("-m", "--match"):
                self.module = self._next()
                self.modules.append(self.module)
                continue
            self._option(option, negate)
        for module in self.modules:
            if module not in self.decided and module not in _SILENT_MODULES:
                self.matches.append(Match("", text=f"-m {module}"))
        matched = [
            Use("connlimit" if m == "connlimit" else "ct-mark", f"-m {m}")
            for m in self.modules
            if m in ("connlimit", "connmark", "connlabel", "connbytes", "helper")
        ]
        return Rule(tuple(self.matches), verdict, (*matched, *uses), " ".join(self.words)[:200])

    def _take(self, word: str) -> bool:
        if self.at < len(self.words) and self.words[self.at] == word:
            self.at += 1
            return True
        return False

    def _next(self) -> str:
        self.at += 1
        return self.words[self.at - 1] if self.at <= len(self.words) else ""

    def _rest(self) -> list[str]:
        """Arguments up to the next option."""
        found = []
        while self.at < len(self.words):
            word = self.words[self.at]
            if word == "!" or (word.startswith("-") and len(word) > 1 and not word[1].isdigit()):
                break
            found.append(word)
            self.at += 1
        return found

    def _add(self, key: str, values: tuple[Value, ...], negate: bool, text: str) -> None:
        self.matches.append(Match(key, values, negate, text))
        self.decided.add(self.module)

    def _option(self, option: str, negate: bool) -> None:
        arguments = self._rest()
        text = " ".join((["!"] if negate else []) + [option, *arguments])
        if option in QUIET:
            self.decided.add(self.module)
            return
        try:
            key, values = self._known(option, arguments)
        except (KeyError, ValueError, IndexError):
            key, values = "", ()
        if key == "ct.state":
            self.ct_state = True
        if key:
            self._add(key, values, negate, text)
        elif self.module not in self.decided or self.module in _SILENT_MODULES:
            self._add("", (), False, text)

    def _known(  # noqa: PLR0911
        self, option: str, arguments: list[str]
    ) -> tuple[str, tuple[Value, ...]]:
        word = arguments[0] if arguments else ""
        if option in ("-p", "--protocol"):
            return "proto", (_proto(word),)
        if option in ("-s", "--source", "-d", "--destination"):
            return ("saddr" if option in ("-s", "--source") else "daddr"), (address_span(word),)
        if option in ("-i", "-o"):
            return ("iif" if option == "-i" else "oif"), (
                word[:-1] + "*" if word.endswith("+") else word,
            )
        if option in ("--sport", "--source-port", "--sports", "--source-ports"):
            return "sport", _ports(word)
        if option in ("--dport", "--destination-port", "--dports", "--destination-ports"):
            return "dport", _ports(word)
        if option == "--tcp-flags":
            mask, value = (_flags(part) for part in arguments)
            return "flags", ((mask, value),)
        if option in ("--icmp-type", "--icmpv6-type"):
            names, key = (_ICMP, "icmp") if option == "--icmp-type" else (_ICMP6, "icmp6")
            if word == "any":
                return key, ((0, 255),)
            if "/" in word:  # with a code: not known
                return "", ()
            number = int(word) if word.isdecimal() else names[word]
            return key, ((number, number),)
        return self._stateful(option, word)

    def _stateful(  # noqa: PLR0911
        self, option: str, word: str
    ) -> tuple[str, tuple[Value, ...]]:
        if option in ("--ctstate", "--state"):
            names = word.lower().split(",")
            states = tuple(name for name in names if name not in ("dnat", "snat"))
            if states != tuple(names) and not states:
                return "ct.status", tuple(names)
            return "ct.state", (*states, *(f"nat:{n}" for n in names if n in ("dnat", "snat")))
        if option == "--ctdir":
            return (CT_EXTRA if self.ct_state else "ct.dir"), (word.lower(),)
        if option == "--ctstatus":
            return (CT_EXTRA if self.ct_state else "ct.status"), tuple(word.lower().split(","))
        if option.startswith("--ct"):
            return (CT_EXTRA if self.ct_state else CT_OTHER), ()
        if option == "--mark" and self.module == "mark":
            return "mark", (_bits(word),)
        if self.module in ("connmark", "connlabel", "connbytes", "helper"):
            return CT_OTHER, ()
        if option in ("--dst-type", "--src-type"):
            key = "daddr.type" if option == "--dst-type" else "saddr.type"
            return key, tuple(word.lower().split(","))
        return "", ()

    def _target(  # noqa: PLR0911
        self, option: str, name: str
    ) -> tuple[Optional[Verdict], list[Use]]:
        arguments = self.words[self.at :]
        text = " ".join([option, name, *arguments])
        if option == "-g":
            return Verdict("goto", name), []
        if name in ("ACCEPT", "DROP", "REJECT", "RETURN"):
            kind = {"ACCEPT": "accept", "RETURN": "return"}.get(name, "drop")
            return Verdict(kind), []
        if name in IGNORED_TARGETS:
            return None, []
        if name in ("DNAT", "SNAT", "MASQUERADE", "REDIRECT", "NETMAP"):
            kind = {"NETMAP": "dnat"}.get(name, name.lower())
            return Verdict("accept"), [Use(kind, text, _nat_port(arguments))]
        special = {
            "SYNPROXY": "synproxy",
            "NOTRACK": "notrack",
            "CONNSECMARK": "ct-set",
            "FLOWOFFLOAD": "flow",
        }
        if name in special:
            verdict = Verdict("drop") if name == "SYNPROXY" else None
            return verdict, [Use(special[name], text)]
        if name == "CONNMARK":
            restore = "--restore-mark" in arguments
            uses = [Use("ct-mark" if restore else "ct-set", text)]
            return None, uses + ([Use("mark", text)] if restore else [])
        if name == "CT":
            kinds = {
                "--notrack": "notrack",
                "--zone": "zone",
                "--zone-orig": "zone",
                "--zone-reply": "zone",
                "--helper": "helper",
                "--timeout": "timeout",
            }
            found = [kinds[a] for a in arguments if a in kinds] or ["template"]
            return None, [Use("template" if k == "zone" else k, text) for k in found]
        if name == "MARK":
            return None, [Use("mark", text, bits=_set_mark(arguments))]
        if name == "TPROXY":
            return Verdict("accept"), [Use("tproxy", text), Use("mark", text)]
        if name in ("QUEUE", "NFQUEUE"):
            return Verdict("unknown", name), []
        return Verdict("jump", name), []


def _proto(word: str) -> tuple[int, int]:
    if word == "all":
        return (0, 255)
    number = PROTO_NUMBERS.get({"ipv6-icmp": "icmpv6"}.get(word, word))
    number = int(word) if number is None else number
    return (number, number)


def _ports(word: str) -> tuple[Value, ...]:
    found: list[Value] = []
    for part in word.split(","):
        low, _, high = part.partition(":")
        found.append((int(low or 0), int(high) if high else 65535 if ":" in part else int(low)))
    return tuple(found)


def _flags(word: str) -> int:
    total = 0
    for name in word.split(","):
        total |= _FLAGS_WORD[name] if name in _FLAGS_WORD else _FLAGS[name]
    return total


def _bits(word: str) -> Bits:
    value, _, mask = word.partition("/")
    return (int(mask, 0) if mask else 0xFFFFFFFF, int(value, 0))


def _set_mark(arguments: list[str]) -> Optional[Bits]:
    """--set-xmark value/mask: new = (old & ~mask) ^ value; None for anything else."""
    if len(arguments) == 2 and arguments[0] == "--set-xmark":
        return _bits(arguments[1])
    return None


def _nat_port(arguments: list[str]) -> Optional[int]:
    for option, value in zip(arguments, arguments[1:]):
        if option == "--to-ports" and value.isdecimal():
            return int(value)
        if option in ("--to-destination", "--to-source"):
            tail = value.rsplit(":", 1)[-1]
            if tail.isdecimal() and (value.count(":") == 1 or "]:" in value):
                return int(tail)
    return None
