"""Options that several verbs share: one name, one meaning and one way to write a value.

``-o FILE`` is a file and ``--format FORMAT`` a format, in every verb. What earlier versions
called otherwise still works, and no help shows it.
"""

from __future__ import annotations

import contextlib
import functools
import os
from collections.abc import Callable, Sequence
from contextlib import suppress
from typing import Any, Optional, TypeVar, cast

import click

from ctrace.cli import output, rights
from ctrace.cli.kinds import Namespace, OneOf, Port, Whole, Words
from ctrace.cli.output import number
from ctrace.errors import CtraceError, UsageError
from ctrace.filters import AT_BIRTH, STATUSES, Filter, parse_network, parse_proto, parse_status
from ctrace.model.snapshot import GROUPS, SORTS

F = TypeVar("F", bound=Callable[..., Any])

FAMILIES = {"ipv4": 2, "ipv6": 10}
HOOKS = ("fentry", "kprobe", "netfilter", "netlink")
THEMES = ("dark", "light", "terminal")
PORT, ZONE = Port(), Whole(0, 65535)


def filter_options(command: F) -> F:
    """Add the filters; their values arrive as keyword arguments for :func:`make_filter`."""
    for option in reversed(
        (
            click.option("-p", "--proto", metavar="PROTO", help="Protocol, by name or number."),
            click.option(
                "-s",
                "--src",
                "--orig-src",
                metavar="NET",
                help="Original source: address or prefix.",
            ),
            click.option(
                "-d",
                "--dst",
                "--orig-dst",
                metavar="NET",
                help="Original destination: address or prefix.",
            ),
            click.option("--sport", type=PORT, metavar="PORT", help="Original source port."),
            click.option("--dport", type=PORT, metavar="PORT", help="Original destination port."),
            click.option(
                "-u",
                "--status",
                metavar="STATUS",
                type=Words(STATUSES),
                help="ASSURED, SEEN_REPLY, UNREPLIED, ...",
            ),
            click.option("-n", "--src-nat", is_flag=True, help="Only source-NATed flows."),
            click.option("-g", "--dst-nat", is_flag=True, help="Only destination-NATed flows."),
            click.option("-w", "--zone", type=ZONE, metavar="ZONE", help="Conntrack zone."),
            click.option(
                "-f", "--family", type=OneOf(list(FAMILIES)), metavar="FAMILY", help="ipv4 or ipv6."
            ),
            click.option("-4", "ipv4", is_flag=True, help="IPv4 only."),
            click.option("-6", "ipv6", is_flag=True, help="IPv6 only."),
            netns_option("Only this namespace"),
        )
    ):
        command = option(command)
    return command


def make_filter(
    *,
    proto: Optional[str] = None,
    src: Optional[str] = None,
    dst: Optional[str] = None,
    sport: Optional[int] = None,
    dport: Optional[int] = None,
    status: Optional[str] = None,
    src_nat: bool = False,
    dst_nat: bool = False,
    zone: Optional[int] = None,
    family: Optional[str] = None,
    ipv4: bool = False,
    ipv6: bool = False,
    netns: Optional[str] = None,
) -> Filter:
    """The options' values as a Filter. Raises UsageError when no flow could match.

    The namespace is looked for among those that are alive.
    """
    from ctrace.host.netns import resolve

    families = {FAMILIES[family]} if family else set()
    families |= {2} if ipv4 else set()
    families |= {10} if ipv6 else set()
    source = parse_network(src) if src else None
    target = parse_network(dst) if dst else None
    families |= {2 if network.version == 4 else 10 for network in (source, target) if network}
    if len(families) > 1:
        raise UsageError("no flow can match both IPv4 and IPv6: drop one of -4, -6, -f, -s, -d")
    bits, unreplied = parse_status(status) if status else (0, False)
    return Filter(
        proto=parse_proto(proto) if proto else None,
        src=source,
        dst=target,
        sport=sport,
        dport=dport,
        status=bits,
        unreplied=unreplied,
        src_nat=src_nat,
        dst_nat=dst_nat,
        zone=zone,
        family=families.pop() if families else None,
        netns=None if netns is None else resolve(netns),
    )


def held_filter(**filters: Any) -> Filter:
    """The same for what counts entries held: a status that comes later can't choose these.

    Entries are tested when they are made. Raises UsageError.
    """
    if later_status(filters):
        raise UsageError(
            "-u can't choose what is recorded or advised on: an entry's status changes while it "
            "lives; see ctrace top -u for who holds them, ctrace trace -u for events"
        )
    return make_filter(**filters)


def later_status(filters: dict[str, Any]) -> str:
    """Take what entries become only while they live out of ``-u``: as a filter of what is held.

    What is left of it holds from their first packet on. Raises UsageError.
    """
    words = [word for word in (filters.get("status") or "").upper().split(",") if word]
    parse_status(",".join(words)) if words else None
    later = [word for word in words if word not in AT_BIRTH]
    filters["status"] = ",".join(word for word in words if word in AT_BIRTH) or None
    return " ".join(f"status={word}" for word in later)


def answer_options(*formats: str, stream: bool = False, forced: bool = False) -> Callable[[F], F]:
    """``--format FORMAT``, ``-o FILE`` and ``--force``: as what the answer comes, and where to.

    The verb prints its answer on standard output and gets ``format``; a FILE takes that
    output when it is whole, or line by line with ``stream``. ``forced``: the verb writes
    more files, and gets ``force``, too.
    """

    def add(function: F) -> F:
        @functools.wraps(function)
        def answer(
            *arguments: Any,
            answer_to: Optional[str],
            format: Optional[str],
            force: bool,
            **options: Any,
        ) -> None:
            if answer_to in ("text", "json"):  # as -o was used by earlier versions
                format, answer_to = format or answer_to, None
            if forced:
                options["force"] = force
            options["format"] = format or _by_name(answer_to, formats)
            if answer_to in (None, "-"):
                function(*arguments, **options)
            else:
                _into(str(answer_to), force, stream, lambda: function(*arguments, **options))

        added = force_option(answer)
        added = click.option(
            "-o",
            "--output",
            "answer_to",
            metavar="FILE",
            type=click.Path(),
            help="Write to FILE instead of standard output.",
        )(added)
        added = click.option(
            "--format",
            type=OneOf(formats),
            metavar="FORMAT",
            help=f"{', '.join(formats[:-1])} or {formats[-1]} [default: by the suffix of FILE, "
            f"else {formats[0]}].",
        )(added)
        return cast(F, added)

    return add


_ENDINGS = {"md": "markdown", "htm": "html", "txt": "text", "jsonl": "json"}


def _by_name(path: Optional[str], formats: Sequence[str]) -> str:
    ending = os.path.splitext(path or "")[1].lstrip(".").lower()
    named = _ENDINGS.get(ending, ending)
    return named if named in formats else formats[0]


def _into(path: str, force: bool, stream: bool, answer: Callable[[], None]) -> None:
    """Write the verb's output to a file. A verb that exits with 0 or 1 has answered."""
    from ctrace.files import growing, new_text

    left: Optional[SystemExit] = None
    taking = growing if stream else new_text
    with taking(path, force=force) as file, contextlib.redirect_stdout(file):
        try:
            answer()
        except SystemExit as leaving:
            if leaving.code not in (None, 0, 1):
                raise
            left = leaving
    if not stream:
        size = os.path.getsize(path)
        told = f"{number(size >> 10)} KiB" if size >= 1024 else f"{size} bytes"
        click.echo(f"ctrace: {path}: {told}", err=True)
    if left is not None:
        raise left


def page_option(command: F) -> F:
    """``--html FILE`` of earlier versions: ``--format html -o FILE``."""

    @functools.wraps(command)
    def page(*arguments: Any, html: Optional[str], **options: Any) -> None:
        if html:
            options.update(format="html", answer_to=html)
        command(*arguments, **options)

    hidden = click.option("--html", metavar="FILE", hidden=True, help="As --format html -o FILE.")
    return cast(F, hidden(page))


def file_option(what: str, default: Optional[str] = None, **more: Any) -> Callable[[F], F]:
    """``-o FILE`` where a verb makes a file of its own kind; the value is ``output``."""
    if default is not None:
        more.update(default=default, show_default=True)
    return click.option("-o", "--output", metavar="FILE", type=click.Path(), help=what, **more)


def hooks_option(command: F) -> F:
    """``--hooks FAMILY``."""
    return click.option(
        "--hooks",
        type=OneOf(HOOKS),
        metavar="FAMILY",
        help=f"Watch with {', '.join(HOOKS[:-1])} or {HOOKS[-1]} only.  [default: the best that "
        "works here]",
    )(command)


def netns_option(what: str) -> Callable[[F], F]:
    """``--netns NAME``."""
    return click.option(
        "--netns", metavar="NAME", type=Namespace(), help=f"{what}: name, path, pid or inode."
    )


def group_option(command: F) -> F:
    """``--group KEY``; None where it was not given: see :func:`rows_by`."""
    return click.option(
        "--group",
        type=OneOf(GROUPS),
        metavar="KEY",
        help=f"What to rank: {', '.join(GROUPS[:-1])} or {GROUPS[-1]}.  [default: who, the "
        "few keys of any kind that hold most; pair in JSON]",
    )(command)


def rows_by(group: Optional[str], format: str) -> str:
    """The kind of rows: programs get rows of one kind unless they ask for others."""
    return group or ("pair" if format == "json" else "who")


def sort_option(command: F) -> F:
    """``--sort COLUMN``."""
    return click.option(
        "--sort",
        type=OneOf(SORTS),
        metavar="COLUMN",
        default="held",
        show_default=True,
        help=f"What to rank by: {', '.join(SORTS[:-1])} or {SORTS[-1]}.",
    )(command)


def limit_option(default: int, most: int, what: str) -> Callable[[F], F]:
    """``--limit N``."""
    return click.option(
        "--limit", type=Whole(1, most), default=default, show_default=True, metavar="N", help=what
    )


def screen_options(command: F) -> F:
    """``--theme`` and ``--ascii``."""
    for option in (
        click.option(
            "--ascii", "ascii_only", is_flag=True, help="ASCII only, also in a UTF-8 locale."
        ),
        click.option(
            "--theme", type=OneOf(THEMES), metavar="THEME", help="Colours: dark, light or terminal."
        ),
    ):
        command = option(command)
    return command


def stop_after_option(command: F) -> F:
    """``--stop-after N``, exact."""
    return click.option("--stop-after", type=Whole(1), metavar="N", help="Stop after N events.")(
        command
    )


def redact_option(command: F) -> F:
    """``--redact``."""
    return click.option(
        "--redact", is_flag=True, help="Replace addresses and names by consistent aliases."
    )(command)


def say(text: str, *, err: bool = False) -> None:
    """Print a line, and go on when nobody reads it any more.

    For verbs that change something: what they do must not depend on who reads. That the output
    could not be written is said at the end, unless it is a pipe whose reader has gone.
    """
    try:
        click.echo(text, err=err)
    except (OSError, CtraceError) as error:
        if isinstance(error, CtraceError):
            output.unsaid = str(error)
        with suppress(OSError):
            sink = os.open(os.devnull, os.O_WRONLY)
            os.dup2(sink, 2 if err else 1)
            os.close(sink)


def force_option(command: F) -> F:
    """``--force``: a file that is there may be replaced."""
    return click.option("--force", is_flag=True, help="Overwrite FILE if it exists.")(command)


def need_root(doing: str) -> None:
    """Raise CtraceError unless this is root, before anything else goes wrong for the lack of it."""
    if os.geteuid() != 0:
        raise CtraceError(f"{doing} needs root: run it with sudo")
    tell_unseen()


def tell_unseen() -> None:
    """Say what this verb does without for lack of rights."""
    for sentence in rights.unseen(click.get_current_context().info_name or ""):
        say(f"ctrace: not seen: {sentence}", err=True)
