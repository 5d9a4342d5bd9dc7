"""How a kernel is timed beside its limit: in turns, round after round, as medians of ratios.

A shared machine is faster in one second than in the next, so that a kernel and what bounds it are
only compared within a round. Knows nothing of what is timed.
"""

from __future__ import annotations

import math
import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Literal

ROUNDS = 7
_MAX_CALLS = 100_000

Unit = Literal["GB/s", "GFLOP/s"]


@dataclass(frozen=True, slots=True)
class Work:
    """Something to be timed, and what one call of it moves and computes.

    run is called with 0, 1, 2 ... so that its inputs can rotate through memory.
    """

    run: Callable[[int], object]
    num_bytes: float = 0.0
    flop: float = 0.0

    def amount(self, unit: Unit) -> float:
        """Return what a call amounts to, in 1e9 bytes or floating-point operations."""
        return amount_in(unit, self.num_bytes, self.flop)


def amount_in(unit: Unit, num_bytes: float, flop: float) -> float:
    """Return that of the two which `unit` is about, times 1e-9."""
    return (num_bytes if unit == "GB/s" else flop) / 1e9


@dataclass(frozen=True, kw_only=True, slots=True)
class Case:
    """One line of a table.

    unit: that of the limit, which is also the one of the result. limit: the work that shows what
    the machine could give, named limit_name. torch: plain torch on the same inputs. empty: the same
    call with no rows: what calling costs. All but the limit and `empty` move and compute the same.
    """

    table: str
    name: str
    num_rows: int
    work: Work
    unit: Unit
    limit: Work
    limit_name: str
    torch: Work | None = None
    empty: Work | None = None


@dataclass(frozen=True, kw_only=True, slots=True)
class Figure:
    """What a case gave: seconds per call, one sample a round. It keeps none of the inputs alive.

    num_bytes, flop: of one call; limit_rates: in `unit`.
    """

    table: str
    name: str
    num_rows: int
    num_bytes: float
    flop: float
    unit: Unit
    limit_name: str
    seconds: list[float]
    limit_rates: list[float]
    torch_seconds: list[float] | None
    empty_seconds: list[float] | None

    def rates_of(self, seconds: Sequence[float]) -> list[float]:
        """Return what calls of so many seconds reach, in `unit`."""
        amount = amount_in(self.unit, self.num_bytes, self.flop)
        return [amount / of_call for of_call in seconds]

    @property
    def rates(self) -> list[float]:
        return self.rates_of(self.seconds)

    @property
    def ratio(self) -> float:
        """The share of the limit that was reached: the median of the rounds' ratios."""
        return median_ratio(self.rates, self.limit_rates)

    @property
    def rates_without_call(self) -> list[float] | None:
        """What was reached less an empty call's median time, which a fused pass does not have.

        None where that was not measured, or is all there is. An empty call runs with warm caches,
        so that less is taken off than the call cost.
        """
        if self.empty_seconds is None:
            return None
        empty = statistics.median(self.empty_seconds)
        net = [seconds - empty for seconds in self.seconds]
        return None if min(net) <= 0 else self.rates_of(net)

    @property
    def ratio_without_call(self) -> float | None:
        rates = self.rates_without_call
        return None if rates is None else median_ratio(rates, self.limit_rates)

    @property
    def torch_ratio(self) -> float | None:
        """How much faster than torch: above 1 where we lead."""
        return (
            None if self.torch_seconds is None else median_ratio(self.torch_seconds, self.seconds)
        )


def median_ratio(numerators: Sequence[float], denominators: Sequence[float]) -> float:
    """Return the median of the rounds' ratios."""
    return statistics.median(a / b for a, b in zip(numerators, denominators, strict=True))


def interleaved(
    works: Sequence[Callable[[int], object]], seconds: float, rounds: int = ROUNDS
) -> list[list[float]]:
    """Time the works in turn; return the seconds per call of each, one sample a round.

    All samples together take about `seconds`, divided evenly; a call that is longer than its sample
    is made once. Before that each is called three times, which warms up and says how often a sample
    must call it.
    """
    turns = [0] * len(works)

    def sample(index: int, calls: int) -> float:
        run, first = works[index], turns[index]
        turns[index] += calls
        start = time.perf_counter()
        for turn in range(first, first + calls):
            run(turn)
        return (time.perf_counter() - start) / calls

    sample_s = seconds / (rounds * len(works))
    calls = []
    for index in range(len(works)):
        sample(index, 1)
        wanted = math.ceil(sample_s / max(sample(index, 2), 1e-9))
        calls.append(min(wanted, _MAX_CALLS))
    samples: list[list[float]] = [[] for _ in works]
    for _ in range(rounds):
        for index, count in enumerate(calls):
            samples[index].append(sample(index, count))
    return samples


def measure(case: Case, seconds: float, rounds: int = ROUNDS) -> Figure:
    """Time a case, its limit and what it is compared with."""
    others = [work for work in (case.torch, case.empty) if work is not None]
    works = [case.work, case.limit, *others]
    samples = interleaved([work.run for work in works], seconds, rounds)
    rest = iter(samples[2:])
    return Figure(
        table=case.table,
        name=case.name,
        num_rows=case.num_rows,
        num_bytes=case.work.num_bytes,
        flop=case.work.flop,
        unit=case.unit,
        limit_name=case.limit_name,
        seconds=samples[0],
        limit_rates=[case.limit.amount(case.unit) / seconds for seconds in samples[1]],
        torch_seconds=next(rest) if case.torch is not None else None,
        empty_seconds=next(rest) if case.empty is not None else None,
    )


def num_sets(set_bytes: int, cold_bytes: int, most: int = 4096) -> int:
    """Return how many inputs of `set_bytes` must take turns so that no cache holds them.

    At least 2, at most `most`: what is so small is bound by its call, not by memory.
    """
    return max(2, min(most, math.ceil(cold_bytes / set_bytes)))
