"""The stage: three private namespaces, one of them with a table that is nearly full.

``nf_conntrack_max`` is one number for the whole host, compared with each namespace's
own count, and only init may write it. The scene leaves it alone: it fills its own
namespace's table, up to a few thousand free places, with entries that stand for idle
connections. What the screen shows is those free places: a small table. With
``lower_max`` the number itself is lowered instead, and put back by a watchdog that
outlives this process.
"""

from __future__ import annotations

import json
import subprocess
import threading
from collections import Counter
from collections.abc import Iterator
from dataclasses import replace
from typing import TYPE_CHECKING, Final, Optional

from ctrace import interpreter
from ctrace.batch import Batch, Clock, HookInfo, Netns
from ctrace.demo.limit import LoweredLimit
from ctrace.errors import CtraceError
from ctrace.filters import Filter, parse_network
from ctrace.lab import Lab, Node
from ctrace.record import Kind
from ctrace.view import format as fmt

if TYPE_CHECKING:
    from ctrace.capture.live import LiveSource
    from ctrace.capture.table.first_dump import Older

ROOM: Final = 4096
"""Free places in the demo's table."""
TIME_WAIT: Final = 20
"""Seconds, in the demo's namespace, instead of 120: nobody likes to wait for the end."""
CALLS: Final = 20.0
"""Metrics a second; half as many look-ups."""
ENTRY_BYTES: Final = 320
"""About what one entry takes in the kernel."""
MOST_BALLAST: Final = 1 << 20
BALLAST_TIMEOUT: Final = 3600
BALLAST: Final = Filter(src=parse_network("198.18.0.0/15"))
"""The entries that :func:`ctrace.host.ctnetlink.fill` made."""
RULES: Final = """
table ip nat {
 chain post { type nat hook postrouting priority srcnat; oifname "docker0" masquerade; }
}
table inet filter {
 chain input {
  type filter hook input priority filter; policy accept;
  ct state established,related accept
  iifname "lo" accept
  tcp dport { 22, 8063 } accept
 }
}
"""
"""What makes conntrack run on many hosts: a masquerade for containers, a stateful input."""


class Actor:
    """A child process of the scene, and the last that it said of itself."""

    def __init__(self, node: Node, *role: str) -> None:
        self.process: subprocess.Popen[bytes] = node.start(
            interpreter.module("ctrace.demo.actors", *role),
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
        )
        self.last: Counter[str] = Counter()
        self.total: Counter[str] = Counter()
        threading.Thread(target=self._listen, daemon=True).start()

    def _listen(self) -> None:
        assert self.process.stdout is not None
        for line in self.process.stdout:
            self.last = Counter(json.loads(line))
            self.total.update(self.last)

    def tell(self, order: str) -> None:
        """Send one line."""
        assert self.process.stdin is not None
        try:
            self.process.stdin.write(order.encode() + b"\n")
            self.process.stdin.flush()
        except OSError as error:
            raise CtraceError("a process of the demo has died: run it again") from error

    def close(self) -> None:
        """End it."""
        self.process.kill()
        self.process.wait()


class Scene:
    """A context manager: everything in it is gone when it is left, however it is left."""

    def __init__(self, *, lower_max: Optional[int] = None, room: int = ROOM) -> None:
        self.lab = Lab()
        self.ballast = 0
        self.room = room
        self.actors: list[Actor] = []
        self._lower = lower_max
        self._lowered: Optional[LoweredLimit] = None

    @property
    def lowers(self) -> bool:
        """Whether the host's own limit is lowered meanwhile."""
        return self._lower is not None

    def __enter__(self) -> Scene:
        try:
            self._build()
        except BaseException:
            self.close()
            raise
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def _build(self) -> None:
        lab = self.lab
        self.host = lab.namespace("shop-1")
        clients, world = lab.namespace("clients"), lab.namespace("world")
        self.address, _ = lab.link(self.host, clients)
        _, resolver = lab.link(self.host, world)
        self.host.run(["nft", "-f", "-"], stdin=RULES)
        prefix = "net.netfilter.nf_conntrack_"
        self.host.sysctl(prefix + "tcp_timeout_time_wait", TIME_WAIT)
        clients.sysctl("net.ipv4.tcp_tw_reuse", 1)
        clients.sysctl("net.ipv4.ip_local_port_range", "1024 65535")
        self._make_room(int(self.host.sysctl(prefix + "max")))
        others = Actor(world, "net")
        self.api = Actor(self.host, "api", resolver, resolver)
        self.front = Actor(clients, "front", self.address)
        self.actors = [self.api, self.front, others]

    def _make_room(self, limit: int) -> None:
        if self._lower is not None:
            self._lowered = LoweredLimit(self._lower)
            self.room = self._lower
            return
        need = limit - self.room
        if limit == 0 or need > MOST_BALLAST:
            size = (
                f"{need * ENTRY_BYTES >> 20:,} MiB of kernel memory"
                if limit
                else "no limit to reach"
            )
            raise CtraceError(
                f"nf_conntrack_max is {limit:,}: filling a table up to it needs {size}; "
                "use --lower-max 8192 instead, which changes that setting while the demo runs"
            )
        if need > 0:
            from ctrace.host.ctnetlink import fill

            self.ballast = fill(self.host.path, need, timeout=BALLAST_TIMEOUT)

    def what(self) -> str:
        """One honest sentence on how the table came to be small."""
        if self._lowered is not None:
            return (
                f"nf_conntrack_max is {fmt.count(self.room)} while the demo runs; "
                f"it was {fmt.count(self._lowered.old)}"
            )
        return (
            f"The table's other {fmt.count(self.ballast)} places hold entries that stand for idle "
            "connections and are left out here"
        )

    def begin(self) -> None:
        """The service's own calls: from when they are watched, so that every entry is known."""
        self.api.tell(str(CALLS))

    def traffic(self, per_second: float) -> None:
        """How many connections a second the clients open."""
        self.front.tell(str(per_second))

    def close(self) -> None:
        """Remove everything; safe to call twice."""
        for actor in self.actors:
            actor.close()
        self.actors = []
        self.lab.close()
        if self._lowered is not None:
            self._lowered.close()
            self._lowered = None


class SmallTable:
    """A source that shows the scene's namespace alone, without its ballast."""

    def __init__(self, source: LiveSource, scene: Scene) -> None:
        self._source = source
        self._netns = scene.host.inum
        self._name = scene.host.name
        self._ballast = scene.ballast

    @property
    def hooks(self) -> HookInfo:
        """The family in use."""
        return self._source.hooks

    @property
    def clock(self) -> Clock:
        """Boot clock to UTC."""
        return self._source.clock

    @property
    def started(self) -> int:
        """When all hooks were in place."""
        return self._source.started

    def batches(self, interval: float) -> Iterator[Batch]:
        """The source's batches, as a host with the small table would give them."""
        for batch in self._source.batches(interval):
            yield self._only_ours(batch)

    def _only_ours(self, batch: Batch) -> Batch:
        events = batch.events
        ours = (events["netns"] == self._netns) & (events["kind"] != int(Kind.EXISTING))
        tables = tuple(
            replace(
                one,
                count=max(0, one.count - self._ballast),
                max=one.max - self._ballast,
                met=0,  # nearly all of it was ballast
            )
            for one in batch.tables
            if one.netns == self._netns
        )
        known = batch.names.netns.get(self._netns)
        named = (
            {} if known is None else {self._netns: Netns(self._netns, self._name, known.addresses)}
        )
        return replace(
            batch,
            events=events[ours],
            counts={k: v for k, v in batch.counts.items() if k == self._netns},
            tables=tables,
            names=replace(batch.names, netns=named),
        )

    def older(self) -> Older:
        """The entries that are older than the next batch, for a recording that begins with it."""
        return self._source.older(lambda rows: rows[~BALLAST.mask(rows)])

    def close(self) -> None:
        """Detach."""
        self._source.close()
