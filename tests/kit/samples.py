"""Snapshots made by hand, as the model makes them: for tests, pictures and the bench.

The numbers obey rate times residence equals entries, so that a screen that shows them
can be judged as a person would judge it.
"""

from __future__ import annotations

import math
from dataclasses import replace

from ctrace.batch import HookInfo, SelfCost
from ctrace.model.causes import datagrams, tcp, whole
from ctrace.model.causes.service import Service
from ctrace.model.snapshot import (
    Cause,
    Counted,
    Culprit,
    Ends,
    Histogram,
    History,
    Holder,
    Memory,
    OwnerView,
    Percentiles,
    Rates,
    Reconciliation,
    Residence,
    Snapshot,
    Table,
    Tuple5,
    Victim,
)
from ctrace.view import format as fmt
from ctrace.view.screen.advice import Remedy

NOW = 1_562_752_987.0
"""10 July 2019, 10:03:07 UTC."""
INIT = 4026531833
NETFILTER = HookInfo(
    "netfilter",
    attached=("ip conntrack confirm", "ipv6 conntrack confirm", "kmem_cache_free", "kfree_skb"),
    blind=("Entries made by ctnetlink are counted, not attributed to a packet.",),
)
NETLINK = HookInfo(
    "netlink",
    attached=("ctnetlink events",),
    note="netfilter: BCC is not installed: install python3-bpfcc (Debian, Ubuntu)",
    blind=(
        "A refused packet has no tuple: only the kernel's counter tells how many there were.",
        "Evictions look like any other deletion.",
        "Which process opened a flow is not known.",
    ),
    drop_tuples=False,
    evictions=False,
    owners=False,
)
LIFE = Histogram(
    edges=tuple(1e-3 * 2**step for step in range(-2, 11)),
    counts=(40, 310, 4_210, 61_400, 88_020, 21_030, 3_900, 640, 120, 41, 12, 3),
)
RESIDENCE = Histogram(
    edges=(1, 10, 30, 60, 90, 110, 118, 119, 120, 121, 125, 150),
    counts=(0, 0, 14, 31, 210, 480, 2_200, 41_000, 132_000, 3_700, 91),
)


def _wave(base: float, length: int = 60, rise: float = 1.0) -> tuple[float, ...]:
    return tuple(
        base * (1 + rise * step / length + 0.06 * math.sin(step * 1.7)) for step in range(length)
    )


def _culprit(key: str, held: int, new: float, total: int, **more: object) -> Culprit:
    proto, _, port = key.rpartition(" ")[2].partition("/")
    values: dict[str, object] = {
        "proto": proto if port else "",
        "port": int(port) if port.isdigit() else None,
        "netns": INIT,
        "netns_name": "init",
        "held": held,
        "share": held / total,
        "new_per_s": new,
        "inserts": int(new * 130),
        "destroys": int(new * 120),
        "table_seconds": held * 118.0,
        "nat": "no",
        "trend": _wave(held / 2),
        "first_seen": NOW - 3_600,
        "residence": Residence(120.0, 120.4, 121.0, int(new * 120)),
    }
    return Culprit(key, **(values | more))  # type: ignore[arg-type]


PHP = OwnerView(
    18_211, "php-fpm", "docker:shop-php-7c9", "php-fpm: pool www --nodaemonize", "opened"
)
STATSD = OwnerView(902, "telegraf", "telegraf.service", "/usr/bin/telegraf", "opened")
RESOLVER = OwnerView(1_001, "app", "shop.service", "/srv/shop/app --listen :8080", "opened")


def incident() -> Snapshot:
    """The table full of TIME_WAIT: port 8063, DNS and metrics refused."""
    total = 65_536
    culprits = (
        _culprit(
            "10.42.3.17 -> tcp/8063",
            54_600,
            455.0,
            total,
            src="10.42.3.17",
            dst="10.42.0.5",
            direction="out",
            drops=1_412,
            drop_per_s=9.3,
            life=Percentiles(0.0042, 0.0081, 0.031, 54_600),
            ends=Ends(expired=54_000, deleted=40),
            assured=1.0,
            unreplied=0.0,
            closed=0.998,
            distinct_src=1,
            owner=PHP,
            life_histogram=LIFE,
            residence_histogram=RESIDENCE,
            states=(("TIME_WAIT", 53_870), ("CLOSE", 112), ("ESTABLISHED", 18)),
            samples=tuple(
                Tuple5(
                    "tcp", "10.42.3.17", "10.42.0.5", 63_518 + step, 8_063,
                    "10.42.0.5", "10.42.3.17", 8_063, 63_518 + step, 0x0E, "TIME_WAIT",
                )
                for step in range(5)
            ),
        ),
        _culprit(
            "10.42.3.0 -> tcp/6379", 4_700, 0.4, total,
            direction="out", life=Percentiles(2_460.0, 7_200.0, 9_000.0, 50), nat="src",
            residence=Residence(), older=4_650, assured=1.0,
            ends=Ends(expired=3, deleted=1), trend=_wave(4_700, rise=0.0),
        ),
        _culprit(
            "127.0.0.1 -> tcp/10248", 1_800, 15.0, total,
            direction="loopback", life=Percentiles(0.0011, 0.002, 0.004, 1_800),
            ends=Ends(expired=1_800), assured=1.0, closed=1.0,
            owner=OwnerView(611, "kubelet", "kubelet.service", "/usr/bin/kubelet", "opened"),
            trend=_wave(1_800, rise=0.0),
        ),
        _culprit(
            "10.42.3.9 -> udp/8125", 1_210, 60.1, total,
            direction="out", life=Percentiles(0.0, 0.0, 0.0, 7_100), unreplied=1.0, nat="dst",
            residence=Residence(22.1, 30.0, 30.2, 7_100),
            ends=Ends(expired=5_400, evicted=1_700), drops=310, drop_per_s=4.0, owner=STATSD,
        ),
        _culprit(
            "fd00:10:42:3::9f21 -> udp/4789", 1_010, 35.0, total,
            direction="out", life=Percentiles(0.0, 0.0, 0.0, 1_000), unreplied=1.0,
            residence=Residence(29.0, 30.0, 30.2, 4_000),
            ends=Ends(expired=3_640, evicted=360), trend=_wave(1_000, rise=0.1),
        ),
        _culprit(
            "10.42.3.17 -> udp/53", 840, 28.0, total,
            direction="out", life=Percentiles(0.0021, 0.009, 5.0, 900), nat="dst",
            residence=Residence(30.0, 30.1, 30.4, 3_000), drops=208, drop_per_s=2.1,
            ends=Ends(expired=2_900, evicted=100), owner=RESOLVER, trend=_wave(700, rise=0.2),
        ),
        _culprit(
            "192.0.2.14 -> tcp/22", 12, 0.1, total,
            direction="in", life=Percentiles(640.0, 900.0, 901.0, 4), trend=_wave(12, rise=0),
            residence=Residence(760.0, 1_020.0, 1_021.0, 4), assured=1.0,
        ),
        _culprit(
            "10.42.3.17 -> icmp", 3, 0.1, total,
            direction="out", life=Percentiles(0.001, 0.001, 0.001, 4),
            residence=Residence(30.0, 30.0, 30.0, 4), trend=_wave(3, rise=0),
        ),
    )  # fmt: skip
    totals = Counted(
        insert=77_142, destroy=70_213, drop=2_114, early_drop=2_160, expired=67_900, deleted=153
    )
    rates = Rates(insert=593.6, destroy=577.2, drop=15.4, early_drop=16.1)
    return Snapshot(
        ts=int(NOW * 1e9),
        host="node-17",
        interval_s=1.0,
        uptime_s=130.0,
        hooks=NETFILTER,
        group="pair",
        sort="held",
        tables=(
            Table(
                INIT, "init", total, total, 65_536, pinned=0.953, pinned_error=0.009,
                totals=totals, rates=rates, full_since=NOW - 72, off_by=Reconciliation(count=3),
            ),
            Table(
                4026532567, "shop-php-7c9", 812, total, 65_536, pinned=0.4,
                totals=Counted(insert=1_310, destroy=498), rates=Rates(insert=8.0, destroy=7.1),
            ),
            Table(4026532801, "metrics", 61, total, 65_536, pinned=0.1),
        ),
        totals=totals,
        rates=rates,
        culprits=culprits,
        culprits_total=1_204,
        held_total=total,
        table_seconds_total=sum(one.table_seconds for one in culprits),
        top={
            "src": (("10.42.3.17", 483.1), ("10.42.3.9", 60.1), ("fd00:10:42:3::9f21", 35.0)),
            "dst": (("10.42.0.5", 455.0), ("10.96.0.10", 88.1), ("fd00:10:42::1", 35.0)),
            "service": (("tcp/8063", 455.0), ("udp/8125", 60.1), ("udp/4789", 35.0)),
            "pair": (("10.42.3.17 -> tcp/8063", 455.0), ("10.42.3.9 -> udp/8125", 60.1)),
        },
        victims=(
            Victim(
                "tcp 10.42.3.17 -> 10.42.0.5:8063", "tcp", "10.42.3.17", "10.42.0.5", 8_063, INIT,
                "init", 1_412, 9.3, 0.0196, owner=PHP,
            ),
            Victim(
                "udp 10.42.3.9 -> 10.42.0.8:8125", "udp", "10.42.3.9", "10.42.0.8", 8_125, INIT,
                "init", 310, 4.0, 0.062, evicted=1_700, owner=STATSD,
            ),
            Victim(
                "udp 10.42.3.17 -> 10.96.0.10:53", "udp", "10.42.3.17", "10.96.0.10", 53, INIT,
                "init", 208, 2.1, 0.07, evicted=100, owner=RESOLVER,
                sample=Tuple5("udp", "10.42.3.17", "10.96.0.10", 42_381, 53),
            ),
            Victim(
                "tcp 192.0.2.14 -> 10.42.3.17:22", "tcp", "192.0.2.14", "10.42.3.17", 22, INIT,
                "init", 4, 0.0, 0.5,
            ),
            Victim(
                "udp fd00:10:42:3::9f21 -> fd00:10:42::1:4789", "udp", "fd00:10:42:3::9f21",
                "fd00:10:42::1", 4_789, INIT, "init", 0, 0.0, 0.0, evicted=360, failed=2,
            ),
        ),
        who=(Holder("pair", "tcp/8063 from 10.42.3.17", 54_600 / total, 54_600, INIT, 1),),
        who_refused=(Holder("src", "10.42.3.17 to 2 services", 0.84, 1_620, INIT, 1),),
        why=_why(culprits, total),
        history=_history(total),
        memory=Memory(used=3_100_000, limit=32 << 20, tracked_keys=1_204),
        cost=SelfCost(cpu=0.018, rss=46 << 20),
    )  # fmt: skip


def _why(culprits: tuple[Culprit, ...], total: int) -> tuple[Cause, ...]:
    """What the product says of these services."""
    table = Table(INIT, "init", total, total, 65_536)
    found = (
        tcp.no_keepalive(_service(culprits[0], table)),
        datagrams.one_way_udp(_service(culprits[3], table)),
    )
    return tuple(one for one in found if one is not None)


def _service(pair: Culprit, table: Table) -> Service:
    """A source's part of a service, as the service that is called by that source alone."""
    owner = pair.owner.comm if pair.owner and pair.owner.role == "opened" else ""
    whole = replace(pair, key=pair.key.rpartition(" ")[2], src="")
    share = pair.held / max(1, table.count)
    return Service(whole, table, share, "", pair.src or "10.42.3.9", 1.0, owner, 1, pair.nat, 0,
                   None, 130.0, ephemeral=(1024, 65535))  # fmt: skip


def _history(limit: int, length: int = 120) -> History:
    counts = tuple(min(limit, int(9_000 + step * 1_180)) for step in range(length))
    return History(
        ts=tuple(NOW - length + step for step in range(length)),
        count=counts,
        insert=tuple(600 + 40 * math.sin(step / 3) for step in range(length)),
        destroy=tuple(min(590.0, step * 12.0) for step in range(length)),
        drop=tuple(15.0 + step % 3 if value == limit else 0.0 for step, value in enumerate(counts)),
        early_drop=tuple(16.0 if value == limit else 0.0 for step, value in enumerate(counts)),
    )


def filling() -> Snapshot:
    """The same host a minute earlier: filling, nothing refused yet."""
    full = incident()
    table = replace(
        full.tables[0], count=41_120, full_since=None, seconds_to_full=71.0,
        seconds_to_full_error=6.0, rates=Rates(insert=593.6, destroy=250.2), totals=Counted(41_000),
    )  # fmt: skip
    return replace(
        full,
        tables=(table, *full.tables[1:]),
        victims=(),
        rates=table.rates,
        totals=table.totals,
        history=replace(
            full.history,
            **{
                name: getattr(full.history, name)[:28]
                for name in ("ts", "count", "insert", "destroy", "drop", "early_drop")
            },
        ),
    )


def _shapeless(first: Culprit, total: int) -> Cause:
    service = _service(first, Table(INIT, "init", total, 262_144, 65_536))
    return whole.shapeless(service, f"most is {service.of}: {service.part}")


def calm() -> Snapshot:
    """A host without trouble."""
    full = incident()
    keep = full.culprits[1:4] + full.culprits[5:7]
    total = 3_120
    culprits = tuple(
        replace(one, held=one.held // 3, share=one.held / 3 / total, drops=0, drop_per_s=0.0)
        for one in keep
    )
    rates = Rates(insert=26.2, destroy=26.0)
    return replace(
        full,
        tables=(
            Table(
                INIT, "init", total, 262_144, 65_536, pinned=0.72, pinned_error=0.021, rates=rates,
                totals=Counted(insert=3_402, destroy=3_380, expired=3_380),
            ),
        ),
        culprits=culprits,
        culprits_total=5,
        held_total=total,
        table_seconds_total=sum(one.table_seconds for one in culprits),
        victims=(),
        rates=rates,
        totals=Counted(insert=3_402, destroy=3_380, expired=3_380),
        why=(_shapeless(culprits[0], total),),
        history=replace(
            full.history,
            count=(3_100,) * 60,
            ts=full.history.ts[-60:],
            insert=tuple(26 + step % 5 for step in range(60)),
            destroy=tuple(26 + (step + 2) % 5 for step in range(60)),
            drop=(0.0,) * 60,
            early_drop=(0.0,) * 60,
        ),
        cost=SelfCost(cpu=0.004, rss=44 << 20),
    )  # fmt: skip


def netlink() -> Snapshot:
    """The incident where BPF is refused: drops without tuples, events lost."""
    full = incident()
    return replace(
        full,
        hooks=NETLINK,
        lost=18_204,
        culprits=tuple(replace(one, owner=None, error=212) for one in full.culprits),
        victims=(),
        tables=(
            replace(full.tables[0], pinned_error=None, off_by=Reconciliation(count=-18_190)),
            *full.tables[1:],
        ),
    )


def remedy() -> Remedy:
    """What is advised against the incident's first culprit."""
    return Remedy(
        f"NOTRACK tcp/8063: safe-with-rules; it frees {fmt.count(54_600)} entries; "
        "fill then 12 % to 17 %",
        good=True,
        reasons=(
            "inet filter input accepts its answers only as ct state established: "
            "untracked they would be dropped, so one accept rule is added there",
        ),
        rules=(
            "table inet ctrace {\n"
            "\tset client_tcp { type inet_service; elements = { 8063 }; }\n"
            "\tchain prerouting {\n\t\ttype filter hook prerouting priority raw;\n"
            "\t\ttcp sport @client_tcp notrack\n\t}\n"
            "\tchain output {\n\t\ttype filter hook output priority raw;\n"
            "\t\ttcp dport @client_tcp notrack\n\t}\n}\n"
            "insert rule inet filter input tcp sport 8063 ct state untracked accept\n"
        ),
        others=("- a keep-alive in the client: one connection instead of 455 a second",),
    )
