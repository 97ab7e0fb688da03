"""``ctrace completion``: the shell's completion script, from click's own definitions."""

from __future__ import annotations

import click
from click.shell_completion import get_completion_class

from ctrace.cli.kinds import OneOf


@click.command()
@click.argument("shell", type=OneOf(["bash", "zsh", "fish"]), metavar="SHELL")
def command(shell: str) -> None:
    """Print the completion script for SHELL: bash, zsh or fish.

    For bash: ctrace completion bash > /etc/bash_completion.d/ctrace
    """
    from ctrace.cli import cli

    completer = get_completion_class(shell)
    assert completer is not None  # click knows the three shells above
    click.echo(completer(cli, {}, "ctrace", "_CTRACE_COMPLETE").source())
