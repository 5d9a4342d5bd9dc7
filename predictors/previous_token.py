"""What the sequence's last tokens used in the same layer.

Every expert has one of 16 pasts: whether each of the last four tokens used it. How often an expert
with such a past is used next is counted per layer, for the rarer, the middle and the more popular
experts apart (eight classes), so that the guess is a probability.
"""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np

from moe_serve.predictors._sequences import SequencePredictor, uses
from moe_serve.predictors.base import (
    Array,
    Gates,
    Observation,
    Predictor,
    PredictorShape,
    start_of,
)

_PASTS = 16  # of four tokens, the last one is bit 0
_CLASSES = 8  # of popularity: each twice as popular as the one before
_CASES = _PASTS * _CLASSES
_FADE = np.float32(1 / 1024)  # of popularity, at each token
_KEPT = 1.0 - 1.0 / 2048  # of the counts, at each token
_STATE_COUNT = 64.0  # what a trained state counts for, and the first guess a tenth of it


class PreviousToken(SequencePredictor):
    """Each sequence's pasts, how popular experts are, and counts of what came of both."""

    def __init__(self, shape: PredictorShape, state: Mapping[str, Array] | None) -> None:
        super().__init__(shape)
        layers, experts = shape.num_layers, shape.num_experts
        self._pasts = np.zeros((self._known.capacity, layers, experts), np.uint8)
        mean = shape.top_k / experts
        self._lowest = np.float32(mean / 2 ** (_CLASSES // 2))
        self._rate = np.full((layers, experts), mean, np.float32)
        self._classes = np.full((layers, experts), _CLASSES // 2 * _PASTS, np.int64)
        rate, seen = self._first_rates(), np.float32(_STATE_COUNT / 10)
        if state is not None:
            rate = np.clip(start_of(state, "rate_of_case", (layers, _CASES)), 0, 1)
            self._rate = np.clip(start_of(state, "rate", (layers, experts)), 0, 1)
            self._classes = self._classes_of(self._rate)
            seen = np.float32(_STATE_COUNT)
        self._seen = np.full((layers, _CASES), seen, np.float32)
        self._used = rate * seen

    def _first_rates(self) -> Array:
        """Return [num_layers, cases]: the more of the tokens used it, the likelier."""
        number = np.array([past.bit_count() for past in range(_PASTS)], np.float32)
        fresh = np.arange(_PASTS) % 2
        popularity = self._lowest * 2.0 ** np.arange(_CLASSES)
        rate = np.minimum(popularity[:, None] * (0.5 + number + fresh), 0.9)
        return np.tile(rate.ravel().astype(np.float32), (self._shape.num_layers, 1))

    def _begin(self, observation: Observation) -> None:
        for slot, is_new in zip(self._slots, self._is_new, strict=True):
            if is_new:
                self._pasts[slot] = 0

    def _see(self, layer: int, ids: Array, observation: Observation) -> None:
        pasts = self._pasts[self._slots, layer]  # [num_sequences, num_experts]
        cases = pasts + self._classes[layer]
        used = uses(ids, self._shape.num_experts)
        self._seen[layer] *= _KEPT
        self._used[layer] *= _KEPT
        self._seen[layer] += np.bincount(cases.ravel(), minlength=_CASES)
        chosen = np.take_along_axis(cases, ids, axis=1)
        self._used[layer] += np.bincount(chosen.ravel(), minlength=_CASES)
        self._pasts[self._slots, layer] = ((pasts << 1) & (_PASTS - 1)) | used.astype(np.uint8)
        rate = self._rate[layer]
        rate += _FADE * (used.mean(0) - rate)
        self._classes[layer] = self._classes_of(rate)

    def _classes_of(self, rate: Array) -> Array:
        """Return the first case of each expert's class, int64, in the shape of its rate."""
        classes = np.log2(np.maximum(rate / self._lowest, 1)).astype(np.int64)
        first: Array = np.minimum(classes, _CLASSES - 1) * _PASTS
        return first

    def _guess(self, layer: int, rows: slice | list[int]) -> Array:
        rates = np.minimum(self._used[layer] / self._seen[layer], 1)
        cases = self._pasts[self._slots[rows], layer] + self._classes[layer]
        guess: Array = rates.take(cases)
        return guess

    def state(self) -> dict[str, Array]:
        rate_of_case = np.minimum(self._used / self._seen, 1)
        return {"rate": self._rate.copy(), "rate_of_case": rate_of_case}


def build(
    shape: PredictorShape,
    state: Mapping[str, Array] | None = None,
    gates: Gates | None = None,
) -> Predictor:
    """Make the predictor; `gates` is not used."""
    return PreviousToken(shape, state)
