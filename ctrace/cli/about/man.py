"""``ctrace man``: the manual page in roff, from the same help texts as ``--help``."""

from __future__ import annotations

import inspect
from collections.abc import Iterator

import click

from ctrace import __version__


@click.command()
def command() -> None:
    """Print the manual page (roff).

    Read it with: ctrace man | man -l -
    """
    from ctrace.cli import cli

    click.echo("\n".join(page(cli)))


def page(group: click.Group) -> Iterator[str]:
    """The lines of ctrace(1)."""
    yield f'.TH CTRACE 1 "" "ctrace {__version__}" "System Administration"'
    yield from (".SH NAME", f"ctrace \\- {_escape(_first_line(group))}")
    yield from (".SH SYNOPSIS", ".B ctrace", ".I COMMAND", "[OPTIONS] [ARGUMENTS]")
    yield ".SH COMMANDS"
    context = click.Context(group, info_name="ctrace")
    for name in group.list_commands(context):
        verb = group.get_command(context, name)
        if verb is None:
            continue
        inner = click.Context(verb, info_name=name, parent=context)
        arguments = " ".join(verb.collect_usage_pieces(inner))
        yield from (f".SS {name} {_escape(arguments)}", *_prose(verb.help or ""))
        for parameter in verb.get_params(inner):
            record = parameter.get_help_record(inner)
            if record is not None and record[1] and "--help" not in record[0]:
                yield from (".TP", f".B {_escape(record[0])}", _escape(record[1]))
    yield ".SH EXIT STATUS"
    yield "0: done. 1: something went wrong; one line on standard error says what to do. "
    yield "2: wrong arguments. 130: interrupted."
    yield ".SH SEE ALSO"
    yield ".BR conntrack (8), nft (8), iptables-extensions (8)"


def _prose(text: str) -> Iterator[str]:
    for paragraph in inspect.cleandoc(text).split("\n\n"):
        if paragraph.startswith("\b\n"):  # click's mark: lines as they stand
            yield from (".nf", *map(_escape, paragraph.splitlines()[1:]), ".fi")
        else:
            yield _escape(" ".join(paragraph.split()))
        yield ".PP"


def _escape(text: str) -> str:
    text = text.replace("\\", "\\e").replace("-", "\\-")
    return "\\&" + text if text.startswith((".", "'")) else text


def _first_line(command: click.Command) -> str:
    return (command.help or "").strip().splitlines()[0].rstrip(".")
