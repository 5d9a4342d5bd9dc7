"""What a step's sampling takes, found before there are logits: by the host, from requests alone.

So all of it can travel to a device while that one still computes the logits: `columns` together,
`edits` one by one. The rest stays, to read the results by.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from operator import attrgetter
from typing import Any, NamedTuple, TypeVar

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from moe_serve.engine.grammar import Allowed
from moe_serve.engine.grammar_compiler import GrammarError
from moe_serve.engine.sequence import Sequence
from moe_serve.kernels.sampling.base import Sampling
from moe_serve.types import SamplingParams

T = TypeVar("T")
Ids = npt.NDArray[np.int64]

_MIN_TEMPERATURE = 1e-5  # as vLLM: at less the choice is the greedy one

_FILTERS = attrgetter("temperature", "min_p", "top_k", "top_p")
_EDITS = attrgetter(
    "allowed_token_ids",
    "logit_bias",
    "min_tokens",
    "repetition_penalty",
    "presence_penalty",
    "frequency_penalty",
    "structured_outputs",
)
_NO_EDITS = (None, None, 0, 1, 0, 0, None)


class Draw(NamedTuple):
    """What `Sampling.sample` takes beside logits, of the rows that are not greedy.

    rows: int64 [num_drawn], where their logits are; None for all, in order.
    """

    rows: Tensor | None
    temperature: Tensor
    min_p: Tensor | None
    top_k: Tensor | None
    top_p: Tensor | None
    keys: Tensor


class Edits(NamedTuple):
    """What changes some rows of logits before tokens are chosen; None where no row asks for it.

    rows: int64 [num_edited], where their logits are. is_forbidden: bool [num_masked, vocab_size],
    by the grammars of the first of them. kept, forbidden, bias, penalties: what the kernel of each
    takes beside the logits of these rows. draw: of those that are not greedy.
    """

    rows: Tensor
    is_forbidden: Tensor | None
    kept: tuple[Tensor, ...] | None
    forbidden: tuple[Tensor, ...] | None
    bias: tuple[Tensor, ...] | None
    penalties: tuple[Tensor, ...] | None
    draw: Draw | None


class Asked(NamedTuple):
    """Rows whose logprobs are asked for, int64 [num_asked], and how many of the best at most."""

    rows: Tensor
    most: int


class Columns(NamedTuple):
    """What kernels take, all by chunk; but draws of all rows are one, as nothing is copied."""

    draws: tuple[Draw, ...]
    asked: tuple[Asked, ...]


@dataclass(frozen=True, slots=True)
class Plan:
    """How tokens of some sequences are chosen, and what is told of them.

    edits: by chunk; they travel one at a time, as they can be as wide as logits. edited: their
    rows. failed: why a row can have no token, by row:
    its grammar. asked: by chunk, rows and how many of the best tokens' logprobs each wants.
    """

    columns: Columns
    edits: tuple[Edits, ...]
    num_rows: int
    edited: list[list[int]]
    failed: dict[int, str]
    asked: list[list[tuple[int, int]]]


class Planner:
    """Makes plans. rows_per_chunk: how many rows of logits may be copied at once."""

    def __init__(self, vocab_size: int, rows_per_chunk: int, kernels: Sampling) -> None:
        self._vocab_size = vocab_size
        self.rows_per_chunk = rows_per_chunk
        self._kernels = kernels

    def plan(self, sequences: list[Sequence]) -> Plan:
        """Return how the next token of each is chosen. Asks the grammars, and no device."""
        edited, drawn, asked = [], [], []
        for row, sequence in enumerate(sequences):
            if _is_edited(sequence):
                edited.append(row)
            elif not _is_greedy(sequence):
                drawn.append(row)
            top = sequence.request.sampling.logprobs
            if top is not None:
                asked.append((row, top))
        allowed, failed = _allowed(edited, sequences)
        edited = [row for row in edited if row not in failed]
        edited.sort(key=lambda row: row not in allowed)  # stable: those with masks come first
        chunks = list(self._chunks(edited))
        asked_chunks = list(self._chunks(asked))
        columns = Columns(
            self._draws(drawn, sequences),
            tuple(self._asked(chunk) for chunk in asked_chunks),
        )
        edits = tuple(self._edits(rows, sequences, allowed) for rows in chunks)
        return Plan(columns, edits, len(sequences), chunks, failed, asked_chunks)

    def _chunks(self, items: list[T]) -> Iterator[list[T]]:
        """Cut what there is one of per row into pieces of at most `rows_per_chunk`."""
        for start in range(0, len(items), self.rows_per_chunk):
            yield items[start : start + self.rows_per_chunk]

    def _asked(self, chunk: list[tuple[int, int]]) -> Asked:
        rows, tops = zip(*chunk, strict=True)
        return Asked(_ids(rows), min(max(tops), self._vocab_size))

    def _draws(self, rows: list[int], sequences: list[Sequence]) -> tuple[Draw, ...]:
        chunks = [rows] if len(rows) == len(sequences) else self._chunks(rows)
        draws = (self._draw(chunk, sequences) for chunk in chunks)
        return tuple(draw for draw in draws if draw is not None)

    def _draw(self, rows: list[int], sequences: list[Sequence]) -> Draw | None:
        if not rows:
            return None
        is_all = len(rows) == len(sequences)
        if not is_all:
            sequences = [sequences[row] for row in rows]
        filters = np.array([_FILTERS(sequence.request.sampling) for sequence in sequences])
        temperature, min_p, top_k, top_p = filters.T  # float64 [num_rows] each
        top_k = np.where(top_k > 0, top_k, self._vocab_size)
        keys = self._kernels.row_keys(
            [sequence.seed for sequence in sequences],
            [len(sequence.token_ids) for sequence in sequences],
        )
        return Draw(
            None if is_all else _ids(rows),
            _column(temperature, np.float32),
            _column(min_p, np.float32) if min_p.any() else None,
            _column(top_k, np.int64) if (top_k < self._vocab_size).any() else None,
            _column(top_p, np.float64) if (top_p < 1).any() else None,
            keys,
        )

    def _edits(
        self, rows: list[int], sequences: list[Sequence], allowed: dict[int, Allowed]
    ) -> Edits:
        sequences = [sequences[row] for row in rows]
        masks = [allowed[row] for row in rows if row in allowed]
        is_forbidden = None
        if masks:
            is_forbidden = torch.empty(len(masks), self._vocab_size, dtype=torch.bool)
            for into, mask in zip(is_forbidden.numpy(), masks, strict=True):
                np.logical_not(mask, out=into)
        params = [sequence.request.sampling for sequence in sequences]
        drawn = [row for row, sequence in enumerate(sequences) if not _is_greedy(sequence)]
        return Edits(
            _ids(rows),
            is_forbidden,
            self._kept(params),
            self._forbidden(sequences),
            self._bias(params),
            self._penalties(sequences),
            self._draw(drawn, sequences),
        )

    def _kept(self, params: list[SamplingParams]) -> tuple[Tensor, ...] | None:
        limited = [row for row, p in enumerate(params) if p.allowed_token_ids is not None]
        if not limited:
            return None
        return _ids(limited), *self._pairs(p.allowed_token_ids or () for p in params)

    def _forbidden(self, sequences: list[Sequence]) -> tuple[Tensor, ...] | None:
        forbidden = [_forbidden_ids(sequence) for sequence in sequences]
        return self._pairs(forbidden) if any(forbidden) else None

    def _bias(self, params: list[SamplingParams]) -> tuple[Tensor, ...] | None:
        biases = [
            {token_id: value for token_id, value in bias.items() if token_id < self._vocab_size}
            for bias in (p.logit_bias or {} for p in params)
        ]
        if not any(biases):
            return None
        values = [value for bias in biases for value in bias.values()]
        return *self._pairs(biases), torch.tensor(values, dtype=torch.float32)

    def _penalties(self, sequences: list[Sequence]) -> tuple[Tensor, ...] | None:
        if not any(_is_penalised(sequence) for sequence in sequences):
            return None
        ids: list[Ids] = []
        counts: list[Ids] = []
        strengths: list[tuple[float, float, float]] = []  # of each row
        for sequence in sequences:
            params = sequence.request.sampling
            seen, seen_counts = np.zeros(0, np.int64), np.zeros(0, np.int64)
            if _is_penalised(sequence):
                seen, seen_counts = _token_counts(sequence, self._vocab_size)
            ids.append(seen)
            counts.append(seen_counts)
            strengths.append(
                (params.repetition_penalty, params.frequency_penalty, params.presence_penalty)
            )
        rows, pair_ids = self._pairs(ids)
        of_pair = torch.tensor(strengths, dtype=torch.float32)[rows]  # [num_pairs, 3]
        return rows, pair_ids, torch.from_numpy(np.concatenate(counts)), *of_pair.unbind(1)

    def _pairs(self, ids_of_row: Iterable[Iterable[int]]) -> tuple[Tensor, Tensor]:
        """Flatten each row's token ids to pairs (rows, ids): int64 [num_pairs] both."""
        ids = [np.fromiter(row_ids, np.int64) for row_ids in ids_of_row]
        rows = np.repeat(np.arange(len(ids)), [len(row_ids) for row_ids in ids])
        flat = np.concatenate(ids)
        is_known = flat < self._vocab_size
        return torch.from_numpy(rows[is_known]), torch.from_numpy(flat[is_known])


def _allowed(
    rows: list[int], sequences: list[Sequence]
) -> tuple[dict[int, Allowed], dict[int, str]]:
    """Return what the grammars allow, and why one failed, by row; others are in neither."""
    allowed: dict[int, Allowed] = {}
    errors: dict[int, str] = {}
    for row in rows:
        sequence = sequences[row]
        if sequence.matcher is not None:
            try:
                allowed[row] = sequence.matcher.allowed(sequence.token_ids)
            except GrammarError as error:
                errors[row] = f"structured_outputs: {error}"
    return allowed, errors


def _ids(values: Any) -> Tensor:
    return torch.tensor(values, dtype=torch.int64)


def _column(values: npt.NDArray[np.float64], dtype: npt.DTypeLike) -> Tensor:
    return torch.from_numpy(values.astype(dtype))


def _is_penalised(sequence: Sequence) -> bool:
    params = sequence.request.sampling
    if params.repetition_penalty != 1:
        return True
    return bool(params.presence_penalty or params.frequency_penalty)


def _is_greedy(sequence: Sequence) -> bool:
    return sequence.request.sampling.temperature < _MIN_TEMPERATURE


def _is_edited(sequence: Sequence) -> bool:
    """Tell whether the row's logits change before a token is chosen."""
    params = sequence.request.sampling
    if _EDITS(params) == _NO_EDITS:  # nearly always: one look, not six
        return bool(sequence.request.bad_words_ids)
    return (
        params.allowed_token_ids is not None
        or bool(params.logit_bias or sequence.request.bad_words_ids)
        or sequence.num_output_tokens < params.min_tokens
        or sequence.matcher is not None
        or _is_penalised(sequence)
    )


def _forbidden_ids(sequence: Sequence) -> list[int]:
    """List the ids that would complete a bad word, or end the output before min_tokens."""
    request = sequence.request
    forbidden: list[int] = []
    if sequence.num_output_tokens < request.sampling.min_tokens:
        forbidden += [*request.eos_token_ids, *request.sampling.stop_token_ids]
    for *before, last in filter(None, request.bad_words_ids):
        start = len(sequence.token_ids) - len(before)
        if start >= sequence.num_prompt_tokens and sequence.token_ids[start:] == before:
            forbidden.append(last)
    return forbidden


def _token_counts(sequence: Sequence, vocab_size: int) -> tuple[Ids, Ids]:
    """Return the ids in the prompt and output, each once, and how often each is in the output."""
    ids, index = np.unique(np.array(sequence.token_ids, np.int64), return_inverse=True)
    counts = np.bincount(index[sequence.num_prompt_tokens :], minlength=len(ids))
    is_known = ids < vocab_size
    return ids[is_known], counts[is_known]
