"""docs/kernels.md names constants that there are."""

from __future__ import annotations

import re
from pathlib import Path

from ctrace.kernel import layout

PAGE = Path(__file__).parents[2] / "docs/kernels.md"


def test_every_constant_that_the_page_names_may_be_found() -> None:
    named = set(re.findall(r"`([A-Z][A-Z0-9]*_[A-Z0-9_]+)`", PAGE.read_text()))
    reasons = {"SKB_DROP_REASON_NETFILTER_DROP"}  # the kernel's own
    assert len(named) > 10
    assert named - reasons <= layout.names()
