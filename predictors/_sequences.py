"""What predictors share that keep something for each sequence: bounded, the oldest dropped."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Sequence
from typing import Any

import numpy as np

from moe_serve.predictors.base import START, Observation, Predictor, PredictorShape, union

Array = np.ndarray[Any, Any]
MAX_SEQUENCES = 512  # held by a predictor, running or not
MAX_PREDICTED = 32  # sequences of a step that are predicted; the others are taken to be like them


class Slots:
    """A slot for each of the names that were seen last."""

    def __init__(self, capacity: int) -> None:
        self.capacity = capacity
        self._slot_of: dict[int, int] = {}  # the name seen longest ago first

    def __len__(self) -> int:
        return len(self._slot_of)

    def find(self, name: int) -> int | None:
        """Return a name's slot, or None where it has none."""
        return self._slot_of.get(name)

    def take(self, name: int) -> tuple[int, bool]:
        """Return a name's slot, and whether it is new; the name is the most recent one now.

        A new slot is that of the name seen longest ago where all are taken.
        """
        slots = self._slot_of
        slot = slots.pop(name, None)
        is_new = slot is None
        if slot is None:
            slot = slots.pop(next(iter(slots))) if len(slots) == self.capacity else len(slots)
        slots[name] = slot
        return slot, is_new


class SequencePredictor(Predictor):
    """A predictor that looks at the last token of each sequence of a step.

    Subclasses give `_begin`, `_see` and `_guess`. Of a step with more than MAX_PREDICTED sequences
    only the first are looked at.
    """

    def __init__(self, shape: PredictorShape) -> None:
        self._shape = shape
        self._known = Slots(MAX_SEQUENCES)
        self._layer = START  # observed last
        self._names: list[int] = []  # sequences of the running step
        self._row_of: dict[int, int] = {}
        self._rows = _FIRST  # of an observation: each sequence's last token
        self._slots = np.zeros(0, np.int64)  # of the sequences of the step
        self._is_new: list[bool] = []

    def observe(self, observation: Observation) -> None:
        layer, ids = observation.layer, observation.expert_ids
        if layer == START:
            self._rows = last_rows(observation.sequence_ids)[:MAX_PREDICTED]
            self._names = observation.sequence_ids[self._rows].tolist()
            self._row_of = {name: row for row, name in enumerate(self._names)}
            taken = [self._known.take(name) for name in self._names]
            self._slots = np.array([slot for slot, _ in taken], np.int64)
            self._is_new = [is_new for _, is_new in taken]
            self._layer = START
            self._begin(observation)
            return
        if len(ids) != len(self._rows):
            ids = ids[self._rows]
        self._layer = layer
        self._see(layer, ids, observation)

    def predict(self, layer: int, sequence_ids: Sequence[int]) -> Array:
        first: Array = self.predict_layers([layer], sequence_ids)[0]
        return first

    def predict_layers(self, layers: list[int], sequence_ids: Sequence[int]) -> Array:
        names = list(sequence_ids)
        rows: slice | list[int] = slice(None)
        if names != self._names:
            rows = [self._row_of[name] for name in names if name in self._row_of]
        guess = union(self._guesses_of(layers, rows))
        num_known = len(self._names) if isinstance(rows, slice) else len(rows)
        if 0 < num_known < len(names):
            guess = 1 - (1 - guess) ** np.float32(len(names) / num_known)
        return guess

    @abstractmethod
    def _begin(self, observation: Observation) -> None:
        """Begin a step; `_slots` and `_is_new` are of its sequences, `_rows` their last tokens."""

    @abstractmethod
    def _see(self, layer: int, ids: Array, observation: Observation) -> None:
        """Take note of a layer. ids: int64 [num_sequences, top_k], of their last tokens."""

    def _guesses_of(self, layers: list[int], rows: slice | list[int]) -> Array:
        """Return float32 [chosen, num_layers, num_experts], all at once where that pays."""
        return np.stack([self._guess(layer, rows) for layer in layers], axis=1)

    @abstractmethod
    def _guess(self, layer: int, rows: slice | list[int]) -> Array:
        """Return float32 [chosen, num_experts] for these sequences of the step."""


def last_rows(sequence_ids: Array) -> Array:
    """Return the row of each sequence's last token, int64 [num_sequences], in rising order."""
    if len(sequence_ids) == 1:
        return _FIRST
    is_last = np.ones(len(sequence_ids), bool)
    np.not_equal(sequence_ids[1:], sequence_ids[:-1], out=is_last[:-1])
    return np.flatnonzero(is_last)


def uses(ids: Array, num_experts: int) -> Array:
    """Return float32 [num_rows, num_experts], 1 where a row of int64 [num_rows, top_k] has it."""
    is_used = np.zeros((len(ids), num_experts), np.float32)
    np.put_along_axis(is_used, ids, 1, axis=1)
    return is_used


def sigmoid(logits: Array) -> Array:
    """Return 1 / (1 + exp(-logits)), float32; far below 0 it is cut off, not overflown."""
    values = np.maximum(logits, np.float32(-30))
    np.negative(values, out=values)
    np.exp(values, out=values)
    values += 1
    return np.reciprocal(values, out=values)


_FIRST = np.zeros(1, np.int64)
