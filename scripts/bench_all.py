"""Runs the benchmarks by name and prints what they found."""

from __future__ import annotations

import argparse
import importlib
import json
import os
import platform
from typing import Any

from rich.console import Console
from rich.table import Table

SUITES = ("capture", "traffic", "model", "trace", "view", "perf", "dumps", "memory")


def table(suite: str, rows: list[dict[str, Any]]) -> Table:
    """One suite's rows; a row's own fields become its columns' cells as ``name value``."""
    made = Table(title=suite, title_justify="left", box=None, show_header=False, pad_edge=False)
    made.add_column(no_wrap=True, style="bold")
    made.add_column()
    for row in rows:
        rest = {key: value for key, value in row.items() if key != "name" and value != ""}
        cells = "   ".join(f"{key.replace('_', ' ')} {_text(value)}" for key, value in rest.items())
        made.add_row(str(row.get("name", "")), cells)
    return made


def _text(value: Any) -> str:
    if isinstance(value, float):
        return f"{value:,.4g}"
    return f"{value:,}" if isinstance(value, int) else str(value)


def main() -> None:
    """Parse, run, print."""
    parser = argparse.ArgumentParser(prog="scripts/bench", description=__doc__)
    parser.add_argument("suites", nargs="*", metavar="SUITE", help=", ".join(SUITES))
    parser.add_argument("-o", "--output", choices=("text", "json"), default="text")
    given = parser.parse_args()
    for suite in given.suites:
        if suite not in SUITES:
            parser.error(f"unknown suite {suite!r}: choose from {', '.join(SUITES)}")
    console = Console()
    found: dict[str, list[dict[str, Any]]] = {}
    for suite in given.suites or SUITES:
        found[suite] = importlib.import_module(f"bench_{suite}").run()
        if given.output == "text":
            console.print(table(suite, found[suite]), "")
    if given.output == "json":
        machine = {"kernel": platform.release(), "cpus": os.cpu_count()}
        print(json.dumps({"machine": machine, "suites": found}, indent=2))


if __name__ == "__main__":
    main()
