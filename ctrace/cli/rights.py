"""What each verb may do: the capabilities that it takes, for its help and its errors."""

from __future__ import annotations

import re
from typing import Final

_LIVE: Final = (
    "CAP_NET_ADMIN",
    "CAP_SYS_ADMIN",
    "CAP_SYS_PTRACE",
    "CAP_SYSLOG",
    "CAP_DAC_READ_SEARCH",
)
_RULES: Final = ("CAP_NET_ADMIN", "CAP_NET_RAW", "CAP_SYS_ADMIN", "CAP_SYS_PTRACE")
RIGHTS: Final[dict[str, tuple[str, ...]]] = {
    **dict.fromkeys(("top", "trace", "metrics", "perf"), _LIVE),
    **dict.fromkeys(("record", "advise", "doctor", "demo"), (*_LIVE, "CAP_NET_RAW")),
    **dict.fromkeys(("apply", "confirm", "undo", "applied"), _RULES),
    **dict.fromkeys(
        ("replay", "import", "collect", "report", "diff", "merge", "export", "whatif",
         "completion", "man"), (),
    ),
}  # fmt: skip
"""Verb to capabilities, to look at all network namespaces. iptables-legacy reads its rules
through a raw socket (CAP_NET_RAW)."""
_NO_ROOT: Final = {
    "collect": "Rights: none; as root it sees more.",
    "completion": "Rights: none.",
    "man": "Rights: none.",
}
_NETLINK: Final = ("top", "trace", "record", "metrics")
"""Verbs that work with ``--hooks netlink``; their source tells what it does not see."""
_DENIED: Final = re.compile(
    r"not permitted|[Pp]ermission denied|must be root|run as root|CAP_[A-Z]|symbols are hidden"
)


def sentence(verb: str) -> str:
    """For the verb's help."""
    needed = RIGHTS[verb]
    if not needed:
        return _NO_ROOT.get(verb, "Rights: none, except to read the files.")
    text = f"Rights: root, or {', '.join(needed)}."
    if verb in _NETLINK:
        text += (
            " To look at one network namespace from within it: CAP_BPF, CAP_PERFMON, CAP_NET_ADMIN "
            "and CAP_SYSLOG; with --hooks netlink CAP_NET_ADMIN alone."
        )
    return text


def unseen(verb: str) -> tuple[str, ...]:
    """What the verb does without for lack of rights, where nothing else reports it."""
    from ctrace.host import kernel

    needed = set(RIGHTS.get(verb, ())) - (set(_LIVE) if verb in _NETLINK else set())
    return kernel.unseen(*kernel.CAPABILITIES.keys() - needed)


def missing(verb: str, error: str) -> str:
    """Addition to an error that is caused by missing rights; empty for other errors."""
    if not _DENIED.search(error):
        return ""
    from ctrace.host.kernel import capabilities

    held = capabilities()
    lacking = [name for name in RIGHTS.get(verb, ()) if not held.get(name, True)]
    return f"; missing here of what {verb} takes: {', '.join(lacking)}" if lacking else ""
