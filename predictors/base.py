"""What a predictor says: how likely each expert is to be used when a step reaches its layer."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, ClassVar, Literal

import numpy as np

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

    needs: which optional fields of an observation it cannot do without ("gates": it is built with
    the model's routers). What it holds is bounded: sequences end without notice, so that state per
    sequence must be dropped by age.
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

    def state(self) -> dict[str, Array]:
        """Return what a later run may start from, as arrays that safetensors can hold."""
        return {}
