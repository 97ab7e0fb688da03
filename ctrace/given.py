"""What texts give of a host's packet filter and of what surrounds it: enough to make it again."""

from __future__ import annotations

import base64
import json
import zlib
from dataclasses import asdict, dataclass, field
from typing import Any, Final, Optional

BIGGEST: Final = 64 << 20
"""Bytes of it, unpacked."""


@dataclass(frozen=True)
class Given:
    """One namespace's rules and network, each as its tool printed it; empty: not given."""

    nft: str = ""
    """``nft -j list ruleset``."""
    nft_text: str = ""
    saves: tuple[tuple[str, str, str], ...] = ()
    """(tool, family, text) of iptables-save."""
    ipsets: str = ""
    """``ipset save``."""
    links: str = ""
    """``ip addr``, with ``-d`` or without."""
    routes: str = ""
    rules: str = ""
    """``ip rule``, IPv4."""
    rules6: str = ""
    qdiscs: str = ""
    """``tc qdisc``."""
    filters: str = ""
    """``tc filter show dev DEVICE SIDE: none``, or what hangs there; a line each."""
    settings: dict[str, str] = field(default_factory=dict)
    """By path below /proc/sys."""
    modules: Optional[tuple[str, ...]] = None
    """All that are loaded; None where that was not given whole."""
    legacy_tables: Optional[dict[str, tuple[str, ...]]] = None
    """Tables of iptables-legacy by family, by /proc/net/ip_tables_names."""
    ipvs: str = ""
    """``none``, or what /proc/net/ip_vs says."""
    kernel: str = ""


def to_line(given: Given) -> str:
    """One line of ASCII; :func:`from_line` reads it back."""
    body = json.dumps(asdict(given), separators=(",", ":")).encode()
    return base64.b85encode(zlib.compress(body, 6)).decode()


def from_line(line: str) -> Given:
    """What :func:`to_line` wrote. Raises ValueError."""
    try:
        inflate = zlib.decompressobj()
        found: dict[str, Any] = json.loads(inflate.decompress(base64.b85decode(line), BIGGEST))
        texts = ("nft", "nft_text", "ipsets", "links", "routes", "rules", "rules6", "qdiscs",
                 "filters", "kernel", "ipvs")  # fmt: skip
        found.setdefault("filters", "")  # a recording from before it was kept
        legacy, modules = found["legacy_tables"], found["modules"]
        return Given(
            saves=tuple((str(a), str(b), str(c)) for a, b, c in found["saves"]),
            settings={str(name): str(value) for name, value in found["settings"].items()},
            modules=None if modules is None else tuple(str(one) for one in modules),
            legacy_tables=None
            if legacy is None
            else {
                str(family): tuple(str(one) for one in names) for family, names in legacy.items()
            },
            **{name: str(found[name]) for name in texts},
        )
    except (
        zlib.error,
        LookupError,
        TypeError,
        ValueError,
        AttributeError,
        RecursionError,
    ) as error:
        raise ValueError("the rules as they were given are damaged") from error
