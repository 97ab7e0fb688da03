"""Sums over the tables for any grouping, and the culprits that views show.

:mod:`~ctrace.model.groups.sums` adds up, :mod:`~ctrace.model.groups.entries` infers,
:mod:`~ctrace.model.groups.group` shows.
"""

from ctrace.model.groups.context import Context
from ctrace.model.groups.group import Group
from ctrace.model.groups.sums import unit_number

__all__ = ["Context", "Group", "unit_number"]
