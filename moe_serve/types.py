"""The vocabulary that all parts share: requests, what they ask for, and what comes back.

Tensors of one step are in `ForwardBatch`. Nothing here knows how a step is made or run.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, fields
from typing import Any, Literal

import msgspec
import torch
from torch import Tensor

from moe_serve.errors import RequestError, nearest

FinishReason = Literal["stop", "length", "abort", "error"]

MAX_LOGPROBS = 20
MAX_STOP_STRINGS = 16
MAX_N = 1024


@dataclass(frozen=True, kw_only=True, slots=True)
class SamplingParams:
    """How one request's tokens are chosen. Names and defaults are vLLM's.

    Sampling is a pure function of the request: the noise for a token is a counter-based hash of
    (seed, position, token id), so the same request gives the same tokens in any batch.
    `temperature=0` is greedy. `top_k=0` and `-1` mean all tokens. `max_tokens=None` means up to the
    model's context. Raises RequestError, naming the field, the value and the range.
    """

    n: int = 1
    max_tokens: int | None = 16
    min_tokens: int = 0
    temperature: float = 1.0
    top_p: float = 1.0
    top_k: int = 0
    min_p: float = 0.0
    seed: int | None = None
    repetition_penalty: float = 1.0
    presence_penalty: float = 0.0
    frequency_penalty: float = 0.0
    logit_bias: Mapping[int, float] | None = None
    allowed_token_ids: Sequence[int] | None = None
    bad_words: Sequence[str] = ()
    stop: str | Sequence[str] = ()
    stop_token_ids: Sequence[int] = ()
    include_stop_str_in_output: bool = False
    ignore_eos: bool = False
    logprobs: int | None = None
    prompt_logprobs: int | None = None
    skip_special_tokens: bool = True

    def __post_init__(self) -> None:
        if isinstance(self.stop, str):
            object.__setattr__(self, "stop", (self.stop,))  # one string is a list of one
        for name in ("bad_words", "stop", "stop_token_ids"):
            value = getattr(self, name)
            object.__setattr__(self, name, tuple(value) if value is not None else ())
        if isinstance(self.allowed_token_ids, Sequence):
            object.__setattr__(self, "allowed_token_ids", tuple(self.allowed_token_ids))
        self._check_numbers()
        self._check_lists()

    def _check_numbers(self) -> None:
        _integer("n", self.n, 1, MAX_N)
        if self.max_tokens is not None:
            _integer("max_tokens", self.max_tokens, 1, 2**31 - 1)
        _integer("min_tokens", self.min_tokens, 0, 2**31 - 1)
        if self.max_tokens is not None and self.min_tokens > self.max_tokens:
            raise RequestError(
                f"min_tokens is {self.min_tokens}, more than max_tokens {self.max_tokens}"
            )
        _number("temperature", self.temperature, 0.0, 1e4)
        _number("top_p", self.top_p, 0.0, 1.0, above=True)
        _integer("top_k", self.top_k, -1, 2**31 - 1)
        _number("min_p", self.min_p, 0.0, 1.0)
        _number("repetition_penalty", self.repetition_penalty, 0.0, 1e4, above=True)
        _number("presence_penalty", self.presence_penalty, -2.0, 2.0)
        _number("frequency_penalty", self.frequency_penalty, -2.0, 2.0)
        if self.seed is not None:
            _integer("seed", self.seed, -(2**63), 2**63 - 1)
        for name in ("logprobs", "prompt_logprobs"):
            if getattr(self, name) is not None:
                _integer(name, getattr(self, name), 0, MAX_LOGPROBS)

    def _check_lists(self) -> None:
        if len(self.stop) > MAX_STOP_STRINGS:
            raise RequestError(f"stop has {len(self.stop)} strings; use at most {MAX_STOP_STRINGS}")
        for name in ("stop", "bad_words"):
            for word in getattr(self, name):
                if not isinstance(word, str) or not word:
                    raise RequestError(
                        f"{name} holds {word!r}; each must be a string that is not empty"
                    )
        for token in self.stop_token_ids:
            _integer("stop_token_ids", token, 0, 2**31 - 1)
        if self.allowed_token_ids is not None:
            if not self.allowed_token_ids:
                raise RequestError(
                    "allowed_token_ids is empty: no token could be chosen; leave it out"
                )
            for token in self.allowed_token_ids:
                _integer("allowed_token_ids", token, 0, 2**31 - 1)
        for token, bias in (self.logit_bias or {}).items():
            _integer("logit_bias (a token id)", token, 0, 2**31 - 1)
            _number(f"logit_bias[{token}]", bias, -100.0, 100.0)

    @property
    def is_greedy(self) -> bool:
        return self.temperature == 0.0

    @classmethod
    def from_mapping(cls, options: Mapping[str, Any]) -> SamplingParams:
        """Build from names and values; an unknown name is an error that names the nearest one."""
        known = [f.name for f in fields(cls)]
        for name in options:
            if name not in known:
                raise RequestError(f"no sampling option {name!r}{nearest(name, known)}")
        return cls(**options)


def _integer(name: str, value: object, low: int, high: int) -> None:
    if isinstance(value, bool) or not isinstance(value, int):
        raise RequestError(f"{name} is {value!r}; it must be an integer")
    if not low <= value <= high:
        raise RequestError(f"{name} is {value}; it must be from {low} to {high}")


def _number(name: str, value: object, low: float, high: float, *, above: bool = False) -> None:
    """Check `low <= value <= high`, or `low < value` with `above`."""
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        raise RequestError(f"{name} is {value!r}; it must be a number")
    if not math.isfinite(value) or not low <= value <= high or (above and value == low):
        start = "above" if above else "from"
        raise RequestError(f"{name} is {value}; it must be {start} {low:g} to {high:g}")


@dataclass(frozen=True, kw_only=True, slots=True)
class Request:
    """One prompt as the engine takes it: already token ids, with every choice made.

    seed: the base of the noise; given at admission when the user sent none. Output i of n uses
    seed + i. eos_token_ids end an output unless `ignore_eos`; bad_words_ids are the token
    sequences of `bad_words` (tokenising is not the engine's work). cache_salt separates users'
    prefix caches. A lower priority number runs earlier. arrival_s is on the engine's clock.
    """

    request_id: str
    prompt_ids: tuple[int, ...]
    sampling: SamplingParams
    seed: int = 0
    eos_token_ids: frozenset[int] = frozenset()
    bad_words_ids: tuple[tuple[int, ...], ...] = ()
    priority: int = 0
    arrival_s: float = 0.0
    cache_salt: str = ""


@dataclass(frozen=True, slots=True)
class TokenLogprobs:
    """The chosen token's logprob and rank, and the `top` most likely (id, logprob), best first.

    Natural logarithm of the model's own distribution: before penalties, bias and temperature.
    rank 1 is the most likely token.
    """

    token_id: int
    logprob: float
    rank: int
    top: tuple[tuple[int, float], ...] = ()


class StepOutput(msgspec.Struct, frozen=True, gc=False):
    """What one step gave to output `index` of a request.

    A Struct, not a dataclass: thousands are made in a step, and the collector need not see them.

    token_ids: the new ones ([] only when it ended without one). finish_reason is None while it
    goes on. prompt_logprobs comes once, with the first output of index 0: an entry for each prompt
    token, None for the first. error says why, when finish_reason is "error".
    """

    request_id: str
    index: int
    token_ids: tuple[int, ...]
    logprobs: tuple[TokenLogprobs, ...] = ()
    finish_reason: FinishReason | None = None
    prompt_logprobs: tuple[TokenLogprobs | None, ...] | None = None
    error: str | None = None
    num_cached_tokens: int = 0


@dataclass(frozen=True, slots=True)
class ForwardBatch:
    """All that one forward pass needs; complete when made, on the model's device.

    A step holds `num_seqs` runs of consecutive tokens, one per sequence, decodes first. Tensors
    named per group have one entry for each of the model's cache groups, in the model's order.

    token_ids, positions, sequence_ids: int64 [num_tokens]; sequence_ids is the row among num_seqs.
    query_lens, context_lens: how many tokens of each sequence run now, and how many there are in
        the cache with these written; tuples of num_seqs.
    slot_mapping: per group, int64 [num_tokens]: where each token's key and value are written,
        block id * block_size + offset.
    block_tables: per group, int32 [num_seqs, max_blocks]; entries past the context, and those that
        a sliding window has left, are 0: the null block, which is always zeros.
    sample_rows: int64 [num_samples], the tokens after which logits are wanted; a row may repeat.
    """

    token_ids: Tensor
    positions: Tensor
    sequence_ids: Tensor
    query_lens: tuple[int, ...]
    context_lens: tuple[int, ...]
    slot_mapping: tuple[Tensor, ...]
    block_tables: tuple[Tensor, ...]
    block_size: int
    sample_rows: Tensor

    @property
    def num_tokens(self) -> int:
        return self.token_ids.shape[0]

    @property
    def num_seqs(self) -> int:
        return len(self.query_lens)


@dataclass(frozen=True, slots=True)
class Routing:
    """Which experts each token uses, heaviest first (ties: lower id), and with what weight.

    expert_ids: int64 [num_tokens, top_k]; weights: float32 [num_tokens, top_k].
    """

    expert_ids: Tensor
    weights: Tensor


RouterScore = Literal["softmax", "sigmoid", "softmax_after_top_k", "sqrt_softplus"]


@dataclass(frozen=True, kw_only=True, slots=True)
class RouterRecipe:
    """How a token chooses its experts, and what each then weighs.

    score: the function of the router's logits; "softmax_after_top_k" chooses by logit and then
        takes the softmax over the chosen. has_selection_bias: a learned bias is added to the score
        for the choice, not for the weight (DeepSeek-V3, arXiv 2412.19437, 2.1.2).
    num_groups, top_k_groups: only experts of the best groups may be chosen; a group's rank is the
        sum of its `group_score_top` best scores (2: DeepSeek-V3; 1: DeepSeek-V2).
    renormalise: divide the chosen weights by their sum (+ `renormalise_eps`); then times `scale`.
    """

    num_experts: int
    top_k: int
    score: RouterScore = "softmax"
    has_selection_bias: bool = False
    num_groups: int = 1
    top_k_groups: int = 1
    group_score_top: int = 2
    renormalise: bool = False
    renormalise_eps: float = 0.0
    scale: float = 1.0


CacheKind = Literal["full", "sliding", "mla_latent", "recurrent"]


@dataclass(frozen=True, slots=True)
class CacheGroup:
    """Layers whose cache is kept alike, and so share block tables.

    kind "full" and "sliding" are paged keys and values; window is in tokens and only for "sliding"
    (a query at position p sees keys p - window + 1 .. p). "mla_latent" and "recurrent" are named so
    that a model can declare them; a manager that does not serve a kind refuses the model.
    bytes_per_token: of all the group's layers together.
    """

    kind: CacheKind
    layers: tuple[int, ...]
    bytes_per_token: int
    window: int | None = None


@dataclass(frozen=True, slots=True)
class CompletionOutput:
    """One of a request's n outputs, as vLLM names it."""

    index: int
    text: str
    token_ids: tuple[int, ...]
    logprobs: tuple[TokenLogprobs, ...] | None
    finish_reason: FinishReason | None
    error: str | None = None


@dataclass(frozen=True, slots=True)
class RequestMetrics:
    """Seconds on the engine's clock: first token, and the whole request, since its arrival."""

    ttft_s: float | None = None
    e2e_s: float | None = None
    num_cached_tokens: int = 0


@dataclass(frozen=True, slots=True)
class RequestOutput:
    """A request with all its outputs so far; `finished` when every one has ended."""

    request_id: str
    prompt: str | None
    prompt_token_ids: tuple[int, ...]
    outputs: tuple[CompletionOutput, ...]
    finished: bool
    prompt_logprobs: tuple[TokenLogprobs | None, ...] | None = None
    metrics: RequestMetrics = field(default_factory=RequestMetrics)


DTYPES: dict[str, torch.dtype] = {
    "bfloat16": torch.bfloat16,
    "float16": torch.float16,
    "float32": torch.float32,
}
