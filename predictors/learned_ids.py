"""Linear in the expert ids of the past, learned online from nothing.

One logit per layer and expert. Before a step's first layer it is a sum of rows of a table, one row
per id of the context: what the sequence's last two tokens used in the layer, what its last token
used in the model's last two layers, and the token where it is known. When a layer is observed, each
of its experts adds its rows to the 13 layers after it. A guess d layers ahead is thus one sum over
all layers that are at least d behind the target.

It is learned in stages: the context and the layers that are six and more behind by the loss of the
guess six ahead, what the layer d behind adds by the loss of the guess d ahead. So every distance
from one to six is a model of its own, at the price of one. Steps are AdaGrad's with one scale per
row, of the logistic loss (Duchi, Hazan, Singer, JMLR 12, 2011). Where the loss of late is well
above the usual one, the task has changed, or a trained state is of another one: weights are halved,
and steps are as long again as at the beginning. About 13 x top_k x num_experts additions for all
guesses that a layer changes, and twice as many to learn from it.
"""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np
from numpy.lib.stride_tricks import as_strided

from moe_serve.predictors._learned_ids_native import NativeStep, native_for
from moe_serve.predictors._sequences import SequencePredictor, Slots, sigmoid
from moe_serve.predictors.base import (
    START,
    Array,
    Gates,
    Observation,
    Predictor,
    PredictorShape,
    start_of,
)

_REACH = 13  # layers that an observed layer speaks about
_NEAR = 6  # distances with a stage of their own
_RATE = np.float32(0.12)
_FIRST_SCALE = 1.0  # AdaGrad's sum of squares before anything was seen
_LAST_SCALE = 200.0  # and at most, so that it never stops to learn
_STATE_SCALE = 64.0  # at most, of a trained state
# Drift: guesses went wrong for some tens of tokens. On the same task the ratio stayed below 1.4; on
# another one it was 1.7 to 2.8.
_RECENT_TOKENS, _USUAL_TOKENS = 64, 1024
_DRIFT_RATIO = 1.5
_DRIFT_SHARE = 0.5  # of the weights that are kept; more is slow to unlearn
_LEARNED = 2  # sequences of a step that are learned from, by turns
# Once so many steps were learned from and nothing drifts, only one step of three is: learning takes
# half of the time, and the last guesses of a long run lost .01 of their recall by it.
_STEPS_TO_SETTLE, _SETTLED_TURN, _SETTLED_RATIO = 2048, 3, 1.1
_KEPT_TOKENS = 4096  # token ids with rows of their own
_UNKNOWN = -1
_SOURCES = 4  # blocks of context rows: last token, the one before, its last layer, its last but one


class LearnedIds(SequencePredictor):
    """One table of rows, the logits of the running step, and what the last tokens used.

    Rows of the table, float32 [rows, num_experts]: (source layer, expert, distance - 1); then
    (target layer, half, block and expert, or bias), where the halves are for guesses from inside a
    step and for those before its first layer; then zeros for what is not known; then, once there
    are token ids, (kept token, layer, half).
    """

    def __init__(self, shape: PredictorShape, state: Mapping[str, Array] | None) -> None:
        super().__init__(shape)
        layers, experts, top_k = shape.num_layers, shape.num_experts, shape.top_k
        self._reach = max(1, min(_REACH, layers - 1))
        self._near = min(_NEAR, self._reach)
        self._width = _SOURCES * experts + 1
        self._context_begin = layers * experts * self._reach
        self._pad = self._context_begin + layers * 2 * self._width
        self._token_begin = self._pad + self._reach
        self._table = np.zeros((self._token_begin, experts), np.float32)
        self._scale = np.full(self._token_begin, _FIRST_SCALE, np.float32)
        self._tokens = Slots(_KEPT_TOKENS)
        share = min(top_k / experts, 0.999)
        self._prior = np.float32(np.log(share / (1 - share)))
        self._recent = self._usual = 0.0  # losses one layer ahead; 0 before the first
        self._turn = self._num_steps = 0
        past = (self._known.capacity, 2, layers, top_k)
        self._past = np.full(past, _UNKNOWN, np.int32)  # experts of each sequence's last two tokens

        # rows of a context, without what is not an id: [layers, 2 halves, blocks, 1]
        blocks = np.arange(layers * 2).reshape(layers, 2, 1, 1) * self._width + self._context_begin
        self._blocks = blocks + (np.arange(_SOURCES) * experts)[:, None]
        self._biases = blocks[..., 0] + _SOURCES * experts  # [layers, 2, 1]
        self._context_rows = 2 * (_SOURCES * top_k + 1)

        # the running step
        self._used_slots = self._slots
        self._now = np.zeros((0, layers, top_k), np.int32)
        self._logits = np.zeros((0, layers + self._reach, experts), np.float32)
        self._early = np.zeros((0, layers, experts), np.float32)
        self._learned: list[int] = []  # rows of the step
        # and of what is learned from: guesses at each stage, the last before the first layer, and
        # the rows that made them, with views of where a source layer's go
        self._stages = self._near + 1
        num_rows = self._reach * top_k + self._context_rows + 2
        padded = layers + self._reach
        self._guesses = np.zeros((_LEARNED, padded, self._stages, experts), np.float32)
        self._rows_of = np.full((_LEARNED, padded, num_rows), self._pad, np.int64)
        self._guesses_of_source = [
            [_diagonal(guesses, layer + 1, self._near, 1) for layer in range(layers)]
            for guesses in self._guesses
        ]
        self._rows_of_source = [
            [_diagonal(rows, layer + 1, self._reach, top_k) for layer in range(layers)]
            for rows in self._rows_of
        ]
        stages = np.minimum(np.arange(self._reach), self._near - 1).repeat(top_k)
        half = _SOURCES * top_k + 1
        context = np.array([self._near - 1, self._near]).repeat(half)
        self._stage_of_row = np.concatenate([stages, context, [self._near - 1, self._near]])
        self._distances = np.arange(self._reach)[:, None]
        self._native = self._native_step()
        if state is not None:
            self._start(state)

    def _native_step(self) -> NativeStep | None:
        native = native_for(self._shape.top_k, self._stages)
        if native is None:
            return None
        return NativeStep(
            native,
            stage_of_row=self._stage_of_row,
            guesses=self._guesses,
            rows=self._rows_of,
            top_k=self._shape.top_k,
            reach=self._reach,
            pad=self._pad,
            rate=float(_RATE),
            last_scale=_LAST_SCALE,
        )

    def _start(self, state: Mapping[str, Array]) -> None:
        """Take over what an earlier run learned, to be halved as soon as it proves wrong."""
        self._table[: self._pad] = start_of(state, "table", (self._pad, self._shape.num_experts))
        scale = start_of(state, "scale", (self._pad,))
        self._scale[: self._pad] = np.clip(scale, _FIRST_SCALE, _STATE_SCALE)
        self._recent = self._usual = float(start_of(state, "loss", (1,))[0])

    def state(self) -> dict[str, Array]:
        return {
            "table": self._table[: self._pad].copy(),
            "scale": self._scale[: self._pad].copy(),
            "loss": np.array([self._usual], np.float32),
        }

    # -- a step's beginning ------------------------------------------------------------------------

    def _begin(self, observation: Observation) -> None:
        """Sum up the context of each sequence, for all layers."""
        self._remember()
        for slot, is_new in zip(self._slots, self._is_new, strict=True):
            if is_new:
                self._past[slot] = _UNKNOWN
        layers, count = self._shape.num_layers, len(self._slots)
        self._now = np.full((count, *self._past.shape[2:]), _UNKNOWN, np.int32)
        self._num_steps += 1
        is_skipped = self._is_settled() and self._num_steps % _SETTLED_TURN
        num_learned = 0 if is_skipped else min(_LEARNED, count)
        self._learned = [(self._turn + index) % count for index in range(num_learned)]
        self._turn += num_learned

        rows = self._rows_of_context(self._past[self._slots])  # [count, layers, 2, rows]
        sums = self._table.take(rows, axis=0).sum(3)
        sums += self._prior
        token_rows = None
        if observation.token_ids is not None:
            token_rows = self._rows_of_tokens(observation.token_ids[self._rows].tolist())
            sums += self._table.take(token_rows, axis=0)
        self._early = sums[:, :, 1]
        self._logits = np.zeros((count, layers + self._reach, sums.shape[3]), np.float32)
        self._logits[:, :layers] = sums[:, :, 0]

        self._rows_of[:] = self._pad
        begin = self._reach * self._shape.top_k
        end = begin + self._context_rows
        for index, row in enumerate(self._learned):
            self._guesses[index, :layers] = sums[row, :, :1]
            self._guesses[index, :layers, self._near] = self._early[row]
            self._rows_of[index, :layers, begin:end] = rows[row].reshape(layers, -1)
            if token_rows is not None:
                self._rows_of[index, :layers, end:] = token_rows[row]
        if self._native is not None:
            self._native.begin(self._table, self._scale, self._logits)

    def _remember(self) -> None:
        """Move what the step before this one used to its sequences' past."""
        if len(self._used_slots):
            self._past[self._used_slots, 1] = self._past[self._used_slots, 0]
            self._past[self._used_slots, 0] = self._now
        self._used_slots = self._slots

    def _rows_of_context(self, past: Array) -> Array:
        """Return rows of the table, int64 [num_sequences, layers, 2 halves, 4 * top_k + 1].

        past: int32 [num_sequences, 2, layers, top_k].
        """
        count, _, layers, top_k = past.shape
        ids = np.empty((count, layers, 1, _SOURCES, top_k), np.int64)
        ids[:, :, 0, 0] = past[:, 0]
        ids[:, :, 0, 1] = past[:, 1]
        ids[:, :, 0, 2] = past[:, 0, -1:]
        ids[:, :, 0, 3] = past[:, 0, max(0, layers - 2), None]
        rows = np.empty((count, layers, 2, _SOURCES * top_k + 1), np.int64)
        of_ids = np.where(ids < 0, self._pad, ids + self._blocks)
        rows[..., :-1] = of_ids.reshape(count, layers, 2, -1)
        rows[..., -1:] = self._biases
        return rows

    def _rows_of_tokens(self, token_ids: list[int]) -> Array:
        """Return the rows of token ids, int64 [num_sequences, layers, 2 halves]."""
        per_token = self._shape.num_layers * 2
        if len(self._table) == self._token_begin:
            more = (_KEPT_TOKENS * per_token, self._shape.num_experts)
            self._table = np.concatenate([self._table, np.zeros(more, np.float32)])
            scale = np.full(len(self._table), _FIRST_SCALE, np.float32)
            scale[: self._token_begin] = self._scale
            self._scale = scale
        begins = []
        for token in token_ids:
            slot, is_new = self._tokens.take(token)
            begin = self._token_begin + slot * per_token
            if is_new:
                self._table[begin : begin + per_token] = 0
                self._scale[begin : begin + per_token] = _FIRST_SCALE
            begins.append(begin)
        rows = np.array(begins)[:, None] + np.arange(per_token)
        return rows.reshape(len(begins), -1, 2)

    # -- a layer -----------------------------------------------------------------------------------

    def _see(self, layer: int, ids: Array, observation: Observation) -> None:
        self._now[:, layer] = ids
        if self._native is not None:
            for loss in self._native.see(layer, ids, self._learned):
                self._watch(loss)
            return
        for index, row in enumerate(self._learned):
            self._learn(layer, index, ids[row])
        if layer + 1 < self._shape.num_layers:
            self._spread(layer, ids)

    def _guess(self, layer: int, rows: slice | list[int]) -> Array:
        return sigmoid(self._logits_of(layer)[rows, layer])

    def _guesses_of(self, layers: list[int], rows: slice | list[int]) -> Array:
        if self._logits_of(layers[0]) is self._logits_of(layers[-1]):
            return sigmoid(self._logits_of(layers[0])[rows][:, layers])
        return super()._guesses_of(layers, rows)

    def _logits_of(self, layer: int) -> Array:
        is_early = self._layer == START or layer - self._layer > self._near
        return self._early if is_early else self._logits

    def _spread(self, layer: int, ids: Array) -> None:
        """Add what a layer's experts say about the layers after it to their logits."""
        experts, reach = self._shape.num_experts, self._reach
        names = ids + layer * experts
        blocks = self._table[: self._context_begin].reshape(-1, reach * experts)
        said = blocks.take(names, axis=0)  # [num_sequences, top_k, reach * experts]
        ahead = self._logits[:, layer + 1 : layer + 1 + reach]
        ahead += np.add.reduce(said, axis=1).reshape(-1, reach, experts)
        for index, row in enumerate(self._learned):
            self._guesses_of_source[index][layer][:] = ahead[row, : self._near]
            np.add(names[row] * reach, self._distances, out=self._rows_of_source[index][layer])

    def _learn(self, layer: int, index: int, ids: Array) -> None:
        """Step down the gradient of all guesses about a layer of one sequence."""
        error = sigmoid(self._guesses[index, layer])  # [stages, num_experts]
        error[:, ids] -= 1
        square = np.einsum("se,se->s", error, error)
        square /= error.shape[1]
        self._watch(float(square[0]))
        rows = self._rows_of[index, layer]
        scale = self._scale.take(rows)
        scale += square.take(self._stage_of_row)
        np.minimum(scale, _LAST_SCALE, out=scale)
        self._scale[rows] = scale
        np.sqrt(scale, out=scale)
        np.divide(_RATE, scale, out=scale)
        step = error.take(self._stage_of_row, axis=0)
        step *= scale[:, None]
        weights = self._table.take(rows, axis=0)
        weights -= step
        self._table[rows] = weights
        self._table[self._pad : self._token_begin] = 0

    def _is_settled(self) -> bool:
        is_steady = self._recent < _SETTLED_RATIO * self._usual
        return is_steady and self._num_steps > _STEPS_TO_SETTLE

    def _watch(self, loss: float) -> None:
        """Compare the loss of late to the usual one, and unlearn where it is far higher."""
        if self._usual == 0.0:
            self._recent = self._usual = loss
        num_layers = self._shape.num_layers
        self._recent += (loss - self._recent) / (_RECENT_TOKENS * num_layers)
        self._usual += (loss - self._usual) / (_USUAL_TOKENS * num_layers)
        if self._recent > _DRIFT_RATIO * self._usual:
            self._usual = self._recent
            self._table *= _DRIFT_SHARE
            np.minimum(self._scale, _FIRST_SCALE, out=self._scale)


def _diagonal(array: Array, first: int, count: int, width: int) -> Array:
    """View, of the rows from `first` on, in the i-th one the i-th piece of `width` entries.

    array: [rows, entries], seen as [count, width], or [rows, entries, n], as [count, n] where the
    width is 1. Writing to the view writes to the array.
    """
    row, entry, *rest = array.strides
    if rest:
        return as_strided(array[first:], (count, array.shape[2]), (row + entry, *rest))
    return as_strided(array[first:], (count, width), (row + width * entry, entry))


def build(
    shape: PredictorShape,
    state: Mapping[str, Array] | None = None,
    gates: Gates | None = None,
) -> Predictor:
    """Make the predictor; `gates` is not used."""
    return LearnedIds(shape, state)
