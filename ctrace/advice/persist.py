"""Where rules must be kept so that a reload or a reboot does not lose them.

Rules that ``apply`` makes live in the kernel until the next boot, or until
something flushes the ruleset: a reload of Debian's /etc/nftables.conf begins with
``flush ruleset``. firewalld's and ufw's reloads, and netfilter-persistent's, leave other nftables
tables alone; what becomes of accepts in their own chains: :mod:`ctrace.change.keep`.
"""

from __future__ import annotations

import os
from collections.abc import Callable
from typing import Final, Optional

from ctrace.ruleset.model import Ruleset

FILE: Final = "/etc/nftables.d/ctrace.nft"
UNIT: Final = "/etc/systemd/system/ctrace-notrack.service"

_INTO: Final = f"put nft's rules (the lines between <<'CTRACE' and CTRACE) into {FILE}"
_OWN_UNIT: Final = (
    f"{_INTO} and load them from a unit of their own ({UNIT}, oneshot, "
    f"Before=network-pre.target, ExecStart=/usr/sbin/nft -f {FILE})"
)


def managers(
    ruleset: Optional[Ruleset], exists: Callable[[str], bool] = os.path.exists
) -> list[str]:
    """What manages the packet filter here: ``firewalld``, ``ufw``, ``nftables``,
    ``iptables-persistent``, ``kube-proxy``; empty when no known manager does."""
    chains = ruleset.chains if ruleset else ()
    found = []
    if any(chain.table == "firewalld" for chain in chains):
        found.append("firewalld")
    if any(chain.name.startswith("ufw-") for chain in chains):
        found.append("ufw")
    if any(chain.name.startswith("KUBE-") for chain in chains):
        found.append("kube-proxy")
    if exists("/etc/iptables/rules.v4"):
        found.append("iptables-persistent")
    if not found and (exists("/etc/nftables.conf") or exists("/etc/sysconfig/nftables.conf")):
        found.append("nftables")
    return found


def hint(manager: str) -> str:
    """One sentence: where to put the rules on a host with this manager."""
    return {
        "nftables": f'{_INTO} and add include "{FILE}" at the end of '
        "/etc/nftables.conf: its flush ruleset would remove a table that was loaded apart",
        "firewalld": f"firewalld: {_OWN_UNIT}; firewall-cmd --reload leaves other tables alone, "
        "and zones and policies cannot express notrack; accepts in its own chains go with each "
        "reload, and a change that ctrace applied puts them back",
        "ufw": f"ufw: {_OWN_UNIT}; accepts in ufw's own chains belong into /etc/ufw/before.rules "
        "and before6.rules, before its INVALID drop",
        "iptables-persistent": f"iptables-persistent does not save nftables tables: {_OWN_UNIT}; "
        "accepts in iptables chains are kept by netfilter-persistent save",
        "kube-proxy": f"on every node: {_OWN_UNIT}; kube-proxy sets nf_conntrack_max and TCP "
        "timeouts itself when it starts, so tune those in its configuration",
    }.get(manager, f"{_OWN_UNIT[0].upper()}{_OWN_UNIT[1:]}")
