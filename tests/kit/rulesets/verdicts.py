"""Verdicts on a service from the entries and rules that are there now."""

from __future__ import annotations

from dataclasses import replace

from ctrace.advice.hazards import Judgement
from ctrace.advice.roles import subject
from ctrace.plan.plan import Notrack
from kit.rulesets.net import Net, seen, verdict_on
from kit.rulesets.services import PORT


def judged(net: Net, proto: str = "tcp", port: int = PORT) -> Judgement:
    """The verdict from the entries that are in the table now."""
    about = subject(seen(net, proto, port), net.local, (32768, 60999), True, ())
    return verdict_on(about, net.h.path)


def bare(judgement: Judgement) -> Notrack:
    return replace(judgement.lever, accepts=(), icmp=False)
