"""Which line is what: entries are told by themselves, the rest also by what it follows.

A text may be one file, a pasted terminal, or the output of a loop; so each line is
looked at by itself, and a prompt, a file's name or a heading only says what a bare
number or a table without a head belongs to.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from typing import IO, Final, Optional

import numpy as np

from ctrace.dumps.entries import lines as entries
from ctrace.dumps.entries import xml
from ctrace.dumps.entries.alike import Alike
from ctrace.dumps.entries.columns import Entries
from ctrace.dumps.entries.columns import entries as columns
from ctrace.dumps.entries.values import Chunk
from ctrace.dumps.entries.words import Bad
from ctrace.dumps.files import Text
from ctrace.dumps.found import Dump, Found, plain
from ctrace.dumps.host.blocks import BLOCKS, Block
from ctrace.dumps.host.context import Context, context, moment
from ctrace.dumps.host.facts import fact

CHUNK: Final = 1 << 20
LINE: Final = 1 << 16
"""Bytes of a line; what is longer is none that any tool prints."""
FACT: Final = 1000
"""Bytes of a line about anything but entries: no pattern gets more to go back and forth in."""
ENTRY: Final = 8192
"""The same of an entry's, in whatever form."""
ROWS: Final = 8192
"""Entries that become columns together."""
_XML_HEADS: Final = (b"<conntrack>", b"<expect>")
SNIFF: Final = 1 << 15
"""Bytes of a bundle's file in which something must be known, or the file is passed over."""
LONG: Final = b"x" * LINE
"""Stands for a line that is too long."""
RUNS: Final = 100
"""Changes between lines that are alike and others in a chunk, up to which reading them
together is faster."""

_PROMPT: Final = re.compile(rb"^(?:\+ |\[?[\w.-]+@[\w.-]+[^#$%>]{0,80}[#$%>] ?|[#$] )(\S.*)$")
_BANNER: Final = re.compile(rb"^[=>#*_\-+ ]{2,}\s*(/?[\w./ :@=|-]{3,200}?)\s*[=<#*_\-+ ]{2,}$")
_SHOWN: Final = re.compile(
    rb"conntrack v[\d.]+ \(conntrack-tools\): (\d{1,12}) (?:flow |dying |unconfirmed )?"
    rb"(entries|events)"
)
_SAID: Final = b" have been shown"
_LOST: Final = b"We have hit ENOBUFS"
_EXPECTED: Final = re.compile(
    rb"^\s*(?:\[\s*[\d.]+\]\s*)?(?:\[(?:NEW|UPDATE|DESTROY)\]\s+)?(?:EXPECTING: )?(?:-|\d+) "
    rb"(?:use=\d+ )?(?:l3proto = \d+ )?proto=\d+ src=\S+ dst=\S+"
)
"""An expectation, by the kernel (exp_seq_show, and ip_conntrack before 2.6.12) or conntrack."""
_GLUED: Final = re.compile(rb"\b(?:use|id)=\d+(?=[a-z])")
"""The end of a dump without its newline, as ``$(cat ...)`` leaves it, and the next one's start."""
_OTHERS: Final = (
    (re.compile(rb"^-[AUD] (?:-\w+ \S+ )*-s \S+ -d \S+"),
     "what conntrack -o save prints: give conntrack -L -o extended"),
    (re.compile(rb"\bsrc-address=\S+ .*\bdst-address=|\bsrc-address: .*\bdst-address: "),
     "a connection as RouterOS prints it, with names of its own"),
    (re.compile(rb"^\d{1,10}\s+\S+:\d+\s+\S+:\d+\s+[a-z]\w*\s+\[\d+\]"),
     "a row of 'show conntrack table', without the reply: give conntrack -L -o extended"),
)  # fmt: skip
"""Lists of entries in forms that have too little, or that are no conntrack's."""


class Reader:
    """Reads texts into what was found."""

    def __init__(self, found: Found) -> None:
        self._found = found
        self._rows: list[entries.Row] = []
        self._lines: list[int] = []
        self._dump: Optional[Dump] = None
        self._last: Optional[Dump] = None
        self._text: Text
        self._context = Context()
        self._block: Optional[Block] = None
        self._at: Optional[float] = None
        self._xml: Optional[bytes] = None
        self._alike = Alike()
        self._begun = b""
        """The beginning of a line that conntrack's own message came into."""
        self._known = 0

    def read(self, text: Text) -> None:
        """One text to its end. Raises CtraceError when it cannot be read."""
        self._text, self._block, self._xml, self._at = text, None, None, None
        self._last, self._known, self._begun = None, 0, b""
        self._context = context(text.name, Context(), named=True)
        self._found.log.begin()
        unread = self._found.unread.count, len(self._found.unread.first)
        number = 0
        for data in _chunks(text.stream):
            number += self._lines_of(Chunk(data), number)
            if not (self._known or self._rows or text.asked):
                break
        self._end()
        unread_now = self._found.unread
        if not self._known and not text.asked:  # a bundle's file about something else
            unread_now.count = unread[0]
            del unread_now.first[unread[1] :]
            self._found.passed += 1
        else:
            self._found.lines += number
            self._found.files.append(plain(text.name.encode("utf-8", "replace")))

    # -- entries ----------------------------------------------------------------------

    def _lines_of(self, chunk: Chunk, before: int) -> int:
        """A chunk's lines; how many there are. ``before`` were read of the text."""
        n = len(chunk)
        if not chunk.has_entries:
            runs, made = np.array([0, n]), None
        else:
            done, made = self._alike.read(chunk)
            runs = np.flatnonzero(np.diff(done, prepend=not done[0], append=not done[-1]))
            if len(runs) > RUNS:
                runs, made = np.array([0, n]), None
        taken = 0
        for start, stop in zip(runs.tolist(), runs[1:].tolist()):
            alike = made is not None and bool(done[start])
            if alike and self._xml is None and not self._begun:
                assert made is not None
                self._take_many(made.part(slice(taken, taken + stop - start)))
            else:
                for at in range(start, stop):
                    self._line(chunk.line(at), before + at + 1)
            taken += (stop - start) * alike
        return n

    def _line(self, line: bytes, number: int) -> None:
        if self._begun:
            line, self._begun = self._begun + line, b""
        if not (_SAID in line and self._interrupted(line)):
            self._other(line, number)

    def _take_many(self, made: Entries) -> None:
        """Entries of lines that were alike."""
        events = made.tag > 0
        edges = [0, *(np.flatnonzero(np.diff(events)) + 1).tolist(), len(made)]
        for start, stop in zip(edges, edges[1:]):
            self._flush()
            if self._dump is None or self._dump.events != events[start]:
                self._begin(bool(events[start]))
            assert self._dump is not None
            self._found.add(self._dump, made.part(slice(start, stop)))
            self._known += stop - start

    def _take(self, row: entries.Row, line: int) -> None:
        events = row[1] is not None
        if self._dump is None or self._dump.events != events:
            self._begin(events)
        self._rows.append(row)
        self._lines.append(line)
        if len(self._rows) >= ROWS:
            self._flush()

    def _begin(self, events: bool) -> None:
        self._flush()
        here, text = self._context, self._text
        command = here.command or text.name
        self._dump = Dump(
            self._found.spool.n, plain(f"{text.name}: {here.command}".encode("utf-8", "replace"))
            if here.command else plain(text.name.encode("utf-8", "replace")),
            re.sub(r"\d+", "#", command), here.netns, events, here.list, self._at,
            text.modified, self._found.spool.n,
        )  # fmt: skip

    def _flush(self) -> None:
        if not self._rows or self._dump is None:
            return
        made, bad = columns(self._rows)
        for at, reason in sorted(bad.items()):
            self._found.unread.add(self._text.name, self._lines[at], reason)
        self._known += len(made)
        self._found.add(self._dump, made)
        self._rows, self._lines = [], []

    def _end(self) -> None:
        """What stood together ends here."""
        self._flush()
        if self._dump is not None and len(self._dump):
            self._found.dumps.append(self._dump)
            self._last = self._dump
        self._dump = None
        if self._block is not None:
            self._block.end(self._found.space(self._context.netns))
            self._block = None

    # -- everything else --------------------------------------------------------------

    def _other(self, line: bytes, number: int) -> None:
        stripped = line.strip()
        if not stripped:
            return
        if len(line) >= LINE:
            self._found.unread.add(self._text.name, number, "a line of more than 64 KiB")
        elif self._xml is not None or b"<flow" in line or line.strip() in _XML_HEADS:
            self._from_xml(line, number)
        elif entries.looks_like_entry(line) and self._entry(line, number):
            return
        elif self._block is not None and self._block.take(line):
            self._known += 1
        elif _EXPECTED.match(line):
            self._found.space(self._context.netns).expectations += 1
            self._known += 1
        elif entries.looks_like_entry(line):
            if not self._log(line):
                self._found.unread.add(self._text.name, number, self._why)
        elif reason := next((reason for form, reason in _OTHERS if form.search(line[:FACT])), ""):
            self._found.unread.add(self._text.name, number, reason)
        elif self._about_entries(stripped) or self._moves(stripped) or self._about_host(stripped):
            self._known += 1
        elif not self._context.ignored:
            self._found.unread.add(self._text.name, number, "not a line that is known")

    def _interrupted(self, line: bytes) -> bool:
        """Whether conntrack's last words stand within a line: with 2>&1 they come as they may.

        What they cut through goes on in the next line.
        """
        said = _SHOWN.search(line)
        if said is None or not line[: said.start()].strip() or len(line) > ENTRY:
            return False
        if self._dump is None or line[: said.start()].rstrip()[-1:] in (b":", b"#", b"$"):
            return False
        if said[2] == b"entries":
            self._dump.said = int(said[1])
        self._begun = line[: said.start()]
        return True

    def _entry(self, line: bytes, number: int) -> bool:
        """Whether it is one by all its words; else ``_why`` tells what it has not got."""
        glued = _GLUED.search(line) if line.count(b"src=") > 2 else None
        ends = [0, *([glued.end()] if glued else []), len(line)]
        try:
            if len(line) > ENTRY:
                raise Bad(f"an entry of more than {ENTRY} bytes")
            rows = [entries.row(line[start:stop]) for start, stop in zip(ends, ends[1:])]
        except Bad as error:
            self._why = str(error)
            return False
        for at, row in enumerate(rows):
            if at:
                self._end()
            self._take(row, number)
        return True

    def _from_xml(self, line: bytes, number: int) -> None:
        """``conntrack -o xml``: an element may stand on one line or on many."""
        self._xml = (self._xml or b"") + line
        while self._xml is not None:
            element, self._xml = xml.next_flow(self._xml)
            if element is None:
                break
            try:
                if len(element) > ENTRY:
                    raise Bad(f"an element of more than {ENTRY} bytes")
                if b"<expected>" in element:
                    self._found.space(self._context.netns).expectations += 1
                    self._known += 1
                else:
                    self._take(xml.row(element), number)
            except Bad as error:
                self._found.unread.add(self._text.name, number, str(error))
        if self._xml is not None and len(self._xml) > LINE:
            self._found.unread.add(self._text.name, number, "an XML element without its end")
            self._xml = None

    def _about_entries(self, line: bytes) -> bool:
        """What conntrack itself says of what it has shown."""
        shown = _SHOWN.search(line)
        if shown:
            self._flush()
            dump = self._dump or self._last
            if dump is not None and shown[2] == b"entries":
                dump.said = int(shown[1])
            self._found.empty |= int(shown[1]) == 0
            self._end()
            return True
        if _LOST in line:
            self._flush()
            dump = self._dump or self._last
            if dump is not None:
                dump.lost += 1
            return True
        return False

    def _moves(self, line: bytes) -> bool:
        """A prompt, heading or time: what follows is something else, or later."""
        typed = len(line) < FACT and (_PROMPT.match(line) or _BANNER.match(line))
        if typed:
            self._end()
            self._context = context(plain(typed[1], 400), self._context)
            return True
        when = moment(plain(line), self._context)
        if when is not None:
            self._end()
            self._at = self._found.date = when
            return True
        return False

    def _about_host(self, line: bytes) -> bool:
        return self._log(line) or self._starts_block(line) or fact(
            plain(line, FACT), self._context, self._found, self._at or self._text.modified
        )  # fmt: skip

    def _starts_block(self, line: bytes) -> bool:
        for kind in BLOCKS:
            block = kind.starting(line, self._context)
            if block is not None:
                self._end()
                self._block = block
                return True
        return False

    def _log(self, line: bytes) -> bool:
        return self._found.log.take(plain(line, 2000))


def _chunks(stream: IO[bytes]) -> Iterator[bytes]:
    """Whole lines of a stream, in bounded memory; the first part of it is short."""
    rest, skipping, size = b"", False, SNIFF
    while True:
        data = stream.read(size)
        size = CHUNK
        if not data:
            break
        data = rest + data
        end = data.rfind(b"\n") + 1
        data, rest = data[:end], data[end:]
        if skipping and end:
            skipping, data = False, LONG + data[data.index(b"\n") :]
        if data:
            yield data
        if len(rest) > LINE:
            rest, skipping = b"", True
    if rest or skipping:
        yield (LONG if skipping else rest) + b"\n"
