"""The table as ctnetlink tells it, against conntrack(8) and against made-up messages."""

from __future__ import annotations

import re
import socket
import struct
import time
from collections import Counter
from typing import Any, Optional

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from kit.examples import examples
from kit.traffic import tcp_connections, tcp_server, udp_flows, udp_server

from ctrace.errors import CtraceError
from ctrace.host import ctnetlink
from ctrace.host.ctnetlink.message import Decoder
from ctrace.host.ctnetlink.table import _bounds
from ctrace.lab import Lab, Node
from ctrace.record import (
    PROTO_NUMBERS,
    STATE_UNKNOWN,
    TCP_STATES,
    Kind,
    Reason,
    Status,
    address_text,
)

LINE = re.compile(
    r"^(?P<family>ipv[46]) +\d+ \S+ +(?P<proto>\d+) (?P<left>\d+) "
    r"(?:(?P<state>[A-Z_0-9]+) )?(?P<rest>.*)$"
)


def listed(node: Node) -> dict[int, dict[str, Any]]:
    """``conntrack -L`` by entry id."""
    entries = {}
    for line in node.run(["conntrack", "-L", "-o", "extended,id"]).splitlines():
        found = LINE.match(line)
        assert found, line
        pairs = re.findall(r"(\w+)=(\S+)", found["rest"])
        entry: dict[str, Any] = {
            "family": 10 if found["family"] == "ipv6" else 2,
            "proto": int(found["proto"]),
            "left": int(found["left"]),
            "state": found["state"],
            "unreplied": "[UNREPLIED]" in line,
            "assured": "[ASSURED]" in line,
        }
        for name, value in pairs:
            if name in entry and name in ("src", "dst", "sport", "dport", "type", "code", "id"):
                # The reply tuple comes second; so does the entry's own id after ICMP's.
                entry["ct" if name == "id" and "reply_id" in entry else f"reply_{name}"] = value
            else:
                entry[name] = value
        ident = entry.get("ct", entry["id"])
        entries[int(ident)] = entry
    return entries


def mixed(lab: Lab) -> Node:
    """A namespace with thousands of entries of every sort that can be made here."""
    a, b = lab.namespace("a", track=True), lab.namespace("b", track=True)
    lab.link(a, b)
    b4, b6 = b.addresses["a"]
    # Nothing is to expire while a slow machine makes the rest.
    for name in ("udp", "udp_timeout_stream", "icmp", "icmpv6", "tcp_timeout_close"):
        setting = name if "timeout" in name else f"{name}_timeout"
        a.sysctl(f"net.netfilter.nf_conntrack_{setting}", 600)
    a.run(
        ["nft", "-f", "-"],
        stdin=(
            "table inet mixed {\n"
            " chain zones { type filter hook output priority -300;"
            " udp sport 30000-30199 ct zone set 7;"
            " udp sport 30200-30299 ct original zone set 8; }\n"
            " chain marks { type filter hook output priority 0;"
            " udp sport 31000-31199 ct mark set 0xabcd; }\n"
            " chain source { type nat hook postrouting priority 100;"
            f" ip daddr {b4} udp sport 32000-32299 snat to :50000-51000; }}\n"
            " chain target { type nat hook output priority -100;"
            f" udp dport 9999 dnat ip to {b4}:8125; }}\n"
            "}\n"
        ),
    )
    with tcp_server(b, 8063), udp_server(b, 8125):
        for target in (b4, b6):
            tcp_connections(a, (target, 8063), 150)
            tcp_connections(a, (target, 8063), 50, reset=True)
            udp_flows(a, (target, 8125), 400, first_port=20000)
            udp_flows(a, (target, 9), 200, first_port=25000)
        udp_flows(a, (b4, 8125), 300, first_port=30000)
        udp_flows(a, (b6, 8125), 300, first_port=30000)
        udp_flows(a, (b4, 8125), 200, first_port=31000)
        udp_flows(a, (b4, 8125), 300, first_port=32000)
        udp_flows(a, (b4, 9999), 100, first_port=33000)
    ctnetlink.fill(a.path, 500, state=7)
    ctnetlink.fill(a.path, 300, state=None, first=1000)
    for family, proto, echo in (
        (socket.AF_INET, socket.IPPROTO_ICMP, 8),
        (socket.AF_INET6, socket.IPPROTO_ICMPV6, 128),
    ):
        with a.socket(family, socket.SOCK_RAW, proto) as raw:
            for ident in range(1, 60):
                # The kernel fills in ICMPv6's checksum; conntrack checks neither going out.
                body = struct.pack(">BBHHH", echo, 0, 0, ident, 1)
                total = sum(struct.unpack(">4H", body))
                body = body[:2] + struct.pack(">H", ~total & 0xFFFF) + body[4:]
                raw.sendto(body, (b4 if family == socket.AF_INET else b6, 0))
        with a.socket(family, socket.SOCK_RAW, 253) as raw:
            raw.sendto(b"experimental", (b4 if family == socket.AF_INET else b6, 0))
    return a


@pytest.mark.kernel
def test_a_dump_is_conntracks_listing_entry_by_entry() -> None:
    with Lab() as lab:
        node = mixed(lab)
        began = time.monotonic()
        table = ctnetlink.read_table(node.path)
        entries = listed(node)
        apart = time.monotonic() - began
        assert len(table.events) == len(entries) == node.count()
        assert len(entries) > 3500
        sorts: Counter[str] = Counter()
        for i, row in enumerate(table.events):
            entry = entries[int(row["ct"])]
            assert (int(row["family"]), int(row["proto"])) == (entry["family"], entry["proto"])
            for side in ("", "reply_"):
                assert address_text(row[f"{side}src"]) == entry[f"{side}src"]
                assert address_text(row[f"{side}dst"]) == entry[f"{side}dst"]
                if "type" in entry:
                    sport = entry[f"{side}id"]
                    dport = int(entry[f"{side}type"]) << 8 | int(entry[f"{side}code"])
                else:
                    sport, dport = entry.get(f"{side}sport", 0), entry.get(f"{side}dport", 0)
                assert (int(row[f"{side}sport"]), int(row[f"{side}dport"])) == (
                    int(sport),
                    int(dport),
                )
            state = TCP_STATES.index(entry["state"]) if entry["proto"] == 6 else STATE_UNKNOWN
            assert row["state"] == state
            assert bool(row["status"] & Status.SEEN_REPLY) is not entry["unreplied"]
            assert bool(row["status"] & Status.ASSURED) is entry["assured"]
            assert row["zone"] == int(entry.get("zone", entry.get("zone_orig", row["zone"])))
            assert table.mark[i] == int(entry.get("mark", 0))
            assert 0 <= table.left[i] - entry["left"] <= apart + 1
            source = entry["reply_dst"] != entry["src"] or (
                entry["proto"] == 17 and entry["reply_dport"] != entry["sport"]
            )
            assert bool(row["status"] & Status.SRC_NAT) is source
            assert bool(row["status"] & Status.DST_NAT) is (entry["reply_src"] != entry["dst"]) or (
                entry["dport"] == "9999"
            )
            for name, holds in (
                ("v6", entry["family"] == 10),
                ("icmp", entry["proto"] in (1, 58)),
                ("generic", entry["proto"] == 253),
                ("zone", row["zone"] != 0),
                ("mark", table.mark[i] != 0),
                ("snat", source),
                ("dnat", bool(row["status"] & Status.DST_NAT)),
                ("unreplied", entry["unreplied"]),
                ("time_wait", entry["state"] == "TIME_WAIT"),
                ("close", entry["state"] == "CLOSE"),
            ):
                sorts[name] += holds
        # The table really held everything that the comparison is about.
        wanted = {"v6", "icmp", "generic", "zone", "mark", "snat", "dnat", "unreplied"}
        assert wanted <= {name for name, n in sorts.items() if n}
        assert sorts["time_wait"] >= 800
        assert sorts["close"] >= 100
        assert (table.events["kind"] == Kind.EXISTING).all()
        assert (table.events["reason"] == Reason.NONE).all()
        assert (table.events["netns"] == node.inum).all()
        assert not table.events["owner"].any()
        assert not table.events["cgroup"].any()
        assert not table.start.any()


@pytest.mark.kernel
def test_times_of_entries_where_the_kernel_keeps_them() -> None:
    with Lab() as lab:
        node = lab.namespace("stamped", track=True)
        node.sysctl("net.netfilter.nf_conntrack_timestamp", 1)
        udp_flows(node, ("127.0.0.1", 9), 5)
        table = ctnetlink.read_table(node.path)
        assert (np.abs(time.time_ns() - table.start.astype(np.int64)) < 60 * 10**9).all()
        assert len(table.start) == 5


@pytest.mark.kernel
def test_fill_delete_flush() -> None:
    with Lab() as lab:
        node = lab.namespace("f", track=True)
        assert ctnetlink.fill(node.path, 5000, timeout=77) == 5000
        assert ctnetlink.fill(node.path, 100, first=4950) == 50  # the rest is there already
        table = ctnetlink.read_table(node.path)
        assert len(table.events) == node.count() == 5050
        assert (table.events["status"] & Status.ASSURED).all()
        assert (table.events["state"] == 3).all()
        one = table.events[17]
        ctnetlink.delete(node.path, one)
        left = ctnetlink.dump(node.path)
        assert len(left) == 5049
        assert one["ct"] not in left["ct"]
        with pytest.raises(CtraceError, match="No such file"):
            ctnetlink.delete(node.path, one)
        ctnetlink.flush(node.path)
        assert node.count() == 0
    with pytest.raises(CtraceError):
        ctnetlink.dump(node.path)


@pytest.mark.kernel
def test_delete_finds_every_sort_of_entry() -> None:
    with Lab() as lab:
        node = mixed(lab)
        table = ctnetlink.dump(node.path)
        _, first = np.unique(table[["family", "proto", "zone"]], return_index=True)
        rows = [row for row in table[first] if row["zone"] != 8]  # one direction's zone: no key
        for row in rows:
            ctnetlink.delete(node.path, row)
        left = set(ctnetlink.dump(node.path)["ct"].tolist())
        assert len(rows) >= 7
        assert not left & {int(row["ct"]) for row in rows}


# -- messages made up ----------------------------------------------------------------------------


def attr(kind: int, value: bytes) -> bytes:
    return struct.pack("=HH", 4 + len(value), kind) + value + bytes(-len(value) % 4)


addresses = st.one_of(st.binary(min_size=4, max_size=4), st.binary(min_size=16, max_size=16))


@st.composite
def flows(draw: st.DrawFn) -> dict[str, Any]:
    """What one message says, and its attributes in an order of their own."""
    src = draw(addresses)
    size = len(src)
    proto = draw(st.sampled_from([6, 17, 1, 58, 132, 253]))
    word, half = st.integers(0, 2**32 - 1), st.integers(0, 2**16 - 1)
    return {
        "src": src,
        "dst": draw(st.binary(min_size=size, max_size=size)),
        "proto": proto,
        "sport": draw(half),
        "dport": draw(half),
        "status": draw(word),
        "id": draw(word),
        "left": draw(st.none() | st.integers(0, 2**31 - 1)),
        "mark": draw(st.none() | word),
        "zone": draw(st.none() | half),
        "state": draw(st.none() | st.integers(0, 10)),
        "start": draw(st.none() | st.integers(0, 2**63)),
        "helper": draw(st.none() | st.binary(min_size=1, max_size=9)),
        "order": draw(st.randoms(use_true_random=False)),
        "portid": draw(word),
        "kind": draw(st.sampled_from([0, 2])),
    }


def message(flow: dict[str, Any], seq: int = 0) -> bytes:
    v6 = len(flow["src"]) == 16
    ip = attr(3 if v6 else 1, flow["src"]) + attr(4 if v6 else 2, flow["dst"])
    ports = attr(1, bytes([flow["proto"]]))
    sport, dport = (struct.pack(">H", flow[name]) for name in ("sport", "dport"))
    if flow["proto"] in (1, 58):
        base = 4 if flow["proto"] == 1 else 7
        ports += attr(base, sport) + attr(base + 1, dport[:1]) + attr(base + 2, dport[1:])
    elif flow["proto"] != 253:
        ports += attr(2, sport) + attr(3, dport)
    tuple_ = attr(1 | 0x8000, ip) + attr(2 | 0x8000, ports)
    parts = [
        attr(1 | 0x8000, tuple_),
        attr(2 | 0x8000, tuple_),
        attr(3, struct.pack(">I", flow["status"])),
        attr(12, struct.pack(">I", flow["id"])),
    ]
    for name, kind, form in (("left", 7, ">I"), ("mark", 8, ">I"), ("zone", 18, ">H")):
        if flow[name] is not None:
            parts.append(attr(kind, struct.pack(form, flow[name])))
    if flow["state"] is not None:
        parts.append(attr(4 | 0x8000, attr(1 | 0x8000, attr(1, bytes([flow["state"]])))))
    if flow["start"] is not None:
        parts.append(attr(20 | 0x8000, attr(1, struct.pack(">Q", flow["start"]))))
    if flow["helper"] is not None:
        parts.append(attr(5 | 0x8000, attr(1, flow["helper"])))
    flow["order"].shuffle(parts)
    body = b"".join(parts)
    head = struct.pack("=IHHII", 20 + len(body), 0x100 | flow["kind"], 2, seq, flow["portid"])
    return head + struct.pack("=BBH", 10 if v6 else 2, 0, 0) + body


def packed(messages: list[bytes]) -> tuple[Any, Any, Any]:
    lengths = np.array([len(one) for one in messages], np.int64)
    sizes = (lengths + 3) & ~3
    starts = np.concatenate([[0], np.cumsum(sizes)[:-1]]).astype(np.int64)
    whole = b"".join(one.ljust(int(size), b"\0") for one, size in zip(messages, sizes, strict=True))
    return np.frombuffer(bytearray(whole), np.uint8), starts, lengths


def mapped(raw: bytes) -> bytes:
    return raw if len(raw) == 16 else bytes(10) + b"\xff\xff" + raw


@examples(150)
@given(st.lists(flows(), min_size=1, max_size=30), st.integers(1, 3))
def test_decoding_says_what_each_message_said(said: list[dict[str, Any]], times: int) -> None:
    said = said * times
    decoder = Decoder()
    for _ in range(2):  # the second time, every layout is known
        got = decoder.decode(*packed([message(flow) for flow in said]))
        for i, flow in enumerate(said):
            row = got.events[i]
            ported = flow["proto"] != 253
            for side in ("", "reply_"):
                assert bytes(row[f"{side}src"]) == mapped(flow["src"])
                assert bytes(row[f"{side}dst"]) == mapped(flow["dst"])
                assert row[f"{side}sport"] == (flow["sport"] if ported else 0)
                assert row[f"{side}dport"] == (flow["dport"] if ported else 0)
            assert row["proto"] == flow["proto"]
            assert row["family"] == (10 if len(flow["src"]) == 16 else 2)
            assert row["status"] == flow["status"]
            assert row["ct"] == flow["id"]
            assert row["zone"] == (flow["zone"] or 0)
            assert row["state"] == (STATE_UNKNOWN if flow["state"] is None else flow["state"])
            assert got.left[i] == (-1 if flow["left"] is None else flow["left"])
            assert got.mark[i] == (flow["mark"] or 0)
            assert got.start[i] == (flow["start"] or 0)
            assert (got.kind[i], got.portid[i]) == (flow["kind"], flow["portid"])


@examples(200)
@given(st.lists(st.binary(min_size=0, max_size=120), max_size=8))
def test_decoding_survives_any_bytes(junk: list[bytes]) -> None:
    messages = [b"\x00" * 20 + one for one in junk]
    got = Decoder().decode(*packed(messages)) if messages else None
    assert got is None or len(got.events) == len(messages)


@examples(100)
@given(st.lists(flows(), min_size=1, max_size=20), st.integers(1, 2**32 - 1), st.data())
def test_bounds_are_the_chain_of_lengths(
    said: list[dict[str, Any]], seq: int, data: st.DataObject
) -> None:
    portid = said[0]["portid"]
    for flow in said:
        flow["portid"] = portid
        if data.draw(st.booleans()):
            flow["id"] = int.from_bytes(struct.pack(">I", seq), "little")  # looks like a header
    whole, starts, lengths = packed([message(flow, seq) for flow in said])
    found = _bounds(whole, seq)
    assert found[0].tolist() == starts.tolist()
    assert found[1].tolist() == lengths.tolist()


def test_the_protocol_numbers_are_those_of_the_record() -> None:
    number: Optional[int] = PROTO_NUMBERS.get("icmpv6")
    assert number == socket.IPPROTO_ICMPV6
