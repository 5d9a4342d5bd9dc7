"""How a long run ends: its figures with their limits, what was broken, and its exit code."""

from __future__ import annotations

import sys
from collections.abc import Sequence

from benchmarks import results


def report(name: str, rows: Sequence[results.Row], faults: Sequence[str], *, is_saved: bool) -> int:
    """Print figures and faults, keep the figures if asked to; return the exit code.

    name: of the module in benchmarks.serving, and with "serving-" before it of the results.
    """
    for row in rows:
        limit = "" if row.limit is None else f", limit {row.limit:g}"
        spread = f" ({row.min:g} to {row.max:g}, n {row.n})" if row.n > 1 else ""
        print(f"{row.name}: {row.value:g} {row.unit}{spread}{limit}")
    for fault in faults:
        print(f"BROKEN: {fault}")
    if is_saved:
        command = results.recorded_command(f"benchmarks.serving.{name}", sys.argv[1:])
        slug = f"serving-{name.replace('_', '-')}"
        print(results.write_results(slug, rows, command=command))
    return int(bool(faults))
