"""From a scheduled step to tokens: build the batch, run the decoder, sample.

Knows block tables and caches, not who waits or why.
"""

from __future__ import annotations

import logging
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from moe_serve.comm.base import Dispatcher
from moe_serve.engine.kv_cache import KVCacheManager
from moe_serve.engine.sampler import Sampler, told_logprobs
from moe_serve.engine.sequence import SamplerOutput, ScheduledStep
from moe_serve.engine.step_parts import halves, joined
from moe_serve.engine.warm_up import nobodys_prompts, nobodys_sequences, sizes_up_to
from moe_serve.kernels.forward.gpu import Forward as GraphedForward
from moe_serve.models.decoder import Decoder
from moe_serve.types import ForwardBatch

logger = logging.getLogger(__name__)

# rows of logits at once for prompt logprobs: bounds memory, a vocabulary is wide
LOGIT_ROWS = 256


class ModelRunner:
    """Runs steps of one model on one device."""

    may_split = True

    def __init__(
        self,
        model: Decoder,
        kv: KVCacheManager,
        num_blocks: tuple[int, ...],
        sampler: Sampler,
        is_fused: bool = True,
        may_return_routing: bool = False,
    ) -> None:
        """is_fused: run the forward pass as one call, where the kernels have that.

        may_return_routing: whether there may be requests that ask for their tokens' experts.
        """
        self.model = model
        self._kv = kv
        self._block_size = kv.block_size
        self._sampler = sampler
        self._shuttle = sampler.shuttle
        self._device = model.kernels.device
        self._most_tokens = sys.maxsize
        self._caches = model.allocate_caches(num_blocks, kv.block_size)
        self._fused = model.fused(self._caches) if is_fused else None
        self._may_return_routing = may_return_routing
        self._moe_layers = torch.tensor(sorted(model.experts.layers), dtype=torch.int64)

    @torch.inference_mode()
    def warm_up(
        self, max_num_tokens: int, dispatchers: Sequence[Dispatcher] = (), num_ranks: int = 1
    ) -> None:
        """Have kernels compiled and graphs captured for steps of up to so many tokens.

        On tokens that belong to nobody: keys go nowhere, and uses are what they were. dispatchers:
        of one rank of `num_ranks`, those that steps may have, but without the other ranks.
        """
        tables = self.model.experts.layers.values()
        uses = [table.uses.clone() for table in tables]
        groups, max_num_seqs = self.model.groups, self._kv.max_num_seqs
        each: Sequence[Dispatcher | None] = dispatchers or [None]
        for num_tokens in sizes_up_to(max_num_tokens):
            context = min(num_tokens, self.model.max_model_len)
            batch = nobodys_prompts(num_tokens, context, self._block_size, len(groups))
            try:
                for dispatcher in each:
                    if dispatcher is not None:
                        dispatcher.begin_step([num_tokens] * num_ranks)
                    self._rehearse(batch, dispatcher)
            except torch.OutOfMemoryError as error:  # of a step, too: that has its own ways out
                message = (str(error).splitlines() or [""])[0]
                logger.warning(
                    "no memory for a step of %d tokens (%s); lower max_num_batched_tokens",
                    num_tokens, message,
                )  # fmt: skip
                torch.cuda.empty_cache()
                break
        if self._fused is not None and isinstance(self._fused.run, GraphedForward):
            self._fused.run.warm_up(
                [(num_seqs, 1) for num_seqs in sizes_up_to(min(max_num_seqs, max_num_tokens))],
                self._block_size,
                [group.window for group in groups],
                self.model.experts.resident() != [],
            )
        for num_rows in {1, min(max_num_seqs, max_num_tokens)}:
            # finite, whatever tokens of nobody give
            hidden = torch.zeros(
                num_rows, self.model.spec.hidden_size, dtype=self.model.dtype, device=self._device
            )
            logits = self.model.logits(hidden)
            for sequences in nobodys_sequences(num_rows):
                self._sampler.sample(logits, sequences)
        for table, before in zip(tables, uses, strict=True):
            table.uses.copy_(before)

    def _rehearse(self, batch: ForwardBatch, dispatcher: Dispatcher | None) -> None:
        if self._fused is not None:
            self._fused(batch)
        else:
            self.model.rehearsal(dispatcher).forward(batch.on(self._device), self._caches)

    @torch.inference_mode()
    def run(self, step: ScheduledStep) -> SamplerOutput:
        """Give each of `step.sampled` its next token.

        A step that a GPU has no memory for is run in parts, and so is every one as large from then
        on; of one token, or where other ranks take part, torch.OutOfMemoryError is raised.
        """
        self._copy_blocks(step.block_copies)
        return self._run_in_parts(step)

    def _run_in_parts(self, step: ScheduledStep) -> SamplerOutput:
        num_tokens = step.num_tokens
        if num_tokens <= self._most_tokens:
            try:
                return self._run(step)
            except torch.OutOfMemoryError as error:
                if num_tokens == 1 or not self.may_split:
                    raise
                message = (str(error).splitlines() or [""])[0]
            self._most_tokens = num_tokens // 2
            logger.warning(
                "no memory for a step of %d tokens (%s): from now on they run in parts of %d at "
                "most; lower max_num_batched_tokens or max_num_seqs",
                num_tokens, message, self._most_tokens,
            )  # fmt: skip
            torch.cuda.empty_cache()  # nothing where there is no GPU
        first, last = halves(step)
        num_before = len(first.sequences) if len(step.sequences) > 1 else 0
        return joined(self._run_in_parts(first), self._run_in_parts(last), num_before)

    def _run(self, step: ScheduledStep) -> SamplerOutput:
        batch = build_batch(step, self._kv.tables, self._block_size)
        wanting: list[int] = []
        if self._may_return_routing:
            wanting = [index for index, one in enumerate(step.sequences) if one.routing is not None]
        hidden, ids = self._forward(batch, bool(wanting))  # [num_tokens, hidden_size]
        # A GPU is at the forward pass now, and nothing up to `fetched` waits for it.
        plan = self._sampler.plan(step.sampled)
        prompts = _prompt_parts(step)
        rows, columns, targets = self._shuttle.sent(
            (
                _sample_rows(batch) if step.sampled else None,
                plan.columns,
                tuple(part.targets for part in prompts),
            )
        )
        known = tuple(  # first, as their logits are gone again: a vocabulary is wide
            self._sampler.known_logprobs(self.model.logits(hidden[part.rows]), token_ids, part.top)
            for part, token_ids in zip(prompts, targets, strict=True)
        )
        launched = None
        if step.sampled:
            logits = self.model.logits(hidden if rows is None else hidden[rows])
            launched = self._sampler.launch(logits, columns, plan.edits)
        is_finite = hidden.sum(-1, dtype=torch.float32).isfinite()  # [num_tokens]
        launched, known, is_finite = self._shuttle.fetched((launched, known, is_finite))
        if launched is None:
            output = SamplerOutput([])
        else:
            output = self._sampler.told(plan, logits, launched)
        output.sequence_errors.update(_not_finite(step, is_finite))
        for part, found in zip(prompts, known, strict=True):
            entries = output.prompt_logprobs.setdefault(part.index, [])
            for chunk in found:
                entries += told_logprobs(chunk, [part.top] * len(chunk.token_ids))
        if ids is not None:
            output.routed_experts.update(self._routed_experts(step, ids, wanting))
        return output

    def _forward(self, batch: ForwardBatch, is_noted: bool) -> tuple[Tensor, Tensor | None]:
        """Run the model; return its rows and, where asked for, which experts the tokens used.

        These are int64 [num_layers, num_tokens, top_k]; see `Watcher`.
        """
        with self.model.experts.step(batch, is_noted) as watcher:
            if self._fused is not None:
                hidden = self._fused(batch, watcher)  # brings it to the device itself
            else:
                hidden = self.model.forward(batch.on(self._device), self._caches)
            return hidden, watcher.ids if is_noted and watcher is not None else None

    def _routed_experts(
        self, step: ScheduledStep, ids: Tensor, wanting: list[int]
    ) -> dict[int, np.ndarray[Any, Any]]:
        """Return, for those of the step's sequences that want them, their tokens' experts."""
        ends = np.cumsum(step.query_lens)
        found = {}
        for index in wanting:
            end = int(ends[index])
            rows = ids[self._moe_layers, end - step.query_lens[index] : end]
            found[index] = rows.transpose(0, 1).to(torch.int16).contiguous().numpy()
        return found

    def _copy_blocks(self, copies: tuple[list[tuple[int, int]], ...]) -> None:
        """Copy blocks within the caches (copy on write); a step's sources are never its targets."""
        size = self._block_size
        for group, pairs in zip(self.model.groups, copies, strict=True):
            if not pairs:
                continue
            sources, targets = torch.tensor(pairs, device=self._device).t()  # [num_pairs] each
            for layer in group.layers:
                for cache in (self._caches[layer].key, self._caches[layer].value):
                    blocks = cache.view(cache.shape[0], -1, size, cache.shape[2])
                    blocks[:, targets] = blocks[:, sources]


def _sample_rows(batch: ForwardBatch) -> Tensor | None:
    """Return after which of the batch's rows tokens are sampled; None for all, in order: often."""
    rows = batch.sample_rows
    if rows.shape[0] == batch.num_tokens and torch.equal(rows, torch.arange(batch.num_tokens)):
        return None
    return rows


@dataclass(frozen=True, slots=True)
class _PromptPart:
    """Some tokens of a prompt whose successors' logprobs are asked for.

    index: of the sequence in its step. rows: where the tokens are among all of the step. targets:
    the tokens that follow them, int64. top: of how many others logprobs are told as well.
    """

    index: int
    rows: slice
    targets: Tensor
    top: int


def _prompt_parts(step: ScheduledStep) -> list[_PromptPart]:
    """Return what prompt logprobs are asked for in a step, `LOGIT_ROWS` rows at most each."""
    found: list[_PromptPart] = []
    start = 0
    for index, (sequence, length) in enumerate(zip(step.sequences, step.query_lens, strict=True)):
        top = sequence.request.sampling.prompt_logprobs
        if top is not None and sequence.index == 0:
            first = sequence.num_computed_tokens + step.num_skipped + 1
            # the row of the last prompt token speaks of an output, not of a prompt token
            count = min(first + length, sequence.num_prompt_tokens) - first
            for offset in range(0, count, LOGIT_ROWS):
                end = min(offset + LOGIT_ROWS, count)
                targets = torch.tensor(sequence.token_ids[first + offset : first + end])
                found.append(_PromptPart(index, slice(start + offset, start + end), targets, top))
        start += length
    return found


def _not_finite(step: ScheduledStep, is_finite: Tensor) -> dict[int, str]:
    """Name the sequences with a hidden row that is not finite; is_finite: bool [num_tokens].

    Rows that are not sampled too: their keys and values would be found by other prompts.
    """
    if bool(is_finite.all()):
        return {}
    parts = torch.split(is_finite, step.query_lens)
    error = "the hidden state is not finite (NaN or Inf)"
    return {index: error for index, part in enumerate(parts) if not bool(part.all())}


def build_batch(
    step: ScheduledStep, tables: tuple[np.ndarray, ...] | list[np.ndarray], block_size: int
) -> ForwardBatch:
    """Lay a step's tokens out flat.

    tables: per cache group, int32 [max_num_seqs, max_blocks], rows as in `Sequence.row`.
    """
    sequences, lens = step.sequences, step.query_lens
    starts = np.array([sequence.num_computed_tokens for sequence in sequences], dtype=np.int64)
    starts += step.num_skipped
    lengths = np.array(lens, dtype=np.int64)
    token_ids = [
        token
        for sequence, start, length in zip(sequences, starts.tolist(), lens, strict=True)
        for token in sequence.token_ids[start : start + length]
    ]
    ends = np.cumsum(lengths)
    places = np.repeat(np.arange(len(sequences)), lengths)  # [num_tokens], in `sequences`
    numbers = np.array([sequence.number for sequence in sequences], dtype=np.int64)
    positions = np.arange(len(token_ids)) + np.repeat(starts - (ends - lengths), lengths)
    contexts = starts + lengths
    rows = np.array([sequence.row for sequence in sequences], dtype=np.int64)
    max_blocks = -(-int(contexts.max()) // block_size)
    slots, batch_tables = [], []
    for table in tables:
        part = table[rows, :max_blocks]
        batch_tables.append(torch.from_numpy(part))
        blocks = part[places, positions // block_size].astype(np.int64)
        slots.append(torch.from_numpy(blocks * block_size + positions % block_size))
    return ForwardBatch(
        token_ids=torch.tensor(token_ids, dtype=torch.int64),
        positions=torch.from_numpy(positions),
        sequence_ids=torch.from_numpy(numbers[places]),
        query_lens=tuple(lens),
        context_lens=tuple(contexts.tolist()),
        prompt_lens=tuple(sequence.num_prompt_tokens for sequence in sequences),
        slot_mapping=tuple(slots),
        block_tables=tuple(batch_tables),
        block_size=block_size,
        sample_rows=torch.from_numpy(ends[np.array(step.sample_sources, dtype=np.int64)] - 1),
    )
