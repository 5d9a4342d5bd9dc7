"""The next layers' routers, asked early: on the residual stream that entered this layer's norm.

The residual stream changes little from layer to layer, so that a router's logits on an earlier one
are near those to come (Eliseev and Mazur, arXiv 2312.17238; AdapMoE). An online correction, per
layer and distance one scale and per expert one shift, makes of them probabilities to be among the
top k: logistic, over the logit's height above the middle of the k-th and the next one. At distance
0 the choice is the router's own. It learns from the guesses that it was asked for. Before a step's
first layer there is no hidden state; what the sequence's last tokens used is asked then.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import ClassVar

import numpy as np

from moe_serve.errors import TraceError
from moe_serve.predictors import previous_token
from moe_serve.predictors._sequences import SequencePredictor, sigmoid, uses
from moe_serve.predictors.base import (
    START,
    Array,
    Gates,
    Need,
    Observation,
    Predictor,
    PredictorShape,
    given,
    start_of,
)

_FURTHEST = 6  # distances with a correction of their own; further ones take the last
_FIRST_SLOPE = 2.0  # of the logistic, per standard deviation of the logits
_RATE = 0.1
_STATE_SHARE = 0.5


class GateLookahead(SequencePredictor):
    """Routers with their norms, corrections, and the hidden states that were seen last."""

    needs: ClassVar[frozenset[Need]] = frozenset({"hidden", "gates"})

    def __init__(
        self, shape: PredictorShape, state: Mapping[str, Array] | None, gates: Gates | None
    ) -> None:
        super().__init__(shape)
        if gates is None:
            raise TraceError("gate_lookahead needs gates, which a trace does not give")
        if len(gates.router_weights) != shape.num_layers:
            raise TraceError(
                f"gates of {len(gates.router_weights)} layers for {shape.num_layers} MoE layers"
            )
        self._gates = gates
        # the norm's weight is folded into the router's
        self._routers = [
            np.ascontiguousarray(weight * norm, np.float32)
            for weight, norm in zip(gates.router_weights, gates.norm_weights, strict=True)
        ]
        self._slopes = np.full((shape.num_layers, _FURTHEST + 1), _FIRST_SLOPE, np.float32)
        shifts = (shape.num_layers, _FURTHEST + 1, shape.num_experts)
        self._shifts = np.zeros(shifts, np.float32)
        if state is not None:
            slopes = start_of(state, "slopes", self._slopes.shape)
            self._slopes += _STATE_SHARE * (slopes - self._slopes)
            self._shifts[:] = _STATE_SHARE * start_of(state, "shifts", shifts)
        self._slope_scale = np.ones_like(self._slopes)
        self._shift_scale = np.ones(shifts, np.float32)
        self._before = previous_token.build(shape)
        self._normed = np.zeros((0, 0), np.float32)
        self._asked: dict[tuple[int, int], tuple[Array, Array]] = {}

    def observe(self, observation: Observation) -> None:
        self._before.observe(observation)
        super().observe(observation)

    def scores(self, layer: int, hidden: Array) -> Array:
        """Return what a layer's router would choose by, float32 [num_rows, num_experts].

        hidden: float32 [num_rows, hidden_size], as it enters the norm before the router.
        """
        return self._scores(layer, self._norm(hidden))

    def _begin(self, observation: Observation) -> None:
        self._asked.clear()

    def _see(self, layer: int, ids: Array, observation: Observation) -> None:
        hidden = given(observation.hidden, "hidden", "gate_lookahead")
        if len(hidden) != len(self._rows):
            hidden = hidden[self._rows]
        asked = [distance for target, distance in self._asked if target == layer]
        if asked:
            used = uses(ids, self._shape.num_experts)
            for distance in asked:
                height, guess = self._asked.pop((layer, distance))
                self._learn(layer, distance, height, guess - used)
        self._normed = self._norm(hidden)

    def _norm(self, hidden: Array) -> Array:
        mean_square = np.einsum("rh,rh->r", hidden, hidden) / hidden.shape[1]
        normed = hidden / np.sqrt(mean_square + np.float32(self._gates.norm_eps))[:, None]
        finite: Array = np.nan_to_num(normed, copy=False, posinf=0.0, neginf=0.0)
        return finite

    def _scores(self, layer: int, normed: Array) -> Array:
        scores: Array = normed @ self._routers[layer].T
        if self._gates.router_biases is not None:
            scores += self._gates.router_biases[layer]
        if self._gates.selection_biases is None:
            return scores
        if self._gates.score == "sigmoid":
            scores = sigmoid(scores)
        else:
            scores = np.exp(scores - scores.max(1, keepdims=True))
            scores /= scores.sum(1, keepdims=True)
        return scores + self._gates.selection_biases[layer]

    def _guess(self, layer: int, rows: slice | list[int]) -> Array:
        if self._layer == START:
            names = self._names[rows] if isinstance(rows, slice) else [self._names[r] for r in rows]
            return np.stack([self._before.predict(layer, [name]) for name in names])
        distance = min(layer - self._layer, _FURTHEST)
        scores = self._scores(layer, self._normed[rows])
        top_k, experts = self._shape.top_k, self._shape.num_experts
        middle = np.float32(0)
        if top_k < experts:
            ordered = np.partition(scores, (experts - top_k - 1, experts - top_k), axis=1)
            middle = ordered[:, experts - top_k - 1 : experts - top_k + 1].mean(1, keepdims=True)
        height = scores - middle
        spread = np.sqrt(np.einsum("re,re->r", height, height) / experts)
        height /= np.maximum(spread, np.float32(1e-9))[:, None]
        guess = sigmoid(self._slopes[layer, distance] * height + self._shifts[layer, distance])
        if isinstance(rows, slice):
            self._asked[layer, distance] = height, guess
        return guess

    def _learn(self, layer: int, distance: int, height: Array, error: Array) -> None:
        """Step down the gradient of the logistic loss, AdaGrad's way. Both [num_sequences, E]."""
        shift = error.mean(0)
        scale = self._shift_scale[layer, distance]
        scale += shift * shift
        self._shifts[layer, distance] -= np.float32(_RATE) * shift / np.sqrt(scale)
        slope = (error * height).sum(1).mean()
        self._slope_scale[layer, distance] += slope * slope
        step = np.float32(_RATE) * slope / np.sqrt(self._slope_scale[layer, distance])
        self._slopes[layer, distance] = max(self._slopes[layer, distance] - step, 0.05)

    def state(self) -> dict[str, Array]:
        return {"slopes": self._slopes.copy(), "shifts": self._shifts.copy()}


def build(
    shape: PredictorShape,
    state: Mapping[str, Array] | None = None,
    gates: Gates | None = None,
) -> Predictor:
    """Make the predictor. Raises TraceError without the model's routers."""
    return GateLookahead(shape, state, gates)
