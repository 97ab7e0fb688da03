"""The command line: one file a verb, loaded only when it is called."""

from __future__ import annotations

import importlib.util
import keyword
import os
import re
import resource
import sys
import threading
import traceback
from typing import Optional

import click

from ctrace import __version__
from ctrace.cli import output, rights
from ctrace.errors import CtraceError, no_thread

VERBS = {
    "top": "Live screen: what fills the table, who is refused, and why",
    "trace": "One line per conntrack event, as it happens",
    "record": "Record per-flow events to a file; also as a flight recorder",
    "replay": "The live screen over a recording, with time travel",
    "import": "Text dumps, logs and support bundles as a recording",
    "collect": "A shell script that gathers such texts on a host without ctrace",
    "report": "What happened, from a recording: text, Markdown, JSON, one HTML page",
    "diff": "Two recordings compared, key by key",
    "merge": "Several hosts' recordings as one",
    "export": "A recording as Parquet, CSV, JSON lines or OpenMetrics",
    "advise": "Which ports to NOTRACK, why it is safe or not, and what else helps",
    "whatif": "A recording through a model of the table, with other settings",
    "apply": "Apply a plan from advise; it reverts by itself unless confirmed",
    "confirm": "Keep what apply put in place",
    "undo": "Remove what ctrace applied, and nothing else",
    "applied": "List what ctrace has applied",
    "perf": "What connection tracking costs on this host, and where",
    "metrics": "OpenMetrics endpoint for Prometheus",
    "doctor": "What this host can do, what it can't, and why conntrack is on",
    "demo": "The incident of the README, in private namespaces",
    "completion": "Print the completion script for a shell",
    "man": "Print the manual page",
}
FOLDERS = ("watch", "recordings", "changes", "about")
"""Where the files of verbs are."""


def _module(verb: str) -> str:
    """The module of a verb; ``import`` is a word of Python's own."""
    name = f"{verb}_" if keyword.iskeyword(verb) else verb
    modules = (f"ctrace.cli.{folder}.{name}" for folder in FOLDERS)
    # not by its file: where only bytecode was installed there is none with its source
    return next(filter(importlib.util.find_spec, modules))


class LazyGroup(click.Group):
    """Imports a verb's file when the verb is used: a fast start matters."""

    def list_commands(self, ctx: click.Context) -> list[str]:  # noqa: ARG002
        """Every verb, in the order of use."""
        return list(VERBS)

    def get_command(self, ctx: click.Context, cmd_name: str) -> Optional[click.Command]:
        """The click command called ``command`` in the verb's module."""
        if cmd_name not in self.list_commands(ctx):
            return None
        module = importlib.import_module(_module(cmd_name))
        command: click.Command = module.command
        command.epilog = rights.sentence(cmd_name)
        return command

    def resolve_command(
        self, ctx: click.Context, args: list[str]
    ) -> tuple[Optional[str], Optional[click.Command], list[str]]:
        """The verb that was meant; the nearest is named when there is none so called."""
        if ctx.resilient_parsing:  # completion: half a line is no mistake
            return super().resolve_command(ctx, args)
        if args[:1] == ["help"]:  # as git's and docker's
            if not args[1:]:
                click.echo(ctx.get_help())
                ctx.exit()
            args = [args[1], "--help"]
        if args and not args[0].startswith("-") and args[0] not in self.list_commands(ctx):
            from ctrace.errors import nearest

            meant = nearest(args[0], self.list_commands(ctx))
            ctx.fail(f"No such command {args[0][:40]!r}{meant}")
        _refuse_empty(ctx, args)
        return super().resolve_command(ctx, args)

    def format_commands(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        """The list in ``ctrace --help``, without importing any verb."""
        with formatter.section("Commands"):
            formatter.write_dl([(verb, VERBS[verb]) for verb in self.list_commands(ctx)])


def _refuse_empty(ctx: click.Context, args: list[str]) -> None:
    """Refuse an empty value, as of a shell variable that is not set: ``undo --netns "$NAME"`` would
    remove what is applied anywhere else."""
    for before, word in zip(args, args[1:]):
        if word == "":
            ctx.fail(f"The word after {before[:40]!r} is empty: give a value")
        if word.startswith("--") and word.endswith("="):
            ctx.fail(f"{word[:40]!r} is empty: give a value")


@click.group(
    cls=LazyGroup,
    context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 100},
    epilog="Start with: sudo ctrace top",
)
@click.version_option(__version__, prog_name="ctrace")
def cli() -> None:
    """Find what fills the connection tracking table, and fix it safely."""


def main() -> None:
    """Entry point: every error is one line and an exit status, never a traceback."""
    # Tools are never looked for where the caller happens to stand, which "." and "" would mean.
    places = os.environ.get("PATH", os.defpath).split(os.pathsep)
    os.environ["PATH"] = os.pathsep.join(filter(os.path.isabs, places))
    # numpy's BLAS, of which nothing is used here, begins a thread and 40 MiB for each processor.
    os.environ["OPENBLAS_NUM_THREADS"] = "1"
    threading.excepthook = _thread_ended
    output.prepare()
    status = _status()
    try:
        sys.stdout.flush()
    except BrokenPipeError:
        output.drop()
        status = status or 1
    except CtraceError as error:
        output.drop()
        if not status:
            click.echo(f"ctrace: {output.remark(str(error))}", err=True)
        status = status or 1
    if output.unsaid and not status:
        click.echo(f"ctrace: {output.unsaid}; the work itself is done", err=True)
        status = 1
    sys.exit(status)


def _status() -> int:
    """Run what was asked for; its exit status, with the one line of an error said."""
    try:
        if "_CTRACE_COMPLETE" in os.environ:
            cli.main(prog_name="ctrace", standalone_mode=False)
        # Not cli.main: it makes a closed pipe an exit status of 1 before we see it.
        with cli.make_context("ctrace", sys.argv[1:]) as context:
            cli.invoke(context)
        status = 0
    except click.exceptions.Exit as done:
        status = done.exit_code
    except SystemExit as done:
        status = done.code if isinstance(done.code, int) else int(done.code is not None)
    except (click.exceptions.Abort, EOFError, KeyboardInterrupt):
        status = 130
    except click.UsageError as error:
        status = _wrong(error)
    except click.ClickException as error:
        error.show()
        status = error.exit_code
    except CtraceError as error:
        lacking = rights.missing(
            next((one for one in sys.argv[1:] if one in VERBS), ""), str(error)
        )
        click.echo(f"ctrace: {output.remark(str(error))}{lacking}", err=True)
        status = error.exit_code
    except BrokenPipeError:
        # The reader of our output has gone (``| head``), and knows it: no word of it.
        output.drop()
        status = 1
    except (OSError, MemoryError) as error:  # a host that has nothing left, or refuses a file
        click.echo(f"ctrace: {output.refused(error)}", err=True)
        status = 1
    except Exception as error:
        click.echo(f"ctrace: {_defect(error)}", err=True)
        status = 1
    return status


def _thread_ended(ended: threading.ExceptHookArgs) -> None:
    """One line, as for any error; what the thread was for may be missing from then on."""
    error = ended.exc_value
    if isinstance(error, (OSError, MemoryError)):
        told = output.refused(error)
    elif isinstance(error, CtraceError):
        told = output.remark(str(error))
    else:
        told = _defect(error) if isinstance(error, Exception) else ended.exc_type.__name__
    name = ended.thread.name if ended.thread is not None else "a thread"
    click.echo(f"ctrace: {name} has ended, the rest goes on: {told}", err=True)


def _defect(error: Exception) -> str:
    """One line on an error that nobody foresaw, with the place in our code that it came from."""
    if no_thread(error):
        return "no more threads or memory can be had: see ulimit -u -v, and pids.max of the cgroup"
    short = isinstance(error, ImportError) and re.search(r"map segment|allocate mem", str(error))
    if short or (isinstance(error, SystemError) and _is_bounded()):
        return "there is no memory left: see ulimit -v"
    frames = traceback.extract_tb(error.__traceback__)
    ours = [one for one in frames if f"{os.sep}ctrace{os.sep}" in one.filename] or frames
    place = f"{os.path.basename(ours[-1].filename)} line {ours[-1].lineno}"
    text = " ".join(str(error).split())[:200]
    return (
        f"{type(error).__name__} in {place}: {text}; this is a defect: please report it with the "
        "output of ctrace doctor"
    )


def _is_bounded() -> bool:
    """Whether this process may have only so much memory: Python then fails in odd places, without
    a word of why (``error return without exception set``)."""
    return resource.getrlimit(resource.RLIMIT_AS)[0] != resource.RLIM_INFINITY


_CALLED = {
    **{f"--{one}": f"--format {one}" for one in ("csv", "html", "json", "jsonl", "parquet")},
    **dict.fromkeys(("--out", "--outfile", "--file"), "--output FILE"),
    **dict.fromkeys(("--time", "--seconds", "--timeout", "-t"), "--duration TIME"),
    **dict.fromkeys(("--ns", "--namespace"), "--netns NAME"),
    **dict.fromkeys(("--lines", "--rows", "--number", "--top"), "--limit N"),
    **{"--events": "--stop-after N", "--start": "--at MOMENT"},
}
"""What other tools call our options."""


def _unknown(error: click.NoSuchOption) -> str:
    """That there is no such option, with the one that was meant where that is plain."""
    from difflib import get_close_matches

    name, command = error.option_name, error.ctx.command if error.ctx else cli
    known = [
        (one, option)
        for option in command.params
        if isinstance(option, click.Option) and not option.hidden
        for one in option.opts
    ]
    called = _CALLED.get(name, "").split()
    for one, option in known:
        if called and one == called[0]:
            kinds = getattr(option.type, "choices", called[1:])
            if one != "--format" or called[1] in kinds:
                return f"No such option {name!r}; it is called {' '.join(called)} here"
    if any(isinstance(one, click.Argument) and one.name == name[2:] for one in command.params):
        return f"No such option {name!r}; give its value without it"
    spelled = {one.lstrip("-"): one for one, _ in known}
    near = get_close_matches(name.lstrip("-"), list(spelled), 1, 0.75)
    return f"No such option {name[:40]!r}{f'; the nearest is {spelled[near[0]]}' if near else ''}"


def _wrong(error: click.UsageError) -> int:
    """One line on wrong arguments, and where help is; without any, the help itself."""
    said = _unknown(error) if isinstance(error, click.NoSuchOption) else error.format_message()
    words = " ".join(said.split()).rstrip(".")
    words += "" if words.endswith(("?", "?)")) else "."
    if len(sys.argv) == 1:
        error.show()
    else:
        verb = next((one for one in sys.argv[1:] if one in VERBS), "")
        path = error.ctx.command_path if error.ctx is not None else f"ctrace {verb}".rstrip()
        click.echo(f"ctrace: {words} See {path} --help", err=True)
    return error.exit_code
