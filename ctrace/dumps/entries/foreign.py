"""Lists of connections in forms that have too little, or that are no conntrack's."""

from __future__ import annotations

import re
from typing import Final

_TWO: Final = rb"(?:(?=\S*[.:])[][\da-fA-F.:]+\s+){2}(?:\d{1,20}\s+\d{1,20}\s+)?"
"""A direction's two addresses, with its packets and bytes where they are counted."""
_FORMS: Final = (
    (re.compile(rb"^-[AUD] (?:-\w+ \S+ )*-s \S+ -d \S+"),
     "what conntrack -o save prints: give conntrack -L -o extended"),
    (re.compile(rb"\bsrc-address=\S+ .*\bdst-address=|\bsrc-address: .*\bdst-address: "),
     "a connection as RouterOS prints it, with names of its own"),
    (re.compile(rb"^\d{1,10}\s+\S+:\d+\s+\S+:\d+\s+[a-z]\w*\s+(?:\[\d+\]|[A-Z_]+\s+\d|\d)"),
     "a row of 'show conntrack table', without the reply: give conntrack -L -o extended"),
    (re.compile(rb"^(?:\d{1,10}\s+)?" + _TWO + _TWO + rb"(?:tcp|udp|icmp|gre|sctp|unknown)\w*\s"),
     "a row of 'show conntrack table', without its status: give conntrack -L -o extended"),
    (re.compile(rb"^(?:tcp|udp|icmp|[\da-fA-F.:]+:\d+)\s+[\w.:-]+:\d+\s+[\w.:-]+(?::\d+)?\s+"
                rb"(?:[A-Z_]+$|(?:tcp|udp|icmp)\s+(?:[A-Z_]+\s+)?\d+:\d\d:\d\d)"
                rb"|^[\w.-]+:\d+\s+[\w.-]+:\d+\s+(?:tcp|udp)\s.*\d:\d\d:\d\d"),
     "a connection as netstat-nat or iptstate prints it, without the reply: give conntrack -L -o "
     "extended"),
    (re.compile(rb"^\s*\d+\s+[A-Z][A-Za-z ]{0,9}\s+(?:tcp|udp|icmp|gre|\d{1,3})\s+"
                rb"[\d.]+(?::\d+)?\s+[\d.]+(?::\d+)?\s"),
     "a connection as RouterOS prints it, without the reply"),
    (re.compile(rb"^Session ID: \d+, Policy name: |^\s+(?:In|Out): \S+ --> \S+;\w+,"),
     "a session of Junos, which has a table of its own"),
    (re.compile(rb"^\d+\s+\S+\s+(?:ACTIVE|INIT|DISCARD|OPENING|CLOSING)\s+FLOW\b"),
     "a session of PAN-OS, which has a table of its own"),
    (re.compile(rb"\borig=\(src=\S+\),reply=\(src="),
     "a connection as Open vSwitch prints it, without its status: give conntrack -L -o extended"),
    (re.compile(rb"\bORIG: SRC=\S+ DST=\S+ .*\bREPLY: SRC="),
     "a connection as ulogd logs it, without its times: give conntrack -L -o extended"),
    (re.compile(rb"\borig-src=\S+ orig-dst=\S+ .*\breply-src=\S+"),
     "a connection as Sophos prints it, with names of its own"),
    (re.compile(rb"^(?:all|\S{1,15}) \w+ \S+ (?:\(\S+\) )?(?:<-|->) \S+ .*\b[A-Z_]+:[A-Z_]+"),
     "a state of pf, which is not Linux's: it has no conntrack"),
    (re.compile(rb"^(?:TCP|UDP|ICMP|GRE|SCTP|ESP) \S+ .*, idle \d+:\d\d:\d\d, bytes \d+"),
     "a connection of a Cisco ASA, which is not Linux's: it has no conntrack"),
    (re.compile(rb"^(?:tcp|udp|icmp|\d{1,3})\s+\d+\s+[\d.]+:\d+\s+(?:[\d.]+:\d+|-)\s+[\d.]+:\d+\s"
                rb"|^session info: proto=\d+ proto_state=\d+ duration="),
     "a session of FortiOS, which has a table of its own"),
    (re.compile(rb"^(?:TCP|UDP|ICMP|ICMPv6) (?:IN|OUT|SVC) \S+ -> \S+ .*\bRxFlagsSeen="),
     "an entry of Cilium's own table, which nf_conntrack's limits do not concern"),
    (re.compile(rb"^(?:ConntrackKey\{proto=)"),
     "an entry of Calico's own table, which nf_conntrack's limits do not concern"),
)  # fmt: skip
"""What such a line looks like, and why it is not read."""


_TRIES: Final = tuple(
    (form.match if form.pattern.startswith(b"^") else form.search, why) for form, why in _FORMS
)
"""Those that stand at the beginning are looked for there alone: a journal has many lines."""


def reason(line: bytes) -> str:
    """Why a connection in another form than conntrack's is not read; empty for other lines."""
    return next((why for found, why in _TRIES if found(line)), "")
