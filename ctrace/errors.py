"""The one exception that a user may see, as one line and an exit status."""

from __future__ import annotations


class CtraceError(Exception):
    """A problem that a person can act on.

    ``str(error)`` is one line: what is wrong, then what to do. The command line
    prints it without a traceback and exits with ``exit_code``.
    """

    exit_code = 1


class UsageError(CtraceError):
    """The arguments themselves are wrong (exit status 2)."""

    exit_code = 2
