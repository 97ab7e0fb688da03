"""The rule sets of tools, and the roles that a service has under each."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Final

from kit.rulesets.texts import Setup, firewalld, nft, ufw
from kit.rulesets.tool.clusters import (
    CALICO_FILTER,
    CALICO_RAW,
    FLANNEL_FILTER,
    FLANNEL_NAT,
    ISTIO,
    KUBE_FILTER,
    KUBE_NAT,
    KUBE_NFT,
)
from kit.rulesets.tool.containers import (
    DOCKER_FILTER,
    DOCKER_NAT,
    DOCKER_NFT,
    DOCKER_RAW,
    LIBVIRT,
    NETAVARK,
)
from kit.rulesets.tool.firewalls import (
    CSF,
    FAIL2BAN,
    FIREHOL,
    FIREWALLD,
    FW4,
    SHOREWALL,
    TAILSCALE_FILTER,
    TAILSCALE_MANGLE,
    TAILSCALE_NAT,
    VYOS,
    WG_QUICK,
)
from kit.rulesets.tool.words import both, table, v4


@dataclass(frozen=True)
class Structure:
    """A tool's rules, and how the service is used behind them."""

    tool: str
    roles: tuple[str, ...]
    setup: Setup
    harmless: bool = True
    """Known to be: the rules must be allowed. Else: they may be, if nothing changes."""
    proto: str = "tcp"
    common: bool = False
    """One of the few that every run of the tests looks at."""


STRUCTURES: Final = (
    Structure("docker", ("server",), v4(
        "nft", table("raw", DOCKER_RAW), table("nat", DOCKER_NAT),
        table("filter", DOCKER_FILTER, FORWARD="DROP")), common=True),
    Structure("kube-proxy nftables", ("server",), nft(KUBE_NFT), common=True),
    Structure("firewalld zones", ("server",), nft(FIREWALLD), common=True),
    Structure("ufw", ("client",), ufw("plain"), common=True),
    Structure("tailscale", ("server", "loopback"), v4(
        "nft", table("mangle", TAILSCALE_MANGLE), table("filter", TAILSCALE_FILTER),
        table("nat", TAILSCALE_NAT)), common=True),
    Structure("calico", ("server",), both(
        "legacy", table("raw", CALICO_RAW), table("filter", CALICO_FILTER, FORWARD="DROP")),
        common=True),
    Structure("docker legacy, its own port", ("server", "forward"), v4(
        "legacy", table("nat", DOCKER_NAT.replace("7063", "8063")),
        table("filter", DOCKER_FILTER, FORWARD="DROP")), harmless=False),
    Structure("docker nftables", ("server", "loopback"), nft(DOCKER_NFT)),
    Structure("netavark", ("server",), nft(NETAVARK), harmless=False),
    Structure("libvirt", ("loopback",), nft(LIBVIRT)),
    Structure("kube-proxy iptables", ("server",), v4(
        "legacy", table("nat", KUBE_NAT), table("filter", KUBE_FILTER))),
    Structure("flannel", ("server",), v4(
        "nft", table("nat", FLANNEL_NAT), table("filter", FLANNEL_FILTER, FORWARD="DROP"))),
    Structure("istio", ("server",), v4("nft", table("nat", ISTIO)), harmless=False),
    Structure("shorewall", ("server", "forward"), both(
        "nft", table("filter", SHOREWALL, INPUT="DROP", FORWARD="DROP", OUTPUT="DROP"))),
    Structure("firehol", ("client",), both(
        "nft", table("filter", FIREHOL, INPUT="DROP", OUTPUT="DROP"))),
    Structure("csf", ("server",), both(
        "legacy", table("filter", CSF, INPUT="DROP", FORWARD="DROP", OUTPUT="DROP"))),
    Structure("fw4", ("server",), nft(FW4), harmless=False),
    Structure("vyos", ("server",), nft(VYOS)),
    Structure("wg-quick", ("server", "client"), nft(WG_QUICK), proto="udp"),
    Structure("ufw and fail2ban", ("server",), (*ufw("allow", "legacy"), *nft(FAIL2BAN))),
    Structure("tailscale and firewalld", ("client",), (*v4(
        "nft", table("filter", TAILSCALE_FILTER)), *firewalld("plain"))),
)  # fmt: skip
