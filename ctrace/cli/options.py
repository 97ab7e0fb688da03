"""Options that several verbs share: conntrack(8)'s filters, under conntrack's names."""

from __future__ import annotations

import os
from collections.abc import Callable
from contextlib import suppress
from typing import Any, Optional, TypeVar

import click

from ctrace.errors import CtraceError, UsageError
from ctrace.filters import Filter, parse_network, parse_proto, parse_status

F = TypeVar("F", bound=Callable[..., Any])

FAMILIES = {"ipv4": 2, "ipv6": 10}
PORT = click.IntRange(0, 65535)


def filter_options(command: F) -> F:
    """Add the filters; their values arrive as keyword arguments for :func:`make_filter`."""
    for option in reversed(
        (
            click.option("-p", "--proto", metavar="PROTO", help="Protocol, by name or number."),
            click.option("-s", "--src", "--orig-src", metavar="NET", help="Original source."),
            click.option("-d", "--dst", "--orig-dst", metavar="NET", help="Original destination."),
            click.option("--sport", type=PORT, help="Original source port."),
            click.option("--dport", type=PORT, help="Original destination port."),
            click.option(
                "-u", "--status", metavar="STATUS", help="ASSURED, SEEN_REPLY, UNREPLIED, ..."
            ),
            click.option("-n", "--src-nat", is_flag=True, help="Only source-NATed flows."),
            click.option("-g", "--dst-nat", is_flag=True, help="Only destination-NATed flows."),
            click.option("-w", "--zone", type=click.IntRange(0, 65535), help="Conntrack zone."),
            click.option("-f", "--family", type=click.Choice(list(FAMILIES)), help="Family."),
            click.option("-4", "ipv4", is_flag=True, help="IPv4 only."),
            click.option("-6", "ipv6", is_flag=True, help="IPv6 only."),
            click.option("--netns", metavar="NAME", help="A namespace: name, path, pid or inode."),
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
    netns: Optional[int] = None,
) -> Filter:
    """The options' values as a Filter. Raises UsageError when no flow could match."""
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
        netns=netns,
    )


def held_filter(**filters: Any) -> Filter:
    """The same for what counts entries held: a status that comes and goes can't choose these.

    Entries are tested when they are made; ASSURED, say, comes later. Raises UsageError.
    """
    wanted = make_filter(**filters)
    if wanted.status or wanted.unreplied:
        raise UsageError(
            "-u can't choose what is held: an entry's status changes while it lives; see PINNED "
            "and ONE-WAY for the parts, conntrack -L -u for the entries, ctrace trace -u for events"
        )
    return wanted


def output_option(command: F) -> F:
    """``-o text|json``: what a person reads, or what a program does."""
    return click.option(
        "-o",
        "--output",
        type=click.Choice(["text", "json"]),
        default="text",
        show_default=True,
        help="For a person, or for a program.",
    )(command)


def say(text: str, *, err: bool = False) -> None:
    """Print a line, and go on when nobody reads it any more.

    For verbs that change something: what they do must not depend on who reads.
    """
    try:
        click.echo(text, err=err)
    except (OSError, CtraceError):
        with suppress(OSError):
            sink = os.open(os.devnull, os.O_WRONLY)
            os.dup2(sink, 2 if err else 1)
            os.close(sink)


def force_option(command: F) -> F:
    """``--force``: a file that is there may be replaced."""
    return click.option("--force", is_flag=True, help="Replace the file that is there.")(command)


def need_root(doing: str) -> None:
    """Raise CtraceError unless this is root, before anything else goes wrong for the lack of it."""
    if os.geteuid() != 0:
        raise CtraceError(f"{doing} needs root: run it with sudo")
