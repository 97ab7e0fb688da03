"""Causes that show in the states and lives of a TCP service's entries."""

from __future__ import annotations

from typing import Final, Optional

from ctrace.model import remedies
from ctrace.model.causes.service import ENDED, Service
from ctrace.model.causes.words import duration, percent
from ctrace.model.snapshot import Cause, Culprit, Remedy

SHORT_LIFE: Final = 5.0
"""Seconds: a connection this short served one request."""
MOSTLY: Final = 0.6
FEW: Final = 50
"""Connections. With fewer, nothing is said about how they stay open."""
GROWS: Final = 30.0
"""Seconds that connections must be watched before they are said to only grow;"""
GROWS_QUIET: Final = 8.0
"""or this long, where they carry nothing once they are open."""
GROWN: Final = 0.1
"""Share of what is held that must have been inserted while ctrace watched."""
STATES: Final[dict[str, tuple[str, str]]] = {
    "SYN_SENT": ("SYNs that nobody answers", "tcp_timeout_syn_sent"),
    "SYN_SENT2": ("SYNs of both sides at once", "tcp_timeout_syn_sent"),
    "SYN_RECV": ("handshakes that were answered and never finished", "tcp_timeout_syn_recv"),
    "FIN_WAIT": ("connections that one side closed", "tcp_timeout_fin_wait"),
    "CLOSE_WAIT": (
        "half-closed: one side closed them, the other never did",
        "tcp_timeout_close_wait",
    ),
    "LAST_ACK": ("closed by both sides, with the last ACK missing", "tcp_timeout_last_ack"),
    "CLOSE": ("connections that were reset", "tcp_timeout_close"),
}
"""What a state that lasts means, and the timeout that ends it (nf_conntrack_proto_tcp.c)."""


def loopback_probes(s: Service) -> Optional[Cause]:
    """Short connections that never leave the host."""
    short = s.c.life.p50 is not None and s.c.life.p50 < 1.0
    if s.c.direction != "loopback" or s.c.proto != "tcp" or not short or s.judged < ENDED:
        return None
    return s.cause(
        "loopback-probes",
        f"{s.of}: {s.part} are loopback connections{s.they}",
        (s.held_line, f"to {s.c.dst or 'loopback addresses'}, direction loopback", s.ends_line),
        remedies.keep_alive(s.c, "probe over one kept connection"),
        notrack(s),
        time_wait(s),
    )


def no_keepalive(s: Service) -> Optional[Cause]:
    """Short TCP connections whose closed entries wait out TIME_WAIT."""
    c = s.c
    if c.proto != "tcp" or s.judged < ENDED or c.closed is None or c.closed < MOSTLY:
        return None
    life = c.life.p50
    residence = c.residence.p50 if c.residence.p50 is not None else s.waits
    if life is None or residence is None or life > SHORT_LIFE or residence < 4 * life:
        return None
    return s.cause(
        "no-keepalive",
        f"{s.of}: {s.part_of(c.closed)} are {_closed(s)}{s.they}",
        (
            s.held_line,
            f"{percent(c.closed)} of {s.basis} were in TIME_WAIT or CLOSE",
            s.expected_line,
            f"half of them live at most {duration(life)}{_longest(c.life.p99)}; "
            f"half of the entries stay {s.stay}{_longest(c.residence.p99)}",
        ),
        None if s.expected_line else remedies.keep_alive(c),
        notrack(s) or time_wait(s),
    )


def _longest(p99: Optional[float]) -> str:
    return "" if p99 is None else f", 99 % at most {duration(p99)}"


def _closed(s: Service) -> str:
    """What closed connections wait for: a reset ends them without TIME_WAIT."""
    state, _, share = most_held_state(s)
    if state == "CLOSE" and share >= MOSTLY:
        return "connections that were reset, until their timeout (CLOSE)"
    return "closed connections waiting out TIME_WAIT"


def waiting(s: Service) -> Optional[Cause]:
    """Closed connections that are not known to have been short."""
    c = s.c
    if c.proto != "tcp" or c.closed is None or c.closed < MOSTLY or c.held < ENDED:
        return None
    stay = s.timeout_of("TIME_WAIT")
    known = f"the timeout is {duration(stay)}" if stay else ""
    lived = s.they
    if not s.changes:
        known = known or "the timeout is not in the texts"
        lived = "; how long they lived one dump does not tell"
    elif s.judged < ENDED or not _in_time_wait(s):
        return None
    keep = remedies.keep_alive(c, "keep connections alive, if they are short")
    return s.cause(
        "time-wait",
        f"{s.of}: {s.part_of(c.closed)} are closed connections waiting out TIME_WAIT{lived}",
        (s.held_line, f"{percent(c.closed)} of {s.basis} were in TIME_WAIT or CLOSE", known),
        keep if c.life.p50 is None or not s.changes else None,
        notrack(s) or time_wait(s),
    )


def _in_time_wait(s: Service) -> bool:
    """Whether looks at the table found most of its entries in TIME_WAIT."""
    state, _, share = most_held_state(s)
    return state == "TIME_WAIT" and share >= MOSTLY


def lasting_state(s: Service) -> Optional[Cause]:
    """Entries that sit in a state which should pass."""
    state, count, share = most_held_state(s)
    if state not in STATES or count < FEW or share < MOSTLY:
        return None
    words, name = STATES[state]
    return s.cause(
        "half-closed" if state in ("FIN_WAIT", "CLOSE_WAIT", "LAST_ACK") else "lasting-state",
        f"{s.of}: {s.part_of(share)} are {words} ({state}, about {count:,} of its {s.c.held:,})"
        f"{s.raised(name, state)}",
        (s.held_line, f"{percent(share)} of its entries are in {state}", s.ends_line),
        remedies.change("find out who does not close them", s.c.netns, s.c.key)
        if state == "CLOSE_WAIT"
        else None,
        remedies.timeout(name, s.c.netns, old=s.timeout_of(state)),
        remedies.delete(s.c, count, state=state, src=s.alone),
    )


def one_way_tcp(s: Service) -> Optional[Cause]:
    """Connections that were picked up in the middle, of which the other direction passes
    elsewhere."""
    state, count, share = most_held_state(s)
    if state != "ESTABLISHED" or share < MOSTLY or count < FEW or (s.c.unreplied or 0.0) < 0.8:
        return None
    return s.cause(
        "one-way-tcp",
        f"{s.of}: {s.part_of(share)} are open connections of which this host sees one direction "
        "only: they began elsewhere, and no answer passes here",
        (
            s.held_line,
            f"{percent(s.c.unreplied)} of {s.basis} never saw a reply, and are ESTABLISHED",
            "nf_conntrack_tcp_loose takes up what it did not see begin",
        ),
        remedies.change("let both directions pass this host", s.c.netns, s.c.key),
        remedies.delete(s.c, count, state="ESTABLISHED", src=s.alone),
    )


def leak(s: Service) -> Optional[Cause]:
    """Open connections that only grow: they are opened, and none is closed."""
    c = s.c
    opened = c.inserts - c.destroys
    if c.proto != "tcp" or opened < 5 * FEW or not _growing(c):
        return None
    state, _, share = most_held_state(s)
    # Short ones that began while they were watched: the first of them are closed by then.
    quiet = (c.composition.once or 0.0) >= 0.8 and share == 1.0 and not s.words
    if _coming(s) < (GROWS_QUIET if quiet else GROWS):
        return None
    if state != "ESTABLISHED" or share < 0.9 or c.destroys > 0.05 * c.inserts:
        return None
    if (c.closed or 0.0) > 0.1 or opened < GROWN * c.held:
        return None
    return s.cause(
        "leak",
        f"{s.of}: {s.part_of(share)} are open connections that only grow: {c.destroys:,} of "
        f"{c.inserts:,} that came in {duration(s.uptime)} have ended",
        (s.held_line, f"{percent(share)} of its entries are ESTABLISHED", s.ends_line),
        remedies.change("find out who does not close them", c.netns, c.key),
        remedies.timeout("tcp_timeout_established", c.netns, old=s.timeout_of("ESTABLISHED")),
    )


def _growing(c: Culprit) -> bool:
    """Whether new ones keep coming: in the last interval, or over the later half of the last
    minute."""
    if c.new_per_s > 0:
        return True
    later = c.trend[len(c.trend) // 2 :]
    return len(later) >= 4 and later[-1] > later[0]


def _coming(s: Service) -> float:
    """Seconds over which the open connections have been coming: twice their mean age, as at an even
    rate.

    A burst that was just opened has been watched only for a moment, however long ctrace has run.
    """
    opened = max(1, s.c.inserts - s.c.destroys)
    seconds = s.c.table_seconds - s.c.older * s.uptime
    return min(s.uptime, 2 * seconds / opened)


def _idle(s: Service) -> bool:
    """Whether most of its connections carry nothing, or nothing shows that they do."""
    return s.quiet is None or s.quiet >= 0.5


def _middle(s: Service) -> Optional[float]:
    """Seconds for which half of its entries had no packet; None where unknown."""
    idle = s.c.composition.idle
    return idle[len(idle) // 2] if idle else None


def idle_established(s: Service) -> Optional[Cause]:
    """Connections that nobody closed, or whose other end has gone: they stay for days."""
    c = s.c
    state, count, share = most_held_state(s)
    if c.proto != "tcp" or c.held < FEW or (c.assured or 0.0) < MOSTLY or (c.closed or 0.0) >= 0.5:
        return None
    if (state and (state != "ESTABLISHED" or share < MOSTLY)) or not _idle(s):
        return None  # something else, or they are in use
    if not s.changes:
        return _established(s)
    leaving = c.destroys / max(1.0, s.uptime) * 60 / c.held
    if leaving > 0.02:  # more than 2 % of them go per minute: they do end
        return None
    expired_open = sum(n for state, n in c.ended_states if state == "ESTABLISHED")
    old = bool(state) and c.older >= 0.5 * c.held
    if not old and expired_open < max(5, 0.5 * c.destroys):
        return None  # nothing shows that they are open, or for how long
    middle = _middle(s)
    quiet = "" if middle is None else f"half had no packet for {duration(middle)}, "
    return s.cause(
        "idle-established",
        f"{s.of}: {s.part_of(share or 1.0)} are long-lived ESTABLISHED connections "
        f"({count or c.held:,} held, {quiet}{100 * leaving:.2f} % of them end per minute)",
        (
            s.held_line,
            f"{percent(c.assured)} ASSURED: early_drop can't evict them",
            f"{c.older:,} are older than ctrace" if c.older else s.ends_line,
            "whether their ends are still there is not known: an entry does not tell",
        ),
        remedies.change("close idle connections, TCP keep-alive below the timeout", c.netns, c.key),
        remedies.timeout("tcp_timeout_established", c.netns, old=s.timeout_of("ESTABLISHED")),
        remedies.delete(
            c,
            count or c.held,
            state="ESTABLISHED",
            src=s.alone,
            why=", also of connections that still live",
        ),
    )


def _established(s: Service) -> Cause:
    """The same for a single dump, which shows whether connections are idle if the timeout is
    known."""
    c, middle = s.c, _middle(s)
    quiet = "whether they are idle one dump does not tell"
    if middle is not None:
        quiet = f"half had no packet for {duration(middle)}"
    return s.cause(
        "established",
        f"{s.of}: {s.part} are ESTABLISHED connections ({c.held:,} held); {quiet}",
        (s.held_line, f"{percent(c.assured)} ASSURED: early_drop can't evict them"),
        remedies.change("close idle connections, TCP keep-alive below the timeout", c.netns, c.key),
        remedies.timeout("tcp_timeout_established", c.netns, old=s.timeout_of("ESTABLISHED")),
    )


def most_held_state(s: Service) -> tuple[str, int, float]:
    """The TCP state of most of the service's entries: its name, how many, which share.

    From looks at the table itself; empty where nothing could look, or too few were seen.
    """
    states, seen = s.c.composition.states, sum(n for _, n in s.c.composition.states)
    if s.c.proto != "tcp" or seen < ENDED:
        return "", 0, 0.0
    first, n = states[0]
    return first, round(n / seen * s.c.held), n / seen


def notrack(s: Service) -> Optional[Remedy]:
    """NOTRACK for the service, where advice would not refuse it."""
    if not remedies.untrackable(s.c, s.nat, s.table, s.ephemeral):
        return None
    return remedies.notrack(s.c)


def time_wait(s: Service) -> Optional[Remedy]:
    """A shorter TIME_WAIT, as far as the present one is known, or what it can be at most."""
    old, stays = s.timeout_of("TIME_WAIT"), s.c.residence.p50
    if old is None and stays is not None and stays <= remedies.SHORTER["tcp_timeout_time_wait"]:
        return None
    return remedies.timeout("tcp_timeout_time_wait", s.c.netns, old=old)
