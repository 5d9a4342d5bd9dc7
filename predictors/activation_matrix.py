"""MoE-Infinity's expert activation matrices: a new sequence is taken to be like a past one.

A sequence's matrix (EAM) counts how often its tokens used each expert of each layer; a collection
(EAMC) keeps those of past sequences (Xue et al., arXiv 2401.14361). The guess is the sequence's own
rate, filled up with those of the members of the collection that are most like it, by the mean over
layers of the cosine of rows. What the released code gets wrong is mended: it compares rows of
layers that are still to come, which are empty in a sequence's first pass. Here a first token is
compared by the layers that it has passed, and later ones by all that the sequence used. A full
collection loses the older one of its closest pair, not the least matched one. When matches get
worse (drift), the members that were not matched of late are dropped.

How far ahead a layer is does not change a probability; it is for the prefetcher to put near layers
first.
"""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np

from moe_serve.errors import TraceError
from moe_serve.predictors._sequences import SequencePredictor, uses
from moe_serve.predictors.base import (
    Array,
    Gates,
    Observation,
    Predictor,
    PredictorShape,
    start_of,
)

_MEMBERS = 96
_SHARPNESS = 24.0  # of the choice among members: exp(this times the cosine)
_PRIOR_TOKENS = np.float32(6)  # that the collection's guess counts for beside a sequence's own rate
_KEEP = np.float32(1 - 1 / 128)  # of a sequence's counts, at each of its tokens
_ENDED_STEPS = 16  # a sequence not seen for so long has ended
_LEAST_TOKENS = 4  # of a sequence that is worth keeping
_RECENT_STEPS = 256  # what "of late" means for a match
_DRIFT = 0.9  # recent matches below this share of the usual ones
_FADE = np.float32(1 / 1024)


class ActivationMatrix(SequencePredictor):
    """The matrices of running sequences, and the collection."""

    def __init__(self, shape: PredictorShape, state: Mapping[str, Array] | None) -> None:
        super().__init__(shape)
        size = (shape.num_layers, shape.num_experts)
        self._rate = np.full(size, shape.top_k / shape.num_experts, np.float32)
        self._counts = np.zeros((self._known.capacity, *size), np.float32)
        self._tokens = np.zeros((self._known.capacity, shape.num_layers), np.float32)
        self._members = np.zeros((_MEMBERS, *size), np.float32)  # uses per token
        self._units = np.zeros((_MEMBERS, *size), np.float32)  # rows of length 1
        self._matched = np.zeros(_MEMBERS, np.int64)  # the step of a member's last match
        self._num_members = 0
        self._open: dict[int, int] = {}  # running sequences and their last step, oldest first
        self._step = 0
        self._recent = self._usual = 0.0  # similarity of matches
        self._likeness = np.zeros((0, _MEMBERS), np.float32)  # of the step's sequences
        self._is_first: list[bool] = []
        if state is not None:
            self._start(state, size)

    def _start(self, state: Mapping[str, Array], size: tuple[int, int]) -> None:
        self._rate = np.clip(start_of(state, "rate", size), 0, 1)
        if "members" not in state or state["members"].ndim != 3:
            raise TraceError(f"members in the predictor's file must be [members, {size}]")
        count = len(state["members"])
        for member in start_of(state, "members", (count, *size))[-_MEMBERS:]:
            self._set(self._num_members, np.clip(member, 0, 1))
            self._num_members += 1

    def _begin(self, observation: Observation) -> None:
        self._step += 1
        self._close_ended()
        self._likeness = np.zeros((len(self._names), _MEMBERS), np.float32)
        self._is_first = []
        for row, (name, slot) in enumerate(zip(self._names, self._slots.tolist(), strict=True)):
            if self._is_new[row]:
                self._counts[slot] = 0
                self._tokens[slot] = 0
            self._open.pop(name, None)
            self._open[name] = self._step
            is_first = not self._tokens[slot].any()
            self._is_first.append(is_first)
            if not is_first and self._num_members:
                self._match(row, slot)

    def _match(self, row: int, slot: int) -> None:
        """Compare a sequence's matrix with all members, and watch for drift."""
        unit = _unit_rows(self._counts[slot]).ravel()
        count = self._num_members
        likeness = self._units[:count].reshape(count, -1) @ unit / self._shape.num_layers
        self._likeness[row, :count] = likeness
        best = int(likeness.argmax())
        self._matched[best] = self._step
        similarity = float(likeness[best])
        self._recent += (similarity - self._recent) / 32
        self._usual += (similarity - self._usual) / 512
        if self._recent < _DRIFT * self._usual:
            self._drop_unmatched()

    def _see(self, layer: int, ids: Array, observation: Observation) -> None:
        used = uses(ids, self._shape.num_experts)
        self._counts[self._slots, layer] = self._counts[self._slots, layer] * _KEEP + used
        self._tokens[self._slots, layer] = self._tokens[self._slots, layer] * _KEEP + 1
        self._rate[layer] += _FADE * (used.mean(0) - self._rate[layer])
        scale = np.float32(ids.shape[1] ** -0.5)
        for row, is_first in enumerate(self._is_first):
            if is_first:
                common = self._units[:, layer].take(ids[row], axis=1).sum(1) * scale
                self._likeness[row] += (common - self._likeness[row]) / (layer + 1)

    def _guess(self, layer: int, rows: slice | list[int]) -> Array:
        slots = self._slots[rows]
        own = self._counts[slots, layer]
        tokens = self._tokens[slots, layer, None]
        count = self._num_members
        if count == 0:
            prior = self._rate[layer]
        else:
            likeness = self._likeness[rows, :count]
            weights = np.exp(np.float32(_SHARPNESS) * (likeness - likeness.max(1, keepdims=True)))
            prior = weights @ self._members[:count, layer] / weights.sum(1, keepdims=True)
        guess: Array = (own + _PRIOR_TOKENS * prior) / (tokens + _PRIOR_TOKENS)
        return np.minimum(guess, 1, out=guess)

    # -- the collection ----------------------------------------------------------------------------

    def _close_ended(self) -> None:
        """Take the matrices of sequences that have ended into the collection."""
        while self._open:
            name, last = next(iter(self._open.items()))
            if self._step - last <= _ENDED_STEPS:
                return
            del self._open[name]
            slot = self._known.find(name)
            if slot is not None and self._tokens[slot].min() >= _LEAST_TOKENS:
                self._keep(self._counts[slot] / self._tokens[slot][:, None])

    def _keep(self, member: Array) -> None:
        if self._num_members < _MEMBERS:
            place = self._num_members
            self._num_members += 1
        else:
            flat = self._units.reshape(_MEMBERS, -1)
            alike = flat @ flat.T
            np.fill_diagonal(alike, -1)
            pair = divmod(int(alike.argmax()), _MEMBERS)
            place = min(pair, key=lambda index: int(self._matched[index]))
        self._set(place, member)

    def _set(self, place: int, member: Array) -> None:
        self._members[place] = member
        self._units[place] = _unit_rows(member)
        self._matched[place] = self._step

    def _drop_unmatched(self) -> None:
        """Rebuild: keep the members that were matched of late."""
        kept = np.flatnonzero(self._matched[: self._num_members] > self._step - _RECENT_STEPS)
        self._num_members = len(kept)
        for array in (self._members, self._units, self._matched):
            array[: len(kept)] = array[kept]
            array[len(kept) :] = 0
        self._likeness[:] = 0
        self._usual = self._recent

    def state(self) -> dict[str, Array]:
        return {"rate": self._rate.copy(), "members": self._members[: self._num_members].copy()}


def _unit_rows(matrix: Array) -> Array:
    """Scale the rows of [num_layers, num_experts] to length 1; rows of zeros stay so."""
    length = np.sqrt(np.einsum("le,le->l", matrix, matrix))
    unit: Array = matrix / np.maximum(length, np.float32(1e-9))[:, None]
    return unit


def build(
    shape: PredictorShape,
    state: Mapping[str, Array] | None = None,
    gates: Gates | None = None,
) -> Predictor:
    """Make the predictor; `gates` is not used."""
    return ActivationMatrix(shape, state)
