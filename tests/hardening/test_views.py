"""Every text of a recording that a stranger may have chosen, through every view and export."""

from __future__ import annotations

import sys
import unicodedata
from dataclasses import replace
from pathlib import Path

import pytest
from click.testing import CliRunner
from kit import synthetic

from ctrace.batch import Names, Netns, Owner
from ctrace.cli import cli
from ctrace.recording.writer import Writer

pytestmark = pytest.mark.slow

OBEYED = [
    chr(code) for code in range(sys.maxunicode)
    if unicodedata.category(chr(code)) in ("Cc", "Cf", "Zl", "Zp") and chr(code) not in "\n"
]  # fmt: skip
"""What a terminal obeys, and what reorders or hides its neighbours."""
BIDI = ("RLO", "LRO", "RLE", "LRE", "RLI", "LRI", "FSI", "PDF", "PDI")
SHOWN = [
    ["report"], ["report", "--markdown"], ["report", "--format", "json"],
    ["replay", "--once"], ["whatif", "--notrack", "tcp/8063"], ["diff"],
    *(["export", "--format", form] for form in ("csv", "jsonl", "openmetrics")),
]  # fmt: skip


def evil(at: int) -> str:
    """A name with a part of all these characters; each is in one of ten."""
    return f"e{at}\x1b[31m\u202e" + "".join(OBEYED[at::10])


@pytest.fixture(scope="module")
def recording(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Hosts, namespaces, processes, units, command lines, addresses, chains, sets, comments."""
    path = tmp_path_factory.mktemp("evil") / "evil.data"
    batches = synthetic.batches(synthetic.traffic(1000, rate=1000))
    owner = Owner((812 << 32) | 5, evil(0), 9, evil(1), evil(2))
    opener = Owner((4242 << 32) | 99, evil(3), 7331, evil(4), evil(5))
    names = Names(
        {synthetic.NETNS: Netns(synthetic.NETNS, evil(6), ("10.9.0.1", evil(7)))},
        {owner.key: owner, opener.key: opener}, {7331: evil(8), 9: evil(1)},
        {(synthetic.NETNS, 6, 8063): owner},
    )  # fmt: skip
    header = replace(synthetic.header(), host=evil(9), kernel=evil(0), facts={
        "net.netfilter.nf_conntrack_max": "65536", f"net.{evil(1)}": evil(2)})  # fmt: skip
    with Writer(str(path), header) as writer:
        for at, batch in enumerate(batches):
            writer.write(replace(batch, names=names) if at == 0 else batch)
        writer.ruleset(synthetic.NETNS, "\n".join([
            f"table inet {evil(3)} {{", f"set {evil(4)} {{ type ipv4_addr; }}",
            f"chain {evil(5)} {{", "type filter hook input priority 0; policy accept;",
            f'iifname "{evil(6)}" tcp dport 8063 accept comment "{evil(7)}"', "}", "}",
        ]))  # fmt: skip
        writer.note(evil(8))
    return path


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
    through = {
        f"U+{ord(one):04X}" for one in text + done.stderr
        if (one in OBEYED and one != "\t") or unicodedata.bidirectional(one) in BIDI
    }  # fmt: skip
    assert not through


def test_the_page_lets_none_through_either(recording: Path, tmp_path: Path) -> None:
    out = tmp_path / "page.html"
    done = CliRunner().invoke(cli, ["report", str(recording), "-o", str(out)])
    assert done.exit_code == 0, (done.output, done.exception)
    text = out.read_text()
    assert not {f"U+{ord(one):04X}" for one in text if one in OBEYED and one not in "\t\r"}
