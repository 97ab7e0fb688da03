"""Reads the live ruleset of one network namespace, whichever tools wrote it.

``nft -j`` shows iptables-nft's extensions without their arguments, so tables that
use them are read through ``iptables-nft-save``; the legacy variant has tables of
its own, which nft does not see. Reading changes nothing: legacy tables are asked
for only when the kernel already has some.
"""

from __future__ import annotations

import contextlib
import json
import re
from collections.abc import Iterator
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any, Final

from ctrace.digests import sha256
from ctrace.errors import CtraceError
from ctrace.host import commands
from ctrace.host.netns import enter
from ctrace.ruleset import iptables, nft
from ctrace.ruleset.installed import Rule, tagged_lines, tagged_rules
from ctrace.ruleset.model import Chain, Ruleset
from ctrace.ruleset.notrack import CHAINS, TABLE, TAG
from ctrace.ruleset.planes import Plane, planes

XT_TABLES: Final = ("raw", "mangle", "nat", "filter", "security")
XT_HOOKS: Final = ("PREROUTING", "INPUT", "FORWARD", "OUTPUT", "POSTROUTING")
_COUNTS: Final = frozenset(("handle", "packets", "bytes", "expires", "used"))
PATIENCE_S: Final = 60.0
"""Seconds of a processor for one tool (:data:`ctrace.host.commands.PATIENCE_S`): 50,000 rules
take some."""

__all__ = ["Ruleset", "dump", "fingerprint", "load", "read"]


@dataclass(frozen=True)
class _Listings:
    """What the tools printed, before it is interpreted."""

    nft: str = ""
    saves: tuple[tuple[str, str, str], ...] = ()
    """(tool, family, text)."""
    ipvs: str = ""
    gaps: tuple[str, ...] = ()
    planes: tuple[Plane, ...] = ()


def read(netns_path: str) -> Ruleset:
    """The ruleset of the namespace at ``netns_path``.

    What could not be read is in ``gaps``; nothing that has gaps may be called safe.
    Raises CtraceError when the namespace cannot be entered.
    """
    return build(_collect(netns_path))


def fingerprint(netns_path: str) -> str:
    """sha256 of the ruleset without counters, handles, set contents that change by
    themselves, and ctrace's own rules. Raises CtraceError when it cannot be read."""
    listings = _collect(netns_path)
    if listings.gaps:
        raise CtraceError(f"the ruleset cannot be read: {listings.gaps[0]}")
    found = _digest(listings)
    forget()
    return found


def dump(netns_path: str) -> dict[str, Any]:
    """The ruleset as the tools print it, JSON-ready: :func:`load` reads it back.

    Without :func:`load`, :func:`forget` what was parsed.
    """
    return asdict(_collect(netns_path))


def forget() -> None:
    """Give back the memory that a parsed listing takes."""
    nft.objects_of.cache_clear()


def load(document: Any) -> Ruleset:
    """The ruleset of a :func:`dump`. Raises CtraceError when it is not one."""
    try:
        saves = [(str(tool), str(family), str(text)) for tool, family, text in document["saves"]]
        gaps = tuple(str(gap) for gap in document["gaps"])
        beside = tuple((str(device), str(what)) for device, what in document.get("planes", ()))
        return build(
            _Listings(str(document["nft"]), tuple(saves), str(document["ipvs"]), gaps, beside)
        )
    except (KeyError, TypeError, ValueError, AttributeError):
        raise CtraceError("the recorded ruleset cannot be read: it is damaged") from None


def build(listings: _Listings) -> Ruleset:
    """The model of the listings."""
    gaps = list(listings.gaps)
    chains: list[Chain] = []
    covered: set[tuple[str, str, str]] = set()  # iptables-nft chains that a save command printed
    for tool, family, text in listings.saves:
        found, unclear = iptables.parse(text, tool, family)
        chains += found
        gaps += unclear
        if tool == "iptables-nft":
            covered |= {(family, chain.table, chain.name) for chain in found}
    if listings.nft:
        try:
            objects = nft.objects_of(listings.nft)
            native = nft.parse(objects, covered)
            gaps += nft.bridged(objects)
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            gaps.append(f"nft's listing could not be understood ({type(error).__name__})")
            native = []
        every = covered | {(chain.family, chain.table, chain.name) for chain in native}
        made = {
            (family, table)
            for family, table, name in every
            if family != "inet" and table in XT_TABLES and name in XT_HOOKS
        }  # by iptables-nft: additions must go through it, or it no longer reads them
        for chain in native:
            xt = (chain.family, chain.table) in made
            chains.append(replace(chain, tool="iptables-nft") if xt else chain)
    ours = tuple(_ours(listings))
    digest = _digest(listings)
    forget()
    return Ruleset(tuple(chains), digest, _ipvs(listings.ipvs), ours, listings.planes, tuple(gaps))


def _ours(listings: _Listings) -> Iterator[Rule]:
    # What is damaged has been told as a gap.
    with contextlib.suppress(ValueError, KeyError, TypeError, AttributeError):
        if listings.nft:
            yield from tagged_rules(nft.objects_of(listings.nft), _saved_tables(listings))
    for tool, family, text in listings.saves:
        with contextlib.suppress(ValueError):
            yield from tagged_lines(text, tool, family)


def _collect(netns_path: str) -> _Listings:
    gaps: list[str] = []
    saves: list[tuple[str, str, str]] = []
    listing, ipvs = "", ""
    with enter(netns_path):
        has_nft = commands.have("nft")
        if has_nft:
            listing = _run(["nft", "-j", "list", "ruleset"], gaps)
        elif _may_have_nf_tables():
            gaps.append("nft is missing, so nf_tables' rules cannot be read: install nftables")
        for family in ("ip", "ip6"):
            command = f"{family}tables-nft-save"
            if not has_nft or _wants_save(listing, family):
                if commands.have(command):
                    saves.append(("iptables-nft", family, _compatible(_run([command, "-c"], gaps))))
                elif has_nft:
                    gaps.append(f"{command} is missing, and iptables-nft rules are in use")
            names = _proc(f"/proc/thread-self/net/{family}_tables_names").split()
            if ("raw" in names or not has_nft) and raw_before_defrag(family, has_nft):
                gaps.append(
                    f"{family}table_raw has raw_before_defrag, so legacy raw rules see "
                    "fragments before they are put together"
                )
            if names:
                command = f"{family}tables-legacy-save"
                if commands.have(command):
                    saves.append(("iptables-legacy", family, _run([command, "-c"], gaps)))
                elif commands.have(f"{family}tables-save"):
                    plain = f"{family}tables-save"
                    saves.append(("iptables-legacy", family, _run([plain, "-c"], gaps)))
                else:
                    gaps.append(f"{command} is missing, and legacy iptables tables are in use")
        ipvs = _proc("/proc/thread-self/net/ip_vs")
        beside = planes(gaps)
    return _Listings(listing, tuple(saves), ipvs, tuple(gaps), tuple(beside))


def _run(argv: list[str], gaps: list[str]) -> str:
    try:
        status, text, said = commands.output(argv, patience=PATIENCE_S)
    except CtraceError as error:
        gaps.append(str(error))
        return ""
    if status != 0:
        gaps.append(f"{' '.join(argv)} failed: {said[:120] or 'no message'}")
        return ""
    return text


def _proc(path: str) -> str:
    try:
        with open(path, errors="replace") as file:
            return file.read()
    except OSError:
        return ""


def raw_before_defrag(family: str, has_nft: bool, root: str = "/") -> bool:
    """Whether legacy raw tables come before defragmentation (at -450, not -300).

    The module parameter itself can't be read (its mode is 0): the hooks tell, where the
    kernel lists them (CONFIG_NETFILTER_NETLINK_HOOK), else what asks for it at load.
    """
    if has_nft:
        hooks = _run(["nft", "list", "hooks"], [])
        if re.search(rf"-0*450 ({family}table_raw|{family}t_do_table)", hooks):
            return True
    option = re.compile(rf"^options {family}table_raw .*raw_before_defrag=[1yY]", re.MULTILINE)
    places = ("etc", "run", "usr/local/lib", "usr/lib", "lib")
    files = [file for place in places for file in Path(root, place, "modprobe.d").glob("*.conf")]
    at_boot = re.compile(rf"\b{family}table_raw\.raw_before_defrag(=[1yY]|\s|$)")
    return bool(at_boot.search(_proc(f"{root}proc/cmdline"))) or any(
        option.search(_proc(str(file))) for file in files
    )


def _may_have_nf_tables() -> bool:
    modules = _proc("/proc/modules")  # empty where everything is built in
    return not modules or "nf_tables " in modules


def _wants_save(listing: str, family: str) -> bool:
    """Whether the family has iptables' tables, of which nft's listing lacks arguments.

    Also when no rule has any yet: ours would add the first, and the listing that the
    fingerprint is made of must not depend on that.
    """
    if not listing:
        return False
    try:
        objects = nft.objects_of(listing)
    except (ValueError, KeyError, TypeError):
        return False
    return any(
        "table" in item and item["table"]["family"] == family and item["table"]["name"] in XT_TABLES
        for item in objects
    )


def _compatible(text: str) -> str:
    """A save listing without tables that it says it cannot express."""
    bad = set(re.findall(r"[Tt]able [`'\"]?(\w+)['\"]? is incompatible", text))
    if not bad:
        return text
    parts = re.split(r"(?m)^(?=\*)", text)
    return "".join(part for part in parts if part.split("\n", 1)[0][1:].strip() not in bad)


def _ipvs(text: str) -> tuple[tuple[str, int], ...]:
    """Virtual services of /proc/net/ip_vs: ``TCP  0A000001:0050 rr``, ``FWM  00000001 wlc``."""
    found = []
    for line in text.splitlines():
        words = line.split()
        if len(words) >= 2 and words[0] in ("TCP", "UDP", "SCTP"):
            found.append((words[0].lower(), int(words[1].rsplit(":", 1)[1], 16)))
        elif len(words) >= 2 and words[0] == "FWM":
            found.append(("", 0))
    return tuple(found)


# ---- the fingerprint -----------------------------------------------------------


def _digest(listings: _Listings) -> str:
    text = json.dumps(
        {
            "nft": _stable_nft(listings.nft, _saved_tables(listings)),
            # One that says nothing is as good as one that was not asked: our own rules,
            # left out here, are what may have caused it to be asked.
            "saves": [
                (tool, family, lines)
                for tool, family, t in listings.saves
                if (lines := _stable_save(t))
            ],
            "ipvs": sorted(_ipvs(listings.ipvs)),
        },
        sort_keys=True,
    )
    return sha256(text.encode()).hexdigest()


def _saved_tables(listings: _Listings) -> set[tuple[str, str]]:
    """iptables-nft's tables that a save command printed: nft's own listing says less."""
    return {
        (family, name)
        for tool, family, text in listings.saves
        if tool == "iptables-nft"
        for name in re.findall(r"(?m)^\*(\w+)", text)
    }


def _stable_nft(text: str, saved: set[tuple[str, str]]) -> list[Any]:
    try:
        objects = nft.objects_of(text) if text else []
    except (ValueError, KeyError, TypeError):
        return [text]
    kept = []
    for item in objects:
        kind, body = next(iter(item.items()))
        table = body.get("name") if kind == "table" else body.get("table")
        place = (body.get("family"), table)
        if kind == "metainfo" or place == ("inet", TABLE) or place in saved:
            continue
        if str(body.get("comment", "")).startswith(TAG) or body.get("name") in CHAINS:
            continue
        if body.get("chain") in CHAINS or _jumps_to_us(body):
            continue
        if kind in ("set", "map") and (
            {"dynamic", "timeout"} & set(body.get("flags", ())) or "size" in body
        ):
            body = {key: value for key, value in body.items() if key != "elem"}
        kept.append({kind: _without_counts(body)})
    return [item for item in kept if not _left_empty(item)]


def _left_empty(item: dict[str, Any]) -> bool:
    """iptables-nft's ``raw`` table and its two hooks: they stay behind when our chains go."""
    if "table" in item:
        return item["table"] in ({"family": "ip", "name": "raw"}, {"family": "ip6", "name": "raw"})
    chain = item.get("chain", {})
    return (chain.get("table"), chain.get("name"), chain.get("policy")) in (
        ("raw", "PREROUTING", "accept"),
        ("raw", "OUTPUT", "accept"),
    )


def _jumps_to_us(body: dict[str, Any]) -> bool:
    return any(
        isinstance(part, dict) and part.get("jump", {}).get("target") in CHAINS
        for part in body.get("expr", ())
    )


def _without_counts(value: Any) -> Any:
    """The same without counters, handles and the like."""
    if type(value) is dict:
        return {
            key: None
            if key == "counter"
            else _without_counts(inner)
            if type(inner) in (dict, list)
            else inner
            for key, inner in value.items()
            if key not in _COUNTS
        }
    return [_without_counts(one) if type(one) in (dict, list) else one for one in value]


def _stable_save(text: str) -> list[str]:
    """Rules and policies; without comments, counters, and ctrace's own chains and rules."""
    lines = []
    for line in text.splitlines():
        if line.startswith("#") or any(chain in line for chain in CHAINS) or f'"{TAG}' in line:
            continue
        lines.append(re.sub(r"\[\d+:\d+\]", "", line).strip())
    kept = []
    for i, line in enumerate(lines):  # an empty raw table stays behind when our chains go
        if line == "*raw" and lines[i + 1 : i + 4] == [
            ":PREROUTING ACCEPT",
            ":OUTPUT ACCEPT",
            "COMMIT",
        ]:
            lines[i + 1 : i + 4] = ["", "", ""]
            continue
        if line:
            kept.append(line)
    return kept
