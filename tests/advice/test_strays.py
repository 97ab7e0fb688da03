"""INVALID packets: whose they are, and why, by a look at packets and at the kernel's count."""

from __future__ import annotations

import os
import socket
import struct
import threading
import time
from collections import Counter
from dataclasses import replace
from typing import Optional

import numpy as np
import pytest

from ctrace.advice.beside import strays
from ctrace.advice.beside.strays import LEAST, MOST, invalid_so_far, sorted_out
from ctrace.beside import Beside, Refusing, Stray
from ctrace.host import ctnetlink
from ctrace.host.ctnetlink import Packet
from ctrace.host.packets import IPV4, IPV6, Seen, parse
from ctrace.lab import Lab
from ctrace.model.causes import strays as causes
from ctrace.model.snapshot import Cause, Table
from ctrace.record import Events, address_bytes, empty
from ctrace.ruleset.told import Told

HERE, THERE = socket.inet_aton("10.0.0.1"), socket.inet_aton("10.0.0.9")
FIN, SYN, RST, ACK = 1, 2, 4, 16


def total(data: bytes) -> int:
    """RFC 1071, the plain way."""
    found = 0
    for at in range(0, len(data), 2):
        found += int.from_bytes(data[at : at + 2].ljust(2, b"\0"), "big")
        found = (found & 0xFFFF) + (found >> 16)
    return found ^ 0xFFFF


def ipv4(proto: int, body: bytes, at: int, *, pseudo: bool = True) -> bytes:
    """A packet from there to here; its body's checksum goes to ``at``."""
    ends = THERE + HERE
    head = ends + struct.pack("!HH", proto, len(body)) if pseudo else b""
    body = body[:at] + struct.pack("!H", total(head + body)) + body[at + 2 :]
    return struct.pack("!BBHHHBBH", 0x45, 0, 20 + len(body), 0, 0, 64, proto, 0) + ends + body


def segment(flags: int, sport: int = 80, dport: int = 4000) -> bytes:
    return ipv4(6, struct.pack("!HHIIBBHHH", sport, dport, 7, 9, 0x50, flags, 999, 0, 0), 16)


def datagram(sport: int, dport: int) -> bytes:
    return ipv4(17, struct.pack("!HHHH", sport, dport, 9, 0) + b"x", 6)


def echo(kind: int, number: int) -> bytes:
    return ipv4(1, struct.pack("!BBHHH", kind, 0, 0, number, 1), 2, pseudo=False)


def error() -> bytes:
    """Port unreachable, about a datagram."""
    return ipv4(1, struct.pack("!BBHI", 3, 3, 0, 0) + datagram(4000, 53)[:28], 2, pseudo=False)


def spoiled(packet: bytes) -> bytes:
    """With another last byte."""
    return packet[:-1] + bytes([packet[-1] ^ 1])


def test_headers_and_checksums_are_read() -> None:
    assert parse(segment(SYN | ACK), IPV4, whole=True) == Seen(
        Packet(6, THERE, HERE, 80, 4000), THERE, SYN | ACK, seq=7, ack=9
    )
    for good in (segment(RST), datagram(53, 4000), echo(0, 7)):
        known, wrong = parse(good, IPV4, whole=True), parse(spoiled(good), IPV4, whole=True)
        assert known is not None
        assert wrong is not None
        assert (known.bad, wrong.bad) == (False, True)
        open_ = parse(spoiled(good), IPV4, whole=False)
        assert open_ is not None
        assert not open_.bad, "a device fills it in later"
    about = parse(error(), IPV4, whole=True)
    assert about == Seen(Packet(17, THERE, HERE, 4000, 53), THERE, error=True)


def test_extension_headers_are_passed_over() -> None:
    ends = address_bytes("2001:db8::9") + address_bytes("2001:db8::1")
    tcp = struct.pack("!HHIIBBHHH", 80, 4000, 7, 9, 0x50, RST, 999, 0, 0)
    hop = struct.pack("!BB6x", 6, 0)
    packet = struct.pack("!IHBB", 6 << 28, len(hop + tcp), 0, 64) + ends + hop + tcp
    found = parse(packet, IPV6, whole=False)
    assert found is not None
    assert (found.packet.sport, found.packet.dport, found.flags) == (80, 4000, RST)


def test_what_is_cut_short_does_no_harm() -> None:
    for packet in (segment(SYN), datagram(1, 2), echo(0, 1)):
        for cut in range(len(packet)):
            parse(packet[:cut], IPV4, whole=True)
            parse(packet[:cut], IPV6, whole=True)


def entry(src: bytes, sport: int, state: int) -> Events:
    row = empty(1)
    row["src"], row["sport"], row["state"] = (
        np.frombuffer(bytes(10) + b"\xff\xff" + src, np.uint8), sport, state)  # fmt: skip
    return row


def why(
    monkeypatch: pytest.MonkeyPatch,
    *seen: Seen,
    known: Optional[dict[Packet, Events]] = None,
    rules: Optional[Told] = None,
    loose: bool = True,
) -> Counter[tuple[str, str, int]]:
    """Reasons, sources and ports of packets, where the table has these entries."""
    entries = known or {}
    monkeypatch.setattr(ctnetlink, "lookup", lambda _, many: [entries.get(one) for one in many])
    found = sorted_out("", seen, rules or Told(), loose)
    return Counter({(one.why, one.src, one.port): n for one, n in found.items()})


def came(flags: int, sport: int = 80, dport: int = 4000) -> Seen:
    return Seen(Packet(6, THERE, HERE, sport, dport), THERE, flags)


def test_what_has_no_entry_and_cannot_begin_one(monkeypatch: pytest.MonkeyPatch) -> None:
    found = why(monkeypatch, came(SYN | ACK), came(FIN | ACK), came(RST), came(ACK), came(SYN))
    assert found == {("syn-ack", "10.0.0.9", 80): 1, ("fin", "10.0.0.9", 80): 1,
                     ("rst", "10.0.0.9", 80): 1}  # fmt: skip
    assert why(monkeypatch, came(ACK), loose=False) == {("ack", "10.0.0.9", 80): 1}


def test_a_reset_that_refuses_a_call_is_no_stray(monkeypatch: pytest.MonkeyPatch) -> None:
    """The kernel deletes the entry with it, so the look finds none."""
    call = Seen(Packet(6, HERE, THERE, 4000, 80), HERE, SYN, out=True)
    assert not why(monkeypatch, call, came(RST | ACK))


def test_a_handshake_of_which_one_direction_is_missing(monkeypatch: pytest.MonkeyPatch) -> None:
    ack, begun = came(ACK, 4000, 80), entry(THERE, 4000, 1)
    assert why(monkeypatch, ack, known={ack.packet: begun}) == {("one-way", "10.0.0.9", 80): 1}
    answer = came(SYN | ACK)
    picked_up = {answer.packet: entry(THERE, 80, 3)}
    assert why(monkeypatch, answer, known=picked_up) == {("one-way", "10.0.0.9", 80): 1}
    half = Told(untracked=frozenset({("tcp", "sport", 80)}))
    assert why(monkeypatch, ack, known={ack.packet: begun}, rules=half) == {
        ("half-notrack", "10.0.0.9", 80): 1
    }
    both = Told(untracked=frozenset({("tcp", "sport", 80), ("tcp", "dport", 80)}))
    assert not why(monkeypatch, answer, rules=both)
    assert not why(monkeypatch, came(ACK), known={came(ACK).packet: entry(THERE, 80, 3)})


def test_a_sequence_number_far_from_what_the_other_side_asks_for(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    answer = Seen(Packet(6, HERE, THERE, 4000, 80), HERE, ACK, out=True, seq=50, ack=1000)
    near, far = replace(came(ACK), seq=2000, ack=60), replace(came(ACK), seq=1 << 30, ack=60)
    known = {near.packet: entry(HERE, 4000, 3)}
    assert not why(monkeypatch, answer, near, known=known)
    assert not why(monkeypatch, answer, far, known=known), "which of the two, nothing shows"
    assert why(monkeypatch, answer, far, near, far, known=known) == {("window", "10.0.0.9", 80): 2}
    wrapped = [replace(answer, ack=5), replace(near, seq=(1 << 32) - 9), near, answer]
    assert not why(monkeypatch, *wrapped, known=known)


def test_translated_packets_are_found_by_the_other_direction(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """What leaves has the address of source NAT, which only the reply's tuple has."""
    leaving = Seen(Packet(6, HERE, THERE, 4000, 80), HERE, FIN | ACK, out=True)
    assert why(monkeypatch, leaving) == {("fin", "10.0.0.1", 80): 1}
    back = Packet(6, THERE, HERE, 80, 4000)
    assert not why(monkeypatch, leaving, known={back: entry(HERE, 1234, 3)})


def test_the_cause_says_whose_and_why() -> None:
    table = Table(1, "init", 10, 1000, 1024)
    cause = Cause("invalid", f"init: 300 packets were INVALID{causes.UNSAID}", ("a", "b"), netns=1)
    found = (Stray("10.0.0.9", "tcp", 80, "syn-ack", 95), Stray("10.0.0.8", "tcp", 81, "fin", 5))
    said = causes.told(cause, table, Beside(1, strays=found))
    assert "; of 100 looked at 95 % are SYN-ACKs without an entry" in said.text
    assert "from 10.0.0.9 (tcp/80); no rule" in said.text
    few = causes.told(cause, table, Beside(1, strays=found[1:]))
    assert few.text == cause.text
    drops = (Refusing("ip t c", 4, "invalid", packets=9, since=9),)
    assert causes.told(cause, table, Beside(1, drops, strays=found[1:])).text.endswith(
        "whose they are and why is not known here; a rule dropped 9 such packets since it was "
        "first read (ip t c, handle 4)"
    )


@pytest.mark.kernel
@pytest.mark.skipif(os.geteuid() != 0, reason="needs root")
def test_a_look_finds_what_the_kernel_counts_as_invalid() -> None:
    """Four kinds from one source, beside calls that are answered and such as are refused."""
    with Lab() as lab:
        client, server = lab.namespace("c"), lab.namespace("s", track=True)
        source, target = lab.link(client, server)
        stop = threading.Event()
        raw = client.socket(socket.AF_INET, socket.SOCK_RAW, socket.IPPROTO_RAW)

        def again(packet: bytes, at: int, pseudo: int) -> bytes:
            """Between the ends of this link."""
            ends = socket.inet_aton(source) + socket.inet_aton(target)
            proto, body = packet[9], packet[20:]
            body = body[:at] + b"\0\0" + body[at + 2 :]
            head = ends + struct.pack("!HH", proto, len(body)) if pseudo else b""
            body = body[:at] + struct.pack("!H", total(head + body)) + body[at + 2 :]
            return packet[:12] + ends + body

        def send() -> None:
            number = 0
            with client.enter():
                while not stop.wait(0.01):
                    number += 1
                    for packet in (
                        again(segment(SYN | ACK, 80, 1024 + number), 16, 1),
                        again(echo(0, number), 2, 0),
                        again(error(), 2, 0),
                        spoiled(again(datagram(2000, 3000 + number), 6, 1)),
                    ):
                        raw.sendto(packet, (target, 0))
                    with socket.socket() as refused:
                        refused.settimeout(1)
                        refused.connect_ex((target, 9))

        sender = threading.Thread(target=send)
        sender.start()
        try:
            found: tuple[Stray, ...] = ()
            deadline = time.monotonic() + 60
            while not found and time.monotonic() < deadline:
                before = invalid_so_far(server.path)
                found = strays.strays(server.path, Told())
                counted = invalid_so_far(server.path) - before
        finally:
            stop.set()
            sender.join()
            raw.close()
    # The server resets what it was said to have asked for: INVALID, too, and no reason of its own.
    assert {(one.why, one.src) for one in found} == {
        ("syn-ack", source), ("reply", source), ("checksum", source), ("error", source)
    }  # fmt: skip
    assert LEAST * counted * 0.5 <= sum(one.packets for one in found) <= MOST * counted
