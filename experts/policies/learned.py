"""Learned: the expert whose next use is predicted to be furthest away, by regression as it runs.

Two stages. The first regresses, in each layer, the nearness of each expert's next use on which
experts of the layer were used of late (`_next_use`). The second weighs that prediction against
what is known of the expert itself: moving averages of its use, its frequency, its recency. It has
one set of weights for all experts and layers, and as it only sees predictions that were made
before the truth, it puts little weight on the first stage while that is worth little: at a cold
start, or when another run's state does not fit. All of it learns at every step.

What is not proportional to the misses is done once a step for all layers, since numpy's cost is
that of the call.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from moe_serve.errors import TraceError
from moe_serve.experts.policies._next_use import DISCOUNT, NextUseRegression
from moe_serve.experts.policies.base import CacheShape, EvictionPolicy

Array = np.ndarray[Any, Any]

_RATES = np.array([0.5, 0.2, 0.08, 0.03, 0.01], np.float32)  # of the moving averages of use
_FREQUENCY, _RECENCY, _BOTH, _REGRESSION, _ONE = range(len(_RATES), len(_RATES) + 5)
_NUM_FEATURES = _ONE + 1
_KEEP = 0.999  # of the second stage's moments, per step
_SOLVE_EVERY = 8  # steps
_START_STEPS = 20.0  # the weight of the weights below, or of another run's, in steps
_LARGEST_REGRESSION = 256  # experts a layer; above, its matrices would take hundreds of megabytes


class Learned(EvictionPolicy):
    """Keeps the features of all experts, and for each the score that it has if it is not used.

    A step is learned from when the next one begins.
    """

    def __init__(self, shape: CacheShape) -> None:
        num_layers, num_experts = shape.num_layers, shape.num_experts
        self._regression = (
            NextUseRegression(num_layers, num_experts)
            if num_experts <= _LARGEST_REGRESSION
            else None
        )
        self._features = np.zeros((_NUM_FEATURES, num_layers, num_experts), np.float32)
        self._features[_ONE] = 1.0
        self._counts = np.zeros((num_layers, num_experts), np.float32)
        self._step_of_use = np.full((num_layers, num_experts), -_SOLVE_EVERY, np.int64)
        # as in `_next_use`: the decaying sum of features since each expert's last use
        self._trail = np.zeros((num_layers, num_experts, _NUM_FEATURES), np.float32)
        self._weights = np.zeros(_NUM_FEATURES, np.float32)
        self._weights[: len(_RATES)] = 0.05, 0.1, 0.3, 0.3, 0.3
        self._gram = np.eye(_NUM_FEATURES) * _START_STEPS
        self._cross = self._gram @ self._weights
        self._outer_steps = 0.0
        self._num_steps = 0
        self._scores = np.zeros((num_layers, num_experts), np.float32)
        self._row_layer = -1
        self._row_scores: Array = self._scores[0]  # of that layer, as of the latest event
        # the step in progress
        self._step = -1
        self._unions: list[Sequence[int]] = [()] * num_layers
        self._layers: list[int] = []
        self._experts: list[int] = []

    @property
    def is_selective(self) -> bool:
        return True

    def touch(self, step: int, layer: int, expert_ids: Sequence[int]) -> None:
        if step != self._step:
            if self._experts:
                self._end_step()
            self._step = step
        self._unions[layer] = expert_ids
        self._row_layer = -1
        self._layers += [layer] * len(expert_ids)
        self._experts += expert_ids

    def scores(self, layer: int, expert_ids: Sequence[int]) -> list[float]:
        scores: list[float] = self._row(layer)[list(expert_ids)].tolist()
        return scores

    def victims(self, layer: int, candidates: Sequence[int], count: int) -> list[int]:
        scores = self._row(layer)[list(candidates)]
        if count == 1:
            return [candidates[int(scores.argmin())]]
        return [candidates[index] for index in scores.argsort(kind="stable")[:count].tolist()]

    def _row(self, layer: int) -> Array:
        """Return the layer's scores with what this step used there, float32 [num_experts]."""
        if layer == self._row_layer:
            return self._row_scores
        union = self._unions[layer]
        row: Array = self._scores[layer].copy()
        if union:
            if self._regression is not None:
                added = self._regression.contribution[layer].take(union, axis=0).sum(axis=0)
                row += self._weights[_REGRESSION] * added
            row[union] += self._use_bonus
        self._row_layer, self._row_scores = layer, row
        return row

    @property
    def _use_bonus(self) -> np.float32:
        """What a use adds to an expert's own score, but for its frequency and earlier recency."""
        return np.float32(self._weights[: len(_RATES)] @ _RATES + self._weights[_RECENCY] / 2)

    def _end_step(self) -> None:
        """Learn from the step that has ended, and score every expert for the next."""
        layers = np.array(self._layers, np.int64)
        experts = np.array(self._experts, np.int64)
        self._layers, self._experts = [], []
        self._unions = [()] * len(self._unions)
        used = np.zeros(self._counts.shape, np.float32)
        used[layers, experts] = 1.0

        self._cross += self._trail[layers, experts].sum(axis=0, dtype=np.float64)
        self._trail[layers, experts] = 0.0
        self._counts += used
        self._step_of_use[layers, experts] = self._num_steps

        features, averages = self._features, self._features[: len(_RATES)]
        rates = _RATES[:, None, None]
        averages *= 1 - rates
        averages += rates * used
        self._num_steps += 1
        features[_FREQUENCY] = self._counts / self._num_steps
        features[_RECENCY] = 1.0 / (self._num_steps - self._step_of_use)
        features[_BOTH] = features[_FREQUENCY] * features[_RECENCY]
        left = None
        if self._regression is not None:
            features[_REGRESSION], left = self._regression.advance(layers, experts, used)

        flat = features.reshape(_NUM_FEATURES, -1)
        self._gram += flat @ flat.T
        self._gram *= _KEEP
        self._cross *= _KEEP
        self._outer_steps = (self._outer_steps + 1.0) * _KEEP
        self._trail *= np.float32(DISCOUNT)
        self._trail += features.transpose(1, 2, 0)
        if self._num_steps % _SOLVE_EVERY == 0:
            self._solve()
        self._score(left)

    def _solve(self) -> None:
        gram = self._gram + 1e-3 * np.eye(_NUM_FEATURES)
        self._weights = np.linalg.solve(gram, self._cross).astype(np.float32)

    def _score(self, left: Array | None) -> None:
        """Score every expert for the next step, as if that did not use it."""
        weights = self._weights
        frequency = self._features[_FREQUENCY]
        recency = 1.0 / (self._num_steps + 1 - self._step_of_use)
        self._scores = np.tensordot(
            weights[: len(_RATES)] * (1 - _RATES), self._features[: len(_RATES)], 1
        )
        self._scores += weights[_FREQUENCY] * frequency
        self._scores += (weights[_RECENCY] + weights[_BOTH] * frequency) * recency
        if left is not None:
            self._scores += weights[_REGRESSION] * left

    def state(self) -> dict[str, Array]:
        """Return both stages' moments; about 2.6 MB for 26 layers of 64 experts."""
        inner = {} if self._regression is None else self._regression.state()
        return {
            **inner,
            "outer_gram": self._gram.copy(),
            "outer_cross": self._cross.copy(),
            "outer_steps": np.array(self._outer_steps),
        }

    def start_from(self, state: Mapping[str, Array]) -> None:
        """Start from what another run learned, with little weight: its task may be another.

        Raises TraceError for a state of another shape.
        """
        expected = self.state()
        for name, own in expected.items():
            given = state.get(name)
            if given is None or given.shape != own.shape:
                raise TraceError(
                    f"the state of policy learned has {name} "
                    f"{'missing' if given is None else list(given.shape)}; this model needs "
                    f"{list(own.shape)}: it is of another model, or another kind of file"
                )
        if self._regression is not None:
            self._regression.start_from(state["gram"], state["cross"], float(state["events"]))
        share = min(1.0, _START_STEPS / max(float(state["outer_steps"]), 1.0))
        self._gram = state["outer_gram"] * share + np.eye(_NUM_FEATURES)
        self._cross = state["outer_cross"] * share
        self._solve()


def build(shape: CacheShape, state: Mapping[str, Array] | None = None) -> Learned:
    """Make the policy; state: what `state` returned in an earlier run of the same model."""
    policy = Learned(shape)
    if state:
        policy.start_from(state)
    return policy
