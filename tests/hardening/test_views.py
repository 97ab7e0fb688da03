"""Every text of a recording that a stranger may have chosen, through every view and export."""

from __future__ import annotations

import sys
import tempfile
import unicodedata
from dataclasses import replace
from pathlib import Path

import pytest
from click.testing import CliRunner
from hypothesis import given
from hypothesis import strategies as st
from kit import synthetic
from kit.examples import examples

import ctrace
from ctrace.batch import Names, Netns, Owner
from ctrace.cli import cli
from ctrace.model import Model
from ctrace.recording.writer import Writer
from ctrace.view.export.events import EventLines
from ctrace.view.export.openmetrics import Exposition

pytestmark = pytest.mark.slow

MORE = [["advise", "--rules"], ["advise", "--format", "json"], ["replay", "--format", "json"],
        ["report", "--format", "html"]]  # fmt: skip
OBEYED = [
    chr(code) for code in range(sys.maxunicode)
    if unicodedata.category(chr(code)) in ("Cc", "Cf", "Zl", "Zp") and chr(code) not in "\n"
]  # fmt: skip
"""What a terminal obeys, and what reorders or hides its neighbours."""
BIDI = ("RLO", "LRO", "RLE", "LRE", "RLI", "LRI", "FSI", "PDF", "PDI")
SHOWN = [
    ["report"], ["report", "--markdown"], ["report", "--format", "json"],
    ["replay", "--once"], ["whatif", "--notrack", "tcp/8063"], ["diff"],
    ["report", "--group", "process"], ["diff", "--group", "process"],
    *(["export", "--format", form] for form in ("csv", "jsonl", "openmetrics")),
]  # fmt: skip


ANY = st.text(st.characters() | st.sampled_from(OBEYED), min_size=1, max_size=24)


def evil(at: int) -> str:
    """A name with a part of all these characters; each is in one of ten."""
    return f"e{at}\x1b[31m\u202e" + "".join(OBEYED[at::10])


@pytest.fixture(scope="module")
def recording(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return written(tmp_path_factory.mktemp("evil") / "evil.data", [evil(at) for at in range(10)])


def written(path: Path, texts: list[str]) -> Path:
    """Hosts, namespaces, processes, units, command lines, addresses, interfaces, chains, sets,
    comments, notes: ten texts as all of them."""
    batches = synthetic.batches(synthetic.traffic(200, rate=1000))
    owner = Owner((812 << 32) | 5, texts[0], 9, texts[1], texts[2])
    opener = Owner((4242 << 32) | 99, texts[3], 7331, texts[4], texts[5])
    names = Names(
        {synthetic.NETNS: Netns(synthetic.NETNS, texts[6], ("10.9.0.1", texts[7]))},
        {owner.key: owner, opener.key: opener}, {7331: texts[8], 9: texts[1]},
        {(synthetic.NETNS, 6, 8063): owner},
    )  # fmt: skip
    header = replace(synthetic.header(), host=texts[9], kernel=texts[0], facts={
        "net.netfilter.nf_conntrack_max": "65536", f"net.{texts[1]}": texts[2]})  # fmt: skip
    with Writer(str(path), header) as writer:
        for at, batch in enumerate(batches):
            writer.write(replace(batch, names=names) if at == 0 else batch)
        writer.ruleset(synthetic.NETNS, "\n".join([
            f"table inet {texts[3]} {{", f"set {texts[4]} {{ type ipv4_addr; }}",
            f"chain {texts[5]} {{", "type filter hook input priority 0; policy accept;",
            f'iifname "{texts[6]}" tcp dport 8063 accept comment "{texts[7]}"', "}", "}",
        ]))  # fmt: skip
        writer.note(texts[8])
    return path


def got_through(text: str, allowed: str = "\t") -> set[str]:
    return {
        f"U+{ord(one):04X}" for one in text
        if (one in OBEYED and one not in allowed) or unicodedata.bidirectional(one) in BIDI
    }  # fmt: skip


@pytest.mark.parametrize("words", SHOWN, ids=" ".join)
def test_nothing_that_a_terminal_obeys_gets_through(
    recording: Path, tmp_path: Path, words: list[str]
) -> None:
    argv = [words[0], str(recording), *words[1:]]
    out = tmp_path / "out"
    if words[0] == "export":
        argv += ["-o", str(out)]
    elif words[0] == "diff":
        argv.append(str(recording))
    done = CliRunner().invoke(cli, argv)
    assert done.exit_code == 0, (done.output, done.exception)
    text = out.read_text() if words[0] == "export" else done.stdout
    assert "e0" in text or "e1" in text or "8063" in text
    assert not got_through(text + done.stderr)


@examples(3)
@given(st.lists(ANY, min_size=10, max_size=10))
def test_any_names_in_every_view(texts: list[str]) -> None:
    with tempfile.TemporaryDirectory() as folder:
        path = str(written(Path(folder, "a.data"), texts))
        for words in (*SHOWN, *MORE):
            argv = [words[0], path, *words[1:], *([path] if words[0] == "diff" else [])]
            done = CliRunner().invoke(cli, argv)
            assert done.exit_code == 0, (words, done.output, done.exception)
            allowed = "\t\r" if "html" in words else "\t"
            assert not got_through(done.stdout + done.stderr, allowed), words
        with ctrace.open(path) as recording:
            model = Model(recording.hooks, recording.clock, recording.started, host=texts[9])
            lines = EventLines(recording.clock)
            for batch in recording.batches():
                model.update(batch)
                lines.learn(batch.names)
                told = [*lines.columns(batch.events), *lines.json(batch.events)]
                assert not got_through("".join(told))
            exposed = Exposition(limit=50, addresses=True).text(model.snapshot("process"), [])
        assert not got_through(exposed.decode())


def test_the_page_lets_none_through_either(recording: Path, tmp_path: Path) -> None:
    out = tmp_path / "page.html"
    done = CliRunner().invoke(cli, ["report", str(recording), "-o", str(out)])
    assert done.exit_code == 0, (done.output, done.exception)
    text = out.read_text()
    assert not {f"U+{ord(one):04X}" for one in text if one in OBEYED and one not in "\t\r"}
