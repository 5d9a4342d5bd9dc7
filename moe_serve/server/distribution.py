"""Counts of how long things took: cheap to add to, for quantiles of late and for Prometheus."""

from __future__ import annotations

import time
from bisect import bisect_left
from collections import deque
from collections.abc import Callable, Sequence
from itertools import accumulate

# of one slice of the time that quantiles are of
_SLICE_S = 5.0
_NUM_SLICES = 12
_EXPORTED = 4


class Distribution:
    """Values from `least` up, in buckets each 2 ** (1 / 4) times as wide as the one before.

    A quantile is that of the last minute, and right to within a bucket (19 %). For one thread.
    """

    def __init__(
        self,
        least: float = 1e-4,
        num_doublings: int = 24,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self.bounds = [least * 2 ** (i / 4) for i in range(4 * num_doublings + 1)]
        self.counts = [0] * (len(self.bounds) + 1)
        self.sum = 0.0
        self._clock = clock
        self._recent = [0] * len(self.counts)
        self._slices: deque[list[int]] = deque(maxlen=_NUM_SLICES)
        self._slice_s = clock()

    def add(self, value: float, num: int = 1) -> None:
        """Count a value, so many times."""
        if self._clock() - self._slice_s > _SLICE_S:
            self._turn()
        index = bisect_left(self.bounds, value)
        self.counts[index] += num
        self._recent[index] += num
        self.sum += num * value

    def quantiles(self, wanted: Sequence[float]) -> list[float | None]:
        """Return those of the last minute; None where it has no value."""
        self._turn()
        counts = [sum(column) for column in zip(self._recent, *self._slices, strict=True)]
        total = sum(counts)
        return [self._quantile(counts, total, one) for one in wanted]

    def buckets(self) -> list[tuple[str, float]]:
        """Return (upper bound, how many were at most that) as Prometheus has them."""
        told, running = [], 0
        for index, count in enumerate(self.counts[:-1]):
            running += count
            if index % _EXPORTED == 0:
                told.append((f"{self.bounds[index]:.6g}", float(running)))
        return [*told, ("+Inf", float(running + self.counts[-1]))]

    def _quantile(self, counts: Sequence[int], total: int, wanted: float) -> float | None:
        if not total:
            return None
        running = accumulate(counts)
        index = next(i for i, count in enumerate(running) if count >= wanted * total)
        return self.bounds[min(index, len(self.bounds) - 1)]

    def _turn(self) -> None:
        """Begin a new slice if the present one is old; forget what is older than a minute."""
        now_s = self._clock()
        passed = int((now_s - self._slice_s) / _SLICE_S)
        for index in range(min(passed, _NUM_SLICES + 1)):
            self._slices.append(self._recent if index == 0 else [0] * len(self.counts))
            self._recent = [0] * len(self.counts)
        self._slice_s += passed * _SLICE_S
