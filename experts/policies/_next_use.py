"""Regression of when each expert is used next on which experts of its layer were used of late.

The target of expert e after an event is g ** (T - 1), where T is the number of steps to its next
use: 1 if that is the next step, near 0 if it is far off. Ridge regression for each layer on
(1) the latest event, (2) a moving average of events, both over all experts of the layer.

No target has to be waited for. Summed over events, features x target is, for every use of e, the
sum over the events since its last use, weighted by g to the power of their age: the difference of
two values of one decaying sum of features, of now and of e's last use.
"""

from __future__ import annotations

from typing import Any

import numpy as np

Array = np.ndarray[Any, Any]

DISCOUNT = 0.92  # g: half a life is 8 steps
_KEEP = 0.9999  # of the moments, per step: half is forgotten after 7,000 steps
_BOTH_UP_TO = 128  # experts; above, the moving average alone bounds time and memory
_SHRINK_TO_MEAN, _SHRINK_OWN, _SHRINK = 0.02, 0.05, 1e-3  # ridge: of mean moment, of own, constant
_FIRST_SOLVE, _SLOWEST_SOLVE = 8, 64  # events of a layer between solutions
_START_EVENTS = 1000  # at most this many events' weight is given to what an earlier run learned


class NextUseRegression:
    """All layers' regressions, advanced one step at a time.

    contribution: float32 [num_layers, num_experts, num_experts]; row i is what a use of expert i by
    the event in progress adds to each expert's prediction.
    """

    def __init__(self, num_layers: int, num_experts: int) -> None:
        rates = (1.0, 0.1) if num_experts <= _BOTH_UP_TO else (0.15,)
        self._rates = np.array(rates, np.float32)[:, None]
        self._num_features = size = len(rates) * num_experts
        self._num_experts = num_experts
        self._features = np.zeros((num_layers, len(rates), num_experts), np.float32)
        self._weights = np.zeros((num_layers, len(rates), num_experts, num_experts), np.float32)
        self.contribution = np.zeros((num_layers, num_experts, num_experts), np.float32)
        # moments: features x features, and targets x features
        self._gram = np.zeros((num_layers, size, size), np.float32)
        self._cross = np.zeros((num_layers, num_experts, size), np.float32)
        self._trail = np.zeros((num_layers, size), np.float32)  # the decaying sum of features
        self._trail_at_use = np.zeros((num_layers, num_experts, size), np.float32)
        self._step_of_use = np.zeros((num_layers, num_experts), np.int64)
        self._num_steps = 0
        # rows of features that the Gram matrices do not hold yet
        self._waiting = np.zeros((num_layers, _SLOWEST_SOLVE, size), np.float32)
        self._num_waiting = [0] * num_layers
        self._events = 0.0  # how many events' weight the moments have

    def advance(self, layers: Array, experts: Array, used: Array) -> tuple[Array, Array]:
        """Take note of a step, learn from it, and predict.

        layers, experts: int64, the step's uses; used: float32 [num_layers, num_experts], the same.
        Returns float32 [num_layers, num_experts] twice: the prediction after this step, and what
        is left of it when the next event is known, before that event's own `contribution`.
        """
        step = self._num_steps
        trail = self._trail[layers]
        age = (step - self._step_of_use[layers, experts]).astype(np.float32)
        faded = np.float32(DISCOUNT) ** age
        self._cross[layers, experts] += trail - faded[:, None] * self._trail_at_use[layers, experts]
        self._trail_at_use[layers, experts] = trail
        self._step_of_use[layers, experts] = step

        self._features *= 1 - self._rates
        self._features += self._rates * used[:, None, :]
        features = self._features.reshape(len(used), -1)
        self._trail *= np.float32(DISCOUNT)
        self._trail += features
        self._waiting[np.arange(len(used)), self._num_waiting] = features
        self._num_steps += 1
        self._solve_what_is_due()

        parts = np.matmul(self._features[:, :, None, :], self._weights)[:, :, 0, :]
        return parts.sum(axis=1), ((1 - self._rates) * parts).sum(axis=1)

    def _solve_what_is_due(self) -> None:
        interval = min(max(self._num_steps // 8, _FIRST_SOLVE), _SLOWEST_SOLVE)
        self._events = self._events * _KEEP + 1.0
        for layer, num_waiting in enumerate(self._num_waiting):
            self._num_waiting[layer] = num_waiting = num_waiting + 1
            # layers take turns, so that no step has to solve them all
            if num_waiting == _SLOWEST_SOLVE or (self._num_steps + layer) % interval == 0:
                self._solve(layer)

    def _solve(self, layer: int) -> None:
        rows = self._waiting[layer, : self._num_waiting[layer]]
        self._num_waiting[layer] = 0
        kept = np.float32(_KEEP ** len(rows))
        gram, cross = self._gram[layer], self._cross[layer]
        gram *= kept
        gram += rows.T @ rows
        cross *= kept
        moments = gram.diagonal()
        shrink = _SHRINK_TO_MEAN * moments.mean() + _SHRINK_OWN * moments + np.float32(_SHRINK)
        solution = np.linalg.solve(gram + np.diag(shrink), cross.T)
        self._weights[layer] = solution.reshape(self._weights.shape[1:])
        self.contribution[layer] = (self._rates[:, :, None] * self._weights[layer]).sum(axis=0)

    def state(self) -> dict[str, Array]:
        """Return the moments; "events" is how many events' weight they have."""
        return {
            "gram": self._gram.copy(),
            "cross": self._cross.copy(),
            "events": np.array(self._events),
        }

    def start_from(self, gram: Array, cross: Array, events: float) -> None:
        """Start from another run's moments, weighing as much as a thousand events at most."""
        share = np.float32(min(1.0, _START_EVENTS / max(events, 1.0)))
        self._gram[:] = gram * share
        self._cross[:] = cross * share
        self._events = events * float(share)
        for layer in range(len(gram)):
            self._solve(layer)
