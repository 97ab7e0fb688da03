"""The frequency of the kernel's clock tick (CONFIG_HZ): times in an entry are in ticks."""

from __future__ import annotations

import gzip
import os
import re
from functools import cache
from pathlib import Path

from ctrace.errors import CtraceError


@cache
def ticks_per_second() -> int:
    """CONFIG_HZ: from the kernel's configuration, else from its timer list.

    Raises CtraceError when neither can be read.
    """
    release = os.uname().release
    for path in (f"/boot/config-{release}", f"/lib/modules/{release}/config", "/proc/config.gz"):
        try:
            data = Path(path).read_bytes()
        except OSError:
            continue
        text = gzip.decompress(data) if path.endswith(".gz") else data
        found = re.search(rb"^CONFIG_HZ=(\d+)", text, re.M)
        if found:
            return int(found.group(1))
    return _measured_ticks()


def _measured_ticks() -> int:
    """jiffies starts at 2^32 - 300 s on 64 bits (INITIAL_JIFFIES), so one reading tells HZ."""
    try:
        text = Path("/proc/timer_list").read_text()
    except OSError:
        text = ""
    now = re.search(r"now at (\d+) nsecs", text)
    jiffies = re.search(r"^jiffies: (\d+)", text, re.M)
    if not now or not jiffies:
        raise CtraceError("cannot tell the kernel's CONFIG_HZ: /proc/timer_list is unreadable")
    seconds = int(now.group(1)) / 1e9 - 300
    rate = (int(jiffies.group(1)) - (1 << 32)) / seconds if abs(seconds) > 1 else 250.0
    return min((100, 250, 300, 1000), key=lambda hz: abs(hz - rate))
