"""A namespace of our own with the interfaces, routes, settings and rules given as texts.

It is then read as every namespace is, and removed: what is rehearsed is what the kernel made of the
texts. Nothing that they lack is made up: then there is no copy, and the reason names what is
missing.
"""

from __future__ import annotations

import json
import os
import re
from dataclasses import dataclass, replace
from typing import Any, Final, Optional

from ctrace.errors import CtraceError
from ctrace.given import Given
from ctrace.host import commands
from ctrace.host.rawlink import Space
from ctrace.rehearsal import surroundings
from ctrace.rehearsal.given import lacking, modules, safe
from ctrace.rehearsal.given.links import Links
from ctrace.rehearsal.given.links import read as read_links
from ctrace.rehearsal.given.routes import Tables, is_six, route, route_lines, rule
from ctrace.rehearsal.nft_copy import BRIDGE
from ctrace.rehearsal.snapshot import PLAIN_QUEUES, Snapshot, read_sysctls, take
from ctrace.ruleset import reader

DEFAULTS: Final = {"nf_conntrack_tcp_loose": "1"}
"""The kernel's initial values of the settings that matter, where they are not 0."""
ROUNDS: Final = 8
"""A gateway wants a route to itself first."""
LISTED: Final = re.compile(
    "metainfo|table|chain|rule|set|map|element|flowtable|counter|quota|limit|secmark|synproxy"
    "|tunnel|ct [a-z]+"
)
"""What nft's JSON lists; other objects are commands."""
SIZE: Final = 4 << 20
"""Bytes of rules that are loaded, and of anything else that was listed: of what is longer, texts
keep a part alone (:data:`ctrace.dumps.found.TEXT_LIMIT`), and a copy of a part is none."""
LOADING_S: Final = 20.0
"""Seconds of a processor: the text is a stranger's."""
CAGE: Final = 'mount -t tmpfs none /run && ulimit -v 2097152 && exec "$0" "$@"'
"""Hides the sockets below /run, so that no name server is asked; limits memory."""

TRACKS: Final = """\
table inet tracked-by-the-module {
    chain every {
        type filter hook prerouting priority 400
        ct state new
    }
}
"""
"""A rule that decides nothing, and makes everything tracked."""
_THERE: Final = re.compile(r"File exists|already assigned")


@dataclass(frozen=True)
class Rebuilt:
    """The result of rebuilding."""

    snapshot: Optional[Snapshot]
    """None: it could not be made, or something is lacking."""
    ruleset: Optional[dict[str, Any]]
    """Of the same namespace, as :func:`ctrace.ruleset.reader.load` takes it."""
    lacking: str = ""
    """Why there is none, as a sentence."""
    remarks: tuple[str, ...] = ()
    """Remarks on a copy made of texts."""


def rebuild(given: Given) -> Rebuilt:
    """Make it, read it, and let it go."""
    try:
        links = read_links(given.links)
        missing = list(dict.fromkeys(lacking.texts(given, links)))
        if missing:
            return Rebuilt(None, None, _asked_for(given, missing))
        unlike = [*lacking.sentences(given, links, os.uname().release)]
        unlike += [
            f"{what} at {device} sees packets before the rules"
            for device, what in (*links.planes, *_programs(given))
        ]
        if unlike:
            return Rebuilt(
                None,
                None,
                f"its rules were given as text, and a copy made of it would "
                f"not be faithful: {'; '.join(unlike)}",
            )
        return _made(given, links)
    except CtraceError as error:
        return Rebuilt(
            None, None, f"its rules were given as text, which could not be made again: {error}"
        )


def _asked_for(given: Given, missing: list[str]) -> str:
    names = ", ".join(
        "`{}` ({}".format(*name.split(" (", 1)) if " (" in name else f"`{name}`" for name in missing
    )
    if given.nft or given.nft_text or given.saves:
        return (
            f"its rules were given as text; to rehearse them, add what the evidence lacks: {names}"
        )
    return f"its rules are not in the texts; to rehearse them, add to the evidence: {names}"


def _made(given: Given, links: Links) -> Rebuilt:
    _check_sizes(given)
    saves, tables = _saves(given)
    nft = safe.nft(given.nft_text, tables) if given.nft_text else ""
    if not nft and given.nft:
        nft = _of_json(given.nft, tables)
    ipsets = safe.ipsets(given.ipsets)
    if len(nft) + len(ipsets) + sum(len(text) for _, _, text in saves) > SIZE:
        raise CtraceError(f"they are more than {SIZE >> 20} MiB")
    unloaded = modules.missing(nft, saves, ipsets)
    if unloaded:
        raise CtraceError(
            "modules that it needs are not loaded here, and ctrace loads none unasked: "
            f"modprobe -a {' '.join(unloaded)}"
        )
    bare = Snapshot(tuple(links.devices), (), (), (), (), (), (), (), (), (), ())
    space = Space()
    files: surroundings.Files = {}
    try:
        files, gaps = surroundings.interfaces(bare, space)
        gaps += _batch(space, "", [f"addr add {one}" for one in links.addresses])
        gaps += _settings(space, given, links)
        gaps += _routes(space, given)
        if gaps:
            raise CtraceError("; ".join(gaps[:5]))
        if ipsets:
            _load(space, ["ipset", "restore"], ipsets)
        if _tracks_all(given.kernel):
            _load(space, ["nft", "-f", "-"], TRACKS)
        if nft:
            _load(space, ["nft", *(["-j"] if nft.startswith("{") else []), "-f", "-"], nft)
        for tool, family, text in saves:
            name = f"{family}tables-{'legacy' if tool == 'iptables-legacy' else 'nft'}-restore"
            _load(space, [name, "-c"], text)
        found = take(space.path)
        ruleset = reader.dump(space.path)
        reader.forget()
    finally:
        for file, _ in files.values():
            os.close(file)
        space.close()
    gaps = [*found.gaps, *ruleset["gaps"]]
    if gaps:
        raise CtraceError("; ".join(gaps[:5]))
    bridged = any(family == BRIDGE for _, family, _ in found.nft)
    quiet = () if bridged else _unmarked(given, links)
    snapshot = replace(found, devices=tuple(links.devices), unmarked=quiet)
    return Rebuilt(snapshot, ruleset, remarks=tuple(_remarks(given)))


def _check_sizes(given: Given) -> None:
    every = {
        "rules": [given.nft_text or given.nft, *(text for _, _, text in given.saves)],
        "sets": [given.ipsets],
        "routes": [given.routes, given.rules, given.rules6, given.qdiscs, given.links],
    }
    for what, listings in every.items():
        if any(len(text) > SIZE for text in listings):
            raise CtraceError(f"the {what} are more than {SIZE >> 20} MiB")


def _tracks_all(kernel: str) -> bool:
    """Whether connections are tracked without a rule that asks for it: not since 4.10
    (nf_ct_netns_get, commit 0c66dc1ea3f0)."""
    said = lacking.release(kernel)
    return said is not None and said < (4, 10)


def _remarks(given: Given) -> list[str]:
    ours = os.uname().release
    theirs = f", not on its own, {given.kernel}" if given.kernel and given.kernel != ours else ""
    found = [
        f"rehearsed with the rules as the texts give them, on kernel {ours} of this "
        f"machine{theirs}: advise again on the host before applying anything"
    ]
    if lacking.come_and_go(given.nft_text) or " timeout " in given.ipsets:
        found.append("sets whose elements come and go stand as they were when they were listed")
    return found


# ---- rules -----------------------------------------------------------------------------


def _saves(given: Given) -> tuple[list[tuple[str, str, str]], set[tuple[str, str]]]:
    """Listings of iptables, the last of each table; and iptables-nft's tables among them."""
    texts: dict[tuple[str, str, str], str] = {}
    for tool, family, text in given.saves:
        for part in re.findall(r"(?ms)^\*(\w+)\n(.*?)^COMMIT$", safe.save(text)):
            texts[tool, family, part[0]] = f"*{part[0]}\n{part[1]}COMMIT\n"
    merged: dict[tuple[str, str], str] = {}
    for (tool, family, _), text in texts.items():
        merged[tool, family] = merged.get((tool, family), "") + text
    tables = {(family, table) for tool, family, table in texts if tool == "iptables-nft"}
    return [(tool, family, text) for (tool, family), text in merged.items()], tables


def _of_json(text: str, without: set[tuple[str, str]]) -> str:
    """nft's JSON without some tables. Raises CtraceError."""
    try:
        kept = []
        for item in json.loads(text)["nftables"]:
            ((kind, body),) = item.items()
            if not LISTED.fullmatch(kind):
                raise CtraceError(f"nft's JSON has {kind[:20]!r}, which no listing has")
            table = body.get("name") if kind == "table" else body.get("table")
            if (body.get("family"), table) in without:
                continue
            if '"xt": ' in (line := json.dumps(item)) and '"expr"' in line:
                raise CtraceError(
                    "nft's JSON lacks what iptables' extensions were given: add iptables-save"
                )
            if int(body.get("size") or 0) > safe.MOST_ELEMENTS:
                raise CtraceError(f"set {body.get('name')} is too large")
            kept.append(item)
    except (ValueError, KeyError, TypeError, AttributeError, OverflowError, RecursionError):
        raise CtraceError("nft's JSON cannot be read") from None
    return json.dumps({"nftables": kept}) if len(kept) > 1 else ""


def _load(space: Space, argv: list[str], text: str) -> None:
    """Raises CtraceError with the tool's own complaint."""
    path = commands.find(argv[0])
    if path is None or commands.find("unshare") is None:
        raise CtraceError(f"{argv[0] if path is None else 'unshare'} is not installed here")
    with space.inside():
        status, _, said = commands.output(
            ["unshare", "--mount", "--propagation", "private", "sh", "-c", CAGE, path, *argv[1:]],
            text,
            LOADING_S,
        )
    if status:
        raise CtraceError(f"{argv[0]} refused: {said[:200] or f'exit status {status}'}")


# ---- what surrounds them ----------------------------------------------------------------


def _batch(space: Space, option: str, lines: list[str]) -> list[str]:
    """Run lines through ``ip -batch`` again and again until no more are taken; returns the rest."""
    for _ in range(ROUNDS):
        if not lines:
            return []
        with space.inside():
            status, said = commands.complaints(
                ["ip", *option.split(), "-force", "-batch", "-"], "\n".join(lines) + "\n"
            )
        if status not in (0, 1):  # it reads no further
            return [f"what ip cannot read: {(said or [''])[-1][:100]}"]
        failed, reason, last = [], "", ""
        for line in said:
            at = re.fullmatch(r"Command failed -:(\d+)", line)
            if not at:
                last = line
            elif not _THERE.search(last) and 0 < int(at[1]) <= len(lines):
                failed.append(lines[int(at[1]) - 1])
                reason = last
        if len(failed) == len(lines):
            break
        lines = failed
    return [f"`ip {line}`: {reason.removeprefix('RTNETLINK answers: ')}" for line in lines]


def _routes(space: Space, given: Given) -> list[str]:
    tables, gaps = Tables(), []
    adds: dict[bool, list[str]] = {False: [], True: []}
    for line in route_lines(given.routes):
        try:
            found = route(line, tables)
        except ValueError as error:
            gaps.append(f"a route that says {str(error)[:40]!r}")
            continue
        if found is not None:
            adds[is_six(line)].append(f"route append {found}")
    rules: dict[bool, list[str]] = {False: [], True: []}
    for six, text in ((False, given.rules), (True, given.rules6)):
        for line in text.splitlines():
            try:
                rules[six].append(f"rule add {rule(line.strip(), tables)[1]}")
            except ValueError as error:
                gaps.append(f"a routing rule that says {str(error)[:40]!r}")
    for six, option in ((False, "-4"), (True, "-6")):
        gaps += _batch(space, option, adds[six])
        if rules[six]:
            _batch(space, option, ["rule flush", "rule del priority 0"])
            gaps += _batch(space, option, rules[six])
    return gaps


def _settings(space: Space, given: Given, links: Links) -> list[str]:
    """Settings as given; those that matter and are missing get the kernel's default."""
    names = {"all", "default", *(device.name for device in links.devices)}
    want: dict[str, str] = {}
    for path, said in given.settings.items():
        part = re.match(r"net/ipv[46]/conf/([^/]+)/", path)
        if not part or part[1] in names:
            want["/proc/sys/" + path] = said
    have = read_sysctls(space.path)
    values = []
    for path, now in have.items():
        name = path.rsplit("/", 1)[1]
        value = want.get(path)
        if value is None and name in surroundings.MATTERS:
            value = DEFAULTS.get(name, "0")
        if value is not None and value.split() != now.split():
            values.append((path, value))
    # Forwarding sets others when it is written; all of it is written twice, then.
    for _ in range(2):
        surroundings.write(space, values)
    have = read_sysctls(space.path)
    return [
        f"{path[10:]} = {value}"
        for path, value in values
        if path.rsplit("/", 1)[1] in surroundings.MATTERS
        and have.get(path, "").split() != value.split()
    ]


def _programs(given: Given) -> list[tuple[str, str]]:
    """Interfaces that have filters, or may have some which the texts do not show."""
    out = []
    for kind, device in re.findall(r"(?m)^qdisc (clsact|ingress) \S+ dev (\S+)", given.qdiscs):
        for side in ("ingress", "egress") if kind == "clsact" else ("ingress",):
            head = f"tc filter show dev {device} {side}: "
            said = [line for line in given.filters.splitlines() if line.startswith(head)]
            if not said:
                out.append((device, "what hangs at tc, which only ctrace collect lists,"))
            elif said[-1] != head + "none":
                out.append((device, f"what hangs at tc {side}"))
    return list(dict.fromkeys(out))


def _unmarked(given: Given, links: Links) -> tuple[int, ...]:
    """As :func:`ctrace.rehearsal.snapshot.take` finds it: interfaces beyond which no mark is
    read."""
    shaped = {
        device
        for kind, device in re.findall(r"(?m)^qdisc (\S+) \S+ dev (\S+)", given.qdiscs)
        if kind not in PLAIN_QUEUES
    }
    return tuple(
        device.index
        for device in links.devices
        if (device.what in ("", "bridge") or device.name in links.away)
        and device.name not in shaped
        and device.kind == 1
    )
