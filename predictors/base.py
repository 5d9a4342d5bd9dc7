"""What a predictor says: how likely each expert is to be used when a step reaches its layer."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar, Literal

import numpy as np

from moe_serve.errors import TraceError

Array = np.ndarray[Any, Any]
Need = Literal["token_ids", "hidden", "gates"]
START = -1  # the layer of a step's first observation, before any expert was chosen


@dataclass(frozen=True, kw_only=True, slots=True)
class PredictorShape:
    """A model's MoE layers, numbered from 0 whatever lies between them."""

    num_layers: int
    num_experts: int
    top_k: int


@dataclass(frozen=True, kw_only=True, slots=True)
class Gates:
    """A model's routers, as far as a guess needs them: one entry per MoE layer.

    router_weights: float32 [num_experts, hidden_size] each. norm_weights: float32 [hidden_size]
    each, of the RMS norm before the router; norm_eps: its epsilon. score: what the router makes of
    its logits, "softmax" or "sigmoid". router_biases: float32 [num_experts] each, added to the
    logits; selection_biases: alike, added to the scores for the choice alone; or None.
    """

    router_weights: Sequence[Array]
    norm_weights: Sequence[Array]
    norm_eps: float
    score: Literal["softmax", "sigmoid"] = "softmax"
    router_biases: Sequence[Array] | None = None
    selection_biases: Sequence[Array] | None = None


@dataclass(frozen=True, kw_only=True, slots=True)
class Observation:
    """What one event showed: the experts that a step's tokens chose in one layer.

    layer: START (-1) at the beginning of every step, with no experts (top_k 0), then 0, 1, ... in
        order; a predictor may rely on the first but must bear a layer that is left out.
    expert_ids: int64 [num_tokens, top_k], heaviest first; weights: float32, alike.
    sequence_ids: int64 [num_tokens], names that a sequence keeps from step to step and that no
        other ever had; rows of one sequence lie together, in the order of its tokens.
    token_ids: int64 [num_tokens], the tokens that the step runs on, or None where not known.
    hidden: float32 [num_tokens, hidden_size], the residual stream that entered the layer's router
        norm, or None.
    """

    layer: int
    expert_ids: Array
    weights: Array
    sequence_ids: Array
    token_ids: Array | None = None
    hidden: Array | None = None


class Predictor(ABC):
    """Guesses from what was observed; learns while it runs; sees no future.

    Every file of this folder has `build(shape, state, gates)`: a state is what an earlier run
    learned, and only a start that counts less than what is seen now; TraceError where its shape is
    another. needs: which optional fields of an observation it cannot do without ("gates": it is
    built with the model's routers). What it holds is bounded: sequences end without notice, so that
    state per sequence must be dropped by age.
    """

    needs: ClassVar[frozenset[Need]] = frozenset()

    @abstractmethod
    def observe(self, observation: Observation) -> None:
        """Take note of one event, and learn from it."""

    @abstractmethod
    def predict(self, layer: int, sequence_ids: Sequence[int]) -> Array:
        """Return float32 [num_experts]: the probability that the step's event uses each expert.

        layer: one that this step has not reached yet. sequence_ids: the distinct sequences of the
        step; the event is the union over them. Each probability is for one token a sequence.
        """

    def predict_layers(self, layers: list[int], sequence_ids: Sequence[int]) -> Array:
        """Return `predict` of some layers, in rising order, float32 [num_layers, num_experts]."""
        return np.stack([self.predict(layer, sequence_ids) for layer in layers])

    def state(self) -> dict[str, Array]:
        """Return what a later run may start from, as arrays that safetensors can hold."""
        return {}


def union(probabilities: Array) -> Array:
    """Return float32 [..., num_experts] that any of the sequences uses an expert.

    They are taken for independent.

    probabilities: float32 [num_sequences, ..., num_experts].
    """
    any_of: Array = probabilities[0]
    if len(probabilities) > 1:
        any_of = 1 - np.multiply.reduce(1 - probabilities, axis=0)
    return any_of


def start_of(state: Mapping[str, Array], name: str, shape: tuple[int, ...]) -> Array:
    """Return an array of a trained state as float32.

    Raises TraceError where it is missing, of another shape, or not finite.
    """
    if name not in state:
        raise TraceError(f"the predictor's file has no {name}: train one for this predictor")
    array = state[name]
    if array.shape != shape:
        raise TraceError(
            f"{name} in the predictor's file is {list(array.shape)}, but this model needs "
            f"{list(shape)}: train one for this model"
        )
    if not np.issubdtype(array.dtype, np.number) or not np.isfinite(array).all():
        raise TraceError(f"{name} in the predictor's file has values that are no finite numbers")
    return array.astype(np.float32)


def given(values: Array | None, need: Need, predictor: str) -> Array:
    """Return an optional field of an observation, or raise TraceError that names it."""
    if values is None:
        raise TraceError(f"{predictor} needs {need}, which this trace or model does not give")
    return values
