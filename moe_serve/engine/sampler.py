"""From logits to tokens: plans what each sequence asks for, and calls the sampling kernels.

It keeps no state: a token is a function of the sequence's request, index and tokens, and of its row
of logits. The order of operations is vLLM's: raw logprobs; the grammar; allowed_token_ids, bad
words and min_tokens; logit_bias; repetition, frequency and presence penalties; the greedy choice,
or temperature, min_p, top_k, top_p and the noise. A row pays only for what its request asks.

Three parts, so that nobody waits for a device but once, for all results: `plan` needs no logits,
`launch` asks the device for nothing, and `told` reads what has come back. Hence a row that turns
out to be wrong has been sampled, too: the kernels must bear it, and nobody is told what they gave.

It does not know how logits are made, nor when a sequence ends.
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from moe_serve.engine.sampling_plan import Columns, Draw, Edits, Plan, Planner
from moe_serve.engine.sequence import SamplerOutput, Sequence
from moe_serve.kernels.gpu.staging import Shuttle
from moe_serve.kernels.gpu.streams import streams
from moe_serve.kernels.sampling.base import Sampling
from moe_serve.types import TokenLogprobs

# Logits that are copied, or ranked, at once: what a core's cache holds; on a device as few as keep
# it busy, as ranking one takes 30 bytes, and penalising it 57.
CHUNK_ELEMENTS_CPU = 2**19
CHUNK_ELEMENTS_DEVICE = 2**22
_CHUNK_BYTES = 60
# of every logit, for the filters: see kernels/sampling/cut
_FILTER_BYTES = 1


class Logprobs(NamedTuple):
    """Of some tokens: ids, logprobs and ranks [num_rows], the best ones' [num_rows, most]."""

    token_ids: Tensor
    logprobs: Tensor
    ranks: Tensor
    top_ids: Tensor
    top_logprobs: Tensor


class Launched(NamedTuple):
    """What comes of a plan. token_ids, is_finite: int64 and bool [num_rows].

    highest: by chunk of the edited rows, the largest logit that the edits left, float32
    [num_edited]. logprobs: by chunk of those who asked.
    """

    token_ids: Tensor
    is_finite: Tensor
    highest: tuple[Tensor, ...]
    logprobs: tuple[Logprobs, ...]


def sampling_bytes(num_rows: int, vocab_size: int) -> int:
    """Return a bound of what a sampler holds at once on a device, besides so many rows of logits.

    However many tokens requests name, and whatever they ask for.
    """
    in_chunk = min(num_rows, max(1, CHUNK_ELEMENTS_DEVICE // vocab_size))
    return (in_chunk * _CHUNK_BYTES + num_rows * _FILTER_BYTES) * vocab_size


class Sampler:
    """Chooses the next token of each sequence.

    Token ids outside the vocabulary are passed over wherever a request names them: no such token
    can be sampled. shuttle: the way to the device and back.
    """

    def __init__(
        self,
        vocab_size: int,
        device: torch.device,
        kernels: Sampling,
        shuttle: Shuttle | None = None,
    ) -> None:
        """shuttle: None for one of the device's own."""
        self.vocab_size = vocab_size
        self.kernels = kernels
        self.shuttle = Shuttle(streams(device)) if shuttle is None else shuttle
        self.hashes = kernels.token_hashes(vocab_size, device)  # [vocab_size]
        elements = CHUNK_ELEMENTS_CPU if device.type == "cpu" else CHUNK_ELEMENTS_DEVICE
        self._planner = Planner(vocab_size, max(1, elements // vocab_size), kernels)

    def sample(self, logits: Tensor, sequences: list[Sequence]) -> SamplerOutput:
        """Choose the token that each sequence receives, and its logprobs where they were asked for.

        logits: as in `launch`. Syncs the host, once.
        """
        plan = self.plan(sequences)
        launched = self.launch(logits, self.shuttle.sent(plan.columns), plan.edits)
        return self.told(plan, logits, self.shuttle.fetched(launched))

    def plan(self, sequences: list[Sequence]) -> Plan:
        """Find out what the sequences ask for. Its columns and edits are what `launch` takes."""
        return self._planner.plan(sequences)

    def launch(self, logits: Tensor, columns: Columns, edits: tuple[Edits, ...]) -> Launched:
        """Have tokens chosen; nothing waits for that, but for room to send many chunks of edits.

        logits: float32 [num_samples, vocab_size], read only; row i is for the plan's sequence i.
        columns: of the plan, where the logits are; edits: of the plan, in host memory.
        """
        assert logits.dtype == torch.float32, logits.dtype
        best, is_finite = self.kernels.greedy_checked(logits)
        token_ids = best
        for draw in columns.draws:
            token_ids = self._drawn(token_ids, logits, draw)
        highest = tuple(self._edited(chunk, logits, token_ids) for chunk in edits)
        logprobs = tuple(
            self._logprobs(logits[rows], token_ids[rows], most) for rows, most in columns.asked
        )
        return Launched(token_ids, is_finite, highest, logprobs)

    def told(self, plan: Plan, logits: Tensor, launched: Launched) -> SamplerOutput:
        """Return what came of a plan. launched: in host memory.

        A row that is not finite, all of whose tokens are forbidden, or whose grammar exceeds a
        limit, gives an entry of `errors`, and the other rows are as if it were not there. Syncs the
        host for rows that are not finite.
        """
        assert logits.shape == (plan.num_rows, self.vocab_size), logits.shape
        finite: list[bool] = launched.is_finite.tolist()
        errors = {row: _not_finite(logits[row]) for row, ok in enumerate(finite) if not ok}
        refused = {row: error for row, error in plan.failed.items() if row not in errors}
        for rows, highest in zip(plan.edited, launched.highest, strict=True):
            for row, value in zip(rows, highest.tolist(), strict=True):
                if np.isinf(value) and row not in errors:
                    refused[row] = _no_choice(value)
        errors |= refused
        logprobs: list[TokenLogprobs | None] | None = None
        if plan.asked:
            logprobs = [None] * plan.num_rows
            for chunk, found in zip(plan.asked, launched.logprobs, strict=True):
                entries = told_logprobs(found, [top for _, top in chunk])
                for (row, _), entry in zip(chunk, entries, strict=True):
                    logprobs[row] = None if row in errors else entry
        return SamplerOutput(launched.token_ids.tolist(), logprobs, errors, set(refused))

    def known_logprobs(self, logits: Tensor, token_ids: Tensor, top: int) -> tuple[Logprobs, ...]:
        """Look up the logprobs of known tokens, token_ids[i] by row i of the logits, by chunk.

        logits: float32 [num_tokens, vocab_size]; token_ids: int64 [num_tokens], where the logits
        are. A row that is not finite gives NaN. Nothing waits for it.
        """
        most = min(top, self.vocab_size)
        size = self._planner.rows_per_chunk
        chunks = zip(torch.split(logits, size), torch.split(token_ids, size), strict=True)
        return tuple(self._logprobs(rows, ids, most) for rows, ids in chunks if len(ids))

    def _drawn(self, token_ids: Tensor, logits: Tensor, draw: Draw | None) -> Tensor:
        """Return the greedy choices with those of drawn rows in place of them. May use them up."""
        if draw is None:
            return token_ids
        part = logits if draw.rows is None else logits[draw.rows]
        chosen = self.kernels.sample(
            part, draw.temperature, draw.min_p, draw.top_k, draw.top_p, draw.keys, self.hashes
        )
        if draw.rows is None:
            return chosen
        token_ids[draw.rows] = chosen
        return token_ids

    def _edited(self, edits: Edits, logits: Tensor, token_ids: Tensor) -> Tensor:
        """Choose the tokens of a chunk's rows, in place; return the largest logit that was left."""
        edits = self.shuttle.sent(edits)
        part = logits[edits.rows]  # a copy
        self._edit_(part, edits)
        best, _ = self.kernels.greedy_checked(part)
        highest = part.gather(1, best[:, None]).squeeze(1)
        token_ids[edits.rows] = self._drawn(best, part, edits.draw)
        return highest

    def _edit_(self, logits: Tensor, edits: Edits) -> None:
        """Forbid tokens, add biases and penalise, in place and in this order."""
        if edits.is_forbidden is not None:
            count = edits.is_forbidden.shape[0]
            logits[:count].masked_fill_(edits.is_forbidden, -torch.inf)
        if edits.kept is not None:
            self.kernels.keep_only_(logits, *edits.kept)
        if edits.forbidden is not None:
            self.kernels.forbid_(logits, *edits.forbidden)
        if edits.bias is not None:
            self.kernels.add_bias_(logits, *edits.bias)
        if edits.penalties is not None:
            self.kernels.penalise_(logits, *edits.penalties)

    def _logprobs(self, logits: Tensor, token_ids: Tensor, most: int) -> Logprobs:
        return Logprobs(token_ids, *self.kernels.chosen_logprobs(logits, token_ids, most))


def told_logprobs(found: Logprobs, tops: list[int]) -> list[TokenLogprobs]:
    """Return what is told of each token. found: in host memory; tops: how many each row wants."""
    rows = zip(tops, *(column.tolist() for column in found), strict=True)
    return [
        TokenLogprobs(token_id, logprob, rank, tuple(zip(ids[:top], values[:top], strict=True)))
        for top, token_id, logprob, rank, ids, values in rows
    ]


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
