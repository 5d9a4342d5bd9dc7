"""The latest figures of the server, of all its measurements: one file, and one table for the docs.

    python -m benchmarks.serving.summary            # prints the table
    python -m benchmarks.serving.summary --save     # and keeps both

Each measurement keeps its own (`--save`), with the command and the commit that give it again; the
newest of each is taken. docs/serving_figures.md holds the table between two marks.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import re
import sys
from pathlib import Path
from typing import Any

from benchmarks import results

PAGE = results.ROOT / "docs" / "serving_figures.md"
BEGIN, END = "<!-- begin of the table -->\n", "<!-- end of the table -->\n"
# of these a limit is the least; of all others it is the most
LEAST = ("server to alone", "goodput at overload")
# what a reader asks first comes first
ORDER = (
    "speed", "front-end", "live", "overload", "kills", "faults", "disconnects", "drains",
    "slow-readers", "sockets", "bad-inputs", "soak",
)  # fmt: skip


def newest(folder: Path = results.RESULTS) -> dict[str, dict[str, Any]]:
    """Return the latest file of each measurement. Raises ValueError where there is none of one."""
    found = {}
    for name in ORDER:
        form = re.compile(rf"\d{{8}}-serving-{name}-(?!all)[a-z0-9-]+\.json")
        paths = sorted(path for path in folder.iterdir() if form.fullmatch(path.name))
        if not paths:
            raise ValueError(f"nothing is kept of {name}: run its module with --save")
        found[name] = json.loads(paths[-1].read_text())
    return found


def rows_of(found: dict[str, dict[str, Any]]) -> list[results.Row]:
    """Return all rows, each with its measurement's name before its own."""
    return [
        dataclasses.replace(results.Row(**row), name=f"{name}: {row['name']}")
        for name, document in found.items()
        for row in document["rows"]
    ]


def table(rows: list[results.Row], commands: dict[str, str]) -> str:
    """Return the rows as Markdown: a table for each measurement, under its command."""
    parts = []
    for name, command in commands.items():
        parts += [f"\n### {name}\n", f"`{command}`\n", "| figure | median | spread | limit |"]
        parts.append("|---|---|---|---|")
        for row in rows:
            kind, _, rest = row.name.partition(": ")
            if kind == name:
                spread = f"{row.min:.4g} to {row.max:.4g}, n {row.n}" if row.n > 1 else ""
                limit = "" if row.limit is None else f"{row.limit:g}"
                if is_missed(rest, row):
                    limit = f"**{limit}, missed**"
                parts.append(f"| {rest} | {row.value:.4g} {row.unit} | {spread} | {limit} |")
    return "\n".join([*parts, "", ""])


def is_missed(name: str, row: results.Row) -> bool:
    """Tell whether a figure is on the wrong side of its limit; name: without the measurement's."""
    if row.limit is None:
        return False
    is_least = any(part in name for part in LEAST)
    return row.value < row.limit if is_least else row.value > row.limit


def with_table(page: str, told: str) -> str:
    """Return a page with the table between its marks replaced."""
    head, rest = page.split(BEGIN)
    return head + BEGIN + told + END + rest.split(END)[1]


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--save", action="store_true")
    given = parser.parse_args()
    found = newest()
    rows = rows_of(found)
    told = table(rows, {name: document["command"] for name, document in found.items()})
    print(told)
    if given.save:
        command = results.recorded_command("benchmarks.serving.summary", sys.argv[1:])
        print(results.write_results("serving-all", rows, command=command))
        PAGE.write_text(with_table(PAGE.read_text(), told))
    return 0


if __name__ == "__main__":
    sys.exit(main())
