"""Expert buffering (Huang et al., NeurIPS 2024): not active first, and then last in, first out.

Experts that the batch does not use go before those that it does; among them the one that came in
last goes first, so that a scan that comes round again finds the front of the layer still there.
The cache pins what the current event uses, so the order below is that among the others.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from moe_serve.experts.policies.base import CacheShape, EvictionPolicy

_ABSENT = -1


class ExpertBuffering(EvictionPolicy):
    """Keeps the step in which each expert came in: its first use since it was last evicted.

    Where layers share slots nobody asks for victims, and the very first use counts.
    """

    def __init__(self, shape: CacheShape) -> None:
        self._came_in = [[_ABSENT] * shape.num_experts for _ in range(shape.num_layers)]

    def touch(self, step: int, layer: int, expert_ids: Sequence[int]) -> None:
        came_in = self._came_in[layer]
        for expert in expert_ids:
            if came_in[expert] == _ABSENT:
                came_in[expert] = step

    def scores(self, layer: int, expert_ids: Sequence[int]) -> list[int]:
        came_in = self._came_in[layer]
        return [-came_in[expert] for expert in expert_ids]

    def victims(self, layer: int, candidates: Sequence[int], count: int) -> list[int]:
        going = super().victims(layer, candidates, count)
        for expert in going:
            self._came_in[layer][expert] = _ABSENT
        return going


def build(
    shape: CacheShape, state: Mapping[str, np.ndarray[Any, Any]] | None = None
) -> EvictionPolicy:
    """Make the policy; it has nothing to start from."""
    return ExpertBuffering(shape)
