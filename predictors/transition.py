"""From expert to expert: what followed the experts of a layer, one to six layers further.

Counts per target layer, distance, source expert and target expert; the guess is the average of what
the sources' rows say. Before a step's first layer the sources are what the sequence's last token
used in the target layer: distance 0 of the table.
"""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np

from moe_serve.predictors._sequences import SequencePredictor
from moe_serve.predictors.base import (
    START,
    Array,
    Gates,
    Observation,
    Predictor,
    PredictorShape,
    start_of,
)

_FURTHEST = 6
_MOST = 512.0  # that a source's count rises to: older uses then fade
_STATE_MOST = 16.0  # and that a trained state starts with
_PRIOR = 2.0  # uses of a source that the average of all sources counts for


class Transition(SequencePredictor):
    """Fading counts, and what each sequence's last token used."""

    def __init__(self, shape: PredictorShape, state: Mapping[str, Array] | None) -> None:
        super().__init__(shape)
        layers, experts, top_k = shape.num_layers, shape.num_experts, shape.top_k
        # rows (target layer, distance, source expert), and a last one for a source not known
        size = (layers * (_FURTHEST + 1) * experts, experts)
        self._pad = size[0]
        self._used = np.zeros((size[0] + 1, experts), np.float32)
        self._seen = np.zeros((size[0] + 1, 1), np.float32)
        self._rate = np.full((layers, experts), top_k / experts, np.float32)
        if state is not None:
            self._rate = np.clip(start_of(state, "rate", self._rate.shape), 0, 1)
            seen = start_of(state, "seen", (size[0], 1))
            share = np.minimum(1, _STATE_MOST / np.maximum(seen, 1))
            self._used[: self._pad] = start_of(state, "used", size) * share
            self._seen[: self._pad] = seen * share
        self._past = np.full((self._known.capacity, layers, top_k), -1, np.int64)
        self._now = np.zeros((0, layers, top_k), np.int64)
        self._is_seen = np.zeros(layers, bool)
        self._from = np.arange(_FURTHEST + 1)[:, None, None] * experts

    def _begin(self, observation: Observation) -> None:
        for slot, is_new in zip(self._slots, self._is_new, strict=True):
            if is_new:
                self._past[slot] = -1
        self._now = np.zeros((len(self._slots), *self._past.shape[1:]), np.int64)
        self._is_seen[:] = False

    def _see(self, layer: int, ids: Array, observation: Observation) -> None:
        experts = self._shape.num_experts
        self._now[:, layer] = ids
        self._is_seen[layer] = True
        nearest = min(layer, _FURTHEST)
        for row, slot in enumerate(self._slots):
            sources = np.empty((nearest + 1, ids.shape[1]), np.int64)
            sources[0] = self._past[slot, layer]
            sources[1:] = self._now[row, layer - nearest : layer][::-1]
            is_known = sources[:, 0] >= 0
            is_known[1:] &= self._is_seen[layer - nearest : layer][::-1]
            first = layer * (_FURTHEST + 1) * experts
            rows = (sources + first + self._from[: nearest + 1, 0])[is_known].ravel()
            self._count(rows, ids[row])
            self._past[slot, layer] = ids[row]
        rate = self._rate[layer]
        rate *= np.float32(1 - 1 / 1024)
        rate += np.bincount(ids.ravel(), minlength=experts) / np.float32(1024 * len(ids))

    def _count(self, rows: Array, ids: Array) -> None:
        """Count one use of each source's row, int64 [n], and that experts `ids` followed."""
        seen = self._seen.take(rows)
        if len(seen) and seen.max() >= _MOST:
            self._used[rows[seen >= _MOST]] *= np.float32(0.5)
            self._seen[rows[seen >= _MOST]] *= np.float32(0.5)
        self._used[rows[:, None], ids] += 1
        self._seen[rows] += 1

    def _guess(self, layer: int, rows: slice | list[int]) -> Array:
        experts = self._shape.num_experts
        distance = layer - self._layer
        if self._layer == START or distance > _FURTHEST:
            distance = 0
            sources = self._past[self._slots[rows], layer]
        else:
            sources = self._now[rows, self._layer]
        index = sources + (layer * (_FURTHEST + 1) + distance) * experts
        if distance == 0:
            index[sources < 0] = self._pad
        prior = np.float32(_PRIOR)
        used = self._used.take(index, axis=0)  # [num_sequences, top_k, num_experts]
        used += prior * self._rate[layer]
        used /= self._seen.take(index, axis=0) + prior
        guess: Array = np.minimum(np.add.reduce(used, axis=1) / sources.shape[1], 1)
        return guess

    def state(self) -> dict[str, Array]:
        return {
            "rate": self._rate.copy(),
            "used": self._used[: self._pad].copy(),
            "seen": self._seen[: self._pad].copy(),
        }


def build(
    shape: PredictorShape,
    state: Mapping[str, Array] | None = None,
    gates: Gates | None = None,
) -> Predictor:
    """Make the predictor; `gates` is not used."""
    return Transition(shape, state)
