"""Least frequently and recently used: uses so far, divided by the age of the last one.

score = count / (age in steps + 1), as in vLLM's pull request 37190 and in Zhang (arXiv 2608.07911).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from moe_serve.experts.policies.base import CacheShape, EvictionPolicy


class Lfru(EvictionPolicy):
    """Keeps each expert's count and the step of its last use; counts outlive eviction."""

    def __init__(self, shape: CacheShape) -> None:
        self._counts = [[0] * shape.num_experts for _ in range(shape.num_layers)]
        self._last = [[0] * shape.num_experts for _ in range(shape.num_layers)]
        self._next_step = 1  # the step after the latest: age + 1 = this - last

    def touch(self, step: int, layer: int, expert_ids: Sequence[int]) -> None:
        self._next_step = step + 1
        counts, last = self._counts[layer], self._last[layer]
        for expert in expert_ids:
            counts[expert] += 1
            last[expert] = step

    def scores(self, layer: int, expert_ids: Sequence[int]) -> list[float]:
        counts, last, next_step = self._counts[layer], self._last[layer], self._next_step
        return [counts[expert] / (next_step - last[expert]) for expert in expert_ids]


def build(
    shape: CacheShape, state: Mapping[str, np.ndarray[Any, Any]] | None = None
) -> EvictionPolicy:
    """Make the policy; it counts from nothing, since counts of another task mislead it."""
    return Lfru(shape)
