"""The vocabulary that all parts share: requests, what they ask for, and what comes back.

Tensors of one step are in `ForwardBatch`. Nothing here knows how a step is made or run.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, fields, replace
from numbers import Integral, Real
from typing import Any, Literal

import msgspec
import numpy as np
import torch
from torch import Tensor

from moe_serve.errors import RequestError, nearest, shown
from moe_serve.structured_outputs import StructuredOutputs as StructuredOutputs
from moe_serve.structured_outputs import read_structured_outputs

FinishReason = Literal["stop", "length", "abort", "error"]

MAX_LOGPROBS = 20
MAX_STOP_STRINGS = 16
MAX_N = 1024
# Below these, float32 would round to 0 what is divided by, or what top-p leaves.
MIN_TEMPERATURE = 1e-30
MIN_REPETITION_PENALTY = 1e-3
MIN_TOP_P = 1e-9

_ALIGNMENT = 64
_MAY_BE_NONE = frozenset({"max_tokens", "seed", "logprobs", "prompt_logprobs"})
_TEXT_LISTS = ("stop", "bad_words")
_FLAGS = (
    "include_stop_str_in_output",
    "ignore_eos",
    "skip_special_tokens",
    "return_routed_experts",
)


@dataclass(frozen=True, kw_only=True, slots=True)
class SamplingParams:
    """How one request's tokens are chosen. Names and defaults are vLLM's.

    Sampling is a pure function of the request: the noise for a token is a counter-based hash of
    (seed, position, token id), so the same request gives the same tokens in any batch.
    `temperature=0` is greedy. `top_k=0` and `-1` mean all tokens. `max_tokens=None` means up to the
    model's context. One string for `stop` or `bad_words` is a list of one. NumPy's numbers are read
    too; all are kept as Python's own. structured_outputs may be given as a mapping of names to
    values. return_routed_experts needs the engine's option `enable_return_routed_experts`. Raises
    RequestError, naming field, value and range.
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
    bad_words: str | Sequence[str] = ()
    stop: str | Sequence[str] = ()
    stop_token_ids: Sequence[int] = ()
    include_stop_str_in_output: bool = False
    ignore_eos: bool = False
    logprobs: int | None = None
    prompt_logprobs: int | None = None
    skip_special_tokens: bool = True
    return_routed_experts: bool = False
    structured_outputs: StructuredOutputs | None = None

    def __post_init__(self) -> None:
        checked = {**self._checked_numbers(), **self._checked_lists()}
        for name, value in checked.items():
            object.__setattr__(self, name, value)
        if self.max_tokens is not None and self.min_tokens > self.max_tokens:
            raise RequestError(
                f"min_tokens is {self.min_tokens}, more than max_tokens {self.max_tokens}"
            )
        for name in _FLAGS:
            value = getattr(self, name)
            if not isinstance(value, bool):
                raise RequestError(f"{name} is {shown(value)}; it must be true or false")

    def _checked_numbers(self) -> dict[str, int | float]:
        """Return the fields that are numbers, as Python's own; those that are None are left out."""
        integers = {
            "n": (1, MAX_N),
            "max_tokens": (1, 2**31 - 1),
            "min_tokens": (0, 2**31 - 1),
            "top_k": (-1, 2**31 - 1),
            "seed": (-(2**63), 2**63 - 1),
            "logprobs": (0, MAX_LOGPROBS),
            "prompt_logprobs": (0, MAX_LOGPROBS),
        }
        numbers = {
            "temperature": (0.0, 1e4),
            "top_p": (MIN_TOP_P, 1.0),
            "min_p": (0.0, 1.0),
            "repetition_penalty": (MIN_REPETITION_PENALTY, 1e4),
            "presence_penalty": (-2.0, 2.0),
            "frequency_penalty": (-2.0, 2.0),
        }
        checked: dict[str, int | float] = {}
        for name, (least, most) in integers.items():
            value = getattr(self, name)
            if value is not None or name not in _MAY_BE_NONE:
                checked[name] = checked_integer(name, value, least, most)
        for name, (low, high) in numbers.items():
            checked[name] = checked_number(name, getattr(self, name), low, high)
        temperature = checked["temperature"]
        if 0 < temperature < MIN_TEMPERATURE:
            raise RequestError(
                f"temperature is {temperature}; it must be 0 (greedy) or from {MIN_TEMPERATURE:g}"
            )
        return checked

    def _checked_lists(self) -> dict[str, Any]:
        """Return the fields that hold several values, as tuples and dicts of Python's own."""
        checked: dict[str, Any] = {name: _texts(name, getattr(self, name)) for name in _TEXT_LISTS}
        if len(checked["stop"]) > MAX_STOP_STRINGS:
            raise RequestError(
                f"stop has {len(checked['stop'])} strings; use at most {MAX_STOP_STRINGS}"
            )
        checked["stop_token_ids"] = _token_ids("stop_token_ids", self.stop_token_ids)
        if self.allowed_token_ids is not None:
            allowed = _token_ids("allowed_token_ids", self.allowed_token_ids)
            if not allowed:
                raise RequestError(
                    "allowed_token_ids is empty: no token could be chosen; leave it out"
                )
            checked["allowed_token_ids"] = allowed
        if self.logit_bias is not None:
            checked["logit_bias"] = _biases(self.logit_bias)
        if self.structured_outputs is not None:
            checked["structured_outputs"] = read_structured_outputs(self.structured_outputs)
        return checked

    @classmethod
    def from_mapping(cls, options: Mapping[str, Any]) -> SamplingParams:
        """Build from names and values; an unknown name is an error that names the nearest one."""
        known = [f.name for f in fields(cls)]
        for name in options:
            if name not in known:
                raise RequestError(f"no sampling option {name!r}{nearest(name, known)}")
        return cls(**options)


def checked_integer(name: str, value: object, low: int, high: int) -> int:
    """Return `value`, from `low` to `high`, as an int: NumPy's integers are read too."""
    if isinstance(value, bool) or not isinstance(value, Integral):
        raise RequestError(f"{name} is {shown(value)}; it must be an integer")
    number = int(value)
    if not low <= number <= high:
        raise RequestError(f"{name} is {shown(value)}; it must be from {low} to {high}")
    return number


def checked_number(name: str, value: object, low: float, high: float) -> float:
    """Return `value`, from `low` to `high`, as a float: NumPy's numbers are read too."""
    if isinstance(value, bool) or not isinstance(value, Real):
        raise RequestError(f"{name} is {shown(value)}; it must be a number")
    number: Any = value  # the abstract type has no order between it and a float
    if not low <= number <= high:  # a NaN is neither
        raise RequestError(f"{name} is {shown(value)}; it must be from {low:g} to {high:g}")
    return float(number)


def _texts(name: str, value: object) -> tuple[str, ...]:
    """Return a list of strings; one string is a list of one, and None an empty list."""
    if value is None:
        return ()
    if isinstance(value, str):
        value = (value,)
    if not isinstance(value, Iterable) or isinstance(value, bytes | Mapping):
        raise RequestError(f"{name} is {shown(value)}; it must be a string or a list of strings")
    words = tuple(value)
    for word in words:
        if not isinstance(word, str) or not word:
            raise RequestError(
                f"{name} holds {shown(word)}; each must be a string that is not empty"
            )
    return words


def _token_ids(name: str, value: object) -> tuple[int, ...]:
    if value is None:
        return ()
    if not isinstance(value, Iterable) or isinstance(value, str | bytes | Mapping):
        raise RequestError(f"{name} is {shown(value)}; it must be a list of token ids")
    return tuple(checked_integer(name, token, 0, 2**31 - 1) for token in value)


def _biases(value: object) -> dict[int, float]:
    if not isinstance(value, Mapping):
        raise RequestError(
            f"logit_bias is {shown(value)}; it must map token ids to what is added to their logits"
        )
    checked: dict[int, float] = {}
    for token, bias in value.items():
        token_id = checked_integer("logit_bias (a token id)", token, 0, 2**31 - 1)
        checked[token_id] = checked_number(f"logit_bias[{token_id}]", bias, -100.0, 100.0)
    return checked


@dataclass(frozen=True, kw_only=True, slots=True)
class Request:
    """One prompt as the engine takes it: already token ids, with every choice made.

    seed: the base of the noise; given at admission when the user sent none. Output i of n uses
    seed + i. eos_token_ids end an output unless `ignore_eos`; bad_words_ids are the token
    sequences of `bad_words` (tokenising is not the engine's work). cache_salt separates users'
    prefix caches. A lower priority number runs earlier. arrival_s is on the engine's clock.
    output_ids: of a request that goes on where another engine was lost: the tokens that each of its
    n outputs has, None for one that has ended; () at its beginning.
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
    output_ids: tuple[tuple[int, ...] | None, ...] = ()

    @property
    def is_resumed(self) -> bool:
        """Whether outputs have tokens already: then each goes on by itself."""
        return any(self.output_ids)


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


class RoutedExperts(msgspec.Struct, frozen=True, gc=False):
    """The experts of some consecutive tokens of a sequence, in the order of each one's routing.

    first: the position of the first of them. ids: int16 of `shape` [num_tokens, num_moe_layers,
    top_k], row by row.
    """

    first: int
    ids: bytes
    shape: tuple[int, int, int]

    @classmethod
    def of(cls, first: int, ids: np.ndarray[Any, Any]) -> RoutedExperts:
        num_tokens, num_layers, top_k = ids.shape
        return cls(first, ids.astype(np.int16).tobytes(), (num_tokens, num_layers, top_k))

    def array(self) -> np.ndarray[Any, Any]:
        """Return the ids, int16 [num_tokens, num_moe_layers, top_k]; read only."""
        return np.frombuffer(self.ids, np.int16).reshape(self.shape)


class StepOutput(msgspec.Struct, frozen=True, gc=False):
    """What one step gave to output `index` of a request.

    A Struct, not a dataclass: thousands are made in a step, and the collector need not see them.

    token_ids: the new ones ([] when it ended without one; see also routed_experts). finish_reason
    is None while it goes on. prompt_logprobs comes once, with the first output of index 0: an entry
    for each prompt token, None for the first. error says why, when finish_reason is "error";
    is_refused: that it is what the request asked for, so that asking again would fail again.
    routed_experts, where asked for: of the tokens that ran in this step; of a prompt that is not
    computed yet, without a token. Output 0 has those of the prompt, and they are those of all.
    """

    request_id: str
    index: int
    token_ids: tuple[int, ...]
    logprobs: tuple[TokenLogprobs, ...] = ()
    finish_reason: FinishReason | None = None
    prompt_logprobs: tuple[TokenLogprobs | None, ...] | None = None
    error: str | None = None
    num_cached_tokens: int = 0
    routed_experts: RoutedExperts | None = None
    is_refused: bool = False


@dataclass(frozen=True, slots=True)
class ForwardBatch:
    """All that one forward pass needs; complete when made. On the host, until `on` a device.

    A step holds `num_seqs` runs of consecutive tokens, one per sequence, decodes first. Tensors
    named per group have one entry for each of the model's cache groups, in the model's order.

    token_ids, positions: int64 [num_tokens]. sequence_ids: int64 [num_tokens], a number that a
        sequence keeps all its life and that no other has.
    query_lens, context_lens: how many tokens of each sequence run now, and how many there are in
        the cache with these written; prompt_lens: how many its prompt has; tuples of num_seqs.
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
    prompt_lens: tuple[int, ...]
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

    def on(self, device: torch.device) -> ForwardBatch:
        """Return this batch, whose tensors are on the host, as the model on `device` takes it.

        They travel as one, and nothing waits for them. `sequence_ids` stays: no model reads it.
        """
        if device.type == "cpu":
            return self
        fields = [self.token_ids, self.positions, self.sample_rows]
        moved = _moved([*fields, *self.slot_mapping, *self.block_tables], device)
        token_ids, positions, sample_rows, *rest = moved
        count = len(self.slot_mapping)
        return replace(
            self,
            token_ids=token_ids,
            positions=positions,
            sample_rows=sample_rows,
            slot_mapping=tuple(rest[:count]),
            block_tables=tuple(rest[count:]),
        )


def _moved(tensors: Sequence[Tensor], device: torch.device) -> list[Tensor]:
    """Return copies of host tensors on a device: one transfer, which nothing waits for.

    Each begins at a multiple of 64 bytes, whatever the others' sizes: a kernel is compiled anew for
    another alignment.
    """
    ends = np.cumsum([-(-tensor.nbytes // _ALIGNMENT) * _ALIGNMENT for tensor in tensors])
    is_pinned = device.type == "cuda"
    packed = torch.empty(int(ends[-1]), dtype=torch.uint8, pin_memory=is_pinned)
    starts = [0, *ends[:-1].tolist()]

    def part_of(memory: Tensor, start: int, like: Tensor) -> Tensor:
        return memory[start : start + like.nbytes].view(like.dtype).view(like.shape)

    for start, tensor in zip(starts, tensors, strict=True):
        part_of(packed, start, tensor).copy_(tensor)
    there = packed.to(device, non_blocking=is_pinned)
    return [part_of(there, start, one) for start, one in zip(starts, tensors, strict=True)]


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
    """One of a request's n outputs, as vLLM names it. error, is_refused: as in `StepOutput`.

    routed_experts: with `return_routed_experts`, of every token of prompt and output but the last,
    which is never run; None before the first token. Of an output that was aborted or has failed: of
    the tokens before the last one that came.
    """

    index: int
    text: str
    token_ids: tuple[int, ...]
    logprobs: tuple[TokenLogprobs, ...] | None
    finish_reason: FinishReason | None
    error: str | None = None
    routed_experts: RoutedExperts | None = None
    is_refused: bool = False


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
