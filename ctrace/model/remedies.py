"""Remedies as objects: screens, reports, metrics and advice all take them from here.

Commands are shell lines for root inside the namespace that the remedy is for; a view that prints
them adds how to get there. A command that changes a setting comes with one that undoes it.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace
from math import ceil, log2
from typing import Final, Optional

from ctrace.beside import EPHEMERAL
from ctrace.dropping import HOOKS, PRIORITY, Drop, command
from ctrace.model.composition import error
from ctrace.model.snapshot import Culprit, Remedy, Table
from ctrace.record import Status

KEPT: Final = 0.8
"""Part of the closed entries that go, at least, where connections are kept: each client keeps some
open, which are entries, too."""
POINTLESS: Final = 0.02
"""Share of the maximum. A service below it is not worth a rule."""
WHOLE: Final = 0.95
"""Where less than this part of a client's calls is matched, the rules free less than they say."""
BUCKET_BYTES: Final = 8
"""One pointer: struct hlist_nulls_head of nf_conntrack_hash (nf_conntrack_core.c)."""
ENTRY_BYTES: Final = (256, 384)
"""Bytes, where slabs cannot be read: nf_conn without and with accounting or timestamps."""
LARGEST: Final = 1 << 24
"""Entries: no larger table is proposed, because it would take gigabytes."""
TIMEOUTS: Final[dict[str, int]] = {
    "tcp_timeout_syn_sent": 120,
    "tcp_timeout_syn_recv": 60,
    "tcp_timeout_established": 432000,
    "tcp_timeout_fin_wait": 120,
    "tcp_timeout_close_wait": 60,
    "tcp_timeout_last_ack": 30,
    "tcp_timeout_time_wait": 120,
    "tcp_timeout_close": 10,
    "udp_timeout": 30,
    "udp_timeout_stream": 120,
    "icmp_timeout": 30,
    "icmpv6_timeout": 30,
}
"""``net.netfilter.nf_conntrack_*`` and the kernel's defaults in seconds (since Linux 4.x)."""
TUNNELS: Final[dict[str, int]] = {
    "gre_timeout": 30,
    "gre_timeout_stream": 180,
    "generic_timeout": 600,
}
"""The same for protocols that carry others: not every kernel has them all."""
SHORTER: Final[dict[str, int]] = {
    "tcp_timeout_syn_sent": 20,
    "tcp_timeout_syn_recv": 15,
    "tcp_timeout_established": 86400,
    "tcp_timeout_fin_wait": 30,
    "tcp_timeout_close_wait": 60,
    "tcp_timeout_last_ack": 15,
    "tcp_timeout_time_wait": 30,
    "tcp_timeout_close": 5,
    "udp_timeout": 10,
    "udp_timeout_stream": 30,
    "icmp_timeout": 5,
    "icmpv6_timeout": 5,
    "gre_timeout": 10,
    "gre_timeout_stream": 60,
    "generic_timeout": 60,
}
"""What is proposed instead, in seconds: below what answers and retransmissions take nowhere."""
LIMIT_PER_S: Final = 50
"""New connections, or datagrams, of each source: far more than a client of one service needs."""
UNTRACK_ECHO: Final = "untrack-echo"
KEEP: Final = "existing entries keep their timeout"
FAMILY: Final = {True: "ipv6", False: "ipv4"}


def untrackable(
    culprit: Culprit, nat: str, table: Optional[Table], ephemeral: tuple[int, int] = EPHEMERAL
) -> bool:
    """Whether NOTRACK may be suggested for a service: by its entries advice would not refuse it.

    ``nat`` is what was seen on its entries from any source, ``ephemeral`` the ports that the kernel
    chooses from.
    """
    port, calls = culprit.port, culprit.direction in ("out", "mixed")
    if culprit.proto not in ("tcp", "udp") or not port or nat != "no" or not culprit.direction:
        return False  # without a direction advice would not know the role either
    if any(one.status & (Status.HELPER | Status.EXPECTED) for one in culprit.samples):
        return False
    if calls and culprit.proto == "udp" and not culprit.dst:
        return False  # answers are told from strangers by address alone
    own = within((one.sport for one in culprit.samples if one.dport == port), ephemeral)
    if calls and own is not None and own < WHOLE:
        return False
    return table is None or not table.max or culprit.held >= POINTLESS * table.max


def within(ports: Iterable[int], ephemeral: tuple[int, int]) -> Optional[float]:
    """The share of a client's calls that its rules match: those whose ports the kernel chose. None:
    none was seen."""
    (low, high), every = ephemeral, list(ports)
    return sum(low <= port <= high for port in every) / len(every) if every else None


def notrack(culprit: Culprit) -> Remedy:
    """Take a service out of tracking; only where :func:`untrackable`.

    What rules ask of tracking no entry tells; advice tries it out, so that is a condition.
    """
    return Remedy(
        "notrack",
        f"NOTRACK {culprit.proto}/{culprit.port} if advise calls it safe (no NAT seen on it)",
        culprit.netns,
        f"{culprit.proto}/{culprit.port}",
        f"new ones get no entry; {KEEP}",
        frees=(culprit.held, culprit.held),
    )


def keep_alive(culprit: Culprit, text: str = "keep connections alive") -> Remedy:
    """Few long connections instead of many short ones: of entries, those that are closed."""
    share, off = culprit.closed, culprit.composition.closed_error or 0.0
    low, high = (0.0, 1.0) if share is None else (max(0.0, share - off), min(1.0, share + off))
    return Remedy(
        "keep-alive",
        text,
        culprit.netns,
        f"{culprit.proto}/{culprit.port}" if culprit.port else "",
        frees=(round(KEPT * low * culprit.held), round(high * culprit.held)),
    )


def timeout(
    name: str,
    netns: int,
    *,
    old: Optional[float] = None,
    frees: Optional[tuple[int, int]] = None,
    fill_after: Optional[tuple[float, float]] = None,
    detail: str = "",
) -> Optional[Remedy]:
    """A shorter timeout of every connection in a state; None where it is short already.

    ``name`` is as in :data:`SHORTER`; ``old`` what it is now: where that is not known there is
    no command that takes it back.
    """
    new = SHORTER[name]
    before = {**TIMEOUTS, **TUNNELS}[name] if old is None else round(old)
    if before <= new:
        return None
    setting = f"net.netfilter.nf_conntrack_{name}"
    known = "" if old is None else f" from {before} s"
    return Remedy(
        "sysctl-timeout",
        f"shorten nf_conntrack_{name}{known} to {new} s",
        netns,
        detail=f"{detail}{'; ' if detail else ''}for every port; {KEEP}"
        + ("; note what it is before" if old is None else ""),
        frees=frees,
        fill_after=fill_after,
        commands=(f"sysctl -w {setting}={new}",),
        undo=() if old is None else (f"sysctl -w {setting}={before}",),
    )


def delete(
    culprit: Culprit, count: int, *, state: str = "", src: str = "", why: str = ""
) -> Optional[Remedy]:
    """Delete the existing entries: nothing else frees them now."""
    if count <= 0 or culprit.proto not in ("tcp", "udp") or not culprit.port:
        return None
    words = ["conntrack", "-D", "-p", culprit.proto]
    if state:
        words += ["--state", state]
    words += ["--orig-port-dst", str(culprit.port)]
    zone = culprit.composition.zone
    if zone:
        words += ["-w", str(zone)]
    if src:
        families = [FAMILY[":" in src]]
        words += ["-s", src]
    else:
        seen = {":" in one.src for one in culprit.samples} or {False, True}
        families = [FAMILY[six] for six in sorted(seen)]
    whose = f" from {src}" if src else ""
    looked, held = culprit.composition.n, max(culprit.held, count)
    off = round(error(count / held, looked) * held) if looked and state else 0
    return Remedy(
        "delete",
        f"delete them (conntrack -D: {count:,} now)",
        culprit.netns,
        f"{culprit.proto}/{culprit.port}",
        f"deletes about {count:,} {state or 'of its'} entries{whose} at once{why}; a connection "
        "that still lives is taken up again at its next packet, unless NAT changed it or a rule "
        "drops it as not new",
        now=count,
        frees=(max(0, count - off), min(held, count + off)),
        commands=tuple(" ".join([*words[:2], "-f", family, *words[2:]]) for family in families),
    )


def limit(culprit: Culprit, frees: int) -> Remedy:
    """Drop packets to a service that come too fast from one source before they get an entry."""
    one = limits(culprit.proto, (culprit.port or 0,), culprit.netns, frees)
    return replace(one, service=f"{culprit.proto}/{culprit.port}")


def limits(proto: str, ports: Sequence[int], netns: int, frees: int) -> Remedy:
    """The same for several ports, each with rules of its own."""
    drops = [Drop(proto, port, rate=LIMIT_PER_S) for port in ports]
    tables = [f"ctrace_limit_{proto}_{port}" for port in ports]
    names = [f"{proto}/{port}" for port in ports]
    to = f" to each of {', '.join(names)}" if len(names) > 1 else ""
    return Remedy(
        "limit",
        f"limit each source to {LIMIT_PER_S} a second{to} before conntrack",
        netns,
        detail=f"of no use against sources that come once; {KEEP}",
        frees=(0, frees),
        commands=tuple(map(command, drops, tables)),
        undo=tuple(f"nft delete table inet {table}" for table in tables),
        option=" ".join(
            f"--{drop.option} {name}={LIMIT_PER_S}" for drop, name in zip(drops, names)
        ),
    )


def drop_source(src: str, netns: int, held: int) -> Remedy:
    """Drop one source before it gets an entry."""
    drop = Drop(sources=(src,))
    return _dropping(
        drop,
        "ctrace_drop_" + src.replace(".", "_").replace(":", "_"),
        Remedy(
            "drop-source",
            f"stop or slow down {src}, or drop it before conntrack",
            netns,
            detail=f"everything from it, wanted traffic included; {KEEP}",
            frees=(0, held),
            option=f"--{drop.option} {src}",
        ),
    )


def drop_service(culprit: Culprit, held: int) -> Remedy:
    """Drop packets to one port before they get an entry."""
    drop = Drop(culprit.proto, culprit.port or 0)
    return _dropping(
        drop,
        f"ctrace_drop_{culprit.proto}_{culprit.port}",
        Remedy(
            "drop-service",
            f"drop {culprit.proto}/{culprit.port} before conntrack, if nobody serves it",
            culprit.netns,
            f"{culprit.proto}/{culprit.port}",
            f"everything to that port, wanted traffic included; {KEEP}",
            frees=(0, held),
            option=f"--{drop.option} {culprit.proto}/{culprit.port}",
        ),
    )


def _dropping(drop: Drop, table: str, remedy: Remedy) -> Remedy:
    """The rules in a table of their own, which is removed as a whole."""
    return replace(
        remedy, commands=(command(drop, table),), undo=(f"nft delete table inet {table}",)
    )


def untrack_echo(proto: str, netns: int, held: int) -> Remedy:
    """Pings without entries; only where they fare the same (:attr:`ctrace.beside.Beside.echo`)."""
    table = f"ctrace_echo_{proto}"
    match = f"{'icmpv6' if proto == 'icmpv6' else 'icmp'} type {{ echo-request, echo-reply }}"
    chains = "; ".join(
        f"add chain inet {table} {name} {{ type filter hook {hook} priority {PRIORITY}; }}; "
        f"add rule inet {table} {name} {match} notrack"
        for name, hook in HOOKS
    )
    return Remedy(
        UNTRACK_ECHO,
        f"take {proto} echo out of tracking (no NAT seen on it; rehearsed: pings fare the same)",
        netns,
        proto,
        f"requests and replies of this namespace; new ones get no entry; {KEEP}",
        frees=(held, held),
        commands=(f"nft 'add table inet {table}; {chains}'",),
        undo=(f"nft delete table inet {table}",),
    )


def syn_proxy(culprit: Culprit) -> Remedy:
    """Let the kernel answer handshakes: only a completed one gets an entry."""
    table = f"ctrace_synproxy_{culprit.port}"
    hook = "forward" if culprit.direction == "forward" else "input"
    port = f"tcp dport {culprit.port}"
    return Remedy(
        "syn-proxy",
        "a SYN proxy (entries only for finished handshakes)",
        culprit.netns,
        f"tcp/{culprit.port}",
        "needs nf_synproxy; mss and wscale have to be those of the server; nobody else may rely "
        "on loose pick-up of connections meanwhile",
        frees=(0, culprit.held),
        commands=(
            f"nft 'add table inet {table}; "
            f"add chain inet {table} pre {{ type filter hook prerouting priority raw; }}; "
            f"add rule inet {table} pre {port} tcp flags syn notrack; "
            f"add chain inet {table} proxy {{ type filter hook {hook} priority filter; }}; "
            f"add rule inet {table} proxy {port} ct state invalid,untracked synproxy mss 1460 "
            f"wscale 7 timestamp sack-perm; "
            f"add rule inet {table} proxy {port} ct state invalid drop'",
            "sysctl -w net.netfilter.nf_conntrack_tcp_loose=0",
        ),
        undo=(f"nft delete table inet {table}", "sysctl -w net.netfilter.nf_conntrack_tcp_loose=1"),
    )


def larger(
    table: Table, need: float, entry_bytes: tuple[int, int] = ENTRY_BYTES, detail: str = ""
) -> Optional[Remedy]:
    """A larger limit with as many buckets; None where it is large enough, or too large."""
    if not table.max or need <= table.max:
        return None
    size = 1 << ceil(log2(need))
    if size > LARGEST:
        return None
    low, high = (size * each + size * BUCKET_BYTES for each in entry_bytes)
    return Remedy(
        "larger-table",
        f"raise nf_conntrack_max and nf_conntrack_buckets to {size:,}",
        table.netns,
        detail=f"at most {mib(low, high)} when full{detail}",
        commands=_sizes({"max": size, "buckets": size}),
        undo=_sizes({"max": table.max, "buckets": table.buckets or table.max}),
        memory=(low, high),
        initial=True,
    )


def buckets(table: Table) -> Remedy:
    """More hash buckets: shorter chains for every namespace."""
    size = 1 << max(10, ceil(log2(max(table.hashed, table.count, 1) * 2)))
    size = max(size, 1 << ceil(log2(max(2 * table.buckets, 1))))
    memory = size * BUCKET_BYTES
    return Remedy(
        "buckets",
        f"raise nf_conntrack_buckets to {size:,} ({mib(memory, memory)})",
        table.netns,
        detail="for all namespaces; the kernel moves every entry once, within milliseconds",
        commands=_sizes({"buckets": size}),
        undo=_sizes({"buckets": table.buckets}),
        memory=(memory, memory),
        initial=True,
    )


def _sizes(values: Mapping[str, int]) -> tuple[str, ...]:
    return tuple(f"sysctl -w net.netfilter.nf_conntrack_{name}={n}" for name, n in values.items())


def change(text: str, netns: int = 0, service: str = "") -> Remedy:
    """A change to the program or set-up that makes the traffic."""
    return Remedy("change", text, netns, service)


def mib(low: int, high: int) -> str:
    """``12 MiB``, ``12 to 16 MiB``, ``512 KiB``."""
    if high < 1 << 20:
        return f"{round(high / 1024)} KiB"
    first, last = (round(value / (1 << 20)) for value in (low, high))
    return f"{last} MiB" if first == last else f"{first} to {last} MiB"
