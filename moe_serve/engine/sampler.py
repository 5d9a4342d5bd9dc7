"""From logits to tokens: reads what each sequence asks for, and calls the sampling kernels.

It keeps no state: a token is a function of the sequence's request, index and tokens, and of its row
of logits. The order of operations is vLLM's: raw logprobs; the grammar; allowed_token_ids, bad
words and min_tokens; logit_bias; repetition, frequency and presence penalties; the greedy choice,
or temperature, min_p, top_k, top_p and the noise. A row pays only for what its request asks.

It does not know how logits are made, nor when a sequence ends.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from operator import attrgetter
from typing import TypeVar

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from moe_serve.engine.grammar import Allowed
from moe_serve.engine.grammar_compiler import GrammarError
from moe_serve.engine.sequence import SamplerOutput, Sequence
from moe_serve.kernels.sampling.base import Sampling
from moe_serve.types import TokenLogprobs

T = TypeVar("T")

MIN_TEMPERATURE = 1e-5  # as vLLM: at less the choice is the greedy one
# Logits that are copied, or ranked, at once: what a core's cache holds; on a device as few as keep
# it busy, as ranking one takes 30 bytes, and penalising it 33.
CHUNK_ELEMENTS_CPU = 2**19
CHUNK_ELEMENTS_DEVICE = 2**22
_CHUNK_BYTES = 48
# of every logit, for the filters: see kernels/sampling/cut
_FILTER_BYTES = 1

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


def sampling_bytes(num_rows: int, vocab_size: int) -> int:
    """Return a bound of what a sampler holds at once on a device, besides so many rows of logits.

    However many tokens requests name, and whatever they ask for.
    """
    in_chunk = min(num_rows, max(1, CHUNK_ELEMENTS_DEVICE // vocab_size))
    return (in_chunk * _CHUNK_BYTES + num_rows * _FILTER_BYTES) * vocab_size


class Sampler:
    """Chooses the next token of each sequence.

    Token ids outside the vocabulary are passed over wherever a request names them: no such token
    can be sampled.
    """

    def __init__(self, vocab_size: int, device: torch.device, kernels: Sampling) -> None:
        self.vocab_size = vocab_size
        self.device = device
        self.kernels = kernels
        self.hashes = kernels.token_hashes(vocab_size, device)  # [vocab_size]
        elements = CHUNK_ELEMENTS_CPU if device.type == "cpu" else CHUNK_ELEMENTS_DEVICE
        self.rows_per_chunk = max(1, elements // vocab_size)

    def sample(self, logits: Tensor, sequences: list[Sequence]) -> SamplerOutput:
        """Choose the token that each sequence receives, and its logprobs where they were asked for.

        logits: float32 [num_samples, vocab_size], read only; row i is for sequences[i]. A row that
        is not finite, all of whose tokens are forbidden, or whose grammar exceeds a limit, gives an
        entry of `errors`, and the other rows are as if it were not there. Syncs the host.
        """
        assert logits.shape == (len(sequences), self.vocab_size), logits.shape
        assert logits.dtype == torch.float32, logits.dtype
        best, is_finite = self.kernels.greedy_checked(logits)
        token_ids: list[int] = best.tolist()
        finite: list[bool] = is_finite.tolist()
        errors = {row: _not_finite(logits[row]) for row, ok in enumerate(finite) if not ok}
        edited, sampled = [], []
        for row, sequence in enumerate(sequences):
            if _is_edited(sequence):
                edited.append(row)
            elif not _is_greedy(sequence):
                sampled.append(row)
        if errors:
            edited = [row for row in edited if row not in errors]
            sampled = [row for row in sampled if row not in errors]

        refused: dict[int, str] = {}
        self._sample_into(token_ids, logits, sampled, sequences)
        for rows in self._chunks(edited):
            allowed, failed = _allowed(rows, sequences)
            refused |= failed
            rows = [row for row in rows if row not in failed]
            part = [sequences[row] for row in rows]
            masks = [allowed.get(row) for row in rows]
            chosen, wrong = self._edit_and_choose(logits[rows], part, masks)  # copies the logits
            _put(token_ids, rows, chosen)
            refused |= {rows[index]: error for index, error in wrong.items()}
        errors |= refused
        return SamplerOutput(
            token_ids,
            self._logprobs(logits, sequences, token_ids, errors),
            errors,
            set(refused),
        )

    def prompt_logprobs(
        self, logits: Tensor, next_token_ids: Tensor, top: int
    ) -> list[TokenLogprobs]:
        """Give the logprobs of known tokens: next_token_ids[i] by row i of the logits.

        logits: float32 [num_tokens, vocab_size]; next_token_ids: int64 [num_tokens]. A row that is
        not finite gives NaN. Syncs the host.
        """
        found: list[TokenLogprobs] = []
        for rows in self._chunks(list(range(logits.shape[0]))):
            part = slice(rows[0], rows[-1] + 1)
            token_ids = next_token_ids[part].to(self.device)
            found += self._token_logprobs(logits[part], token_ids, [top] * len(rows))
        return found

    def _sample_into(
        self, token_ids: list[int], logits: Tensor, rows: list[int], sequences: list[Sequence]
    ) -> None:
        """Set token_ids[row] for the rows given, whose logits must have a finite maximum.

        logits: [len(sequences), vocab_size]. Leaves the other rows as they are.
        """
        if not rows:
            return
        if len(rows) == len(sequences):
            _put(token_ids, rows, self._sampled(logits, sequences))
            return
        for part in self._chunks(rows):  # copies the logits
            chosen = self._sampled(logits[part], [sequences[row] for row in part])
            _put(token_ids, part, chosen)

    def _sampled(self, logits: Tensor, sequences: list[Sequence]) -> list[int]:
        """Return the token of each sequence, of its row of the logits; there must be one."""
        filters = np.array([_FILTERS(sequence.request.sampling) for sequence in sequences])
        temperature, min_p, top_k, top_p = filters.T  # float64 [num_rows] each
        top_k = np.where(top_k > 0, top_k, self.vocab_size)
        keys = self.kernels.row_keys(
            [sequence.seed for sequence in sequences],
            [len(sequence.token_ids) for sequence in sequences],
        )
        chosen = self.kernels.sample(
            logits,
            self._column(temperature, np.float32),
            self._column(min_p, np.float32) if min_p.any() else None,
            self._column(top_k, np.int64) if (top_k < self.vocab_size).any() else None,
            self._column(top_p, np.float64) if (top_p < 1).any() else None,
            keys.to(self.device),
            self.hashes,
        )
        found: list[int] = chosen.tolist()
        return found

    def _edit_and_choose(
        self, logits: Tensor, sequences: list[Sequence], masks: list[Allowed | None]
    ) -> tuple[list[int], dict[int, str]]:
        """Edit the logits in place and choose from what is left; all must be finite before.

        masks: what the grammars allow, bool [vocab_size], where there is one. Returns a token for
        each sequence, and why there is none, by index.
        """
        for row, allowed in enumerate(masks):
            if allowed is not None:
                is_forbidden = torch.from_numpy(~allowed).to(self.device)
                logits[row].masked_fill_(is_forbidden, -torch.inf)
        self._edit_(logits, sequences)
        best, _ = self.kernels.greedy_checked(logits)
        token_ids: list[int] = best.tolist()
        highest: list[float] = logits.gather(1, best[:, None]).squeeze(1).tolist()
        errors = {row: _no_choice(value) for row, value in enumerate(highest) if np.isinf(value)}
        sampled = [
            row
            for row, sequence in enumerate(sequences)
            if row not in errors and not _is_greedy(sequence)
        ]
        self._sample_into(token_ids, logits, sampled, sequences)
        return token_ids, errors

    def _edit_(self, logits: Tensor, sequences: list[Sequence]) -> None:
        """Forbid tokens, add biases and penalise, in place and in this order."""
        params = [sequence.request.sampling for sequence in sequences]
        limited = [row for row, p in enumerate(params) if p.allowed_token_ids is not None]
        if limited:
            pairs = self._pairs(p.allowed_token_ids or () for p in params)
            self.kernels.keep_only_(logits, self._tensor(limited), *pairs)
        if any(forbidden := [_forbidden_ids(sequence) for sequence in sequences]):
            self.kernels.forbid_(logits, *self._pairs(forbidden))
        biases = [self._in_vocabulary(p.logit_bias or {}) for p in params]
        if any(biases):
            values = [value for bias in biases for value in bias.values()]
            bias_values = self._tensor(values, torch.float32)
            self.kernels.add_bias_(logits, *self._pairs(biases), bias_values)
        if any(_is_penalised(sequence) for sequence in sequences):
            self._penalise_(logits, sequences)

    def _penalise_(self, logits: Tensor, sequences: list[Sequence]) -> None:
        ids: list[npt.NDArray[np.int64]] = []
        counts: list[npt.NDArray[np.int64]] = []
        strengths: list[tuple[float, float, float]] = []  # of each pair
        for sequence in sequences:
            params = sequence.request.sampling
            seen, seen_counts = np.zeros(0, np.int64), np.zeros(0, np.int64)
            if _is_penalised(sequence):
                seen, seen_counts = _token_counts(sequence, self.vocab_size)
            ids.append(seen)
            counts.append(seen_counts)
            strengths.append(
                (params.repetition_penalty, params.frequency_penalty, params.presence_penalty)
            )
        rows, pair_ids = self._pairs(ids)
        of_pair = self._tensor(strengths, torch.float32)[rows]  # [num_pairs, 3]
        output_counts = torch.from_numpy(np.concatenate(counts)).to(self.device)
        self.kernels.penalise_(logits, rows, pair_ids, output_counts, *of_pair.unbind(1))

    def _logprobs(
        self,
        logits: Tensor,
        sequences: list[Sequence],
        token_ids: list[int],
        errors: dict[int, str],
    ) -> list[TokenLogprobs | None] | None:
        tops = [sequence.request.sampling.logprobs for sequence in sequences]
        if all(top is None for top in tops):
            return None
        found: list[TokenLogprobs | None] = [None] * len(sequences)
        asked = [
            (row, top) for row, top in enumerate(tops) if top is not None and row not in errors
        ]
        for chunk in self._chunks(asked):
            rows = [row for row, _ in chunk]
            chosen = self._tensor([token_ids[row] for row in rows])
            _put(found, rows, self._token_logprobs(logits[rows], chosen, [top for _, top in chunk]))
        return found

    def _token_logprobs(
        self, logits: Tensor, token_ids: Tensor, tops: list[int]
    ) -> list[TokenLogprobs]:
        most = min(max(tops), self.vocab_size)
        columns = self.kernels.chosen_logprobs(logits, token_ids, most)
        rows = zip(token_ids.tolist(), tops, *(column.tolist() for column in columns), strict=True)
        return [
            TokenLogprobs(token_id, logprob, rank, tuple(zip(ids[:top], values[:top], strict=True)))
            for token_id, top, logprob, rank, ids, values in rows
        ]

    def _pairs(self, ids_of_row: Iterable[Iterable[int]]) -> tuple[Tensor, Tensor]:
        """Flatten each row's token ids to pairs (rows, ids): int64 [num_pairs] both."""
        ids = [np.fromiter(row_ids, np.int64) for row_ids in ids_of_row]
        rows = np.repeat(np.arange(len(ids)), [len(row_ids) for row_ids in ids])
        flat = np.concatenate(ids)
        is_known = flat < self.vocab_size
        pairs = torch.from_numpy(np.stack([rows[is_known], flat[is_known]])).to(self.device)
        return pairs[0], pairs[1]

    def _in_vocabulary(self, bias: Mapping[int, float]) -> dict[int, float]:
        return {token_id: value for token_id, value in bias.items() if token_id < self.vocab_size}

    def _chunks(self, items: list[T]) -> Iterator[list[T]]:
        """Cut what there is one of per row into pieces of at most `rows_per_chunk`."""
        for start in range(0, len(items), self.rows_per_chunk):
            yield items[start : start + self.rows_per_chunk]

    def _column(self, values: npt.NDArray[np.float64], dtype: npt.DTypeLike) -> Tensor:
        return torch.from_numpy(values.astype(dtype)).to(self.device)

    def _tensor(self, values: object, dtype: torch.dtype = torch.int64) -> Tensor:
        return torch.tensor(values, dtype=dtype, device=self.device)


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


def _put(into: list[T], at: list[int], values: Iterable[T]) -> None:
    for index, value in zip(at, values, strict=True):
        into[index] = value


def _is_penalised(sequence: Sequence) -> bool:
    params = sequence.request.sampling
    if params.repetition_penalty != 1:
        return True
    return bool(params.presence_penalty or params.frequency_penalty)


def _is_greedy(sequence: Sequence) -> bool:
    return sequence.request.sampling.temperature < MIN_TEMPERATURE


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


def _token_counts(
    sequence: Sequence, vocab_size: int
) -> tuple[npt.NDArray[np.int64], npt.NDArray[np.int64]]:
    """Return the ids in the prompt and output, each once, and how often each is in the output."""
    ids, index = np.unique(np.array(sequence.token_ids, np.int64), return_inverse=True)
    counts = np.bincount(index[sequence.num_prompt_tokens :], minlength=len(ids))
    is_known = ids < vocab_size
    return ids[is_known], counts[is_known]


def _not_finite(logits: Tensor) -> str:
    """logits: [vocab_size]."""
    wrong = (~logits.isfinite()).nonzero().squeeze(1).tolist()
    return (
        f"the model gave {len(wrong)} of {len(logits)} logits that are NaN or infinite, the first "
        f"for token id {wrong[0]}; check the checkpoint, or run it with --dtype float32"
    )


def _no_choice(highest: float) -> str:
    if highest > 0:
        return "repetition_penalty made a logit infinite; use one nearer to 1"
    return (
        "no token is left to choose from: structured_outputs, allowed_token_ids, bad_words, "
        "min_tokens, ignore_eos and repetition_penalty forbid them all; relax one of them"
    )
