"""Figures beside what the machine gives, and whether they are what was asked for."""

from __future__ import annotations

import statistics
import traceback
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass
from typing import Any, Literal, Self

from benchmarks.results import Row

Verdict = Literal["met", "MISSED", "dry", ""]


@dataclass(frozen=True, kw_only=True, slots=True)
class Figure:
    """A row, and the goal of its ratio: at least so much, or, if `is_most`, at most. None: none."""

    row: Row
    goal: float | None = None
    is_most: bool = False

    @property
    def is_met(self) -> bool:
        assert self.goal is not None, self.row.name
        if self.row.ratio is None:
            return False
        return self.row.ratio <= self.goal if self.is_most else self.row.ratio >= self.goal

    def verdict(self, is_dry: bool) -> Verdict:
        """Tell whether the goal was met; figures of a dry run say nothing."""
        if is_dry:
            return "dry"
        if self.goal is None:
            return ""
        return "met" if self.is_met else "MISSED"

    def line(self, is_dry: bool) -> str:
        """Return it as a line of a report."""
        row = self.row
        limit = "" if row.limit is None else f"{row.limit:.4g}"
        ratio = "" if row.ratio is None else f"{row.ratio:.3f}"
        goal = "" if self.goal is None else f"{'<=' if self.is_most else '>='}{self.goal:g}"
        spread = f"{row.min:.4g} to {row.max:.4g}, n {row.n}"
        return (
            f"{row.name:<72} {row.value:>10.4g} {row.unit:<11} {spread:<28} "
            f"limit {limit:>9} ratio {ratio:>7} {goal:>7} {self.verdict(is_dry)}"
        ).rstrip()

    def document(self) -> dict[str, Any]:
        """Return it as JSON holds it."""
        return {"row": asdict(self.row), "goal": self.goal, "is_most": self.is_most}

    @classmethod
    def read(cls, document: dict[str, Any]) -> Self:
        """Return what `document` made."""
        row = Row(**document["row"])
        return cls(row=row, goal=document["goal"], is_most=document["is_most"])


@dataclass(frozen=True, slots=True)
class Failure:
    """What could not be measured, and why."""

    name: str
    error: str


def attempted(
    name: str, measure: Callable[[], Iterator[Figure | Failure]]
) -> Iterator[Figure | Failure]:
    """Yield what `measure` does; where it fails, say so, and let what comes after go on."""
    try:
        yield from measure()
    except Exception as error:
        traceback.print_exc()
        yield Failure(name, told(error))


def told(error: BaseException) -> str:
    """Return an error's kind and its first line."""
    return f"{type(error).__name__}: {(str(error).splitlines() or [''])[0]}"


def rate(
    name: str,
    seconds: Sequence[float],
    amount: float,
    unit: str,
    limit: float | None = None,
    goal: float | None = None,
) -> Figure:
    """Return what calls of so many seconds reach, beside the most that the machine gives.

    amount: of a call, in the unit times a second; limit: in the unit. The ratio is to the limit.
    """
    rates = [amount / of_call for of_call in seconds]
    ratio = None if limit is None else statistics.median(rates) / limit
    return Figure(row=Row.of(name, rates, unit, limit=limit, ratio=ratio), goal=goal)


def against(
    name: str,
    seconds: Sequence[float],
    limit_s: float,
    goal: float | None = None,
    unit: str = "ms",
) -> Figure:
    """Return a time beside the least that the machine needs; the ratio is limit / time."""
    factor = {"ms": 1e3, "us": 1e6}[unit]
    row = Row.of(
        name,
        [factor * one for one in seconds],
        unit,
        limit=factor * limit_s,
        ratio=limit_s / statistics.median(seconds),
    )
    return Figure(row=row, goal=goal)


def compared(
    name: str,
    seconds: Sequence[float],
    others: Sequence[float],
    goal: float | None = None,
    is_most: bool = False,
) -> Figure:
    """Return times beside others of the same work; the ratio is median to median, ours first."""
    ratio = statistics.median(seconds) / statistics.median(others)
    row = Row.of(name, [1e3 * one for one in seconds], "ms", ratio=ratio)
    return Figure(row=row, goal=goal, is_most=is_most)


def plain(name: str, samples: Sequence[float], unit: str) -> Figure:
    """Return a figure that has no limit."""
    return Figure(row=Row.of(name, samples, unit))
