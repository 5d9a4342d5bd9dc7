"""Replay of recorded routing through the runtime's own `ExpertCache`, and Belady's bound for it.

Definitions: Zhang (arXiv 2608.07911), section 2. An event is (step, layer) with the union of the
experts that the step's tokens use; logical = tokens x top_k x layers; miss = misses / logical.
Knows no bandwidth and no clock: it counts.
"""

from __future__ import annotations

import heapq
import sys
import time
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

import numpy as np

from moe_serve.errors import ConfigError, TraceError
from moe_serve.experts.cache import Event, ExpertCache
from moe_serve.experts.policies import belady
from moe_serve.experts.policies.base import CacheShape, EvictionPolicy
from moe_serve.experts.trace import Trace

Array = np.ndarray[Any, Any]
SCOPES = ("layer", "shared", "global")
_CHUNK_BYTES = 4 << 20  # of the masks of used experts that are made at a time
_TEMPLATE_AGREEMENT = 0.7


# -- from tokens to events ---------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class Step:
    """One step of a replay.

    unions: for each layer the experts that the step's tokens use, sorted; counts: how many tokens
    use each of them, in the same order.
    """

    number: int
    num_tokens: int
    unions: list[list[int]]
    counts: list[list[int]]


def batched_steps(trace: Trace, batch: int) -> Array:
    """Return each token's step, int64 [num_tokens], with `batch` places, each refilled at once.

    Sequences are taken first come first served; a step gives one token to each that is running.
    """
    free_at = [0] * batch  # the step from which on each place is free
    steps = np.empty(trace.num_tokens, np.int64)
    offsets = trace.seq_offsets.tolist()
    for begin, end in pairwise(offsets):
        start = free_at[0]
        steps[begin:end] = np.arange(start, start + end - begin)
        heapq.heapreplace(free_at, start + end - begin)
    return steps


def recorded_steps(trace: Trace) -> Array:
    """Return each token's step as it was recorded, int64 [num_tokens]. Raises TraceError."""
    if trace.step is None:
        raise TraceError(
            f"trace {trace.name} has no field 'step'; record it anew, or replay with a batch size"
        )
    return trace.step.astype(np.int64)


def replay_steps(trace: Trace, step_of_token: Array) -> Iterator[Step]:
    """Yield the steps in rising order, made a few megabytes at a time."""
    order = np.argsort(step_of_token, kind="stable")
    numbers, row_begins = np.unique(step_of_token[order], return_index=True)
    row_ends = np.append(row_begins[1:], len(order))
    sizes = row_ends - row_begins  # [num_steps], tokens
    num_layers, num_experts = trace.num_layers, trace.num_experts
    rows_of_layers = num_experts * np.arange(num_layers)[None, :, None]
    chunk = max(1, _CHUNK_BYTES // (8 * num_layers * num_experts))
    for first in range(0, len(numbers), chunk):
        last = min(first + chunk, len(numbers))
        rows = order[row_begins[first] : row_ends[last - 1]]
        step_of_row = np.repeat(np.arange(last - first), sizes[first:last])
        used = trace.ids[rows] + rows_of_layers
        used += (step_of_row * (num_layers * num_experts))[:, None, None]
        tokens = np.bincount(used.ravel(), minlength=(last - first) * num_layers * num_experts)
        present = np.flatnonzero(tokens)
        experts, counts = (present % num_experts).tolist(), tokens[present].tolist()
        union_sizes = np.bincount(present // num_experts, minlength=(last - first) * num_layers)
        begin = 0
        for index, union_size_of_layer in enumerate(
            union_sizes.reshape(last - first, num_layers).tolist()
        ):
            parts = []
            for size in union_size_of_layer:
                parts.append(slice(begin, begin + size))
                begin += size
            yield Step(
                int(numbers[first + index]),
                int(sizes[first + index]),
                [experts[part] for part in parts],
                [counts[part] for part in parts],
            )


def template_length(trace: Trace) -> int:
    """Return how many leading tokens the sequences share, by their routing: a chat template.

    A position belongs to it while, over sequences and layers, more than seven tenths of the experts
    are those that most sequences use there. (Equal tokens are not routed equally to the last bit.)
    """
    begins, ends = trace.seq_offsets[:-1], trace.seq_offsets[1:]
    if trace.num_seqs < 2:
        return 0
    for position in range(int((ends - begins).min())):
        ids = trace.ids[begins + position]  # [num_seqs, num_layers, top_k]
        counts = np.stack([np.bincount(row, minlength=trace.num_experts) for row in _by_layer(ids)])
        common = -np.sort(-counts, axis=1)[:, : trace.top_k]
        if common.sum() <= _TEMPLATE_AGREEMENT * ids.size:
            return position
    return int((ends - begins).min())


def _by_layer(ids: Array) -> Array:
    return ids.transpose(1, 0, 2).reshape(ids.shape[1], -1)


def without_prefix(trace: Trace, length: int) -> Trace:
    """Return the trace without the first `length` tokens of each sequence."""
    begins, ends = trace.seq_offsets[:-1], trace.seq_offsets[1:]
    position = np.arange(trace.num_tokens) - np.repeat(begins, ends - begins)
    kept = position >= length

    def part(array: Array | None) -> Array | None:
        return None if array is None else array[kept]

    lengths = np.maximum(ends - begins - length, 0)
    return Trace(
        name=f"{trace.name} without {length} tokens of each sequence",
        ids=trace.ids[kept],
        weights=trace.weights[kept],
        seq_offsets=np.concatenate([[0], lengths.cumsum()]),
        layer_ids=trace.layer_ids,
        num_experts=trace.num_experts,
        top_k=trace.top_k,
        step=part(trace.step),
        phase=part(trace.phase),
        token_ids=part(trace.token_ids),
        model_id=trace.model_id,
    )


# -- from events to misses ---------------------------------------------------------------------


@dataclass(frozen=True, kw_only=True, slots=True)
class ReplayResult:
    """What a replay counted.

    union_over_slots: of each event, its union over the layer's slots (a layer's equal part, where
    they are shared): the mean, and the share of events above 1. seconds: of policy and cache.
    """

    num_tokens: int
    events: int
    logical: int
    union: int
    hits: int
    misses: int
    misses_per_layer: tuple[int, ...]
    union_over_slots: float
    over_slots_share: float
    seconds: float

    @property
    def miss(self) -> float:
        return self.misses / self.logical if self.logical else 0.0

    @property
    def us_per_event(self) -> float:
        return 1e6 * self.seconds / self.events if self.events else 0.0


def cache_shape(trace: Trace, slots: int, scope: str) -> CacheShape:
    """Return a cache of `slots` a layer, its own in scope "layer", else shared by all layers."""
    if scope not in SCOPES:
        raise ConfigError(f"scope is {scope!r}; it must be one of {', '.join(SCOPES)}")
    return CacheShape(
        num_layers=trace.num_layers,
        num_experts=trace.num_experts,
        slots_per_layer=slots if scope == "layer" else None,
        total_slots=slots * trace.num_layers,
    )


def replay(
    trace: Trace,
    step_of_token: Array,
    shape: CacheShape,
    policy: EvictionPolicy,
    guaranteed: int | None = None,
    with_counts: bool = False,
) -> ReplayResult:
    """Replay a trace from a cold start through `ExpertCache`; the policy learns as it goes.

    guaranteed: slots that other layers cannot take, where they share; default: top_k. with_counts:
    tell the cache how many tokens use each expert, as the runtime does; it then keeps those used
    most where a union is larger than the slots, whatever the policy says.
    Raises CapacityError for fewer slots than a token needs.
    """
    cache = ExpertCache(shape, policy, trace.top_k, guaranteed)
    admits_all = type(policy).admits is EvictionPolicy.admits
    counted = _Sizes(shape)
    seconds = 0.0
    for step in replay_steps(trace, step_of_token):
        counted.add(step)
        number = step.number
        start = time.perf_counter()
        if admits_all:
            for layer, union in enumerate(step.unions):
                cache.serve(number, layer, union, step.counts[layer] if with_counts else None)
        else:
            for layer, union in enumerate(step.unions):
                counts = step.counts[layer] if with_counts else None
                _serve_admitted(cache, cache.begin(number, layer, union, counts))
        seconds += time.perf_counter() - start
    total = cache.counters.total()
    return ReplayResult(
        num_tokens=trace.num_tokens,
        events=counted.events,
        logical=trace.num_tokens * trace.num_layers * trace.top_k,
        union=counted.union,
        hits=total["hits"],
        misses=total["misses"],
        misses_per_layer=tuple(cache.counters.misses.tolist()),
        union_over_slots=counted.ratio / counted.events if counted.events else 0.0,
        over_slots_share=counted.over / counted.events if counted.events else 0.0,
        seconds=seconds,
    )


class _Sizes:
    """Sums over the events of a replay."""

    def __init__(self, shape: CacheShape) -> None:
        self._slots = shape.slots_per_layer or shape.total_slots / shape.num_layers
        self.events = self.union = self.over = 0
        self.ratio = 0.0

    def add(self, step: Step) -> None:
        sizes = [len(union) for union in step.unions]
        self.events += len(sizes)
        self.union += sum(sizes)
        self.over += sum(size > self._slots for size in sizes)
        self.ratio += sum(sizes) / self._slots


def _serve_admitted(cache: ExpertCache, event: Event) -> None:
    """Serve an event whose misses come in only where the policy admits them."""
    layer, admits = event.layer, cache.policy.admits
    cache.computed(event, [expert for expert in event.misses if not admits(layer, expert)])
    for wave in cache.waves(event):
        for expert, _ in wave.loads:
            cache.loaded(layer, expert)
    cache.end(event)


# -- bounds ------------------------------------------------------------------------------------


def belady_misses(trace: Trace, step_of_token: Array, shape: CacheShape) -> int:
    """Return the fewest misses that any policy can have that loads on demand only.

    Belady's rule with bypass: after each event the slots hold those experts, of the ones resident
    and the event's own, whose next uses are nearest. Where layers share slots, guarantees to single
    layers are left out; they can only add misses.
    """
    next_use = belady.Belady(shape, **belady.future(trace.ids, step_of_token, trace.num_experts))
    per_layer = shape.slots_per_layer
    if per_layer is None:
        optimal = [_Optimal(shape.total_slots)] * shape.num_layers
    else:
        optimal = [_Optimal(per_layer) for _ in range(shape.num_layers)]
    misses = 0
    for step in replay_steps(trace, step_of_token):
        for layer, union in enumerate(step.unions):
            next_use.touch(step.number, layer, union)
            misses += optimal[layer].serve(layer, union, next_use.scores(layer, union))
    return misses


class _Optimal:
    """The optimal content of some slots; a heap with what is needed last on top."""

    def __init__(self, slots: int) -> None:
        self._slots = slots
        self._score: dict[tuple[int, int], int] = {}  # of residents: minus the next use
        self._heap: list[tuple[int, tuple[int, int]]] = []

    def serve(self, layer: int, union: list[int], scores: list[int]) -> int:
        score, heap = self._score, self._heap
        misses = 0
        for expert, value in zip(union, scores, strict=True):
            key = (layer, expert)
            if key not in score:
                misses += 1
            score[key] = value
            heapq.heappush(heap, (value, key))
        while len(score) > self._slots:
            value, key = heapq.heappop(heap)
            if score.get(key) == value:
                del score[key]
        if len(heap) > 8 * self._slots:
            heap[:] = [(value, key) for key, value in score.items()]
            heapq.heapify(heap)
        return misses


def static_misses(trace: Trace, step_of_token: Array, chosen: list[set[int]]) -> int:
    """Return the misses of a fixed set of residents for each layer, from the histogram alone."""
    steps = belady.future(trace.ids, step_of_token, trace.num_experts)["offsets"]
    uses = np.diff(steps).reshape(trace.num_layers, trace.num_experts)
    return int(uses.sum()) - sum(
        int(uses[layer, expert]) for layer, experts in enumerate(chosen) for expert in experts
    )


def held_bytes(policy: object) -> int:
    """Return the memory that a policy holds: its arrays, and its containers with what they hold."""
    seen: set[int] = set()

    def size(value: object) -> int:
        if id(value) in seen:
            return 0
        seen.add(id(value))
        if isinstance(value, np.ndarray):
            return value.nbytes if value.base is None else size(value.base)
        parts: Iterable[object] = ()
        if isinstance(value, dict):
            parts = (*value.keys(), *value.values())
        elif isinstance(value, list | tuple | set):
            parts = value
        elif hasattr(value, "__dict__") and not isinstance(value, type):
            parts = vars(value).values()
        elif hasattr(value, "__slots__") and not isinstance(value, type):
            parts = [getattr(value, name) for name in value.__slots__]
        return sys.getsizeof(value) + sum(size(part) for part in parts)

    return size(policy)
