"""How often an expert was used of late, by any sequence: the same guess for every token."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np

from moe_serve.predictors.base import (
    START,
    Array,
    Gates,
    Observation,
    Predictor,
    PredictorShape,
    start_of,
)

_KEPT_TOKENS = 2048.0  # older ones fade out
_STATE_TOKENS = 64.0  # what a trained state counts for
_FIRST_TOKENS = 4.0  # that all experts alike count for, before anything is seen


class Popularity(Predictor):
    """Fading counts of uses and of tokens, per layer."""

    def __init__(self, shape: PredictorShape, state: Mapping[str, Array] | None) -> None:
        size = (shape.num_layers, shape.num_experts)
        rate, tokens = np.full(size, shape.top_k / shape.num_experts, np.float32), _FIRST_TOKENS
        if state is not None:
            rate, tokens = np.clip(start_of(state, "rate", size), 0, 1), _STATE_TOKENS
        self._counts = rate * np.float32(tokens)
        self._tokens = np.full((shape.num_layers, 1), tokens, np.float32)

    def observe(self, observation: Observation) -> None:
        layer, ids = observation.layer, observation.expert_ids
        if layer == START:
            return
        counts = self._counts[layer]
        keep = np.float32((1 - 1 / _KEPT_TOKENS) ** len(ids))
        counts *= keep
        counts += np.bincount(ids.ravel(), minlength=len(counts))
        self._tokens[layer] = self._tokens[layer] * keep + len(ids)

    def predict(self, layer: int, sequence_ids: Sequence[int]) -> Array:
        rate: Array = np.minimum(self._counts[layer] / self._tokens[layer], 1)
        if len(sequence_ids) > 1:
            rate = 1 - (1 - rate) ** len(sequence_ids)
        return rate

    def state(self) -> dict[str, Array]:
        return {"rate": np.minimum(self._counts / self._tokens, 1)}


def build(
    shape: PredictorShape,
    state: Mapping[str, Array] | None = None,
    gates: Gates | None = None,
) -> Predictor:
    """Make the predictor; `gates` is not used."""
    return Popularity(shape, state)
