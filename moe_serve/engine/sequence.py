"""What scheduler, runner and sampler say to each other: sequences, one step's work, its result.

A request with n outputs is n sequences; until its prompt is computed only the first exists.
"""

from __future__ import annotations

import itertools
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Literal

import numpy as np

from moe_serve.engine.routing_log import RoutingLog
from moe_serve.types import FinishReason, Request, TokenLogprobs

if TYPE_CHECKING:
    from moe_serve.engine.grammar import Matcher

SequenceState = Literal["waiting", "running", "finished"]
_numbers = itertools.count()


class Sequence:
    """One output of a request: its tokens, and how far its cache is.

    token_ids: prompt and output in one list. num_computed_tokens: how many of them have their keys
    and values in the cache. number: no other sequence has it. row: its row in the block tables of
    `KVCacheManager` while it runs, else -1. routing: of its tokens, where that is asked for. `seed`
    is the base of its noise; all of its sampling is a function of the request, the index and the
    tokens before. matcher: its place in a grammar, where its request has one.
    """

    __slots__ = (
        "finish_reason",
        "index",
        "matcher",
        "num_cached_tokens",
        "num_computed_tokens",
        "num_preemptions",
        "num_prompt_tokens",
        "number",
        "prompt_logprobs",
        "request",
        "routing",
        "row",
        "seed",
        "state",
        "token_ids",
    )

    def __init__(self, request: Request, index: int = 0) -> None:
        self.number = next(_numbers)
        self.request = request
        self.index = index
        self.seed = request.seed + index
        self.token_ids: list[int] = list(request.prompt_ids)
        self.num_prompt_tokens = len(request.prompt_ids)
        self.num_computed_tokens = 0
        if request.output_ids:
            self.token_ids += request.output_ids[index] or ()
        self.num_cached_tokens = 0
        self.num_preemptions = 0
        self.prompt_logprobs: list[TokenLogprobs | None] = []
        self.routing = RoutingLog() if request.sampling.return_routed_experts else None
        self.row = -1
        self.matcher: Matcher | None = None
        self.state: SequenceState = "waiting"
        self.finish_reason: FinishReason | None = None

    @property
    def num_output_tokens(self) -> int:
        return len(self.token_ids) - self.num_prompt_tokens

    @property
    def output_ids(self) -> list[int]:
        return self.token_ids[self.num_prompt_tokens :]


@dataclass(frozen=True, slots=True)
class ScheduledStep:
    """One step's work, complete when made.

    sequences: who runs, decodes (one token, after which a new one is sampled) first, then prompt
        chunks; a preempted sequence that is computed again counts as a prompt.
    query_lens: how many tokens of each run: token_ids[num_computed : num_computed + query_len].
    sample_sources: indices into `sequences` after whose last token one is sampled; an index repeats
        when a prompt that just ended forks into n outputs.
    sampled: the sequence that receives each of those tokens (for forks: outputs 0 .. n-1).
    block_copies: per cache group, (source, destination) block ids to be copied before the forward
        pass: copy on write.
    num_skipped: of a part of a step with one sequence: its tokens that another part has run.
    """

    step: int
    sequences: list[Sequence]
    query_lens: list[int]
    sample_sources: list[int]
    sampled: list[Sequence]
    block_copies: tuple[list[tuple[int, int]], ...]
    num_skipped: int = 0

    @property
    def num_tokens(self) -> int:
        return sum(self.query_lens)


@dataclass(frozen=True, slots=True)
class SamplerOutput:
    """What a step's forward pass gave.

    token_ids: one per entry of `ScheduledStep.sampled`. logprobs: likewise, or None when nobody
        asked; an entry is None where its request did not. errors: why a sampled row failed (a NaN
        in its logits), by its index; its token id means nothing. refused: those of them that the
        request itself has brought about.
    sequence_errors: why a sequence that ran failed as a whole (a hidden state that is not finite,
        sampled or not), by its index in `sequences`: nothing that it computed may be used again.
    prompt_logprobs: for the indices into `sequences` whose requests ask for them: the logprobs of
        the prompt tokens *after* each token that ran (the last prompt token has none after it).
    routed_experts: for the indices into `sequences` whose requests ask for them: int16 [query_len,
        num_moe_layers, top_k].
    """

    token_ids: list[int]
    logprobs: list[TokenLogprobs | None] | None = None
    errors: dict[int, str] = field(default_factory=dict)
    refused: set[int] = field(default_factory=set)
    sequence_errors: dict[int, str] = field(default_factory=dict)
    prompt_logprobs: dict[int, list[TokenLogprobs]] = field(default_factory=dict)
    routed_experts: dict[int, np.ndarray[Any, Any]] = field(default_factory=dict)
