"""What policies and predictors start from in a split: learned once, from the part not measured."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from moe_serve import plugin
from moe_serve.experts.policies.base import CacheShape, EvictionPolicy
from moe_serve.experts.trace import Trace
from moe_serve.study.prediction import trained_state
from moe_serve.study.replay import batched_steps, recorded_steps, replay_steps

Array = np.ndarray[Any, Any]
POLICIES = "moe_serve.experts.policies"


@dataclass(slots=True)
class PolicyStates:
    """States of policies that have seen `learned_from`; None where there is none."""

    learned_from: Trace | None
    _known: dict[tuple[str, int | None], Mapping[str, Array]] = field(default_factory=dict)

    def of(self, name: str, batch: int | None, shape: CacheShape) -> Mapping[str, Array] | None:
        """Return the state; batch: sequences at once, None for the recorded steps."""
        if self.learned_from is None:
            return None
        if (name, batch) not in self._known:
            self._known[name, batch] = learned_state(name, self.learned_from, batch, shape)
        return self._known[name, batch]


@dataclass(slots=True)
class PredictorStates:
    """States of predictors that were trained on `learned_from`; None where there is none."""

    learned_from: Trace | None
    _known: dict[str, Mapping[str, Array]] = field(default_factory=dict)

    def of(self, name: str) -> Mapping[str, Array] | None:
        """Return the state, or None to start from nothing."""
        if self.learned_from is None:
            return None
        if name not in self._known:
            self._known[name] = trained_state(name, self.learned_from)
        return self._known[name] or None


def learned_state(
    name: str, trace: Trace, batch: int | None, shape: CacheShape
) -> Mapping[str, Array]:
    """Return the state of policy `name` after it has seen all of `trace`; {} if it keeps none.

    batch: sequences at once, or None for the recorded steps.
    """
    policy: EvictionPolicy = plugin.load(POLICIES, name).build(shape)
    if not policy.state():
        return {}
    for step in replay_steps(trace, steps_of_batch(trace, batch)):
        for layer, union in enumerate(step.unions):
            policy.touch(step.number, layer, union)
    return policy.state()


def steps_of_batch(trace: Trace, batch: int | None) -> Array:
    """Return each token's step, with `batch` places, or as it was recorded (None)."""
    return recorded_steps(trace) if batch is None else batched_steps(trace, batch)
