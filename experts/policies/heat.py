"""Heat: an exponential moving average of use, one step of it for each event of the layer.

h becomes (1 - a) h + a where the event uses the expert, and (1 - a) h elsewhere.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from moe_serve.experts.policies.base import CacheShape, EvictionPolicy

_RATE = 0.08
_GROWTH = 1.0 / (1.0 - _RATE)
_LARGE = 2.0**200


class Heat(EvictionPolicy):
    """Lets the weight of a use grow instead of cooling every expert at every event."""

    def __init__(self, shape: CacheShape) -> None:
        self._heat = [[0.0] * shape.num_experts for _ in range(shape.num_layers)]
        self._unit = [1.0] * shape.num_layers  # what one use adds at the layer's latest event

    def touch(self, step: int, layer: int, expert_ids: Sequence[int]) -> None:
        heat = self._heat[layer]
        unit = self._unit[layer] * _GROWTH
        if unit > _LARGE:
            unit /= _LARGE
            heat[:] = [value / _LARGE for value in heat]
        self._unit[layer] = unit
        for expert in expert_ids:
            heat[expert] += unit

    def scores(self, layer: int, expert_ids: Sequence[int]) -> list[float]:
        heat, scale = self._heat[layer], _RATE / self._unit[layer]
        return [heat[expert] * scale for expert in expert_ids]


def build(
    shape: CacheShape, state: Mapping[str, np.ndarray[Any, Any]] | None = None
) -> EvictionPolicy:
    """Make the policy; all experts start cold, since heat lasts some tens of steps only."""
    return Heat(shape)
