"""Least recently used: the expert whose last use is longest ago."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from moe_serve.experts.policies.base import CacheShape, EvictionPolicy

_NEVER = -1


class Lru(EvictionPolicy):
    """Keeps the step of each expert's last use."""

    def __init__(self, shape: CacheShape) -> None:
        self._last = [[_NEVER] * shape.num_experts for _ in range(shape.num_layers)]

    def touch(self, step: int, layer: int, expert_ids: Sequence[int]) -> None:
        last = self._last[layer]
        for expert in expert_ids:
            last[expert] = step

    def scores(self, layer: int, expert_ids: Sequence[int]) -> list[int]:
        last = self._last[layer]
        return [last[expert] for expert in expert_ids]


def build(
    shape: CacheShape, state: Mapping[str, np.ndarray[Any, Any]] | None = None
) -> EvictionPolicy:
    """Make the policy; it has nothing to start from."""
    return Lru(shape)
