"""What the self-test found: each comparison, and all of one run."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any

OK, FAILED, SKIPPED = "ok", "FAILED", "skipped"


@dataclass(frozen=True)
class Check:
    """One comparison of a record with what was sent."""

    name: str
    result: str
    """``ok``, ``FAILED`` or ``skipped``."""
    text: str = ""
    """What differs, or why it was not tried."""


@dataclass(frozen=True)
class Report:
    """All checks of one run."""

    family: str
    checks: tuple[Check, ...]

    @property
    def passed(self) -> bool:
        """Whether no check failed and some were made."""
        results = {check.result for check in self.checks}
        return FAILED not in results and OK in results

    def summary(self) -> str:
        """One line."""
        number = {
            word: sum(check.result == word for check in self.checks)
            for word in (OK, FAILED, SKIPPED)
        }
        said = ", ".join(f"{n} {word}" for word, n in number.items() if n)
        return f"self-test of {self.family}: {said}"

    def to_json(self) -> dict[str, Any]:
        """Plain data."""
        return {
            "family": self.family,
            "passed": self.passed,
            "checks": [asdict(check) for check in self.checks],
        }
