"""Who made conntrack active: per namespace and address family, rule by rule.

Conntrack's hooks (``ipv4_conntrack_in`` and its siblings) are registered per
namespace and per family, counted per user: a rule that needs an entry calls
``nf_ct_netns_get`` when it is loaded and ``nf_ct_netns_put`` when it goes
(net/netfilter/nf_conntrack_proto.c, 4.10 and later). The first user turns
tracking on, the last one off, whatever modules stay loaded. So the rules are
the answer, and removing a module is never needed.
"""

from __future__ import annotations

import contextlib
import json
import os
import re
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any, Optional, Protocol

from ctrace.errors import CtraceError
from ctrace.host.netns import enter
from ctrace.names import clean
from ctrace.ruleset.users import IPV4, IPV6, NAT, User, output, users_of_nft, users_of_save


class Place(Protocol):
    """A namespace as :func:`ctrace.host.netns.find` gives it."""

    @property
    def inum(self) -> int:
        """Inode number."""

    @property
    def name(self) -> str:
        """Its name."""

    @property
    def path(self) -> str:
        """A path through which to enter it."""


@dataclass(frozen=True)
class NamespaceActivation:
    """One namespace's answer."""

    netns: int
    name: str
    users: tuple[User, ...]
    entries: Optional[int]
    """``conntrack -C`` there, now."""
    hooks: Optional[tuple[str, ...]]
    """Families with hooks that the kernel itself lists; None where it can't be asked."""
    unread: tuple[str, ...] = ()
    """What could not be read, one line each: then an empty list proves nothing."""

    def active(self, family: str) -> Optional[bool]:
        """Whether tracking is on for ``ipv4`` or ``ipv6``; None when it can't be known."""
        if self.hooks is not None:
            return family in self.hooks
        if any(family in user.families for user in self.users):
            return True
        return None if self.unread or self.entries else False

    @property
    def verdict(self) -> str:
        """Whether tracking can be turned off completely here, in one or two sentences."""
        if not self.users:
            return self._without_users()
        owners = sorted({user.owner for user in self.users} - {"unknown", "ctrace"})
        uses = {use for user in self.users for use in user.uses}
        if uses & NAT:
            what = "address translation (" + ", ".join(sorted(uses & NAT)) + ")"
            if uses - NAT:
                what += " and stateful rules"
        else:
            what = "stateful rules (" + ", ".join(sorted(uses)) + ")"
        who = f", written by {_listed(owners)}" if owners else ""
        plural = "rule holds" if len(self.users) == 1 else "rules hold"
        return (
            f"{len(self.users)} {plural} tracking on through {what}{who}. It goes off by itself "
            "when the last of them is removed; what needs them stops working then. "
            "No module has to be removed."
        )

    def _without_users(self) -> str:
        if self.unread:
            return "no rule was found, but not everything could be read: this proves nothing."
        if self.entries or self.hooks:
            return (
                "no rule uses conntrack, yet it has entries or hooks: entries from before, "
                "Open vSwitch, tc's act_ct, IPVS, or the module parameter enable_hooks=1."
            )
        return "off: no rule uses conntrack here, so packets pass untracked."


@dataclass(frozen=True)
class Modules:
    """nf_conntrack as a module, as lsmod shows it."""

    loaded: bool
    """False also when it is built into the kernel (then ``built_in``)."""
    built_in: bool
    refcount: Optional[int] = None
    holders: tuple[str, ...] = ()
    enable_hooks: Optional[bool] = None

    @property
    def notes(self) -> tuple[str, ...]:
        """What lsmod's list means, one sentence each."""
        notes = []
        if self.built_in:
            notes.append(
                "nf_conntrack is built into this kernel: there is no module to remove, "
                "and none has to be."
            )
        elif not self.loaded:
            notes.append("nf_conntrack is not loaded: nothing is tracked on this host.")
        else:
            held = ", ".join(self.holders) or "nobody"
            notes.append(
                f"nf_conntrack is loaded, refcount {self.refcount}, held by {held}. Loaded is not "
                "active: tracking follows the rules below, so no rmmod is needed to turn it off."
            )
            pins = [name for name in ("xt_CT", "nft_ct") if name in self.holders]
            if pins:
                notes.append(
                    f"{_listed(pins)} is what NOTRACK rules themselves load: it keeps the module "
                    "in place, but a NOTRACK rule never turns tracking on."
                )
        if self.enable_hooks:
            notes.append(
                "The module parameter enable_hooks=1 keeps tracking on in every namespace, "
                "with or without rules."
            )
        return tuple(notes)


@dataclass(frozen=True)
class Activation:
    """The whole answer of ``doctor --why``."""

    modules: Modules
    namespaces: tuple[NamespaceActivation, ...]

    def to_json(self) -> dict[str, Any]:
        """Plain data; every namespace with ``active`` per family and its ``verdict``."""
        return {
            "modules": {**asdict(self.modules), "notes": list(self.modules.notes)},
            "namespaces": [
                {
                    **asdict(place),
                    "active": {family: place.active(family) for family in (IPV4, IPV6)},
                    "verdict": place.verdict,
                }
                for place in self.namespaces
            ],
        }

    def render(self, limit: int = 12) -> str:
        """Text: the modules, then each namespace with up to ``limit`` rules per owner."""
        return "\n".join(_render(self, limit)) + "\n"


def explain(namespaces: Sequence[Place]) -> Activation:
    """Read every namespace's rulesets and report what keeps conntrack active in each.

    A namespace that has gone in the meantime is left out. Reads only.
    """
    places = []
    for namespace in namespaces:
        try:
            with enter(namespace.path):
                places.append(_explain_here(namespace))
        except CtraceError:
            continue
    return Activation(read_modules(), tuple(places))


def read_modules(root: str = "/sys/module") -> Modules:
    """nf_conntrack below ``root``: a module has ``refcnt``, a built-in has not."""
    base = f"{root}/nf_conntrack"
    enable = _first_line(f"{base}/parameters/enable_hooks")
    hooks = None if enable is None else enable in ("Y", "1")
    refcount = _first_line(f"{base}/refcnt")
    if refcount is None:
        return Modules(False, os.path.isdir(base), enable_hooks=hooks)
    try:
        holders = tuple(sorted(os.listdir(f"{base}/holders")))
    except OSError:
        holders = ()
    return Modules(True, False, int(refcount), holders, hooks)


def _explain_here(namespace: Place) -> NamespaceActivation:
    """The namespace that this thread is in."""
    users: list[User] = []
    unread: list[str] = []
    saved: set[tuple[str, str]] = set()
    for command, backend, family in (
        ("iptables-nft-save", "iptables", IPV4),
        ("ip6tables-nft-save", "iptables", IPV6),
        ("iptables-legacy-save", "iptables-legacy", IPV4),
        ("ip6tables-legacy-save", "iptables-legacy", IPV6),
    ):
        text, problem = output([command])
        if problem and problem != "missing":
            unread.append(f"{command}: {problem}")
        parsed = list(users_of_save(text, backend, family))
        users += parsed
        if backend == "iptables" and not problem:
            native = "ip" if family == IPV4 else "ip6"
            saved |= {(native, table) for table in re.findall(r"^\*(\S+)$", text, re.M)}
    text, problem = output(["nft", "-j", "-a", "list", "ruleset"])
    if problem == "missing":
        if not os.path.exists("/proc/thread-self/net/ip_tables_names"):
            unread.append("nft is not installed: install nftables to see its rules")
    elif problem:
        unread.append(f"nft: {problem}")
    else:
        try:
            users += users_of_nft(json.loads(text), saved)
        except ValueError:
            unread.append("nft -j printed something that is not JSON")
    return NamespaceActivation(
        namespace.inum,
        namespace.name,
        tuple(map(_harmless, users)),
        _entries(),
        _hooks(),
        tuple(map(clean, unread)),
    )


def _harmless(user: User) -> User:
    """The same, with names chosen by the ruleset's author made safe to show."""
    return replace(user, table=clean(user.table), chain=clean(user.chain), rule=clean(user.rule))


def _hooks() -> Optional[tuple[str, ...]]:
    """Families with a conntrack hook as the kernel lists them (6.4's nft can; JSON aborts).

    None without CONFIG_NETFILTER_NETLINK_HOOK, or when the list has no hook at all.
    """
    found: list[str] = []
    for family, native in ((IPV4, "ip"), (IPV6, "ip6")):
        text, problem = output(["nft", "list", "hooks", native])
        if problem or "hook" not in text:
            return None
        if re.search(r"conntrack_in\b", text):
            found.append(family)
    return tuple(found)


def _entries() -> Optional[int]:
    line = _first_line("/proc/sys/net/netfilter/nf_conntrack_count")
    return int(line) if line else None


def _first_line(path: str) -> Optional[str]:
    with contextlib.suppress(OSError), open(path) as file:
        return file.readline().strip()
    return None


def _listed(names: Sequence[str]) -> str:
    return ", ".join(names[:-1]) + " and " + names[-1] if len(names) > 1 else "".join(names)


def _render(activation: Activation, limit: int) -> Iterator[str]:
    yield from activation.modules.notes
    for place in activation.namespaces:
        yield ""
        state = ", ".join(f"{family} {_on(place.active(family), place)}" for family in (IPV4, IPV6))
        entries = "" if place.entries is None else f", {place.entries} entries"
        yield f"{place.name}: {state}{entries}"
        owners: dict[str, list[User]] = {}
        for user in place.users:
            owners.setdefault(user.owner, []).append(user)
        for owner, users in sorted(owners.items(), key=lambda pair: -len(pair[1])):
            yield f"  {owner}: {len(users)} rule{'s' * (len(users) != 1)}"
            for user in users[:limit]:
                where = f"handle {user.handle}" if user.handle else f"rule {user.position}"
                yield (
                    f"    {user.backend} {user.table} {user.chain} {where} "
                    f"[{', '.join(user.uses)}]: {user.rule}"
                )
            if len(users) > limit:
                yield f"    and {len(users) - limit} more"
        yield f"  {place.verdict}"
        for line in place.unread:
            yield f"  not read: {line}"


def _on(active: Optional[bool], place: NamespaceActivation) -> str:
    if active is None:
        return "unknown"
    return ("on" if active else "off") + (" (as the kernel lists it)" if place.hooks else "")
