"""``ctrace doctor``: what this host can do, what it can't, and what to do about it."""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any, Optional

import click

from ctrace.batch import TableReading
from ctrace.cli.options import answer_options, hooks_option, need_root
from ctrace.errors import CtraceError
from ctrace.host import kernel, netns, tables

GOOD, WARN, BAD = "ok", "note", "no"


@dataclass(frozen=True)
class Finding:
    """One line of the report."""

    subject: str
    level: str
    """``ok``, ``note`` (works, with less) or ``no``."""
    text: str
    remedy: str = ""


@click.command()
@click.option("--self-test", is_flag=True, help="Prove every decoded field with real traffic.")
@click.option("--why", is_flag=True, help="Name the rules that keep conntrack active.")
@hooks_option
@answer_options("text", "json")
def command(self_test: bool, why: bool, hooks: Optional[str], format: str) -> None:
    """Say what this host can do, what it can't, and what to do about it.

    The exit status is 0 when ctrace can trace here (with --self-test: when every check
    passed), else 1. Nothing is changed; --self-test works in namespaces of its own.
    """
    if hooks and not self_test:
        raise click.UsageError("--hooks goes with --self-test")
    if self_test:
        sys.exit(_self_test(hooks, format))
    if why:
        sys.exit(_why(format))
    report, findings = examine()
    if format == "json":
        click.echo(json.dumps(report, indent=2))
    else:
        _print(report, findings)
    sys.exit(0 if report["can_trace"] else 1)


def examine() -> tuple[dict[str, Any], list[Finding]]:
    """Everything that can be read without attaching anything for longer than a moment."""
    here = kernel.read()
    held = kernel.capabilities()
    compiler = kernel.bcc()
    families = _families()
    spaces = netns.find()
    with tables.TableReader() as reader:
        readings = reader.read(spaces)
    chosen = next((one["family"] for one in families if one["holds"]), None)
    findings = [
        *_about_kernel(here),
        _about_capabilities(held),
        _about_programs(compiler, chosen),
        *(_about_family(one, chosen) for one in families),
        *_about_tables(here, readings),
        *_about_changes(),
    ]
    limit, buckets = kernel.limits()
    names = {space.inum: space.name for space in spaces}
    report = {
        "can_trace": chosen is not None,
        "hooks": chosen,
        "kernel": asdict(here),
        "capabilities": held,
        "bcc": asdict(compiler),
        "families": families,
        "conntrack": {
            "loaded": here.conntrack != "not loaded",
            "max": limit,
            "buckets": buckets,
            "settings": kernel.tunables(),
        },
        "namespaces": [_namespace(reading, names[reading.netns]) for reading in readings],
        "terminal": _terminal(),
        "findings": [asdict(finding) for finding in findings],
    }
    return report, findings


def _families() -> list[dict[str, Any]]:
    """Every hook family, best first, by the ladder's own trial."""
    from ctrace.capture.ladder import probe

    return [{"family": one.family, "holds": one.holds, "why": one.why} for one in probe()]


def _namespace(reading: TableReading, name: str) -> dict[str, Any]:
    return {
        "netns": reading.netns,
        "name": name,
        "count": reading.count,
        "max": reading.max,
        "buckets": reading.buckets,
        "fill": reading.count / reading.max if reading.max else 0.0,
        "active": _active(reading),
        "stats": dict(reading.stats),
    }


def _active(reading: TableReading) -> Optional[bool]:
    """Entries or counters prove tracking; their absence proves nothing: ``--why`` looks."""
    busy = ("found", "invalid", "insert", "insert_failed", "drop")
    return True if reading.count or any(reading.stats.get(name) for name in busy) else None


def _terminal() -> dict[str, Any]:
    try:
        columns, lines = os.get_terminal_size()
    except OSError:
        columns = lines = 0
    return {
        "tty": sys.stdout.isatty(),
        "columns": columns,
        "lines": lines,
        "term": os.environ.get("TERM", ""),
        "encoding": (sys.stdout.encoding or "").lower(),
    }


def _about_kernel(here: kernel.Kernel) -> list[Finding]:
    findings = [Finding("kernel", GOOD, f"{here.release} on {here.machine}")]
    if here.btf:
        findings.append(Finding("BTF", GOOD, "types of the running kernel"))
    else:
        findings.append(
            Finding(
                "BTF",
                WARN,
                "none: the BPF hooks need the kernel's types, so only netlink works here",
                "a kernel built with CONFIG_DEBUG_INFO_BTF",
            )
        )
    if here.lockdown == "confidentiality":
        findings.append(
            Finding(
                "lockdown",
                BAD,
                "confidentiality: BPF may not read kernel memory",
                "boot with lockdown=integrity; until then only the netlink family works",
            )
        )
    else:
        text = {"unknown": "unknown (securityfs is not mounted)"}.get(here.lockdown, here.lockdown)
        findings.append(Finding("lockdown", GOOD, text))
    if here.jit is False:
        findings.append(
            Finding("BPF JIT", WARN, "off: programs are interpreted", "net.core.bpf_jit_enable=1")
        )
    return findings


def _about_capabilities(held: dict[str, bool]) -> Finding:
    missing = [name for name, has in held.items() if not has]
    if not missing:
        return Finding("capabilities", GOOD, "all that are used")
    uses = "; ".join(f"{name} for {kernel.CAPABILITIES[name][1]}" for name in missing)
    fix = "run it outside this user namespace" if kernel.in_user_namespace() else "run it with sudo"
    return Finding("capabilities", WARN, f"missing {uses}", fix)


def _about_programs(compiler: kernel.Bcc, chosen: Optional[str]) -> Finding:
    """The compiler matters only to people who change the programs; others have them prebuilt."""
    from ctrace.kernel import programs

    where = f"BCC {compiler.version} in {compiler.path}"
    if compiler.elsewhere:
        where += f", outside this Python environment; {compiler.python} runs it"
    try:
        made = all(map(programs.is_made, programs.SOURCES))
    except CtraceError as error:
        return Finding("programs", BAD, str(error))
    if made:
        also = "no compiler needed" if compiler.problem else f"not needed: {where}"
        return Finding("programs", GOOD, f"compiled before, for all kernels; {also}")
    if compiler.problem:
        text, _, remedy = compiler.problem.partition(": ")
        return Finding("programs", WARN if chosen else BAD, f"not compiled yet; {text}", remedy)
    return Finding("programs", GOOD, f"compiled when first used, by {where}")


def _about_family(one: dict[str, Any], chosen: Optional[str]) -> Finding:
    text = one["why"] or "holds"
    if one["family"] == chosen:
        text = f"in use: {text}"
    level = GOOD if one["holds"] else BAD if chosen is None else WARN
    return Finding(f"hooks {one['family']}", level, text)


def _about_tables(here: kernel.Kernel, readings: Sequence[TableReading]) -> list[Finding]:
    if here.conntrack == "not loaded":
        return [Finding("conntrack", WARN, "not loaded: nothing on this host is tracked")]
    active = [reading for reading in readings if _active(reading)]
    text = f"{here.conntrack}; "
    if not active:
        return [
            Finding(
                "conntrack",
                WARN,
                text + "no entry and no counter in any namespace",
                "packets are tracked once a rule needs it; ctrace doctor --why names such rules",
            )
        ]
    most = f"namespace{'s' * (len(active) != 1)}"
    findings = [Finding("conntrack", GOOD, text + f"used in {len(active)} {most}")]
    limit, buckets = kernel.limits()
    if limit and buckets and limit > 4 * buckets:
        findings.append(
            Finding(
                "hash table",
                WARN,
                f"{buckets} buckets for {limit} entries: "
                f"chains of {2 * limit / buckets:.0f} when full",
                f"nf_conntrack_buckets={limit // 2}",
            )
        )
    mode = kernel.tunables().get("events")
    if mode == 0:
        findings.append(
            Finding("events", WARN, "nf_conntrack_events=0: the netlink family sees nothing here")
        )
    return findings


def _about_changes() -> list[Finding]:
    """Changes by ctrace apply that do not hold."""
    from ctrace.advice.again import objection
    from ctrace.change.condition import HOLDS, ON_TRIAL, conditions

    return [
        Finding(
            "applied",
            GOOD if one.state in (HOLDS, ON_TRIAL) else WARN,
            f"{', '.join(one.services) or 'a change'} in {one.name}: "
            f"{one.told or one.state.replace('-', ' ')}",
        )
        for one in conditions(objection)
    ]


def _print(report: dict[str, Any], findings: Sequence[Finding]) -> None:
    from rich.table import Table
    from rich.text import Text

    from ctrace.view import format as fmt
    from ctrace.view.paper import Paper

    console = Paper(highlight=False)
    colour = {GOOD: "green", WARN: "yellow", BAD: "red"}
    grid = Table.grid(padding=(0, 2))
    for finding in findings:
        said = Text(finding.text)
        if finding.remedy:
            said.append(f"\n{finding.remedy}", style="bold")
        level = Text(finding.level, style=colour[finding.level])
        grid.add_row(level, Text(finding.subject), said)
    console.put(grid)
    spaces = sorted(report["namespaces"], key=lambda one: -one["count"])
    if spaces:
        console.put()
        table = Table(box=None, header_style="bold", pad_edge=False)
        for column in ("namespace", "netns", "count", "max", "full", "drop", "early_drop"):
            table.add_column(column, justify="left" if column == "namespace" else "right")
        for one in spaces[:20]:
            stats = one["stats"]
            row = (
                one["netns"],
                fmt.count(one["count"]),
                fmt.count(one["max"]),
                fmt.share(one["fill"]),
            )
            counted = (stats.get("drop", "-"), stats.get("early_drop", "-"))
            table.add_row(Text(one["name"]), *map(str, (*row, *counted)))
        console.put(table)
        if len(spaces) > 20:
            console.put(f"and {len(spaces) - 20} more, less full")


def _why(output: str) -> int:
    from ctrace.ruleset.activation import explain

    need_root("reading every namespace's rules")
    activation = explain(netns.find())
    if output == "json":
        click.echo(json.dumps(activation.to_json(), indent=2))
    else:
        click.echo(activation.render(), nl=False)
    return 0


def _self_test(hooks: Optional[str], output: str) -> int:
    from ctrace.selftest.report import Check
    from ctrace.selftest.run import run

    def show(check: Check) -> None:
        if output == "text":
            click.echo(f"{check.result:8} {check.name}{': ' + check.text if check.text else ''}")

    report = run(hooks, show)
    if output == "json":
        click.echo(json.dumps(report.to_json(), indent=2))
    else:
        click.echo(report.summary())
    return 0 if report.passed else 1
