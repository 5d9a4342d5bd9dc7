"""The truth: for studies, to see what the best guess could save. It is given the future."""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np

from moe_serve.errors import ConfigError, TraceError
from moe_serve.predictors._sequences import SequencePredictor, uses
from moe_serve.predictors.base import Array, Gates, Observation, Predictor, PredictorShape

_FIELDS = ("ids", "sequence_ids")


class Oracle(SequencePredictor):
    """The tokens of every sequence in their order, and how far each sequence is."""

    def __init__(self, shape: PredictorShape, state: Mapping[str, Array] | None) -> None:
        """state: ids, int [num_tokens, num_layers, top_k], and sequence_ids, int [num_tokens]."""
        super().__init__(shape)
        if state is None:
            raise ConfigError(
                "predictor oracle knows the future: it is for `simulate` only; serve with another"
            )
        if any(name not in state for name in _FIELDS):
            raise TraceError(f"oracle needs the future in its state: {', '.join(_FIELDS)}")
        self._ids, names = state["ids"], state["sequence_ids"]
        size = (len(names), shape.num_layers, shape.top_k)
        if self._ids.shape != size:
            raise TraceError(
                f"ids in the oracle's state are {list(self._ids.shape)}, but this model needs "
                f"{list(size)}"
            )
        self._tokens_of = {int(name): np.flatnonzero(names == name) for name in np.unique(names)}
        self._position: dict[int, int] = {}
        self._used = np.zeros((0, shape.num_layers, shape.num_experts), np.float32)

    def _begin(self, observation: Observation) -> None:
        names, counts = np.unique(observation.sequence_ids, return_counts=True)
        num_tokens = dict(zip(names.tolist(), counts.tolist(), strict=True))
        self._used = np.zeros(
            (len(self._names), self._shape.num_layers, self._shape.num_experts), np.float32
        )
        for row, name in enumerate(self._names):
            first = self._position.get(name, 0)
            self._position[name] = last = first + num_tokens[name]
            for token in self._tokens_of.get(name, ())[first:last]:
                used = uses(self._ids[token].astype(np.int64), self._shape.num_experts)
                np.maximum(self._used[row], used, out=self._used[row])

    def _see(self, layer: int, ids: Array, observation: Observation) -> None:
        pass

    def _guess(self, layer: int, rows: slice | list[int]) -> Array:
        return self._used[rows, layer]


def build(
    shape: PredictorShape,
    state: Mapping[str, Array] | None = None,
    gates: Gates | None = None,
) -> Predictor:
    """Make the predictor; `gates` is not used. Raises TraceError for a state without a future."""
    return Oracle(shape, state)
