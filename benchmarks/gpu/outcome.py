"""What came of a part, how it is kept, and the table of all parts against what was asked for."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, Self

from benchmarks import results
from benchmarks.gpu.figures import Failure, Figure

# in the order in which they are run: what all others are compared with comes first
PARTS = {
    "ceilings": "benchmarks.gpu.ceilings",
    "tests": "benchmarks.gpu.tests",
    "kernels": "benchmarks.gpu.kernels",
    "exactness": "benchmarks.gpu.exactness",
    "decode": "benchmarks.gpu.decode",
    "transfer": "benchmarks.gpu.transfer",
    "prefill": "benchmarks.gpu.prefill",
    "offload": "benchmarks.gpu.offload",
    "peers": "benchmarks.gpu.peers",
    "tiles": "benchmarks.gpu.tiles",
}


@dataclass(kw_only=True)
class Outcome:
    """What was measured, and what could not be.

    error: why a part ended before its end, or None; environment: card, driver, versions. kernels:
    whose they were. is_spared: nothing of it had the name that was asked for.
    """

    part: str
    is_dry: bool = False
    figures: list[Figure] = field(default_factory=list)
    failures: list[Failure] = field(default_factory=list)
    error: str | None = None
    seconds: float = 0.0
    environment: dict[str, Any] = field(default_factory=dict)
    card: str = "unknown"
    kernels: str = "triton"
    is_spared: bool = False

    def document(self) -> dict[str, Any]:
        """Return it as JSON holds it."""
        return {
            **vars(self),
            "figures": [figure.document() for figure in self.figures],
            "failures": [asdict(failure) for failure in self.failures],
        }

    @classmethod
    def read(cls, document: dict[str, Any]) -> Self:
        """Return what `document` made."""
        figures = [Figure.read(one) for one in document["figures"]]
        failures = [Failure(**one) for one in document["failures"]]
        return cls(**{**document, "figures": figures, "failures": failures})

    def add(self, found: Figure | Failure) -> None:
        """Take a figure, or what is in its place."""
        if isinstance(found, Failure):
            self.failures.append(found)
        else:
            self.figures.append(found)

    @property
    def errors(self) -> list[str]:
        """All that went wrong."""
        found = [f"{failure.name}: {failure.error}" for failure in self.failures]
        return found if self.error is None else [*found, self.error]

    def save(self, arguments: argparse.Namespace) -> Path:
        """Keep the figures, and the environment; return the file."""
        words = [word for word in sys.argv[1:] if word not in PARTS]
        return results.write_results(
            f"gpu-{self.part}",
            [figure.row for figure in self.figures],
            command=results.recorded_command("benchmarks.gpu", [self.part, *words]),
            machine=self.card,
            folder=arguments.folder or results.RESULTS,
            environment={**self.environment, "errors": self.errors},
        )


def is_quiet(figure: Figure) -> bool:
    """Tell whether a figure is a test that passed: they are counted, not listed."""
    return figure.row.unit == "passed" and figure.is_met


def summary(outcomes: Sequence[Outcome]) -> str:
    """Return every figure that has a goal, and every part that failed, as a table."""
    lines = ["", f"{'part':<10} {'verdict':<7} {'ratio':>8} {'goal':>7}  figure"]
    for outcome in outcomes:
        for figure in outcome.figures:
            if figure.goal is None or is_quiet(figure):
                continue
            ratio = "-" if figure.row.ratio is None else f"{figure.row.ratio:.3f}"
            goal = f"{'<=' if figure.is_most else '>='}{figure.goal:g}"
            verdict = figure.verdict(outcome.is_dry)
            lines.append(f"{outcome.part:<10} {verdict:<7} {ratio:>8} {goal:>7}  {figure.row.name}")
        lines += [f"{outcome.part:<10} FAILED  {error}" for error in outcome.errors]
        num_passed = sum(map(is_quiet, outcome.figures))
        told = f"{len(outcome.figures)} figures in {outcome.seconds:.0f} s"
        told += f", {num_passed} tests passed" if num_passed else ""
        told += "; nothing of it has that name" if outcome.is_spared else ""
        lines.append(f"{outcome.part:<10} {told}")
    judged = [
        figure for outcome in outcomes for figure in outcome.figures if figure.goal is not None
    ]
    num_failed = sum(bool(outcome.errors) for outcome in outcomes)
    if any(outcome.is_dry for outcome in outcomes):
        if any(outcome.kernels == "reference" for outcome in outcomes):
            lines.append(
                "Triton is not here: torch's operations stood in for the GPU's kernels, and tiles "
                "were not walked"
            )
        lines.append(
            f"dry: no figure means anything; {len(judged)} have goals; {num_failed} parts failed"
        )
    else:
        num_met = sum(figure.is_met for figure in judged)
        lines.append(f"{num_met} of {len(judged)} goals met; {num_failed} parts failed")
    return "\n".join(lines)
