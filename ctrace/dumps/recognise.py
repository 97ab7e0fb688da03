"""Which line is what: entries are recognised by themselves, the rest also by what precedes it.

A text may be one file, a pasted terminal, or the output of a loop; so each line is looked at by
itself, and a prompt, a file's name or a heading only says what a bare number or a table without a
head belongs to.
"""

from __future__ import annotations

import re
from dataclasses import replace
from typing import Final, Optional

import numpy as np

from ctrace.dumps import typed, whose
from ctrace.dumps.decoded import LINE, RULES, chunks, unmailed
from ctrace.dumps.entries import copied, foreign, xml
from ctrace.dumps.entries import lines as entries
from ctrace.dumps.entries.alike import Alike
from ctrace.dumps.entries.columns import Entries
from ctrace.dumps.entries.columns import entries as columns
from ctrace.dumps.entries.values import Chunk
from ctrace.dumps.entries.words import Bad
from ctrace.dumps.entries.wrapped import Wrapped, goes_on, is_entry
from ctrace.dumps.files import Text
from ctrace.dumps.found import Dump, Found, plain
from ctrace.dumps.host.blocks import BLOCKS, Block
from ctrace.dumps.host.context import Context, context
from ctrace.dumps.host.facts import fact
from ctrace.dumps.host.network import NETWORK
from ctrace.dumps.host.times import Clock, heading_time, moment
from ctrace.dumps.packed import Unreadable

FACT: Final = 1000
"""Bytes of a line about anything but entries: no pattern gets more to go back and forth in."""
ENTRY: Final = 8192  # the same of an entry's, in whatever form
ROWS: Final = 8192  # entries that become columns together
_XML_HEADS: Final = (b"<conntrack>", b"<expect>")
RUNS: Final = 100
"""Changes between lines that are alike and others in a chunk, up to which reading them
together is faster."""


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
        self._at: Optional[Clock] = None
        self._xml: Optional[bytes] = None
        self._alike = Alike(lambda line: found.belongs(whose.REACHED, whose.before(line)))
        self._ruled = b""  # the line before, if it is about no entry
        self._begun = b""
        """The beginning of a line that conntrack's own message came into."""
        self._known = 0
        self._inside = False
        """Whether the line being read was inside another."""
        self._wrapped = Wrapped()
        self._left_out = False
        """Whether somebody cut lines out just before."""

    def read(self, text: Text) -> None:
        """One text to its end. Raises CtraceError when it cannot be read."""
        if not text.asked and typed.CONFIGURED.search(text.name):
            self._found.passed += 1
            return
        self._text, self._block, self._xml, self._at = text, None, None, None
        self._last, self._known, self._begun, self._left_out = None, 0, b"", False
        self._context = context(text.name, Context(), named=True)
        self._dated = text.asked or bool(typed.DATED.search(text.name))
        self._found.log.begin()
        unread = self._found.unread.count, len(self._found.unread.first)
        weight = self._found.weight
        number, broken = 0, ""
        try:
            for data in chunks(text.stream, text.name):
                number += self._lines_of(Chunk(data), number) if data else 0
                if not (self._known or self._rows or text.asked):
                    break
        except Unreadable as error:
            if text.asked:
                raise
            broken = str(error)
            if self._dump is not None:
                self._dump.cut = True
        self._end()
        self._found.prompt()
        unread_now = self._found.unread
        if self._found.weight == weight and not text.asked:  # a bundle's file about something else
            unread_now.count = unread[0]
            del unread_now.first[unread[1] :]
        if broken:
            unread_now.add(text.name, 0, broken)
        if not self._known and not text.asked:
            self._found.passed += 1
        else:
            self._found.lines += number
            self._found.files.append(plain(text.name.encode("utf-8", "replace")))
            if text.host and self._found.weight > weight:
                self._found.belongs(whose.FOLDERS, text.host)

    def _lines_of(self, chunk: Chunk, before: int) -> int:
        """A chunk's lines; how many there are. ``before`` were read of the text."""
        n = len(chunk)
        self._dated |= chunk.has_entries
        if not chunk.has_entries:
            runs, made = np.array([0, n]), None
        else:
            done, made = self._alike.read(chunk)
            runs = np.flatnonzero(np.diff(done, prepend=not done[0], append=not done[-1]))
            if len(runs) > RUNS:
                runs, made = np.array([0, n]), None
        taken = 0
        for start, stop in zip(runs.tolist(), runs[1:].tolist()):
            alike, first = made is not None and bool(done[start]), start
            if made is not None and alike and self._xml is None and not self._begun:
                # The last of them may have a rest, and is then read with it.
                first = stop - (stop == n or goes_on(chunk.line(stop)))
                self._give_up()
                self._take_many(made.part(slice(taken, taken + first - start)))
            for at in chunk.telling(first, stop):
                self._line(chunk.line(at), before + at + 1)
            taken += (stop - start) * alike
        return n

    def _line(self, line: bytes, number: int) -> None:
        if self._begun:
            line, self._begun = self._begun + line, b""
        line, self._begun = unmailed(line)
        if self._begun:
            return
        joined = self._wrapped.more(line, number)
        if joined is not None:
            (line, number), again = joined
            if again and self._rows:
                self._rows.pop()
                self._lines.pop()
            if self._wrapped.is_open:
                return
        else:
            self._give_up()
            if self._wrapped.breaks(line, number):
                return
        if not (typed.SAID in line and self._interrupted(line)):
            self._other(line, number)

    def _give_up(self) -> None:
        """The rest of an entry that was broken into lines did not come."""
        lost = self._wrapped.lost()
        if lost is not None:
            self._found.unread.add(self._text.name, *lost)

    def _take_many(self, made: Entries) -> None:
        """Entries of lines that were alike, if any."""
        events = made.tag > 0
        edges = [0, *(np.flatnonzero(np.diff(events)) + 1).tolist(), len(made)]
        for start, stop in zip(edges, edges[1:]) if len(made) else ():
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
        if len(self._rows) >= ROWS:  # before: the last one may have its rest in the next line
            self._flush()
        self._rows.append(row)
        self._lines.append(line)

    def _begin(self, events: bool) -> None:
        self._close()
        here, text = self._context, self._text
        command = here.command or ("" if text.asked else text.name)
        self._dump = Dump(
            self._found.spool.n, plain(f"{text.name}: {here.command}".encode("utf-8", "replace"))
            if here.command else plain(text.name.encode("utf-8", "replace")),
            re.sub(r"\d+", "#", command), here.netns, events, here.list, self._utc(),
            text.modified, self._found.spool.n, filtered=typed.is_filtered(here.command),
            cut=self._left_out or typed.is_filtered(here.command), clock=self._at,
        )  # fmt: skip
        self._left_out = False

    def _flush(self) -> None:
        if not self._rows or self._dump is None:
            return
        made, bad = columns(self._rows)
        for at, reason in sorted(bad.items()):
            self._found.unread.add(self._text.name, self._lines[at], reason)
        self._known += len(made)
        self._found.add(self._dump, made)
        self._rows, self._lines = [], []

    def _close(self) -> None:
        """The dump that is being read has no more entries."""
        self._flush()
        if self._dump is not None and len(self._dump):
            self._found.dumps.append(self._dump)
            self._last = self._dump
        self._dump = None

    def _end(self) -> None:
        """What stood together ends here."""
        self._give_up()
        self._close()
        if self._block is not None:
            self._block.end(self._found.space(self._context.netns))
            self._block = None

    def _other(self, line: bytes, number: int) -> None:
        stripped = line.strip()
        if not stripped:
            return
        if len(line) >= LINE and not line.startswith(RULES):
            self._found.unread.add(self._text.name, number, "a line of more than 64 KiB")
            if self._block is not None:
                self._block.lacks()
        elif self._xml is not None or b"<flow" in line or line.strip() in _XML_HEADS:
            self._from_xml(line, number)
        elif entries.looks_like_entry(line) and self._entry(line, number):
            return
        elif self._block is not None and self._block.take(line):
            self._known += 1
        elif entries.is_expectation(line):
            self._found.space(self._context.netns).expectations += 1
            self._known += 1
        elif entries.looks_like_entry(line):
            self._no_entry(line, number)
        elif reason := foreign.reason(line[:FACT]):
            self._found.unread.add(self._text.name, number, reason)
        elif (
            (told := self._about_entries(stripped))
            or self._moves(stripped)  # a comment looks like a prompt: alone it tells nothing
            or (not self._context.configured and (told := self._about_host(stripped)))
        ):
            self._known += told
        elif b" src=" in line and entries.begins(line):
            self._wrapped.begin(line, number, "cut off before its addresses")
        elif not (self._mark(stripped) or self._context.ignored):
            self._found.unread.add(self._text.name, number, "an unknown line")

    def _mark(self, line: bytes) -> bool:
        """Whether a line is a quotation's: its edge, or what stands for lines left out."""
        if line.endswith(b":"):  # somebody's heading
            self._end()
        elif typed.left_out(line):
            self._left_out = self._dump is None
            if self._dump is not None:
                self._dump.cut = True
            return True
        return typed.is_fence(line)

    def _no_entry(self, line: bytes, number: int) -> None:
        parts = [] if self._inside else copied.bare(line)
        inside = [one for one in parts if entries.looks_like_entry(one)]
        if not any(map(is_entry, inside)) and self._found.log.take(plain(line, 2000)):
            return
        if inside:
            self._inside = True
            for one in inside:
                self._other(one, number)
            self._inside = False
            return
        if reason := foreign.reason(line[:FACT]):
            self._found.unread.add(self._text.name, number, reason)
        elif self._why.startswith(("cut off", "a direction without")):
            self._wrapped.begin(line, number, self._why)
        else:
            self._found.unread.add(self._text.name, number, self._why)

    def _interrupted(self, line: bytes) -> bool:
        """Whether conntrack's last words stand within a line: with 2>&1 they come as they may.

        What they cut through goes on in the next line.
        """
        said = typed.SHOWN.search(line)
        if said is None or not line[: said.start()].strip() or len(line) > ENTRY:
            return False
        if self._dump is None or line[: said.start()].rstrip()[-1:] in (b":", b"#", b"$"):
            return False
        if said[2] == b"entries":
            self._dump.said = int(said[1])
        self._begun = line[: said.start()]
        return True

    def _entry(self, line: bytes, number: int) -> bool:
        """Whether every word of the line fits an entry; otherwise ``_why`` says what is missing."""
        try:
            if len(line) > ENTRY:
                raise Bad(f"an entry of more than {ENTRY} bytes")
            rows = [entries.row(one) for one in entries.glued(line)]
        except Bad as error:
            self._why = str(error)
            return False
        for at, row in enumerate(rows):
            if at:
                self._end()
            self._take(row, number)
        self._found.belongs(whose.REACHED, whose.before(line))
        if len(rows) == 1 and self._rows:
            self._wrapped.whole(line)
        return True

    def _from_xml(self, line: bytes, number: int) -> None:
        """``conntrack -o xml``: an element may stand on one line or on many."""
        found, self._xml = xml.flows((self._xml or b"") + line)
        for element in found:
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
        shown, lost = typed.SHOWN.search(line), b"We have hit ENOBUFS" in line
        if not (shown or lost):
            return False
        self._flush()
        dump = self._dump or self._last
        if shown is None:
            if dump is not None:
                dump.lost += 1
            return True
        if shown[3] == b"deleted":  # they are gone, and are listed before it or after
            if self._dump is not None:
                self._dump.list = "deleted"
            self._context = replace(self._context, list="deleted")
        elif dump is not None and shown[2] == b"entries":
            dump.said = int(shown[1])
        self._found.empty |= int(shown[1]) == 0
        self._end()
        return True

    def _moves(self, line: bytes) -> bool:
        """A prompt, heading or time: what follows is something else, or later."""
        before, self._ruled = self._ruled, line
        asked = whose.announced(line, before)
        if asked:
            self._end()
            self._found.prompt(whose.REACHED, asked)
        if asked or line in whose.RULES:
            return True
        command = typed.command(line) if len(line) < FACT else None
        when = None if command is None else heading_time(plain(command))
        if command is not None and when is None:
            self._end()
            self._found.prompt(*whose.prompted(line, command))
            self._left_out = False
            self._context = context(plain(command, 400), self._context)
            self._found.log.begin()
            return True
        if when is None and len(line) < 100:  # no time is longer
            when = moment(plain(line), epoch=self._dated and not self._context.settings)
        if when is None:
            return False
        self._end()
        if self._dated:
            self._at, self._found.date = when, None if when[0] else when[1]
        return True

    def _utc(self) -> Optional[float]:
        return self._at[1] if self._at is not None and not self._at[0] else None

    def _about_host(self, line: bytes) -> bool:
        return (
            self._found.log.take(plain(line, 2000))
            or self._starts_block(line)
            or fact(
                plain(line, FACT), self._context, self._found, self._utc() or self._text.modified
            )
        )

    def _starts_block(self, line: bytes) -> bool:
        for kind in (*BLOCKS, *NETWORK):
            block = kind.starting(line, self._context)
            if block is not None:
                self._end()
                self._block = block
                return True
        return False
