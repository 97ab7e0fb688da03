"""SHA-256 and BLAKE2 from Python's own modules, not from OpenSSL.

hashlib loads OpenSSL's library, which is 3.5 MB of memory that nothing else here needs.
"""

from __future__ import annotations

import sys
from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from hashlib import blake2b, sha256
else:

    def _find(name: str, *modules: str) -> Any:
        """The first there is: the modules have other names elsewhere, or were left out."""
        for module in modules if "hashlib" not in sys.modules else ():
            try:
                return getattr(import_module(module), name)
            except (ImportError, AttributeError):
                continue
        return getattr(import_module("hashlib"), name)

    blake2b = _find("blake2b", "_blake2")
    sha256 = _find("sha256", "_sha2", "_sha256")

__all__ = ["blake2b", "sha256"]
