"""How good guesses are: predictors run over a trace as they would be in an engine.

They are shown one event after the other and asked before each; sequences are split, never tokens.
recall@n: of the experts that an event used, those among its n most probable (n: as many as it used;
and twice as many). What prefetching can gain is only measured on experts that are not resident:
precision of the guesses that the calibrated gate would issue, and the share of misses that they
cover. The cache is served on demand alone, so that guesses do not change what they are measured on.
"""

from __future__ import annotations

import time
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np

from moe_serve.errors import TraceError
from moe_serve.experts.cache import ExpertCache
from moe_serve.experts.calibration import Calibration
from moe_serve.experts.policies.base import CacheShape
from moe_serve.experts.trace import Trace
from moe_serve.plugin import load
from moe_serve.predictors import learned_hash
from moe_serve.predictors.base import START, Observation, Predictor, PredictorShape
from moe_serve.study.replay import batched_steps

Array = np.ndarray[Any, Any]
FURTHEST = 6
BREAK_EVEN = 0.75  # C / (B + C) as measured on a consumer GPU: 142 and 47 microseconds
EPOCHS = {"learned_ids": 3, "learned_hash": 24}  # of training, where not one (docs/log.md)
# what is counted per step and distance; distance 0 is before the step's first layer
USED, FOUND, FOUND_TWICE, ISSUED, CORRECT, MISSES = range(6)
_COUNTS = 6


@dataclass(frozen=True, kw_only=True, slots=True)
class Accuracy:
    """One distance of one split. distance 0: all layers, before the first one.

    recall, recall_twice: at as many guesses as the event used experts, and at twice as many.
    issued: guesses of experts not resident that passed the gate; precision: the share of them that
    was used, None where none was issued; cover: over all misses of all layers.
    """

    distance: int
    recall: float
    recall_twice: float
    issued: int
    precision: float | None
    cover: float


@dataclass(frozen=True, kw_only=True, slots=True)
class Measurement:
    """Counts of a run, int64 [num_steps, 1 + FURTHEST, 6], and what it took.

    first_tokens: int64 [num_steps], tokens that ran before each step. observe_us, predict_us:
    medians of single calls; state_bytes: of what the predictor holds after the run, in arrays.
    """

    counts: Array
    first_tokens: Array
    observe_us: float
    predict_us: float
    held_bytes: int

    def accuracy(self, first_token: int = 0, last_token: int | None = None) -> list[Accuracy]:
        """Sum up the steps that began within these tokens."""
        chosen = self.first_tokens >= first_token
        if last_token is not None:
            chosen &= self.first_tokens < last_token
        total = self.counts[chosen].sum(0)
        misses = max(1, int(total[0, MISSES]))
        rows = []
        for distance, row in enumerate(total.tolist()):
            used, issued = max(1, row[USED]), row[ISSUED]
            rows.append(
                Accuracy(
                    distance=distance,
                    recall=row[FOUND] / used,
                    recall_twice=row[FOUND_TWICE] / used,
                    issued=issued,
                    precision=row[CORRECT] / issued if issued else None,
                    cover=row[CORRECT] / misses,
                )
            )
        return rows


def shape_of(trace: Trace) -> PredictorShape:
    return PredictorShape(
        num_layers=trace.num_layers, num_experts=trace.num_experts, top_k=trace.top_k
    )


def make_predictor(name: str, trace: Trace, state: Mapping[str, Array] | None = None) -> Predictor:
    """Build a predictor for a trace; the oracle is given its future.

    Raises TraceError where the trace lacks what the predictor needs, naming it.
    """
    module = load("moe_serve.predictors", name)
    if name == "oracle":
        lengths = np.diff(trace.seq_offsets)
        names = np.repeat(np.arange(trace.num_seqs), lengths)
        state = {"ids": trace.ids, "sequence_ids": names}
    missing = {"hidden", "gates"}
    if trace.token_ids is None:
        missing.add("token_ids")
    lacking = sorted(missing & needs_of(name))
    if lacking:
        raise TraceError(f"{name} needs {', '.join(lacking)}, which trace {trace.name} has not")
    predictor: Predictor = module.build(shape_of(trace), state)
    return predictor


def needs_of(name: str) -> frozenset[str]:
    """Return what a predictor cannot do without, before it is built."""
    module = load("moe_serve.predictors", name)
    found: frozenset[str] = frozenset()
    for kind in vars(module).values():
        if isinstance(kind, type) and kind.__module__ == module.__name__:
            found |= getattr(kind, "needs", frozenset())
    return found


def steps_of(trace: Trace, batch: int) -> Iterator[tuple[Array, Array]]:
    """Yield each step's rows of the trace and their sequences, both int64 [num_tokens]."""
    steps = batched_steps(trace, batch)
    lengths = np.diff(trace.seq_offsets)
    names = np.repeat(np.arange(trace.num_seqs), lengths)
    order = np.argsort(steps, kind="stable")
    begins = np.flatnonzero(np.diff(steps[order], prepend=-1))
    for begin, end in zip(begins, [*begins[1:], len(order)], strict=True):
        rows = order[begin:end]
        yield rows, names[rows]


def observations(trace: Trace, rows: Array, names: Array) -> Iterator[Observation]:
    """Yield what a step shows: its beginning, then each layer."""
    token_ids = None if trace.token_ids is None else trace.token_ids[rows].astype(np.int64)
    nothing = np.zeros((len(rows), 0))
    yield Observation(
        layer=START,
        expert_ids=nothing.astype(np.int64),
        weights=nothing.astype(np.float32),
        sequence_ids=names,
        token_ids=token_ids,
    )
    ids = trace.ids[rows].astype(np.int64)
    weights = trace.weights[rows].astype(np.float32)
    for layer in range(trace.num_layers):
        yield Observation(
            layer=layer,
            expert_ids=ids[:, layer],
            weights=weights[:, layer],
            sequence_ids=names,
            token_ids=token_ids,
        )


def trained_state(name: str, trace: Trace, epochs: int | None = None) -> dict[str, Array]:
    """Return what a predictor learns from a trace, for a later run to start from.

    epochs: how often the trace is shown; None: as often as EPOCHS says, else once. learned_hash has
    a training of its own. {} for what keeps nothing, and for the oracle, which cannot.
    Raises TraceError where the trace lacks what the predictor needs, naming it.
    """
    if not trace.num_tokens:
        raise TraceError(f"trace {trace.name} has no tokens to learn from; give a longer one")
    predictor = make_predictor(name, trace)
    if name == "oracle" or not predictor.state():
        return {}
    epochs = epochs or EPOCHS.get(name, 1)
    if name == "learned_hash":
        assert trace.token_ids is not None
        return learned_hash.train(
            shape_of(trace), trace.ids, trace.token_ids, trace.seq_offsets, epochs
        )
    for epoch in range(epochs):
        for rows, names in steps_of(trace, 1):
            for observation in observations(trace, rows, names + epoch * trace.num_seqs):
                predictor.observe(observation)
    return predictor.state()


def measure(
    predictor: Predictor,
    trace: Trace,
    *,
    batch: int = 1,
    slots: int = 26,
    eviction: str = "lfu",
    break_even: float = BREAK_EVEN,
) -> Measurement:
    """Run a predictor over a trace, asking it before every event at every distance."""
    shape = CacheShape(
        num_layers=trace.num_layers,
        num_experts=trace.num_experts,
        slots_per_layer=slots,
        total_slots=slots * trace.num_layers,
    )
    policy = load("moe_serve.experts.policies", eviction).build(shape)
    cache = ExpertCache(shape, policy, trace.top_k)
    calibration = Calibration(FURTHEST)
    clock = _Clock(predictor)
    counts, first_tokens, num_tokens = [], [], 0
    for step, (rows, names) in enumerate(steps_of(trace, batch)):
        guesses = clock.run(observations(trace, rows, names), trace, np.unique(names).tolist())
        used = np.zeros((trace.num_layers, trace.num_experts), bool)
        np.put_along_axis(used, _by_layer(trace.ids[rows]), True, axis=1)
        absent = cache.slot_of_expert < 0
        counts.append(_count(guesses, used, absent, calibration, break_even))
        for layer in range(trace.num_layers):
            cache.serve(step, layer, np.flatnonzero(used[layer]).tolist())
        first_tokens.append(num_tokens)
        num_tokens += len(rows)
    return Measurement(
        counts=np.array(counts),
        first_tokens=np.array(first_tokens),
        observe_us=1e6 * float(np.median(clock.observe_s)),
        predict_us=1e6 * float(np.median(clock.predict_s)),
        held_bytes=held_bytes(predictor),
    )


class _Clock:
    """Shows a predictor a step, asks it, and takes the time of each call."""

    def __init__(self, predictor: Predictor) -> None:
        self.predictor = predictor
        self.observe_s: list[float] = []
        self.predict_s: list[float] = []

    def run(self, seen: Iterator[Observation], trace: Trace, names: list[int]) -> Array:
        """Return guesses, float32 [1 + FURTHEST, num_layers, num_experts], NaN where none is."""
        size = (1 + FURTHEST, trace.num_layers, trace.num_experts)
        guesses = np.full(size, np.nan, np.float32)
        for observation in seen:
            begin = time.perf_counter()
            self.predictor.observe(observation)
            now = time.perf_counter()
            layer = observation.layer
            if layer == START:
                targets = [(0, target) for target in range(trace.num_layers)]
            else:
                self.observe_s.append(now - begin)
                ahead = min(FURTHEST, trace.num_layers - 1 - layer)
                targets = [(distance, layer + distance) for distance in range(1, ahead + 1)]
            for distance, target in targets:
                begin = time.perf_counter()
                guess = self.predictor.predict(target, names)
                self.predict_s.append(time.perf_counter() - begin)
                guesses[distance, target] = guess
        return guesses


def _count(
    guesses: Array, used: Array, absent: Array, calibration: Calibration, break_even: float
) -> Array:
    """Return int64 [1 + FURTHEST, 6] of one step, and let the gate learn from it.

    used, absent: bool [num_layers, num_experts]; absent: not resident when the step began.
    """
    counts = np.zeros((1 + FURTHEST, _COUNTS), np.int64)
    counts[:, MISSES] = (used & absent).sum()
    num_used = used.sum(1)  # [num_layers]
    num_experts = used.shape[1]
    for distance, guess in enumerate(guesses):
        layers = np.flatnonzero(~np.isnan(guess[:, 0]))
        if len(layers) == 0:
            continue
        guess = guess[layers]
        order = np.argsort(-guess, axis=1, kind="stable")
        found = np.take_along_axis(used[layers], order, axis=1).cumsum(1)
        at = np.arange(len(layers))
        counts[distance, USED] = num_used[layers].sum()
        counts[distance, FOUND] = found[at, num_used[layers] - 1].sum()
        twice = np.minimum(2 * num_used[layers], num_experts)
        counts[distance, FOUND_TWICE] = found[at, twice - 1].sum()
        candidates = absent[layers]
        said, was_used = guess[candidates], used[layers][candidates]
        threshold = calibration.threshold(distance, break_even)
        if threshold is not None:
            counts[distance, ISSUED] = (said >= threshold).sum()
            counts[distance, CORRECT] = was_used[said >= threshold].sum()
        calibration.record(distance, said, was_used)
    return counts


def _by_layer(ids: Array) -> Array:
    """Return [num_layers, num_tokens * top_k] of [num_tokens, num_layers, top_k], int64."""
    return ids.astype(np.int64).transpose(1, 0, 2).reshape(ids.shape[1], -1)


def held_bytes(predictor: object) -> int:
    """Return the bytes of the arrays that an object holds, also in lists, dicts and parts of it.

    Arrays of zeros that were never written count as well, though they take no memory yet.
    """
    seen: set[int] = set()

    def bytes_of(thing: object) -> int:
        if id(thing) in seen:
            return 0
        seen.add(id(thing))
        if isinstance(thing, np.ndarray):
            return bytes_of(thing.base) if isinstance(thing.base, np.ndarray) else thing.nbytes
        if isinstance(thing, list | tuple):
            return sum(map(bytes_of, thing))
        if isinstance(thing, dict):
            return sum(map(bytes_of, thing.values()))
        is_part = type(thing).__module__.startswith("moe_serve.predictors")
        return sum(map(bytes_of, getattr(thing, "__dict__", {}).values())) if is_part else 0

    return bytes_of(predictor)


# -- splits ------------------------------------------------------------------------------------


def in_domain(
    name: str, trace: Trace, share: float = 0.7, epochs: int | None = None, **options: Any
) -> Measurement:
    """Learn from the first sequences of a trace, then measure on the others."""
    cut = int(trace.num_seqs * share)
    rest = trace.sequences(cut, trace.num_seqs)
    state = trained_state(name, trace.sequences(0, cut), epochs)
    return measure(make_predictor(name, rest, state), rest, **options)


def transfer(name: str, source: Trace, target: Trace, **options: Any) -> Measurement:
    """Start from what was learned on another trace. Raises TraceError for other shapes."""
    predictor = make_predictor(name, target, trained_state(name, source))
    return measure(predictor, target, **options)


def prequential(name: str, trace: Trace, **options: Any) -> Measurement:
    """Start from nothing, and measure while it learns."""
    return measure(make_predictor(name, trace), trace, **options)
