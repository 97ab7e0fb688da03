"""What advice needs to know of a host and a namespace beyond its entries."""

from __future__ import annotations

import json
import os
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, Final, Optional

from ctrace.advice.beside import leftovers
from ctrace.beside import EPHEMERAL, Left
from ctrace.change import notes
from ctrace.errors import CtraceError
from ctrace.given import Given
from ctrace.given import to_line as to_given
from ctrace.host import commands, sock_diag
from ctrace.host.ctnetlink import dump as dump_entries
from ctrace.host.memory import unswept
from ctrace.host.netns import Namespace, enter, here, local_addresses
from ctrace.model.remedies import ENTRY_BYTES, TIMEOUTS
from ctrace.names import clean
from ctrace.plan import plan as plans
from ctrace.plan.plan import Lever
from ctrace.record import Events, address_bytes, address_text
from ctrace.rehearsal.snapshot import Snapshot, take
from ctrace.rehearsal.snapshot import from_text as from_line
from ctrace.rehearsal.snapshot import to_text as to_line
from ctrace.ruleset.model import Ruleset
from ctrace.ruleset.reader import dump, forget, load
from ctrace.ruleset.told import Told, told

BIGGEST: Final = 3 << 19
"""Bytes of a snapshot, as text, that fit in a recording: some thousands of rules."""


@dataclass(frozen=True)
class Facts:
    """One namespace, as far as it is known."""

    ruleset: Optional[Ruleset] = None
    addresses: tuple[str, ...] = ()
    ephemeral: tuple[int, int] = EPHEMERAL
    forwarding: bool = True
    timeouts: dict[str, int] = field(default_factory=dict)
    """The known ones, by their names in :data:`~ctrace.model.remedies.TIMEOUTS`."""
    entry_bytes: tuple[int, int] = ENTRY_BYTES
    """Lowest and highest memory of one entry: equal when read from the slab."""
    has_nft: bool = True
    applied: tuple[Lever, ...] = ()
    """What ctrace apply has in place there, according to its note (live only)."""
    condition: str = ""
    """The condition of that change, such as missing accepts (live only)."""
    enter: tuple[str, ...] = ()
    """The prefix of a command that makes it run there (:func:`ctrace.host.commands.prefix`)."""
    reserved: tuple[tuple[int, int], ...] = ()
    """``ip_local_reserved_ports``: ranges that the kernel never picks a source port from."""
    listening: frozenset[tuple[str, int]] = frozenset()
    """(protocol, port) that a socket there holds for itself."""
    initial: bool = False
    """Whether it is the host's first namespace, which alone can change max and buckets."""
    untold: tuple[str, ...] = ()
    """What the texts did not say, so that a default stands for it."""
    snapshot: Optional[Snapshot] = None
    """The basis of a rehearsal; None: it was not recorded, or is not readable."""
    given: str = ""
    """The basis of a copy where only texts are known (:func:`ctrace.given.to_line`)."""
    entries: Optional[Events] = None
    """The table as it is (live only)."""
    left: tuple[Left, ...] = ()
    """Entries translated to where no rule leads any more (live only)."""

    def picks(self, proto: str, port: int) -> bool:
        """Whether the kernel may give ``port`` to a connection that begins here."""
        low, high = self.ephemeral
        return (
            low <= port <= high
            and (proto, port) not in self.listening
            and not any(first <= port <= last for first, last in self.reserved)
        )


def facts(netns_path: str) -> Facts:
    """Read everything in the namespace at ``netns_path``. Raises CtraceError."""
    with unswept():
        read, snapshot = _collect(netns_path), _snapshot(netns_path)
        rules = told(read["ruleset"]) if read["ruleset"] is not None else Told()
        found = _build(read, snapshot)
    entries = dump_entries(netns_path)
    found = replace(found, entries=entries, left=leftovers(netns_path, rules, entries))
    with enter(netns_path):
        inum = here()
    note = notes.read(inum) if found.ruleset and found.ruleset.ours else None
    if note is None or note.over:
        return found
    return replace(found, applied=plans.from_json(note.plan).levers)


def to_text(netns_path: str) -> str:
    """Everything of a namespace as JSON text, for a recording. Raises CtraceError."""
    found = _collect(netns_path)
    forget()
    snapshot = _snapshot(netns_path)
    line = to_line(snapshot) if snapshot else ""
    return json.dumps({**found, "snapshot": line if len(line) <= BIGGEST else ""})


def from_text(text: str) -> Facts:
    """The facts that :func:`to_text` wrote. Raises CtraceError when they are damaged."""
    try:
        found = json.loads(text)
        line = found.get("snapshot")
        return _build(found, from_line(line) if line else None)
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        raise CtraceError("the recorded ruleset cannot be read: it is damaged") from None


def _build(found: dict[str, Any], snapshot: Optional[Snapshot]) -> Facts:
    low, high = found["ephemeral"]
    entry_low, entry_high = found["entry_bytes"]
    return Facts(
        ruleset=load(found["ruleset"]) if found["ruleset"] is not None else None,
        # Commands that are shown to be pasted have them in them.
        addresses=tuple(address_text(address_bytes(one)) for one in found["addresses"]),
        ephemeral=(int(low), int(high)),
        forwarding=bool(found["forwarding"]),
        timeouts={
            name: int(value) for name, value in found["timeouts"].items() if name in TIMEOUTS
        },
        entry_bytes=(int(entry_low), int(entry_high)),
        has_nft=bool(found["has_nft"]),
        enter=tuple(str(word) for word in found.get("enter", ())),
        reserved=_ranges(str(found.get("reserved", ""))),
        listening=frozenset((str(proto), int(port)) for proto, port in found.get("listening", ())),
        initial=bool(found["initial"]),
        untold=tuple(clean(str(one)) for one in found.get("untold", ())),
        snapshot=snapshot,
        given=str(found.get("given", "")),
    )


def _ranges(text: str) -> tuple[tuple[int, int], ...]:
    """``8063,9000-9010`` as pairs, as the kernel prints a port bitmap (proc_do_large_bitmap)."""
    pairs = (part.partition("-") for part in text.split(",") if part)
    return tuple((int(low), int(high or low)) for low, _, high in pairs)


def _collect(netns_path: str) -> dict[str, Any]:
    with enter(netns_path):
        low, _, high = _sys("net/ipv4/ip_local_port_range", "32768\t60999").partition("\t")
        forwarding = any(
            _sys(name, "0") != "0"
            for name in ("net/ipv4/ip_forward", "net/ipv6/conf/all/forwarding")
        )
        timeouts = {
            name: int(_sys(f"net/netfilter/nf_conntrack_{name}", str(default)))
            for name, default in TIMEOUTS.items()
        }
        inum = here()
        reserved = _sys("net/ipv4/ip_local_reserved_ports", "")
        try:
            listening = sock_diag.listening()
        except OSError:  # inet_diag is a module that may be missing: then none is known
            listening = frozenset()
    return {
        "ruleset": dump(netns_path),
        "addresses": local_addresses(netns_path),
        "ephemeral": [int(low), int(high)],
        "forwarding": forwarding,
        "timeouts": timeouts,
        "entry_bytes": entry_bytes(),
        "has_nft": commands.have("nft"),
        "enter": list(commands.prefix(Namespace(inum, "", netns_path))),
        "reserved": reserved,
        "listening": sorted(listening),
        "initial": _is_initial(inum),
    }


@dataclass(frozen=True)
class Written:
    """A namespace as others wrote it down; None or empty for what they left out."""

    ruleset: Optional[dict[str, Any]]
    """As ctrace.ruleset.reader.dump gives it."""
    addresses: Sequence[str]
    ephemeral: Optional[tuple[int, int]]
    forwarding: Optional[bool]
    timeouts: Mapping[str, int]
    entry_bytes: Optional[int]
    initial: bool
    reserved: str = ""
    listening: Collection[tuple[str, int]] = ()
    given: Optional[Given] = None


def written(texts: Written) -> str:
    """The text of :func:`to_text`; the defaults of :class:`Facts` stand for what is missing."""
    size, given = texts.entry_bytes, texts.given
    line = to_given(given) if given else ""
    return json.dumps(
        {
            "ruleset": texts.ruleset,
            "addresses": list(texts.addresses),
            "ephemeral": list(texts.ephemeral or EPHEMERAL),
            "forwarding": texts.forwarding is not False,
            "timeouts": dict(texts.timeouts),
            "entry_bytes": [size, size + 128] if size else ENTRY_BYTES,
            "has_nft": bool(texts.ruleset and texts.ruleset["nft"]),
            "initial": texts.initial,
            "reserved": texts.reserved,
            "listening": sorted(texts.listening),
            "given": line if len(line) <= BIGGEST else "",
            "untold": [
                name
                for name, value in (
                    ("ip_local_port_range", texts.ephemeral),
                    ("ip_forward", texts.forwarding),
                    ("the host's addresses", texts.addresses or None),
                )
                if value is None
            ],
        }
    )


def _snapshot(netns_path: str) -> Optional[Snapshot]:
    try:
        return take(netns_path)
    except CtraceError:
        return None


def entry_bytes() -> tuple[int, int]:
    """Bytes of one entry on this kernel, from /proc/slabinfo (root); else a range.

    The object holds the extensions for NAT and accounting in an allocation of its
    own: 128 bytes when timestamps, accounting or labels are on (measured).
    """
    try:
        with open("/proc/slabinfo") as file:
            for line in file:
                words = line.split()
                if words and words[0] == "nf_conntrack":
                    size = int(words[3])
                    extra = any(
                        _sys(f"net/netfilter/nf_conntrack_{name}", "0") != "0"
                        for name in ("acct", "timestamp")
                    )
                    return (size + 128, size + 128) if extra else (size, size + 128)
    except OSError:
        pass
    return ENTRY_BYTES


def _is_initial(inode: int) -> bool:
    try:
        return os.stat("/proc/1/ns/net").st_ino == inode
    except OSError:
        return False


def _sys(name: str, default: str) -> str:
    try:
        with open(f"/proc/sys/{name}") as file:
            return file.read().strip()
    except OSError:
        return default
