"""SiDA's hash function: a small recurrent student that knows token ids alone, run ahead.

A step's token ids are known before its first layer, so that all layers are guessed at once, in a
thread of its own, while the first layers are being computed (Du et al., SiDA-MoE, MLSys 2024: an
LSTM with sparse attention over a whole text; here one cell per token, a GRU, since text comes token
by token). Unlike SiDA's, its guess never replaces the router's choice.

The recurrent part is trained from traces (`train`, with torch), or is random; the heads, one
linear map per layer on its state, go on learning online. About 150 x num_experts additions a layer.
"""

from __future__ import annotations

from collections.abc import Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from itertools import pairwise
from typing import TYPE_CHECKING, ClassVar

import numpy as np

from moe_serve.predictors._sequences import SequencePredictor, sigmoid, uses
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

if TYPE_CHECKING:
    import torch

_BUCKETS = 8192  # of token ids; two that fall into one are taken for the same
_EMBEDDING = 48
_STATE = 96
_FEATURES = _STATE + _EMBEDDING + 1  # the cell's state, the token's embedding, and 1
_RATE = 0.05
_CELL = ("embedding", "input_weight", "state_weight", "bias")
_PIECE, _PIECES = 128, 8  # tokens that a gradient goes back in training, and side by side
_TRAIN_RATE = 1e-2


class LearnedHash(SequencePredictor):
    """The cell, the heads, the state of each sequence, and the job that is running ahead."""

    needs: ClassVar[frozenset[Need]] = frozenset({"token_ids"})

    def __init__(self, shape: PredictorShape, state: Mapping[str, Array] | None) -> None:
        super().__init__(shape)
        self._cell = _first_cell()
        heads = (shape.num_layers, _FEATURES, shape.num_experts)
        self._heads = np.zeros(heads, np.float32)
        rate = min(shape.top_k / shape.num_experts, 0.999)
        self._heads[:, -1] = np.log(rate / (1 - rate))
        if state is not None:
            self._cell = {
                name: start_of(state, name, array.shape) for name, array in self._cell.items()
            }
            self._heads = start_of(state, "heads", heads)
        self._scale = np.ones((shape.num_layers, _FEATURES, 1), np.float32)
        self._states = np.zeros((self._known.capacity, _STATE), np.float32)
        self._ahead = ThreadPoolExecutor(max_workers=1, thread_name_prefix="learned_hash")
        self._job: Future[tuple[Array, Array]] | None = None

    def _begin(self, observation: Observation) -> None:
        token_ids = given(observation.token_ids, "token_ids", "learned_hash")
        self._result()  # of the step before: its states have to be there
        for slot, is_new in zip(self._slots, self._is_new, strict=True):
            if is_new:
                self._states[slot] = 0
        begins = [0, *(self._rows[:-1] + 1).tolist()]
        tokens = [
            token_ids[begin : end + 1] % _BUCKETS
            for begin, end in zip(begins, self._rows.tolist(), strict=True)
        ]
        self._job = self._ahead.submit(self._run_ahead, tokens, self._slots)

    def _run_ahead(self, tokens: list[Array], slots: Array) -> tuple[Array, Array]:
        """Return features [num_sequences, features] and guesses [num_sequences, layers, E]."""
        features = np.ones((len(slots), _FEATURES), np.float32)
        for row, (run, slot) in enumerate(zip(tokens, slots, strict=True)):
            state = self._states[slot]
            for embedded in self._cell["embedding"][run]:
                state = _advance(self._cell, state, embedded)
                features[row, _STATE:-1] = embedded
            self._states[slot] = features[row, :_STATE] = state
        logits = np.einsum("sf,lfe->sle", features, self._heads, optimize=True)
        return features, sigmoid(logits)

    def _result(self) -> tuple[Array, Array]:
        if self._job is None:
            empty = np.zeros((0, _FEATURES), np.float32)
            return empty, np.zeros((0, *self._heads.shape[::2]), np.float32)
        return self._job.result()

    def _see(self, layer: int, ids: Array, observation: Observation) -> None:
        features, guesses = self._result()
        error = guesses[:, layer] - uses(ids, self._shape.num_experts)
        gradient = features.T @ error / np.float32(len(ids))  # [features, num_experts]
        scale = self._scale[layer]
        scale += (np.einsum("fe,fe->f", gradient, gradient) / gradient.shape[1])[:, None]
        self._heads[layer] -= np.float32(_RATE) / np.sqrt(scale) * gradient

    def _guess(self, layer: int, rows: slice | list[int]) -> Array:
        return self._result()[1][rows, layer]

    def state(self) -> dict[str, Array]:
        self._result()
        return {name: array.copy() for name, array in self._cell.items()} | {
            "heads": self._heads.copy()
        }


def _first_cell() -> dict[str, Array]:
    """Return a random cell, always the same: a reservoir, as good as nothing trained allows."""
    source = np.random.default_rng(0)
    gates = 3 * _STATE  # reset, update, candidate
    return {
        "embedding": source.normal(0, 1, (_BUCKETS, _EMBEDDING)).astype(np.float32),
        "input_weight": source.normal(0, _EMBEDDING**-0.5, (_EMBEDDING, gates)).astype(np.float32),
        "state_weight": source.normal(0, _STATE**-0.5, (_STATE, gates)).astype(np.float32),
        "bias": np.zeros((2, gates), np.float32),
    }


def _advance(cell: Mapping[str, Array], state: Array, embedded: Array) -> Array:
    """Return the GRU's next state, float32 [_STATE] (Cho et al. 2014, in torch's form)."""
    given_ = embedded @ cell["input_weight"] + cell["bias"][0]
    held = state @ cell["state_weight"] + cell["bias"][1]
    reset, update = np.split(sigmoid(given_[: 2 * _STATE] + held[: 2 * _STATE]), 2)
    candidate = np.tanh(given_[2 * _STATE :] + reset * held[2 * _STATE :])
    following: Array = (1 - update) * candidate + update * state
    return following


def train(
    shape: PredictorShape,
    ids: Array,
    token_ids: Array,
    seq_offsets: Array,
    epochs: int = 24,
    seed: int = 0,
) -> dict[str, Array]:
    """Return a state learned from routing: ids [num_tokens, num_layers, top_k] of sequences.

    Cross-entropy of which experts each token used, Adam, in pieces of 128 tokens by turns of eight.
    Takes about a minute for ten thousand tokens; the same seed gives the same state.
    """
    import torch  # slow to import, and only needed here

    generator = torch.Generator().manual_seed(seed)
    cell = torch.nn.GRU(_EMBEDDING, _STATE, batch_first=True)
    embedding = torch.nn.Embedding(_BUCKETS, _EMBEDDING)
    head = torch.nn.Linear(_STATE + _EMBEDDING, shape.num_layers * shape.num_experts)
    parameters = [*cell.parameters(), *embedding.parameters(), *head.parameters()]
    with torch.no_grad():
        for parameter in parameters:
            spread = 0.3 if parameter.shape[0] == _BUCKETS else 0.1
            parameter.normal_(0, spread, generator=generator)
        rate = min(shape.top_k / shape.num_experts, 0.999)
        head.bias.fill_(float(np.log(rate / (1 - rate))))
    optimizer = torch.optim.Adam(parameters, lr=_TRAIN_RATE)
    pieces = [
        (start, min(start + _PIECE, end))
        for begin, end in pairwise(seq_offsets.tolist())
        for start in range(begin, end, _PIECE)
    ]
    for epoch in range(epochs):
        for group in optimizer.param_groups:
            group["lr"] = _TRAIN_RATE * (1 - epoch / epochs)
        order = torch.randperm(len(pieces), generator=generator).tolist()
        for first in range(0, len(order), _PIECES):
            chosen = [pieces[index] for index in order[first : first + _PIECES]]
            tokens, used, is_real = _side_by_side(shape, ids, token_ids, chosen)
            embedded = embedding(tokens)
            logits = head(torch.cat([cell(embedded)[0], embedded], dim=2))
            loss = torch.nn.functional.binary_cross_entropy_with_logits(
                logits[is_real], used[is_real]
            )
            optimizer.zero_grad()
            loss.backward()  # type: ignore[no-untyped-call]
            optimizer.step()
    weights = {name: value.detach().numpy() for name, value in cell.named_parameters()}
    head_weight = head.weight.detach().numpy().reshape(shape.num_layers, shape.num_experts, -1)
    heads = np.concatenate(
        [
            head_weight.transpose(0, 2, 1),
            head.bias.detach().numpy().reshape(shape.num_layers, 1, shape.num_experts),
        ],
        axis=1,
    )
    return {
        "embedding": embedding.weight.detach().numpy().copy(),
        "input_weight": weights["weight_ih_l0"].T.copy(),
        "state_weight": weights["weight_hh_l0"].T.copy(),
        "bias": np.stack([weights["bias_ih_l0"], weights["bias_hh_l0"]]),
        "heads": np.ascontiguousarray(heads),
    }


def _side_by_side(
    shape: PredictorShape, ids: Array, token_ids: Array, pieces: list[tuple[int, int]]
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Return tokens [pieces, longest], experts used [pieces, longest, layers * E], is real."""
    import torch  # as in train

    size = (len(pieces), max(end - begin for begin, end in pieces))
    tokens, is_real = np.zeros(size, np.int64), np.zeros(size, bool)
    used = np.zeros((*size, shape.num_layers, shape.num_experts), np.float32)
    for row, (begin, end) in enumerate(pieces):
        length = end - begin
        tokens[row, :length] = token_ids[begin:end] % _BUCKETS
        is_real[row, :length] = True
        np.put_along_axis(used[row, :length], ids[begin:end].astype(np.int64), 1, axis=2)
    flat = used.reshape(*size, -1)
    return torch.from_numpy(tokens), torch.from_numpy(flat), torch.from_numpy(is_real)


def build(
    shape: PredictorShape,
    state: Mapping[str, Array] | None = None,
    gates: Gates | None = None,
) -> Predictor:
    """Make the predictor; `gates` is not used."""
    return LearnedHash(shape, state)
