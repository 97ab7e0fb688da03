"""Causes that are not TCP's: tunnels, look-ups, one-way and answered UDP, pings."""

from __future__ import annotations

from dataclasses import replace
from typing import Final, Optional

from ctrace.model import remedies
from ctrace.model.causes.service import ENDED, Service
from ctrace.model.causes.tcp import MOSTLY, SHORT_LIFE, notrack
from ctrace.model.causes.words import duration, percent
from ctrace.model.snapshot import Cause, Remedy
from ctrace.record import Status

TUNNELS: Final = {
    4789: "VXLAN",
    8472: "VXLAN (Linux's old port)",
    4790: "VXLAN-GPE",
    6081: "Geneve",
    4754: "GRE in UDP",
    6635: "MPLS in UDP",
    51820: "WireGuard",
}
TUNNEL_PROTOS: Final = ("ipip", "ipv6", "gre", "esp", "ah")
UDP: Final = ("udp", "udplite")
FEW: Final = 100
"""Entries below which a few look-ups, pings or tunnels are not worth a line."""
TFTP: Final = 69
TRACEROUTE: Final = range(33434, 33534)
"""Ports that traceroute(8) sends to, a port for each probe; ICMP errors answer them."""
ECHO_FLOOD: Final = 500
"""Sources that ping once each: no monitor has as many."""
SERVERS: Final = 3
"""Different name servers in the samples: a client asks the first two or three that it knows."""
PINGS: Final = {"icmp": "icmp_timeout", "icmpv6": "icmpv6_timeout"}


def tunnel(s: Service) -> Optional[Cause]:
    """An overlay's outer packets: the inner flows are the ones worth tracking."""
    name = TUNNELS.get(s.c.port or 0) if s.c.proto == "udp" else None
    if name is None and s.c.proto in TUNNEL_PROTOS:
        name = s.c.proto.upper()
    if name is None or s.c.held < FEW:
        return None
    one_way = s.c.unreplied is not None and s.c.unreplied >= 0.5
    evidence = [f"{s.c.key} is {name}", s.held_line]
    if s.c.unreplied is not None:
        evidence.append(f"{percent(s.c.unreplied)} of {s.basis} never saw a reply")
    how = ", one-way" if one_way else ""
    return s.cause(
        "tunnel",
        f"{s.of}: {s.part} are {name} tunnel underlay{how}; the flows inside are tracked on "
        "their own",
        tuple(evidence),
        notrack(s),
        None if _in_use(s) else _shorter(s, _tunnel_timeout(s)),
    )


def _tunnel_timeout(s: Service) -> str:
    """The timeout after which a tunnel's entries expire."""
    if s.c.proto not in ("gre", "udp"):
        return "generic_timeout"
    return f"{s.c.proto}_timeout{'_stream' if (s.c.assured or 0.0) >= MOSTLY else ''}"


def _in_use(s: Service) -> bool:
    """Whether most of its entries had a packet lately: no timeout ends these."""
    return s.quiet is not None and s.quiet < 0.2


def dns_storm(s: Service) -> Optional[Cause]:
    """Look-ups: every query is a flow that stays for the UDP timeout."""
    if s.c.port != 53 or s.c.proto != "udp" or s.c.held < FEW:
        return None
    if s.c.new_per_s <= 0 and s.c.inserts < FEW:
        return None
    served = s.c.direction == "in"
    silent = s.judged >= ENDED and (s.c.unreplied or 0.0) >= 0.9
    what = "DNS look-ups that it answers" if served else "DNS look-ups"
    if s.c.direction == "mixed":
        what = "DNS look-ups, those that it answers and its own"
    helps = () if served else _fewer(s)
    if silent:
        what = "DNS look-ups that nobody answers"
        asked = "this host" if served else s.c.dst or "who is asked"
        helps = (f"find out why {asked} does not answer on udp/53",)
    cause = s.cause(
        "dns-storm",
        f"{s.of}: {s.part} are {', '.join((what, *s.pace('a second')))}{s.they}"
        f"{s.raised('udp_timeout')}",
        (
            s.held_line,
            s.ends_line,
            f"{percent(s.c.unreplied)} of {s.basis} never saw a reply",
            _nat(s),
        ),
        *(remedies.change(one, s.c.netns, s.c.key) for one in helps),
        (None if silent else notrack(s)) or _shorter(s, "udp_timeout"),
    )
    return replace(cause, load=not silent)


def _fewer(s: Service) -> tuple[str, ...]:
    """What makes fewer look-ups: who asks ever other servers is a resolver itself."""
    if s.c.direction == "mixed":  # it is a resolver itself
        return ("a larger cache",)
    if s.c.direction == "out" and len({one.dst for one in s.c.samples}) >= SERVERS:
        return ("a larger cache, or one resolver to forward to, instead of all these servers",)
    where = "on the host" if s.c.direction in ("out", "loopback") else "on the clients' side"
    return (f"a caching resolver {where}", "fewer search domains")


def one_way_udp(s: Service) -> Optional[Cause]:
    """Datagrams that nobody answers: metrics, logs, telemetry."""
    if s.c.proto not in UDP or s.judged < ENDED:
        return None
    if s.c.unreplied is None or s.c.unreplied < 0.9:
        return None
    requests = _known(s)
    what = f"one-way UDP: {requests}" if requests else "one-way UDP"
    return s.cause(
        "one-way-udp",
        f"{s.of}: {s.part} are {what}{s.they}{s.raised('udp_timeout')}",
        (
            s.held_line,
            f"{percent(s.c.unreplied)} of {s.basis} never saw a reply",
            s.ends_line,
            _nat(s),
        ),
        notrack(s),
        remedies.change("send from one fixed source port", s.c.netns, s.c.key)
        if (s.c.direction in ("out", "loopback") or s.alone) and not requests
        else None,
        _shorter(s, "udp_timeout"),
    )


def _known(s: Service) -> str:
    """Probes that only errors answer, and requests whose answers come from another port, so that
    they are entries of their own."""
    if s.c.samples and all(one.dport in TRACEROUTE for one in s.c.samples):
        return "probes of traceroute, which only ICMP errors answer"
    answers = "whose answers come from another port, as entries of their own"
    if s.c.port == TFTP:
        return f"TFTP requests, {answers}"
    if s.samples_have(Status.HELPER):
        return f"requests that a conntrack helper follows, {answers}"
    return ""


def answered_udp(s: Service) -> Optional[Cause]:
    """Short exchanges, or streams, that stay for their timeout after the last datagram."""
    c = s.c
    if c.proto not in UDP or s.judged < 5 * ENDED or c.unreplied is None or c.unreplied > 0.3:
        return None
    streams = _streams(s)
    assured = (c.assured or 0.0) >= MOSTLY
    quic = ", as QUIC has" if c.port == 443 else ""
    what = f"UDP streams of both ways{quic}" if streams else "answered UDP requests"
    used = streams and _in_use(s)
    over = "of use only for streams that have ended" if streams and s.quiet is None else ""
    if streams is None:
        what, over = "answered UDP flows", "of use only for those that are over"
    name = f"udp_timeout{'_stream' if assured else ''}"
    in_use = (
        f"{percent(1 - s.quiet)} had a packet in the last {duration(s.long)}"
        if (s.quiet is not None)
        else ""
    )
    return s.cause(
        "udp-streams" if streams else "answered-udp",
        f"{s.of}: {s.part} are {what}{s.they}{s.raised(name)}",
        (
            s.held_line,
            f"{percent(c.unreplied)} of {s.basis} never saw a reply",
            in_use,
            s.expected_line,
            s.ends_line,
            _nat(s),
        ),
        None if used else _shorter(s, name, over),
        notrack(s),
    )


def _streams(s: Service) -> Optional[bool]:
    """Whether they are streams rather than single exchanges; None where neither can be shown."""
    c = s.c
    assured, once = (c.assured or 0.0) >= MOSTLY, c.composition.once
    if once is not None and c.held >= FEW:
        if once >= MOSTLY:
            return False
        if once < 0.3:
            return True
    stays, lives = c.residence.p50, c.life.p50
    if stays is None or lives is None:
        # of old ones only this is known: a packet after the first answer made them ASSURED
        return True if assured else None
    if assured and lives > SHORT_LIFE:
        return True
    return False if lives <= SHORT_LIFE and stays >= 4 * lives else None


def pings(s: Service) -> Optional[Cause]:
    """ICMP echo: every id is an entry of its own, and neighbours that don't answer keep it."""
    name = PINGS.get(s.c.proto)
    if name is None or s.c.held < FEW or (s.c.new_per_s <= 0 and s.c.inserts < FEW):
        return None
    silent = s.c.unreplied is not None and s.judged >= ENDED
    answers = f", {percent(s.c.unreplied)} unanswered" if silent else ""
    what = f"pings ({'ICMPv6' if s.c.proto == 'icmpv6' else 'ICMP'} echo)"
    fewer = "ping less often, or with one id for each target"
    flood = s.flooded(ECHO_FLOOD)
    if flood:
        what += " of ever new sources, hardly an entry each (ping flood)"
        fewer = "limit echo requests before conntrack, or drop them upstream"
    cause = s.cause(
        "pings",
        f"{s.of}: {s.part} are {', '.join((what, *s.pace('new ids a second')))}{answers}"
        f"{s.they}{s.raised(name)}",
        (s.held_line, s.ends_line, "every id and target is an entry of its own"),
        _shorter(s, name),
        remedies.untrack_echo(s.c.proto, s.c.netns, s.c.held) if s.nat == "no" else None,
        remedies.change(fewer, s.c.netns, s.c.key),
    )
    return replace(cause, load=not flood and (not silent or (s.c.unreplied or 0.0) < MOSTLY))


def _shorter(s: Service, name: str, detail: str = "") -> Optional[Remedy]:
    return remedies.timeout(name, s.c.netns, old=s.timeout_of(name), detail=detail)


def _nat(s: Service) -> str:
    return "no NAT seen on it" if s.nat == "no" else f"{s.nat} NAT seen on it"
