"""What a token id used whenever it came: known before a step's first layer.

Counts per token id, for as many ids as are kept, the one seen longest ago dropped; what is not
seen often is filled up with what all tokens use.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import ClassVar

import numpy as np

from moe_serve.errors import TraceError
from moe_serve.predictors._sequences import SequencePredictor, Slots, uses
from moe_serve.predictors.base import (
    Array,
    Gates,
    Need,
    Observation,
    Predictor,
    PredictorShape,
    given,
    start_of,
)

_KEPT_TOKENS = 8192
_MOST = 31.0  # that a count rises to: older uses then fade
_STATE_MOST = 8.0  # and that a trained state starts with
_PRIOR = 2.0  # tokens that the average of all tokens counts for
_FADE = np.float32(1 / 1024)


class TokenTable(SequencePredictor):
    """Fading counts per token id, and the rate of all tokens."""

    needs: ClassVar[frozenset[Need]] = frozenset({"token_ids"})

    def __init__(self, shape: PredictorShape, state: Mapping[str, Array] | None) -> None:
        super().__init__(shape)
        size = (shape.num_layers, shape.num_experts)
        self._tokens = Slots(_KEPT_TOKENS)
        self._names_of_slots = np.full(_KEPT_TOKENS, -1, np.int64)
        self._rate = np.full(size, shape.top_k / shape.num_experts, np.float32)
        self._used = np.zeros((_KEPT_TOKENS, *size), np.float32)
        self._seen = np.zeros((_KEPT_TOKENS, shape.num_layers), np.float32)
        self._token_slots = np.zeros(0, np.int64)
        if state is not None:
            self._start(state, size)

    def _start(self, state: Mapping[str, Array], size: tuple[int, int]) -> None:
        self._rate = np.clip(start_of(state, "rate", size), 0, 1)
        if "token_ids" not in state or state["token_ids"].ndim != 1:
            raise TraceError("the predictor's file has no list of token_ids")
        token_ids = state["token_ids"].astype(np.int64)[-_KEPT_TOKENS:]
        num_tokens = len(state["token_ids"])
        used = start_of(state, "used", (num_tokens, *size))[-_KEPT_TOKENS:]
        seen = start_of(state, "seen", (num_tokens, size[0]))[-_KEPT_TOKENS:]
        if len(np.unique(token_ids)) != len(token_ids):
            raise TraceError("token_ids in the predictor's file has a token twice")
        share = np.minimum(1, _STATE_MOST / np.maximum(seen, 1))
        for row, token in enumerate(token_ids.tolist()):
            slot, _ = self._tokens.take(token)
            self._names_of_slots[slot] = token
            self._used[slot] = used[row] * share[row, :, None]
            self._seen[slot] = seen[row] * share[row]

    def _begin(self, observation: Observation) -> None:
        token_ids = given(observation.token_ids, "token_ids", "token_table")[self._rows]
        slots = []
        for token in token_ids.tolist():
            slot, is_new = self._tokens.take(token)
            if is_new:
                self._used[slot] = 0
                self._seen[slot] = 0
                self._names_of_slots[slot] = token
            slots.append(slot)
        self._token_slots = np.array(slots, np.int64)

    def _see(self, layer: int, ids: Array, observation: Observation) -> None:
        used = uses(ids, self._shape.num_experts)
        self._rate[layer] += _FADE * (used.mean(0) - self._rate[layer])
        for row, slot in enumerate(self._token_slots):
            if self._seen[slot, layer] >= _MOST:
                fade = np.float32(_MOST / (_MOST + 1))
                self._used[slot, layer] *= fade
                self._seen[slot, layer] *= fade
            self._used[slot, layer] += used[row]
            self._seen[slot, layer] += 1

    def _guess(self, layer: int, rows: slice | list[int]) -> Array:
        slots = self._token_slots[rows]
        used = self._used[slots, layer] + np.float32(_PRIOR) * self._rate[layer]
        seen = self._seen[slots, layer] + np.float32(_PRIOR)
        guess: Array = used / seen[:, None]
        return np.minimum(guess, 1, out=guess)

    def state(self) -> dict[str, Array]:
        slots = np.flatnonzero(self._names_of_slots >= 0)
        return {
            "rate": self._rate.copy(),
            "token_ids": self._names_of_slots[slots],
            "used": self._used[slots],
            "seen": self._seen[slots],
        }


def build(
    shape: PredictorShape,
    state: Mapping[str, Array] | None = None,
    gates: Gates | None = None,
) -> Predictor:
    """Make the predictor; `gates` is not used."""
    return TokenTable(shape, state)
