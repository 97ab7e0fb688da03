"""Reads what rules, tables and devices show beside what is captured: entries translated to where
no rule leads any more, source ports in use, limits of rules and of what is not the table, and
INVALID packets.
"""

from ctrace.advice.beside.reader import Reader, Space
from ctrace.advice.beside.table import leftovers, used

__all__ = ["Reader", "Space", "leftovers", "used"]
