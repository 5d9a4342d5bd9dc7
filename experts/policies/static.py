"""Static: each layer's most popular experts stay for good, and nobody else comes in.

What Fiddler (arXiv 2402.07033, section 3.2) does with popularity measured beforehand. Its misses
follow from the histogram alone: the uses of the experts that are not in the set.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from moe_serve.errors import TraceError
from moe_serve.experts.policies.base import CacheShape, EvictionPolicy

Array = np.ndarray[Any, Any]
_WINDOW = 256  # events of a layer that are counted where no counts are given


class Static(EvictionPolicy):
    """Counts for a window, admitting everything, and then stays with what was used most.

    counts: [num_layers, num_experts], uses of an earlier run; then there is no window.
    """

    def __init__(self, shape: CacheShape, counts: Array | None) -> None:
        self._shape = shape
        self._is_counting = [counts is None] * shape.num_layers
        self._num_events = [0] * shape.num_layers
        self._counts: list[list[float]] = (
            np.zeros((shape.num_layers, shape.num_experts)) if counts is None else counts
        ).tolist()
        self._chosen: list[set[int]] = [set() for _ in range(shape.num_layers)]
        if counts is not None:
            self._choose(range(shape.num_layers))

    def touch(self, step: int, layer: int, expert_ids: Sequence[int]) -> None:
        if not self._is_counting[layer]:
            return
        counts = self._counts[layer]
        for expert in expert_ids:
            counts[expert] += 1
        self._num_events[layer] += 1
        if self._num_events[layer] == _WINDOW:
            self._is_counting[layer] = False
            self._choose([layer])

    def scores(self, layer: int, expert_ids: Sequence[int]) -> list[float]:
        counts = self._counts[layer]
        return [counts[expert] for expert in expert_ids]

    def admits(self, layer: int, expert: int) -> bool:
        return self._is_counting[layer] or expert in self._chosen[layer]

    def resize(self, shape: CacheShape) -> None:
        self._shape = shape
        self._choose([la for la, counting in enumerate(self._is_counting) if not counting])

    def state(self) -> dict[str, Array]:
        return {"counts": np.array(self._counts, np.float64)}

    def _choose(self, layers: Sequence[int]) -> None:
        """Choose the experts that may stay: as many in each layer as it has slots.

        Where layers share their slots each takes an equal part.
        """
        per_layer = self._shape.slots_per_layer
        if per_layer is None:
            per_layer = self._shape.total_slots // self._shape.num_layers
        for layer in layers:
            counts = self._counts[layer]
            # of equals the lower id goes first, so the higher one stays
            ranked = sorted(range(len(counts)), key=lambda expert: (counts[expert], expert))
            self._chosen[layer] = set(ranked[-per_layer:])


def build(shape: CacheShape, state: Mapping[str, Array] | None = None) -> EvictionPolicy:
    """Make the policy; state "counts": uses [num_layers, num_experts], as `state` returns it.

    Raises TraceError for counts of another shape.
    """
    counts = None if state is None else state.get("counts")
    expected = (shape.num_layers, shape.num_experts)
    if counts is not None and counts.shape != expected:
        raise TraceError(
            f"counts are {list(counts.shape)}, the model's experts {list(expected)}; "
            "they are of another model"
        )
    return Static(shape, counts)
