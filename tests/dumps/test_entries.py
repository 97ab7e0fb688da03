"""Lines of entries: every form that tools print, by both ways of reading, and broken ones."""

from __future__ import annotations

import contextlib
from ipaddress import IPv4Address, IPv6Address
from pathlib import Path
from typing import Any, Optional

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from kit.examples import examples

from ctrace.dumps.entries import columns, lines, xml
from ctrace.dumps.entries.alike import Alike
from ctrace.dumps.entries.values import Chunk
from ctrace.dumps.entries.words import Bad
from ctrace.dumps.opened import open_any
from ctrace.record import TCP_STATES, Status, address_text
from ctrace.recording.format.evidence import parse

NAMES = {1: "icmp", 6: "tcp", 17: "udp", 33: "dccp", 47: "gre", 58: "icmpv6", 89: "unknown",
         132: "sctp"}  # fmt: skip
ports = st.integers(0, 65535)
EXAMPLE: dict[str, Any] = {
    "v6": False, "proto": 6, "left": 63, "state": "TIME_WAIT", "unreplied": False, "assured": True,
    "addresses": [IPv4Address(f"192.0.2.{i}") for i in (1, 2, 2, 1)], "ports": [4000, 80, 80, 4000],
    "mark": 0, "zone": None, "age": None,
}  # fmt: skip


@st.composite
def made(draw: st.DrawFn) -> dict[str, Any]:
    """An entry as the kernel may hold it."""
    v6 = draw(st.booleans())
    proto = draw(st.sampled_from([p for p in NAMES if p != (1 if v6 else 58)]))
    address = (st.integers(0, (1 << (128 if v6 else 32)) - 1)).map(
        IPv6Address if v6 else IPv4Address
    )
    one: dict[str, Any] = {
        "v6": v6,
        "proto": proto,
        "addresses": [draw(address) for _ in range(4)],
        "ports": [draw(ports) for _ in range(4)] if proto not in (89,) else None,
        "left": draw(st.integers(0, 432000)),
        "state": draw(st.sampled_from(TCP_STATES[1:9])) if proto == 6 else None,
        "unreplied": draw(st.booleans()),
        "assured": draw(st.booleans()),
        "mark": draw(st.one_of(st.none(), st.integers(0, (1 << 32) - 1))),
        "zone": draw(st.one_of(st.none(), st.integers(0, 65535))),
        "age": draw(st.one_of(st.none(), st.integers(0, 10**6))),
    }
    if proto in (1, 58):
        ident = one["ports"][0]
        one["ports"] = [ident, 8 << 8, ident, 0]
    return one


def flow(one: dict[str, Any], at: int, form: str) -> str:
    def text(address: Any) -> str:
        return address.exploded if form == "proc" and one["v6"] else str(address)

    src, dst = (text(a) for a in one["addresses"][at : at + 2])
    out = f"src={src} dst={dst} "
    if one["ports"] is None:
        return out
    sport, dport = one["ports"][at : at + 2]
    if one["proto"] in (1, 58):
        return out + f"type={dport >> 8} code={dport & 255} id={sport} "
    if one["proto"] == 47:
        return out + f"srckey=0x{sport:x} dstkey=0x{dport:x} "
    return out + f"sport={sport} dport={dport} "


def line(one: dict[str, Any], form: str, counters: bool, extra: str) -> bytes:
    """As ct_seq_show (proc) or conntrack(8) (list) prints it."""
    name = NAMES[one["proto"]]
    out = ""
    if form == "proc":
        out = f"ipv{6 if one['v6'] else 4}     {10 if one['v6'] else 2} "
    out += f"{name:<8} {one['proto']} {one['left']} "
    out += f"{one['state']} " if one["state"] else ""
    if form == "proc" and one["proto"] == 47:
        out += "timeout=30, stream_timeout=180 "
    count = "packets=3 bytes=18446744073709551615 " if counters else ""
    out += flow(one, 0, form) + count + ("[UNREPLIED] " if one["unreplied"] else "")
    out += flow(one, 2, form) + count + ("[ASSURED] " if one["assured"] else "")
    out += extra
    for word, name in (("mark", "mark"), ("zone", "zone"), ("age", "delta-time")):
        if one[word] is not None:
            out += f"{name}={one[word]} "
    return (out + "use=2").encode()


def expect(one: dict[str, Any], found: columns.Entries, at: int) -> None:
    row = found.events[at]
    got = [address_text(row[n]) for n in ("src", "dst", "reply_src", "reply_dst")]
    want = [str(a) for a in one["addresses"]]
    assert [str(IPv6Address(a)) if one["v6"] else a for a in got] == want
    assert [row[n] for n in ("sport", "dport", "reply_sport", "reply_dport")] == (
        one["ports"] or [0] * 4
    )
    assert row["proto"] == one["proto"]
    assert row["zone"] == (one["zone"] or 0)
    assert bool(row["status"] & Status.SEEN_REPLY) != one["unreplied"]
    assert bool(row["status"] & Status.ASSURED) == one["assured"]
    assert row["state"] == (TCP_STATES.index(one["state"]) if one["state"] else 255)
    assert found.left[at] == one["left"]
    assert found.mark[at] == (-1 if one["mark"] is None else one["mark"])
    assert found.age[at] == (-1 if one["age"] is None else one["age"])


def in_family(one: dict[str, Any]) -> bool:
    """IPv4 in the form of IPv6 is IPv4 in a record."""
    return not (one["v6"] and any(a.ipv4_mapped for a in one["addresses"]))


@pytest.mark.slow
def test_the_last_words_of_conntrack_may_come_within_a_line(tmp_path: Path) -> None:
    """With 2>&1 they are written whenever they are, and what they cut through goes on below."""
    one = line(EXAMPLE, "list", True, "").decode()
    for at in range(1, len(one)):
        path = tmp_path / "both.txt"
        said = "conntrack v1.4.7 (conntrack-tools): 3 flow entries have been shown.\n"
        path.write_text(f"{one}\n{one[:at]}{said}{one[at:]}\n")
        with contextlib.closing(open_any([str(path)])) as recording:
            told = parse(recording.header.facts)
        assert told is not None
        assert told["not_understood"] == 0, one[:at]


@examples(80)
@given(
    st.lists(made().filter(in_family), min_size=1, max_size=20),
    st.sampled_from(["proc", "list"]),
    st.booleans(),
    st.sampled_from(["", "[FASTNAT] [RTCACHE o33/r37] ifw=37 mac=00:00:5e:00:53:01 ",
                     "secctx=system_u:object_r:unlabeled_t:s0 ", "helper=ftp [OFFLOAD] ",
                     "labels=three,five words "]),
)  # fmt: skip
def test_what_is_printed_is_read_back(
    table: list[dict[str, Any]], form: str, counters: bool, extra: str
) -> None:
    text = [line(one, form, counters, extra) for one in table]
    alone, bad = columns.entries([lines.row(one) for one in text])
    assert not bad
    done, together = Alike(str).read(Chunk(b"".join(one + b"\n" for one in text)))
    grey = [one["proto"] == 47 for one in table]
    assert (done | grey).all()  # GRE's keys are hexadecimal, and read one by one
    for name in ("events", "left", "mark", "age", "tag", "time", "user"):
        assert np.array_equal(getattr(alone, name)[done], getattr(together, name)), name
    for at, one in enumerate(table):
        expect(one, alone, at)


@examples(60)
@given(made().filter(in_family))
def test_xml_is_read_back(one: dict[str, Any]) -> None:
    def meta(at: int, direction: str) -> str:
        src, dst = one["addresses"][at : at + 2]
        layer3 = f'<layer3 protonum="{10 if one["v6"] else 2}" protoname="x">'
        out = f'<meta direction="{direction}">{layer3}<src>{src}</src><dst>{dst}</dst></layer3>'
        out += f'<layer4 protonum="{one["proto"]}" protoname="x">'
        if one["ports"] is not None and one["proto"] not in (1, 58):
            first, second = one["ports"][at : at + 2]
            if one["proto"] == 47:
                out += f"<srckey>0x{first:x}</srckey><dstkey>0x{second:x}</dstkey>"
            else:
                out += f"<sport>{first}</sport><dport>{second}</dport>"
        counted = "<counters><packets>7</packets><bytes>18446744073709551615</bytes></counters>"
        return out + f"</layer4>{counted}</meta>"

    own = f"<timeout>{one['left']}</timeout>"
    own += f"<state>{one['state']}</state>" if one["state"] else ""
    own += f"<mark>{one['mark']}</mark>" if one["mark"] is not None else ""
    own += f"<zone>{one['zone']}</zone>" if one["zone"] is not None else ""
    own += "<labels><label>three</label><label>five words</label></labels>"
    own += "<secctx>system_u:object_r:unlabeled_t:s0</secctx>"
    own += "<assured/>" if one["assured"] else ""
    own += "<unreplied/>" if one["unreplied"] else ""
    text = f'<flow>{meta(0, "original")}{meta(2, "reply")}<meta direction="independent">{own}'
    element, rest = xml.next_flow((text + "</meta></flow>\n").encode())
    assert element is not None
    assert rest == b"\n"
    found, bad = columns.entries([xml.row(element)])
    assert not bad
    no_ids = one["proto"] in (1, 58)  # conntrack's XML has no type, code or id
    expect({**one, "age": None, "ports": None if no_ids else one["ports"]}, found, 0)


WHOLE = [
    line({**EXAMPLE, "mark": 4, "zone": 3}, form, counters, extra)
    for form, counters, extra in (
        ("proc", False, ""),
        ("list", True, "helper=ftp [OFFLOAD] "),
        ("list", False, "id=77 [RTCACHE o33/r37] portid=5 "),
    )
]
WHOLE += [b"[1753786144.112233]\t    [NEW] " + WHOLE[1], b"[1753786144]\t[DESTROY] " + WHOLE[2]]
LONG = b"2001:0db8:0000:0000:0000:0000:0000:000"
WHOLE += [WHOLE[0].replace(b"192.0.2.", LONG).replace(b"ipv4", b"ipv6")]


@examples(150)
@given(
    st.lists(
        st.tuples(
            st.sampled_from(WHOLE), st.integers(0, 200), st.integers(0, 3),
            st.sampled_from([b"", b" ", b"0", b"9", b"999", b"=", b"[", b"]", b".", b":", b"a",
                             b"mark=", b"x.mark=4", b"[1.5]", b"[12", b"src=", b"\x00", b"-"]),
        ),
        min_size=1, max_size=12,
    ),
)  # fmt: skip
def test_lines_read_together_are_as_read_alone(
    mutants: list[tuple[bytes, int, int, bytes]],
) -> None:
    """Whatever a line has become: the same entry, or it is left to be read by itself."""
    text = [one[:at] + junk + one[at + gone :] for one, at, gone, junk in mutants]
    done, together = Alike(str).read(Chunk(b"".join(one + b"\n" for one in text)))
    rows = [lines.row(one) for one, well in zip(text, done) if well]
    alone, bad = columns.entries(rows)
    assert not bad
    for name in ("events", "left", "mark", "age", "tag", "time", "user"):
        assert np.array_equal(getattr(alone, name), getattr(together, name)), (name, text)


def test_a_prefix_and_a_reordered_line_are_read() -> None:
    text = b"Jul 29 11:02:03 gw probe[7]: ipv4 2 tcp 6 28 TIME_WAIT dst=192.0.2.1 src=192.0.2.9"
    with pytest.raises(Bad):
        lines.row(text)
    whole = text[: text.index(b"dst=")] + (
        b"src=192.0.2.9 dst=192.0.2.1 sport=1 dport=2 "
        b"src=192.0.2.1 dst=192.0.2.9 sport=2 dport=1 [ASSURED]"
    )
    found, bad = columns.entries([lines.row(whole)])
    assert (len(found), bad, found.left[0]) == (1, {}, 28)


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        ((b"198.51.100.7 ", b"198.51.100.777 "), "address"),
        ((b"sport=63518 ", b"sport=93518 "), "port"),
        ((b"tcp      6 ", b"tcp      266 "), "protocol"),
        ((b"mark=0", b"mark=99999999999"), "mark"),
        ((b"ipv4 ", b"ipv6 "), "family"),
        ((b"src=192.0.2.10 dst=198.51.100.7 sport=8063 dport=63518 ", b""), "cut off"),
    ],
)
def test_a_wrong_line_says_why_and_the_others_stay(
    change: tuple[bytes, bytes], reason: str
) -> None:
    good = (
        b"ipv4     2 tcp      6 28 TIME_WAIT src=198.51.100.7 dst=192.0.2.10 sport=63518 "
        b"dport=8063 src=192.0.2.10 dst=198.51.100.7 sport=8063 dport=63518 [ASSURED] mark=0 use=2"
    )
    wrong = good.replace(*change, 1)
    assert wrong != good
    said: Optional[str] = None
    rows = [lines.row(good), lines.row(good)]
    try:
        rows.insert(1, lines.row(wrong))
        found, bad = columns.entries(rows)
        said = bad[1]
    except Bad as error:
        said = str(error)
        found, _ = columns.entries(rows)
    assert reason in (said or "")
    assert len(found) == 2


@pytest.mark.parametrize("line", [
    b"tcp      6 28 TIME_WAIT src=198.51.100.7 dst=192.0.2.10 sport=63518 dport=8063 "
    b"src=192.0.2.10 dst=198.51.100.7 sport=8063 dport=63518 [ASSURED] mark=0 use=2",
    b"icmp     1 29 src=192.0.2.1 dst=192.0.2.9 type=8 code=0 id=768 packets=1 bytes=84 "
    b"src=192.0.2.9 dst=192.0.2.1 type=0 code=0 id=768 packets=1 bytes=84 mark=0 use=1",
    b"gre      47 179 src=192.0.2.1 dst=192.0.2.9 srckey=0x1b dstkey=0x1a "
    b"src=192.0.2.9 dst=192.0.2.1 srckey=0x1a dstkey=0x1b [ASSURED] mark=0 use=2",
])  # fmt: skip
def test_a_line_that_ends_anywhere_does_not_look_translated(line: bytes) -> None:
    """As of ``cut -c``, a narrow window, or a file that was cut off."""
    cut = [line[:end] for end in range(1, len(line) + 1)]
    rows = []
    for one in cut:
        with contextlib.suppress(Bad):
            rows.append(lines.row(one))
    singly, _ = columns.entries(rows)
    _, together = Alike(str).read(Chunk(b"\n".join(cut) + b"\n"))
    assert len(together) <= len(singly)
    assert 0 < len(singly) < len(line)
    nat = int(Status.SRC_NAT) | int(Status.DST_NAT)
    assert not (singly.events["status"] & nat).any()
    assert not (together.events["status"] & nat).any()
