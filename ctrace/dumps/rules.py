"""Rules and settings as texts give them, in the form that advice reads from a recording."""

from __future__ import annotations

import json
from collections.abc import Iterator
from typing import Any, Optional

from ctrace.advice import facts
from ctrace.dumps.found import Found, Space
from ctrace.dumps.nft.tables import to_json
from ctrace.dumps.source import Told
from ctrace.given import Given
from ctrace.model.remedies import TIMEOUTS
from ctrace.record import proto_name


def rulesets(told: Told) -> Iterator[tuple[int, str]]:
    """(namespace, its facts as text): with rules where they were given, else without."""
    for name, number in told.netns.items():
        space = told.found.space(name)
        timeouts = {
            known: int(text)
            for known in TIMEOUTS
            if (text := space.sysctls.get(f"net.netfilter.nf_conntrack_{known}", "")).isdigit()
            and len(text) < 10
        }
        yield (
            number,
            facts.written(
                facts.Written(
                    ruleset=_listings(space),
                    addresses=space.addresses,
                    ephemeral=_range(space.sysctls.get("net.ipv4.ip_local_port_range", "")),
                    forwarding=_forwarding(space),
                    timeouts=timeouts,
                    entry_bytes=told.found.slab,
                    initial=told.found.whole and not name,
                    reserved=space.sysctls.get("net.ipv4.ip_local_reserved_ports", ""),
                    listening={(proto_name(proto), port) for proto, port in space.listeners},
                    given=given_of(told.found, space),
                )
            ),
        )


def _listings(space: Space) -> Optional[dict[str, Any]]:
    """As ctrace.ruleset.reader.load takes them; None where no rules were given."""
    if not space.has_rules:
        return None
    gaps = []
    if not space.nft and not space.nft_text and any(t == "iptables-nft" for t, _, _ in space.saves):
        gaps.append("nft's own tables were not given: give nft -j list ruleset too")
    nft = space.nft or (json.dumps(to_json(space.nft_text)) if space.nft_text else "")
    return {"nft": nft, "saves": space.saves, "ipvs": "", "gaps": gaps, "planes": []}


def given_of(found: Found, space: Space) -> Given:
    """All that a copy can be made of."""
    parts: dict[str, list[str]] = {}
    for (kind, _), text in space.network.items():
        parts.setdefault(kind, []).append(text)
    links = sorted(parts.get("links", ()), key=lambda t: (" inet" in t, " promiscuity " in t))
    parts.setdefault("ipsets", parts.get("listed sets", []))
    joined = {
        name: "".join(parts.get(name, ()))
        for name in ("routes", "rules", "rules6", "ipsets", "qdiscs", "filters")
    }
    return Given(
        nft=space.nft,
        nft_text=space.nft_text,
        saves=tuple(space.saves),
        **joined,
        links=links[-1] if links else "",
        settings=space.settings,
        modules=tuple(found.modules) if found.modules_whole else None,
        legacy_tables=space.legacy_tables or None,
        ipvs=space.ipvs,
        kernel=found.kernel,
    )


def _range(text: str) -> Optional[tuple[int, int]]:
    low, _, high = text.partition(" ")
    return (int(low), int(high)) if low.isdigit() and high.isdigit() else None


def _forwarding(space: Space) -> Optional[bool]:
    said = [
        space.sysctls[name] != "0"
        for name in ("net.ipv4.ip_forward", "net.ipv6.conf.all.forwarding")
        if name in space.sysctls
    ]
    return any(said) if said else None
