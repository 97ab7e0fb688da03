"""Files from strangers: broken, mutated, packed to burst, or meant for the terminal."""

from __future__ import annotations

import bz2
import gzip
import io
import lzma
import os
import random
import tarfile
from pathlib import Path

import pytest
from click.testing import CliRunner

from ctrace.cli import cli
from ctrace.dumps import decoded, files
from ctrace.dumps.opened import open_any
from ctrace.errors import CtraceError
from ctrace.record import Kind
from ctrace.recording.format.evidence import parse

pytestmark = pytest.mark.slow

ENTRY = (
    b"ipv4     2 tcp      6 28 TIME_WAIT src=198.51.100.7 dst=192.0.2.10 sport=63518 dport=8063 "
    b"src=192.0.2.10 dst=198.51.100.7 sport=8063 dport=63518 [ASSURED] mark=0 zone=0 use=2\n"
)
SEED = (
    b"[root@gw ~]# dmesg | tail\n"
    b"[  100.752270] nf_conntrack: table full, dropping packet\n"
    b"[  105.728802] net_ratelimit: 1367 callbacks suppressed\n"
    b"[root@gw ~]# cat /proc/net/nf_conntrack\n" + ENTRY +
    b"ipv6     10 icmpv6   58 0 src=2001:db8::1 dst=2001:db8::e0 type=128 code=0 id=56516 "
    b"[UNREPLIED] src=2001:db8::e0 dst=2001:db8::1 type=129 code=0 id=56516 mark=0 use=2\n"
    b"[1753786144.112233]\t    [NEW] udp      17 30 src=192.0.2.10 dst=203.0.113.53 sport=42381 "
    b"dport=53 [UNREPLIED] src=203.0.113.53 dst=192.0.2.10 sport=53 dport=42381\n"
    b"[1753786164.112233]\t[DESTROY] udp      17 src=192.0.2.10 dst=203.0.113.53 sport=42381 "
    b"dport=53 [UNREPLIED] src=203.0.113.53 dst=192.0.2.10 sport=53 dport=42381\n"
    b'<flow type="new"><meta direction="original"><layer3 protonum="2" protoname="ipv4">'
    b"<src>1.1.1.1</src><dst>2.2.2.2</dst></layer3><layer4 protonum=\"6\" protoname=\"tcp\">"
    b"<sport>10</sport><dport>20</dport></layer4></meta></flow>\n"
    b"cpu=0  \tfound=0 invalid=4 insert=0 insert_failed=0 drop=7 early_drop=3 error=0\n"
    b"net.netfilter.nf_conntrack_max = 65536\nnet.netfilter.nf_conntrack_count = 3\n"
    b"nf_conntrack          105702  6 xt_CT,nf_nat,nf_nat_ipv4\n"
    b"2019-07-29T11:02:03+0200 gw kernel: nf_conntrack: table full, dropping packet\n"
    b"*raw\n:PREROUTING ACCEPT [0:0]\n-A PREROUTING -p tcp --dport 80 -j CT --notrack\nCOMMIT\n"
    b"table inet f {\n\tchain c {\n\t\taccept\n\t}\n}\n"
    b"conntrack v1.4.7 (conntrack-tools): 2 flow entries have been shown.\n"
    b"tcp LISTEN 0 128 0.0.0.0:8063 0.0.0.0:* users:((\"nginx\",pid=812,fd=6))\n"
)  # fmt: skip
MUTANTS = int(os.environ.get("DUMP_MUTANTS", "300"))


ODD = [b"9" * 40, b"=", b"src=", b"[", b"]", b"\n", b"\x00", b"-1", b"\xff\xfe", b"99999999999",
       b"<flow", b"</flow>", b"{", b"\x1b[31m", b"\xc2\xa0", b"\xef\xbb\xbf", b"\n...\n", b"cut",
       b"# conntrack -D\n", b"~ # cat /proc/sys/net/netfilter/nf_conntrack_{count,max,max}\n",
       b"Mon Jul 29 11:02:03 CEST 2024\n", b" in netns 4026532999"]  # fmt: skip


def mutated(text: bytes, rng: random.Random) -> bytes:
    """A few changes of the kinds that make parsers stumble."""
    data = bytearray(text)
    for _ in range(rng.randint(1, 12)):
        at = rng.randrange(len(data) + 1)
        what = rng.randrange(7)
        if what == 0 and data:
            data[min(at, len(data) - 1)] = rng.randrange(256)
        elif what == 1:
            del data[at : at + rng.randint(1, 200)]
        elif what == 2:
            other = rng.randrange(len(text))
            data[at:at] = text[other : other + rng.randint(1, 400)]
        elif what == 3:
            data[at:at] = rng.choice(ODD)
        elif what == 4:
            data[at:at] = rng.choice([b"\x1b]0;owned\x07", b"\xe2\x80\xae", b"\x1b[31m"])
        elif what == 5:
            data = data[:at]
        else:
            data += data[at : at + 500]
    return bytes(data)


def test_mutants_end_with_a_report_or_one_line(tmp_path: Path) -> None:
    rng = random.Random(18)
    path = tmp_path / "mutant.txt"
    for i in range(MUTANTS):
        path.write_bytes(mutated(SEED, rng))
        try:
            with open_any([str(path)]) as recording:  # type: ignore[attr-defined]
                events = sum(len(batch.events) for batch in recording.batches())
                said = parse(recording.header.facts)
                assert not recording.missing
        except CtraceError as error:
            said, events = {"error": str(error)}, 0
        assert said is not None, i
        assert events <= 100
        assert "\x1b" not in str(said)


def test_what_the_seed_tells(tmp_path: Path) -> None:
    """The mutants above begin as something that is understood from its first line to its last."""
    path = tmp_path / "seed.txt"
    path.write_bytes(SEED)
    with open_any([str(path)]) as recording:  # type: ignore[attr-defined]
        said = parse(recording.header.facts)
        rules = [text for _, text in recording.rulesets()]
    assert said is not None
    assert [line for _, line, _ in said["unread"]] == [9]
    # The message with another kind of time may be one of the two before it.
    assert (said["refused_at_least"], said["max"], said["count"]) == (1368, 65536, 3)
    assert said["kernel_counted"]["drop"] == 7
    assert "--notrack" in rules[0]


def test_reports_let_no_control_byte_through(tmp_path: Path) -> None:
    name = tmp_path / "evil\x1b]0;owned\x07.txt"
    name.write_bytes(
        SEED
        + b"\x1b[31mevil line \xe2\x80\xae\n"
        + b"Linux gw\x1b[31m 3.10.0\x07 #1 SMP\n"
        + b"nf_conntrack 1 1 evil\x1b[31m\n"
    )
    for verb in (["report"], ["replay", "--once"], ["advise"], ["export", "--to", "jsonl"]):
        done = CliRunner().invoke(cli, [*verb, str(name)])
        assert done.exit_code == 0, (verb, done.output, done.exception)
        assert not any(c in done.output for c in "\x1b\x07\u202e"), verb


def bomb(kind: str) -> bytes:
    zeros = bytes(1 << 20)
    if kind == "gzip":
        out = io.BytesIO()
        with gzip.GzipFile(fileobj=out, mode="wb", compresslevel=9) as file:
            for _ in range(300):
                file.write(zeros)
        return out.getvalue()
    pack = lzma.LZMACompressor(preset=0) if kind == "xz" else bz2.BZ2Compressor()
    return b"".join(pack.compress(zeros) for _ in range(300)) + pack.flush()


@pytest.fixture
def taken(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """How many bytes were taken from all budgets: the only element."""
    bytes_taken = [0]
    take = files._Budget.take

    def counting(self: files._Budget, name: str, n: int) -> None:
        bytes_taken[0] += n
        take(self, name, n)

    monkeypatch.setattr(files._Budget, "take", counting)
    return bytes_taken


@pytest.mark.parametrize("kind", ["gzip", "xz", "bzip2"])
def test_a_bomb_is_refused_before_it_has_unfolded(
    tmp_path: Path, kind: str, taken: list[int]
) -> None:
    path = tmp_path / "bomb"
    path.write_bytes(bomb(kind))
    with pytest.raises(CtraceError, match="times its size"):
        open_any([str(path)])
    assert taken[0] < 200 << 20


def test_a_bomb_in_an_archive_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "evidence.tar"
    inner = gzip.compress(ENTRY) + bomb("gzip")  # without an entry it is passed over
    with tarfile.open(path, "w") as archive:
        member = tarfile.TarInfo("proc/net/nf_conntrack.gz")
        member.size = len(inner)
        archive.addfile(member, io.BytesIO(inner))
    with pytest.raises(CtraceError, match="times its size"):
        open_any([str(path)])


def test_what_has_no_ends_of_lines_is_not_read_to_its_end(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, taken: list[int]
) -> None:
    path = tmp_path / "data" / "blob"
    path.parent.mkdir()
    path.write_bytes(b"x" * (8 << 20))
    with pytest.raises(CtraceError, match="contains nothing about conntrack"):
        open_any([str(path.parent)])
    assert 0 < taken[0] < 4 << 20
    monkeypatch.setattr(decoded, "NO_TEXT", 4 << 20)
    with pytest.raises(CtraceError, match="blob is not text: most of it has no ends of lines"):
        open_any([str(path)])


def test_files_of_a_folder_are_counted_before_they_are_read(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in "abcd":
        (tmp_path / name).write_bytes(ENTRY)
    monkeypatch.setattr(files, "MEMBERS", 3)
    monkeypatch.delattr(files, "_open")
    with pytest.raises(CtraceError, match="holds more than 3 files: name the ones you mean"):
        open_any([str(tmp_path)])


def test_packed_as_people_pack(tmp_path: Path) -> None:
    for name, pack in (("a.gz", gzip.compress), ("a.xz", lzma.compress), ("a.bz2", bz2.compress)):
        path = tmp_path / name
        path.write_bytes(pack(ENTRY) + pack(ENTRY.replace(b"63518", b"63519")))
        with open_any([str(path)]) as recording:  # type: ignore[attr-defined]
            kinds = [int(k) for batch in recording.batches() for k in batch.events["kind"]]
        assert kinds.count(Kind.EXISTING) == 2, name


def test_a_file_that_is_cut_off_says_so(tmp_path: Path) -> None:
    for name, pack in (("a.gz", gzip.compress), ("a.xz", lzma.compress), ("a.bz2", bz2.compress)):
        path = tmp_path / name
        path.write_bytes(pack(b"".join(os.urandom(4000) + ENTRY for _ in range(9)))[:-2000])
        with pytest.raises(CtraceError, match=r"cannot read .*"):
            open_any([str(path)])


def test_what_cannot_be_read_of_a_bundle_is_named_and_the_rest_told(tmp_path: Path) -> None:
    folder, cut = tmp_path / "host", tmp_path / "host.tar"
    folder.mkdir()
    (folder / "a.gz").write_bytes(gzip.compress(os.urandom(4000))[:-2000])
    (folder / "b.xz").write_bytes(b"\xfd7zXZ\0" + bytes(40))
    (folder / "nf_conntrack").write_bytes(ENTRY)
    with (folder / "sparse").open("wb") as file:
        file.truncate(1 << 40)
    archive(cut, [])
    with tarfile.open(cut, "a") as tar:
        tar.add(folder / "a.gz", "a.gz")
    cut.write_bytes(cut.read_bytes()[: tarfile.BLOCKSIZE * 4])
    for given, names in ((folder, ["a.gz", "b.xz", "sparse"]), (cut, ["host.tar"])):
        with open_any([str(given)]) as recording:  # type: ignore[attr-defined]
            said = parse(recording.header.facts)
        assert said is not None
        assert said["entries"] == 1
        assert [line for _, line, _ in said["unread"]] == [0] * len(names), said["unread"]
        shown = CliRunner().invoke(cli, ["report", str(given)], env={"COLUMNS": "500"}).output
        assert all(name in shown for name in names), shown
    (folder / "nf_conntrack").unlink()
    with pytest.raises(CtraceError, match=r"^cannot read a\.gz: "):
        open_any([str(folder)])


def test_links_and_devices_of_an_archive_are_passed_over(tmp_path: Path) -> None:
    path = tmp_path / "evidence.tar.gz"
    with tarfile.open(path, "w:gz") as archive:
        for name, kind in (("a", tarfile.SYMTYPE), ("b", tarfile.LNKTYPE), ("c", tarfile.CHRTYPE)):
            member = tarfile.TarInfo(f"../../{name}")
            member.type, member.linkname = kind, "/etc/shadow"
            archive.addfile(member)
        member = tarfile.TarInfo("../../proc/net/nf_conntrack")
        member.size = len(ENTRY)
        archive.addfile(member, io.BytesIO(ENTRY))
    with open_any([str(path)]) as recording:  # type: ignore[attr-defined]
        assert sum(len(batch.events) for batch in recording.batches()) >= 1
    assert sorted(tmp_path.iterdir()) == [path]


def test_a_long_line_costs_no_memory_and_is_told(tmp_path: Path) -> None:
    path = tmp_path / "long.txt"
    path.write_bytes(ENTRY + b"a" * (8 << 20) + b"\n" + ENTRY.replace(b"63518", b"63519"))
    with open_any([str(path)]) as recording:  # type: ignore[attr-defined]
        said = parse(recording.header.facts)
    assert said is not None
    assert (said["entries"], said["not_understood"]) == (2, 1)
    assert said["unread"][0][1] == 2


def test_a_pipe_that_nobody_feeds_is_given_up(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(files, "WAIT", 50)
    path = tmp_path / "pipe"
    os.mkfifo(path)
    with pytest.raises(CtraceError, match="nothing came through"):
        open_any([str(path)])


LONG = {
    "banner": b"-" * 60_000 + b"x",
    "counters": b"cpu=0 " + b"a=1" * 20_000 + b"!",
    "netstat": b"tcp 0 0 0.0.0.0:80 0.0.0.0:* LISTEN " + b" " * 60_000 + b"x",
    "prompt": b"a@" + b"b" * 60_000,
    "entry": b"src= dst= " + b"tcp 6 1 " * 7_000,
    "element": b"<flow>" + b'<meta direction="original">' * 2_000 + b"</flow>",
    "settings": b"net." + b"a." * 30_000 + b" !",
    "modules": b"a" * 60_000 + b" 1 1 ",
}


@pytest.mark.parametrize("kind", LONG)
@pytest.mark.timeout(60)
def test_no_pattern_loses_itself_in_a_long_line(tmp_path: Path, kind: str) -> None:
    """A hundred of each: one that goes back and forth over 60 kB would take hours."""
    path = tmp_path / "long.txt"
    path.write_bytes(ENTRY + (LONG[kind] + b"\n") * 100)
    with open_any([str(path)]) as recording:  # type: ignore[attr-defined]
        said = parse(recording.header.facts)
    assert said is not None
    assert said["entries"] == 1


def archive(path: Path, members: list[tarfile.TarInfo], kind: int = tarfile.PAX_FORMAT) -> Path:
    """A tar of one good text, and of members that say more of themselves than they hold."""
    with tarfile.open(path, "w", format=kind) as tar:
        good = tarfile.TarInfo("proc/net/nf_conntrack")
        good.size = len(ENTRY)
        tar.addfile(good, io.BytesIO(ENTRY))
        for member in members:
            tar.addfile(member)
    return path


@pytest.mark.parametrize("when", ["inf", "-inf", "nan", "1e300", "-1e18", "99999999999"])
def test_a_time_that_is_none_is_not_known(tmp_path: Path, when: str) -> None:
    late = tarfile.TarInfo("late")
    late.pax_headers = {"mtime": when}
    path = archive(tmp_path / "a.tar", [late])
    assert [text.modified for text in files.texts([str(path)])] == [0.0, None]
    done = CliRunner().invoke(cli, ["import", str(path), "-o", str(tmp_path / "out")])
    assert done.exit_code == 0, done.output


@pytest.mark.parametrize(
    "kind", [tarfile.XHDTYPE, tarfile.XGLTYPE, tarfile.GNUTYPE_LONGNAME, tarfile.GNUTYPE_LONGLINK]
)
def test_a_header_of_any_size_is_not_read(
    tmp_path: Path, kind: bytes, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It would be read in one piece; here it is made of holes, which a real one need not be."""
    monkeypatch.setattr(files, "_check_holes", lambda *_: None)
    header = tarfile.TarInfo("header")
    header.type, header.size = kind, 8 << 30
    path = tmp_path / "a.tar"
    with path.open("wb") as file:
        file.write(header.tobuf(tarfile.GNU_FORMAT))
        file.truncate(header.size)
    with pytest.raises(CtraceError, match="a header in it is larger than any name"):
        list(files.texts([str(path)]))


def test_holes_are_not_read(tmp_path: Path) -> None:
    """GNU's and POSIX' way to store a file of a terabyte in a block."""
    holes = tarfile.TarInfo("proc/net/nf_conntrack")
    holes.pax_headers = {"GNU.sparse.size": str(1 << 40), "GNU.sparse.map": "0,0",
                         "GNU.sparse.numblocks": "1"}  # fmt: skip
    path = archive(tmp_path / "a.tar", [holes])
    with open_any([str(path)]) as recording:  # type: ignore[attr-defined]
        said = parse(recording.header.facts)
    assert said is not None
    ((_, line, why),) = said["unread"]
    assert (said["entries"], line) == (1, 0)
    assert "nearly all holes" in why


def test_a_file_of_holes_is_not_read(tmp_path: Path) -> None:
    path = tmp_path / "holes"
    with path.open("wb") as file:
        file.write(ENTRY)
        file.truncate(1 << 40)
    for given in (path, tmp_path):
        with pytest.raises(CtraceError, match="nearly all holes"):
            open_any([str(given)])


def test_blank_lines_cost_nothing_and_count(tmp_path: Path) -> None:
    """A text of 16 kB may unfold to 64 million of them."""
    path = tmp_path / "blank.gz"
    path.write_bytes(gzip.compress(ENTRY + b"\n" * (8 << 20) + b"what\n" + ENTRY + b"\n\nwhat\n"))
    with open_any([str(path)]) as recording:  # type: ignore[attr-defined]
        said = parse(recording.header.facts)
    assert said is not None
    assert [line for _, line, _ in said["unread"]] == [(8 << 20) + 2, (8 << 20) + 6]
    assert said["lines"] == (8 << 20) + 6


def test_archives_in_archives_end(tmp_path: Path) -> None:
    path = archive(tmp_path / "0.tar", [])
    for depth in range(1, files.NESTED + 1):
        inner = path.read_bytes()
        path = tmp_path / f"{depth}.tar"
        member = tarfile.TarInfo(f"{depth - 1}.tar")
        member.size = len(inner)
        with tarfile.open(path, "w") as tar:
            tar.addfile(member, io.BytesIO(inner))
        texts = files.texts([str(path)])
        if depth < files.NESTED:
            assert [text.name for text in texts] == ["proc/net/nf_conntrack"]
        else:
            with pytest.raises(CtraceError, match="5th archive"):
                list(texts)
