"""Where the end of a trial would cut forwarded connections, which no socket here tells of."""

from __future__ import annotations

import re
from collections.abc import Iterator
from typing import Final

from ctrace.change.plan import Notrack, Plan
from ctrace.host import commands
from ctrace.ruleset.installed import XT_TOOLS, nft_ruleset, saved_rules

_FLAGS: Final = r"(--syn|--tcp-flags \S+ SYN)\b"
_XT_SYN: Final = re.compile(rf"{_FLAGS}.*\bNEW\b|\bNEW\b.*{_FLAGS}")


def cut_off(plan: Plan) -> Iterator[str]:
    """One sentence for each reason; reads the ruleset of the namespace that we are in.

    This host's own connections get their entries before they are tracked again
    (:mod:`ctrace.change.carry`). Forwarded ones are picked up in mid-stream, as NEW.
    """
    if not any(
        isinstance(lever, Notrack) and lever.proto == "tcp" and "forward" in lever.roles
        for lever in plan.levers
    ):
        return
    with open("/proc/sys/net/netfilter/nf_conntrack_tcp_loose") as file:
        if file.read().strip() == "0":
            yield (
                "nf_conntrack_tcp_loose is 0: forwarded TCP connections that are opened during "
                "the trial become INVALID if it is taken back"
            )
    saves = "".join(saved_rules(tool, family) for tool in XT_TOOLS for family in ("ip", "ip6"))
    if _XT_SYN.search(saves) or (commands.have("nft") and _nft_looks_at_syn()):
        yield (
            "a rule tells NEW packets with SYN from those without: forwarded TCP connections "
            "that are opened during the trial may be cut off if it is taken back"
        )


def _nft_looks_at_syn() -> bool:
    for item in nft_ruleset().get("nftables", ()):
        text = str(item.get("rule", {}).get("expr", "")) if isinstance(item, dict) else ""
        if "'new'" in text and "'flags'" in text:
            return True
    return False
