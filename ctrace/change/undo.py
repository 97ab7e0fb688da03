"""Removing what ctrace applied: exactly that, nothing else, in one transaction per tool."""

from __future__ import annotations

import re
import time
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass, replace
from typing import Optional

from ctrace.change import notes
from ctrace.change.carry import carry_over
from ctrace.errors import CtraceError
from ctrace.host import commands, netns
from ctrace.host.netns import Namespace
from ctrace.ruleset import notrack_iptables, notrack_nft
from ctrace.ruleset.installed import NOTHING, XT_TOOLS, Installed, Rule, nft_ruleset, read_installed
from ctrace.ruleset.notrack import CHAINS, TABLE


@dataclass(frozen=True)
class Applied:
    """What is applied in one namespace, with the note that goes with it."""

    namespace: Namespace
    installed: Installed
    note: Optional[notes.Note]


def applied(only: Optional[int] = None, unread: Optional[list[str]] = None) -> list[Applied]:
    """What is applied now, in every namespace (or one). Changes nothing.

    ``unread``: gets a line for each namespace whose rules cannot be read: anybody may own one.
    Raises CtraceError at the first, where that is not given.
    """
    found = []
    for namespace in netns.find():
        if only is not None and namespace.inum != only:
            continue
        try:
            with netns.Way(namespace.inum, namespace).held() as there:
                if there is None:
                    continue  # it went away while we looked, and its rules with it
                with netns.enter(there.path):
                    installed = read_installed(time.time())
        except CtraceError as error:
            if unread is None:
                raise
            unread.append(f"{namespace.name} cannot be read: {error}")
            continue
        if installed.state != NOTHING:
            found.append(Applied(namespace, installed, notes.read(namespace.inum)))
    return found


def undo(only: Optional[int] = None) -> list[Applied]:
    """Remove what ctrace applied, in every namespace (or one); what was removed.

    Connections that were opened while untracked are picked up again as NEW by their next
    packet. Raises CtraceError.
    """
    return take_away(applied(only), only)


def take_away(
    changes: Sequence[Applied], only: Optional[int] = None, failed: Optional[list[str]] = None
) -> list[Applied]:
    """Remove these changes, one namespace at a time, and the notes of what was removed before
    (of one namespace, if ``only`` that).

    ``failed``: gets a line for each that stays; where that is not given, CtraceError is raised.
    """
    done = []
    for change in changes:
        inum, installed = change.namespace.inum, change.installed
        try:
            with notes.locked(inum) as lock, netns.Way(inum, change.namespace).held() as there:
                if there is not None:
                    with netns.enter(there.path):
                        installed = read_installed(time.time())
                        remove(installed, notes.read(inum), lock)
                notes.forget(inum)
            if installed.state != NOTHING:  # else its guard was faster
                done.append(replace(change, installed=installed))
        except CtraceError as error:
            if failed is None:
                raise
            failed.append(f"{change.namespace.name} stays as it is: {error}")
    # Of what is off, over, or was killed half way there may be no rule left: its guard ends.
    for note in notes.every():
        if only in (None, note.netns):
            with suppress(CtraceError), notes.locked(note.netns) as lock:
                if notes.read(note.netns) == note and not applied(note.netns):
                    with netns.Way(note.netns).held() as there:
                        if there is not None and note.made:
                            with netns.enter(there.path):
                                _drop_empty(note.made, lock)
                    notes.forget(note.netns)
    sweep()
    return done


def sweep() -> None:
    """Remove the notes of namespaces that are gone. Raises CtraceError."""
    notes.sweep(lambda: {namespace.inum for namespace in netns.find()})


def remove(installed: Installed, note: Optional[notes.Note], lock: int) -> None:
    """Remove everything of ours from the namespace that this thread is in.

    The untracking rules go first, then the accepts that only untracked packets
    need. Open connections of this host get their entries before, and those that
    were opened meanwhile after. Each command has the ``lock`` of the namespace: if this process is
    killed just now, nobody else begins before that command is over. Raises CtraceError when the
    kernel refuses; nothing of that tool's part has changed then.
    """
    services = {rule.service for rule in installed.rules if rule.own}
    carry_over(services)
    accepts = notrack_nft.delete_accepts(
        [
            (rule.family, rule.table, rule.chain, rule.handle)
            for rule in installed.rules
            if rule.tool == "nft" and not rule.own and rule.handle is not None
        ]
    )
    if installed.table:
        _nft(f"delete table inet {TABLE}\n{accepts}", lock)
    untracking = {chain[0] for chain in installed.chains}
    _by_iptables(installed, [tool for tool in XT_TOOLS if tool in untracking], lock)
    if accepts and not installed.table:
        _nft(accepts, lock)
    _by_iptables(installed, [tool for tool in XT_TOOLS if tool not in untracking], lock)
    carry_over(services)
    if note is not None:
        _drop_empty(note.made, lock)


def _by_iptables(installed: Installed, tools: Sequence[str], lock: int) -> None:
    for tool in tools:
        for family in ("ip", "ip6"):
            text = _restore(installed, tool, family)
            if text:
                commands.run(notrack_iptables.restore_argv(tool, family), text, keep=(lock,))


def _nft(script: str, lock: int) -> None:
    commands.run(["nft", "-f", "-"], script, keep=(lock,))


def nft_objects(family: str, table: str) -> set[str]:
    """``ip raw`` and ``ip raw PREROUTING``...: a table and its chains, if they are there."""
    found = set()
    for item in nft_ruleset().get("nftables", ()):
        body = item.get("table")
        if isinstance(body, dict) and (body["family"], body["name"]) == (family, table):
            found.add(f"{family} {table}")
        body = item.get("chain")
        if isinstance(body, dict) and (body["family"], body["table"]) == (family, table):
            found.add(f"{family} {table} {body['name']}")
    return found


def _restore(installed: Installed, tool: str, family: str) -> str:
    """What takes our rules out of one iptables variant; empty when there are none."""
    rules = [rule for rule in installed.rules if (rule.tool, rule.family) == (tool, family)]
    chains = [chain[2] for chain in installed.chains if chain[:2] == (tool, family)]
    tables: dict[str, list[str]] = {}
    for rule in rules:
        if rule.chain not in CHAINS:
            tables.setdefault(rule.table, []).append(_delete(rule))
    if chains:
        # The jumps, already listed above, must go before the chains that they lead to.
        lines = tables.setdefault("raw", [])
        lines += [f"-F {chain}" for chain in chains]
        lines += [f"-X {chain}" for chain in chains]
    ordered = sorted(tables.items(), key=lambda pair: pair[0] != "raw")
    return "".join("\n".join([f"*{name}", *lines, "COMMIT"]) + "\n" for name, lines in ordered)


def _delete(rule: Rule) -> str:
    """A rule's own save line as its deletion, which matches it exactly."""
    return re.sub(r"^-A ", "-D ", rule.text, count=1)


def _drop_empty(made: tuple[str, ...], lock: int) -> None:
    """Remove tables and chains that iptables-nft made for us and that are still empty."""
    if not made or not commands.have("nft"):
        return
    used: set[str] = set()
    chains: set[str] = set()
    for item in nft_ruleset().get("nftables", ()):
        rule, chain = item.get("rule"), item.get("chain")
        if isinstance(rule, dict):
            used.add(f"{rule['family']} {rule['table']}")
            used.add(f"{rule['family']} {rule['table']} {rule['chain']}")
        if isinstance(chain, dict):
            chains.add(f"{chain['family']} {chain['table']} {chain['name']}")
    # A chain that somebody else has made since keeps its table.
    used |= {" ".join(chain.split()[:2]) for chain in chains - set(made)}
    # Chains (three words) before their table (two).
    for name in sorted(made, key=lambda name: -len(name.split())):
        words = name.split()
        if name not in used and (len(words) == 2 or name in chains):
            what = "table" if len(words) == 2 else "chain"
            commands.output(["nft", "delete", what, *words], keep=(lock,))
