"""How evenly ranks' experts were busy lately."""

from __future__ import annotations

from collections import deque
from collections.abc import Sequence

_EVERY = 100
_STEPS = 1000


class PairsWindow:
    """What each rank's experts computed in the last 1,000 to 1,100 steps, or since the start."""

    def __init__(self, num_ranks: int) -> None:
        self._num_steps = 0
        self._latest: Sequence[int] = [0] * num_ranks
        self._before: deque[Sequence[int]] = deque([self._latest], maxlen=_STEPS // _EVERY + 1)

    def told(self, pairs: Sequence[int]) -> None:
        """Take note of a step. pairs: of each rank, computed since the start."""
        self._latest = pairs
        self._num_steps += 1
        if self._num_steps % _EVERY == 0:
            self._before.append(pairs)

    def imbalance(self) -> float | None:
        """Return the busiest rank's pairs over the mean of all; None where there were none."""
        pairs = [now - then for now, then in zip(self._latest, self._before[0], strict=True)]
        return max(pairs) * len(pairs) / sum(pairs) if sum(pairs) else None
