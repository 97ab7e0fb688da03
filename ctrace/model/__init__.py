"""Arithmetic on batches, giving snapshots, in bounded memory."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from ctrace.model.model import Model

__all__ = ["Model"]


def __getattr__(name: str) -> Any:
    """Load the model only when asked for: views need just the snapshot's types."""
    if name == "Model":
        from ctrace.model.model import Model

        return Model
    raise AttributeError(name)
