"""Belady's optimum with forced admission: the expert whose next use is furthest away goes.

Only for replay, where the future is known; `future` reads it off a trace. The bound that may also
let a missed expert pass by without a slot is no policy: see `moe_serve.study.replay`.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from moe_serve.errors import ConfigError
from moe_serve.experts.policies.base import CacheShape, EvictionPolicy

Array = np.ndarray[Any, Any]
NEVER = 2**40  # steps


def future(ids: Array, step_of_token: Array, num_experts: int) -> dict[str, Array]:
    """Return the state from which `build` makes the policy for the replay of these tokens.

    ids: [num_tokens, num_layers, top_k]; step_of_token: int64 [num_tokens].
    Returns "steps", int64: for each expert of each layer in turn the steps that use it, rising; and
    "offsets", int64 [num_layers * num_experts + 1]: where those of each begin.
    """
    num_steps = int(step_of_token.max()) + 1 if len(step_of_token) else 1
    steps, counts = [], []
    for layer in range(ids.shape[1]):
        uses = ids[:, layer].astype(np.int64) * num_steps + step_of_token[:, None]
        uses = np.unique(uses)
        counts.append(np.bincount(uses // num_steps, minlength=num_experts))
        steps.append(uses % num_steps)
    offsets = np.concatenate([[0], *counts]).cumsum()
    return {"steps": np.concatenate(steps), "offsets": offsets}


class Belady(EvictionPolicy):
    """Keeps the next use of each expert: its step and, within it, the layer's turn."""

    def __init__(self, shape: CacheShape, steps: Array, offsets: Array) -> None:
        self._num_layers = shape.num_layers
        self._num_experts = shape.num_experts
        self._steps = np.ascontiguousarray(steps, np.int64).data  # faster to index than an array
        self._position: list[int] = offsets[:-1].tolist()  # of each expert's next use
        self._end: list[int] = offsets[1:].tolist()
        self._next_step = [
            self._steps[begin] if begin < end else NEVER
            for begin, end in zip(self._position, self._end, strict=True)
        ]

    def touch(self, step: int, layer: int, expert_ids: Sequence[int]) -> None:
        first = layer * self._num_experts
        for expert in expert_ids:
            index = first + expert
            assert self._next_step[index] == step, "these are not the events that were announced"
            position = self._position[index] = self._position[index] + 1
            is_last = position == self._end[index]
            self._next_step[index] = NEVER if is_last else self._steps[position]

    def scores(self, layer: int, expert_ids: Sequence[int]) -> list[int]:
        first, num_layers, next_step = layer * self._num_experts, self._num_layers, self._next_step
        return [-(next_step[first + expert] * num_layers + layer) for expert in expert_ids]


def build(shape: CacheShape, state: Mapping[str, Array] | None = None) -> Belady:
    """Make the policy for the events that `future` was given. Raises ConfigError without."""
    if state is None or "steps" not in state:
        raise ConfigError(
            "eviction belady knows the future, so it is for `simulate` only; serve with another"
        )
    return Belady(shape, state["steps"], state["offsets"])
