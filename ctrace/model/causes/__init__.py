"""Why a table is as it is: causes recognised by pattern, each with evidence and remedies."""

from ctrace.model.causes.explain import explain
from ctrace.model.causes.facts import Facts

__all__ = ["Facts", "explain"]
