"""Lists of connections in forms that have too little, or that are no conntrack's."""

from __future__ import annotations

import re
from typing import Final

_FORMS: Final = (
    (re.compile(rb"^-[AUD] (?:-\w+ \S+ )*-s \S+ -d \S+"),
     "what conntrack -o save prints: give conntrack -L -o extended"),
    (re.compile(rb"\bsrc-address=\S+ .*\bdst-address=|\bsrc-address: .*\bdst-address: "),
     "a connection as RouterOS prints it, with names of its own"),
    (re.compile(rb"^\d{1,10}\s+\S+:\d+\s+\S+:\d+\s+[a-z]\w*\s+(?:\[\d+\]|[A-Z_]+\s+\d|\d)"),
     "a row of 'show conntrack table', without the reply: give conntrack -L -o extended"),
    (re.compile(rb"\borig=\(src=\S+\),reply=\(src="),
     "a connection as Open vSwitch prints it, without its status: give conntrack -L -o extended"),
    (re.compile(rb"\bORIG: SRC=\S+ DST=\S+ .*\bREPLY: SRC="),
     "a connection as ulogd logs it, without its times: give conntrack -L -o extended"),
)  # fmt: skip
"""What such a line looks like, and why it is not read."""


def reason(line: bytes) -> str:
    """Why a connection in another form than conntrack's is not read; empty for other lines."""
    return next((why for form, why in _FORMS if form.search(line)), "")
