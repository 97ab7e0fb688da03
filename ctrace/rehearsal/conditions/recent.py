"""Lists of addresses that iptables' ``recent`` keeps: some rules fill them, others ask.

Constants: include/uapi/linux/netfilter/xt_recent.h.
"""

from __future__ import annotations

import re
import struct
from collections.abc import Iterator
from contextlib import suppress
from typing import Final

from ctrace.host.rawlink import Space, word

MATCH: Final = "recent"
_SET: Final = 2
_RULE: Final = re.compile(r" -m recent((?: (?!-m |-j |-g )\S+)*)")
_OPTION: Final = re.compile(r"--(name|hitcount) (\S+)")


def fills(info: bytes) -> bool:
    """Whether a match puts addresses into its list; it holds for every packet then."""
    return bool(info[8] & _SET)


class Lists:
    """The lists of a rule set."""

    def __init__(self) -> None:
        self._filled: set[str] = set()
        self._asked: dict[str, int] = {}
        """How many packets of an address rules ask for, at most."""

    def see(self, info: bytes) -> None:
        """A match of nftables' form: struct xt_recent_mtinfo."""
        hits, how = struct.unpack_from("=IB", info, 4)
        self._add(word(info[10:210].split(b"\0")[0]), bool(how & _SET), hits)

    def text(self, saved: str) -> None:
        """The output of iptables-legacy-save."""
        for found in _RULE.finditer(saved):
            options = dict(_OPTION.findall(found[1]))
            hits = int(options.get("hitcount", 0))
            self._add(options.get("name", "DEFAULT"), " --set" in found[1], hits)

    def _add(self, name: str, fills: bool, hits: int) -> None:
        if fills:
            self._filled.add(name)
        else:
            self._asked[name] = max(self._asked.get(name, 0), hits)

    @property
    def filled(self) -> bool:
        """Whether packets leave addresses behind."""
        return bool(self._filled)

    @property
    def watched(self) -> list[str]:
        """Names of lists that rules fill and ask."""
        return sorted(self._filled & set(self._asked))

    def held(self, space: Space) -> Iterator[tuple[str, bytes]]:
        """What they hold in a namespace: (list, address); with the number of its packets where
        rules ask for several."""
        with space.inside():
            for name in self.watched:
                with suppress(OSError), open(f"/proc/thread-self/net/xt_recent/{name}") as file:
                    for line in file:
                        key = line.split()[0]
                        if self._asked[name] > 1:
                            key += f" {min(line.count(',') + 1, self._asked[name])}"
                        yield name, key.encode()
