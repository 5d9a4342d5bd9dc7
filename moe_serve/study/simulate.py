"""What `moe-serve simulate` computes: policies x slots x batch sizes, each beside Belady's bound.

Every figure is a replay through the runtime's `ExpertCache`. With predictors there are rows of how
good their guesses are, and, given a machine, runs on a virtual clock. Splits are by sequence, not
by token:

- all: the whole trace, from a cold start; what learns, learns as it goes.
- prequential: the same; of guesses, the first 2,000 tokens are counted apart.
- in-domain: policies and predictors learn from the first seven tenths of the sequences, and start
  from the state that they then save; counted is the rest, from an empty cache.
- transfer: the same, but they learn from another trace.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any

import numpy as np

from moe_serve import plugin
from moe_serve.errors import ConfigError, TraceError, nearest
from moe_serve.experts.policies import belady
from moe_serve.experts.policies.base import CacheShape, EvictionPolicy
from moe_serve.experts.trace import Trace
from moe_serve.study.prediction import held_bytes as predictor_bytes
from moe_serve.study.prediction import make_predictor
from moe_serve.study.prediction_rows import prediction_rows
from moe_serve.study.replay import (
    SCOPES,
    ReplayResult,
    belady_misses,
    cache_shape,
    held_bytes,
    replay,
    template_length,
    without_prefix,
)
from moe_serve.study.states import POLICIES, PolicyStates, PredictorStates, steps_of_batch

if TYPE_CHECKING:
    from moe_serve.study.timeline import TimelineResult

Array = np.ndarray[Any, Any]
PREDICTORS = "moe_serve.predictors"
SPLITS = ("all", "prequential", "in-domain", "transfer")
BASELINES = ("lru", "lfu", "lfru")  # the best of them is what `gap_closed` starts from
DEFAULT_POLICIES = ("lru", "lfu", "lfru", "heat", "adaptive", "belady")
DEFAULT_SHARES = (0.14, 0.20, 0.30, 0.41, 0.50, 0.75)  # of the experts of a layer
GUESS_SHARE = 0.41  # of a layer's experts are resident while guesses are judged
_LEARNING_SHARE = 0.7  # of the sequences, in split in-domain
DEFINITIONS = 1  # the version of what the rows mean


@dataclass(frozen=True, kw_only=True, slots=True)
class SimulateOptions:
    """What to replay.

    slots: per layer; () for DEFAULT_SHARES of the experts, never below top_k. batches: sequences
    that run at once. as_recorded: the steps that the trace has, instead of `batches`.
    learn_from: the trace that is learned from, for split transfer. keep_template: with False, the
    leading tokens that all sequences share are dropped, as a prefix cache would do. sequences: only
    the first so many. record_bytes: what moves for one expert; 0 where not known. predictors: whose
    guesses are judged. layer_s, link_bytes_s: seconds of one layer of one step, and the link's
    rate; with both, policies and predictors also run on a virtual clock.
    """

    policies: tuple[str, ...] = DEFAULT_POLICIES
    slots: tuple[int, ...] = ()
    batches: tuple[int, ...] = (1, 8)
    scopes: tuple[str, ...] = ("layer",)
    split: str = "all"
    as_recorded: bool = False
    learn_from: Trace | None = None
    keep_template: bool = True
    sequences: int | None = None
    record_bytes: int = 0
    predictors: tuple[str, ...] = ()
    layer_s: float | None = None
    link_bytes_s: float | None = None

    def __post_init__(self) -> None:
        for kind, given, allowed in (
            ("eviction", self.policies, plugin.names(POLICIES)),
            ("predictor", self.predictors, plugin.names(PREDICTORS)),
            ("scope", self.scopes, SCOPES),
            ("split", (self.split,), SPLITS),
        ):
            for name in given:
                if name not in allowed:
                    raise ConfigError(
                        f"{kind}: there is no {name!r}{nearest(name, allowed)} "
                        f"(there are: {', '.join(allowed)})"
                    )
        for batch in self.batches:
            if batch < 1:
                raise ConfigError(f"batch is {batch}; at least one sequence has to run")
        if (self.split == "transfer") != (self.learn_from is not None):
            raise ConfigError("split transfer needs a trace to learn from, and only it takes one")
        if self.sequences is not None and self.sequences < 1:
            raise ConfigError(f"{self.sequences} sequences: give at least 1")
        self._check_clock()

    def _check_clock(self) -> None:
        values = {"layer_s": self.layer_s, "link_bytes_s": self.link_bytes_s}
        for name, value in values.items():
            if value is not None and not 0 < value < float("inf"):
                raise ConfigError(f"{name} is {value}; it must be above 0")
        if self.record_bytes < 0:
            raise ConfigError(f"record_bytes is {self.record_bytes}; it must be at least 0")
        given = [value is not None for value in values.values()]
        if any(given) and not (all(given) and self.record_bytes):
            raise ConfigError(
                "the virtual clock needs the time of a layer, the rate of the link and the bytes "
                "of an expert; give all three, or neither of the first two"
            )

    @property
    def is_timed(self) -> bool:
        return self.layer_s is not None


@dataclass(frozen=True, kw_only=True, slots=True)
class Row:
    """One policy at one size, without a predictor or with one that guesses.

    miss: misses / logical, where logical = tokens x top_k x layers. belady: the least that any
    policy can have that loads on demand; belady_forced: where every missed expert must be given a
    slot. gap_closed: the share of the way from the best of lru, lfu, lfru to `belady`; None where
    there is none, and with guesses, which do not wait for a demand. union_over_slots,
    over_slots_share: mean and share above 1 of an event's union over the layer's slots.
    us_per_event: of policy and cache; predictor_us: of predicting and planning, both for one event.
    state_bytes: of what the policy saves; held_bytes: of what it holds in memory, predictor_bytes:
    of what the predictor holds. The rest is of the virtual clock, None without one: of guesses,
    useful came in time, late were on their way, wasted left unused.
    """

    policy: str
    predictor: str | None
    scope: str
    slots: int
    batch: int | None
    split: str
    num_tokens: int
    events: int
    logical: int
    union: int
    hits: int
    misses: int
    miss: float
    belady: float
    belady_forced: float
    gap_closed: float | None
    bytes_per_token: float
    union_over_slots: float
    over_slots_share: float
    us_per_event: float
    state_bytes: int
    held_bytes: int
    predictor_us: float | None = None
    predictor_bytes: int | None = None
    ms_per_token: float | None = None
    stall_ms_per_token: float | None = None
    issued: int | None = None
    useful: int | None = None
    late: int | None = None
    wasted: int | None = None


def simulate(
    trace: Trace, options: SimulateOptions, progress: Callable[[str], None] | None = None
) -> dict[str, Any]:
    """Replay `trace` as the options say; return what `simulate --json` prints.

    progress: is told of each replay before it starts. Raises CapacityError for slots below top_k,
    TraceError for a trace to learn from that is of another model, or has no steps to replay, or
    lacks what a predictor needs.
    """
    study = _Study(trace, options, progress or (lambda _: None))
    for name in options.predictors:
        make_predictor(name, study.measured)  # says what the trace lacks before hours are spent
    rows = [row for scope in options.scopes for row in study.rows(scope)]
    result = {
        "trace": study.measured.name,
        "definitions": DEFINITIONS,
        "rows": [_fields(row) for row in rows],
    }
    if options.predictors:
        result["predictions"] = [_fields(row) for row in study.predictions()]
    return result


def _fields(row: Any) -> dict[str, Any]:
    return {name: getattr(row, name) for name in type(row).__slots__}


def default_slots(num_experts: int, top_k: int) -> tuple[int, ...]:
    """Return DEFAULT_SHARES of a layer's experts as slots, rising, none below top_k."""
    return tuple(sorted({max(top_k, round(share * num_experts)) for share in DEFAULT_SHARES}))


@dataclass(slots=True)
class _Size:
    """One cell of the study: what is replayed at once, in how many slots."""

    scope: str
    batch: int | None
    slots: int
    steps: Array
    shape: CacheShape

    @property
    def guaranteed(self) -> int | None:
        return 0 if self.scope == "global" else None

    def __str__(self) -> str:
        return f"{self.slots} slots, batch {self.batch or 'as recorded'}, {self.scope}"


@dataclass(slots=True)
class _Study:
    """One trace, cut as the split says, and what is learned from its other part."""

    trace: Trace
    options: SimulateOptions
    progress: Callable[[str], None]
    measured: Trace = field(init=False)
    policy_states: PolicyStates = field(init=False)
    predictor_states: PredictorStates = field(init=False)

    def __post_init__(self) -> None:
        trace, other = self.trace, self.options.learn_from
        if other is not None:
            _check_same_model(trace, other)
        if self.options.sequences is not None:
            trace = trace.sequences(0, min(self.options.sequences, trace.num_seqs))
        if not self.options.keep_template:
            trace = without_prefix(trace, template_length(trace))
            other = other and without_prefix(other, template_length(other))
        if self.options.split == "in-domain":
            cut = int(_LEARNING_SHARE * trace.num_seqs)
            other = trace.sequences(0, cut)
            trace = trace.sequences(cut, trace.num_seqs)
        if other is not None and other.num_tokens == 0:
            raise TraceError(f"trace {other.name} has no tokens to learn from; give a longer one")
        too_many = [slots for slots in self.options.slots if slots > trace.num_experts]
        if too_many:
            raise ConfigError(
                f"{too_many[0]} slots a layer, but a layer has {trace.num_experts} experts; give "
                "at most that"
            )
        if trace.num_tokens == 0:
            raise TraceError(f"trace {trace.name} has no tokens left to replay; give a longer one")
        self.measured = trace
        self.policy_states = PolicyStates(other)
        self.predictor_states = PredictorStates(other)

    def rows(self, scope: str) -> Iterator[Row]:
        trace, options = self.measured, self.options
        batches: tuple[int | None, ...] = (None,) if options.as_recorded else options.batches
        for batch in batches:
            steps = steps_of_batch(trace, batch)
            for slots in options.slots or default_slots(trace.num_experts, trace.top_k):
                shape = cache_shape(trace, slots, scope)
                yield from self._rows_of_size(_Size(scope, batch, slots, steps, shape))

    def predictions(self) -> Iterator[Any]:
        """Yield rows of guesses, at the slots that were asked for, or GUESS_SHARE."""
        trace, options = self.measured, self.options
        share = max(trace.top_k, round(GUESS_SHARE * trace.num_experts))
        for slots in options.slots or (share,):
            yield from prediction_rows(
                trace,
                self.predictor_states,
                options.predictors,
                options.split,
                options.batches,
                slots,
                self.progress,
            )

    def _rows_of_size(self, size: _Size) -> Iterator[Row]:
        # as the runtime, which knows how many tokens use each expert
        with_counts = self.options.as_recorded or self.options.is_timed
        results: dict[str, tuple[ReplayResult, EvictionPolicy]] = {}
        for name in dict.fromkeys((*self.options.policies, *BASELINES, "belady")):
            self.progress(f"{name}, {size}")
            policy = self._policy(name, size)
            result = replay(
                self.measured, size.steps, size.shape, policy, size.guaranteed, with_counts
            )
            results[name] = result, policy
        optimum = belady_misses(self.measured, size.steps, size.shape)
        best = min(results[name][0].misses for name in BASELINES)
        for name in self.options.policies:
            result, policy = results[name]
            fields: dict[str, Any] = {
                "policy": name,
                "scope": size.scope,
                "slots": size.slots,
                "batch": size.batch,
                "split": self.options.split,
                "num_tokens": result.num_tokens,
                "events": result.events,
                "logical": result.logical,
                "union": result.union,
                "belady": optimum / result.logical,
                "belady_forced": results["belady"][0].miss,
                "union_over_slots": result.union_over_slots,
                "over_slots_share": result.over_slots_share,
                "us_per_event": result.us_per_event,
                "state_bytes": sum(array.nbytes for array in policy.state().values()),
                "held_bytes": held_bytes(policy),
            }
            closed = (best - result.misses) / (best - optimum) if best > optimum else None
            yield Row(
                predictor=None,
                hits=result.hits,
                misses=result.misses,
                miss=result.miss,
                gap_closed=closed,
                bytes_per_token=result.misses * self.options.record_bytes / result.num_tokens,
                **fields,
                **(_timed(self._run(name, size, None)[0]) if self.options.is_timed else {}),
            )
            for guesser in self.options.predictors if self.options.is_timed else ():
                yield self._guessed_row(fields, name, size, guesser)

    def _guessed_row(self, fields: dict[str, Any], name: str, size: _Size, guesser: str) -> Row:
        timed, held = self._run(name, size, guesser)
        counters = timed.counters
        return Row(
            predictor=guesser,
            hits=counters["hits"],
            misses=counters["misses"],
            miss=counters["misses"] / fields["logical"],
            gap_closed=None,
            bytes_per_token=counters["bytes"] / timed.num_tokens,
            predictor_us=timed.predictor_us,
            predictor_bytes=held,
            **fields,
            **_timed(timed),
        )

    def _run(self, name: str, size: _Size, guesser: str | None) -> tuple[TimelineResult, int]:
        """Run on the virtual clock; return what it gave, and the bytes that the predictor holds."""
        from moe_serve.study.timeline import Machine, run_timeline  # imports torch

        options = self.options
        assert options.layer_s is not None
        assert options.link_bytes_s is not None
        machine = Machine(
            layer_s=options.layer_s,
            link_bytes_s=options.link_bytes_s,
            record_bytes=options.record_bytes,
        )
        self.progress(f"{name} with {guesser or 'no predictor'} on the clock, {size}")
        predictor = None
        if guesser is not None:
            predictor = make_predictor(guesser, self.measured, self.predictor_states.of(guesser))
        steps = np.unique(size.steps, return_inverse=True)[1]  # a run counts its steps from 0
        policy = self._policy(name, replace(size, steps=steps))
        result = run_timeline(
            self.measured, steps, size.shape, policy, machine, predictor, size.guaranteed
        )
        return result, predictor_bytes(predictor)

    def _policy(self, name: str, size: _Size) -> EvictionPolicy:
        if name == "belady":
            trace = self.measured
            return belady.build(size.shape, belady.future(trace.ids, size.steps, trace.num_experts))
        state = self.policy_states.of(name, size.batch, size.shape)
        policy: EvictionPolicy = plugin.load(POLICIES, name).build(size.shape, state)
        return policy


def _timed(result: TimelineResult) -> dict[str, Any]:
    counters = result.counters
    return {
        "ms_per_token": 1e3 * result.seconds / result.num_tokens,
        "stall_ms_per_token": 1e3 * result.stall_s / result.num_tokens,
        "issued": result.issued,
        **{name: counters[name] for name in ("useful", "late", "wasted")},
    }


def _check_same_model(trace: Trace, other: Trace) -> None:
    shape, other_shape = (
        (t.num_layers, t.num_experts, t.top_k, t.model_id) for t in (trace, other)
    )
    is_named = trace.model_id is not None and other.model_id is not None
    if shape[:3] != other_shape[:3] or (is_named and trace.model_id != other.model_id):
        raise TraceError(
            f"trace {other.name} is of another model than {trace.name}: layers, experts, top_k and "
            f"model are {list(other_shape)} and {list(shape)}; learn from a trace of the same model"
        )
