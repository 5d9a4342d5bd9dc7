"""MoE-Infinity's eviction (arXiv 2401.14361): activation matrix x visits in cache x layer decay.

The published score is the current sequence's activation matrix, each row normalised, times how
often the expert was used since it came in, times a ramp that falls with the layer; each factor
plus 1e-6. Here the matrix is that of recent events and fades, as a policy is not told where
sequences begin and end and a batch mixes them. The ramp matters only where layers share slots.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from moe_serve.experts.policies.base import CacheShape, EvictionPolicy

_EPSILON = 1e-6
_FADING = 1.0 - 1.0 / 64  # of the matrix, per event: about one sequence's length
_LARGE = 2.0**200


class Activation(EvictionPolicy):
    """Keeps a fading activation matrix, and the visits to each expert since it was last evicted.

    Where layers share slots nobody asks for victims, and visits count from the first one.
    """

    def __init__(self, shape: CacheShape) -> None:
        self._activations = [[0.0] * shape.num_experts for _ in range(shape.num_layers)]
        self._row_sums = [0.0] * shape.num_layers
        self._unit = [1.0] * shape.num_layers  # what one use adds at the layer's latest event
        self._visits = [[0] * shape.num_experts for _ in range(shape.num_layers)]
        self._num_layers = shape.num_layers

    def touch(self, step: int, layer: int, expert_ids: Sequence[int]) -> None:
        activations, visits = self._activations[layer], self._visits[layer]
        unit = self._unit[layer] / _FADING
        if unit > _LARGE:
            unit /= _LARGE
            activations[:] = [value / _LARGE for value in activations]
            self._row_sums[layer] /= _LARGE
        self._unit[layer] = unit
        for expert in expert_ids:
            activations[expert] += unit
            visits[expert] += 1
        self._row_sums[layer] += unit * len(expert_ids)

    def scores(self, layer: int, expert_ids: Sequence[int]) -> list[float]:
        activations, visits = self._activations[layer], self._visits[layer]
        row_sum = self._row_sums[layer] or 1.0
        ramp = 1.0 - layer / (self._num_layers + 1) + _EPSILON
        return [
            ramp * (activations[expert] / row_sum + _EPSILON) * (visits[expert] + _EPSILON)
            for expert in expert_ids
        ]

    def victims(self, layer: int, candidates: Sequence[int], count: int) -> list[int]:
        going = super().victims(layer, candidates, count)
        for expert in going:
            self._visits[layer][expert] = 0
        return going


def build(
    shape: CacheShape, state: Mapping[str, np.ndarray[Any, Any]] | None = None
) -> EvictionPolicy:
    """Make the policy; its matrix is that of the sequences that run, so it starts empty."""
    return Activation(shape)
