"""A figure that was measured, in the one form in which all of them are told and kept."""

from __future__ import annotations

import statistics
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Self


@dataclass(frozen=True, slots=True)
class Row:
    """One figure. value: what is reported, in `unit`; the spread is over n samples.

    limit: the most (or least) that it may be, or that the machine could give, in `unit`, or None
    where there is none. ratio: of this figure to what the row's name says it is compared with, or
    None.
    """

    name: str
    value: float
    unit: str
    median: float
    min: float
    max: float
    n: int
    limit: float | None = None
    ratio: float | None = None

    @classmethod
    def of(
        cls,
        name: str,
        samples: Sequence[float],
        unit: str,
        *,
        limit: float | None = None,
        ratio: float | None = None,
    ) -> Self:
        """Summarise samples: the value is their median. Raises ValueError when there is none."""
        if not samples:
            raise ValueError(f"{name}: no samples; measure at least once")
        median = statistics.median(samples)
        return cls(
            name, median, unit, median, min(samples), max(samples), len(samples), limit, ratio
        )

    def line(self) -> str:
        """Return it as a line of a report."""
        return (
            f"{self.name:<24} {self.value:>12.4g} {self.unit:<10} "
            f"(min {self.min:.4g}, max {self.max:.4g}, n {self.n})"
        )
