"""Least frequently used: the expert with the fewest uses so far, resident or not."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from moe_serve.experts.policies.base import CacheShape, EvictionPolicy


class Lfu(EvictionPolicy):
    """Counts the events that used each expert, also while it was not resident."""

    def __init__(self, shape: CacheShape) -> None:
        self._counts = [[0] * shape.num_experts for _ in range(shape.num_layers)]

    def touch(self, step: int, layer: int, expert_ids: Sequence[int]) -> None:
        counts = self._counts[layer]
        for expert in expert_ids:
            counts[expert] += 1

    def scores(self, layer: int, expert_ids: Sequence[int]) -> list[int]:
        counts = self._counts[layer]
        return [counts[expert] for expert in expert_ids]


def build(
    shape: CacheShape, state: Mapping[str, np.ndarray[Any, Any]] | None = None
) -> EvictionPolicy:
    """Make the policy; it counts from nothing, since counts of another task mislead it."""
    return Lfu(shape)
