"""What `moe-serve simulate` computes: policies x slots x batch sizes, each beside Belady's bound.

Every figure is a replay through the runtime's `ExpertCache`. Splits are by sequence, not by token:

- all: the whole trace, from a cold start; what learns, learns as it goes.
- in-domain: policies learn from the first seven tenths of the sequences, and start from the state
  that they then save; counted is the rest, from an empty cache.
- transfer: the same, but they learn from another trace.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from moe_serve import plugin
from moe_serve.errors import ConfigError, TraceError, nearest
from moe_serve.experts.policies import belady
from moe_serve.experts.policies.base import CacheShape, EvictionPolicy
from moe_serve.experts.trace import Trace
from moe_serve.study.replay import (
    SCOPES,
    ReplayResult,
    batched_steps,
    belady_misses,
    cache_shape,
    held_bytes,
    recorded_steps,
    replay,
    replay_steps,
    template_length,
    without_prefix,
)

Array = np.ndarray[Any, Any]
POLICIES = "moe_serve.experts.policies"
SPLITS = ("all", "in-domain", "transfer")
BASELINES = ("lru", "lfu", "lfru")  # the best of them is what `gap_closed` starts from
DEFAULT_POLICIES = ("lru", "lfu", "lfru", "heat", "adaptive", "belady")
DEFAULT_SHARES = (0.14, 0.20, 0.30, 0.41, 0.50, 0.75)  # of the experts of a layer
_LEARNING_SHARE = 0.7  # of the sequences, in split in-domain
DEFINITIONS = 1  # the version of what the rows mean


@dataclass(frozen=True, kw_only=True, slots=True)
class SimulateOptions:
    """What to replay.

    slots: per layer; () for DEFAULT_SHARES of the experts, never below top_k. batches: sequences
    that run at once. as_recorded: the steps that the trace has, instead of `batches`.
    learn_from: the trace whose state policies start from, for split transfer. keep_template: with
    False, the leading tokens that all sequences share are dropped, as a prefix cache would do.
    record_bytes: what moves for one expert; 0 where not known.
    """

    policies: tuple[str, ...] = DEFAULT_POLICIES
    slots: tuple[int, ...] = ()
    batches: tuple[int, ...] = (1, 8)
    scopes: tuple[str, ...] = ("layer",)
    split: str = "all"
    as_recorded: bool = False
    learn_from: Trace | None = None
    keep_template: bool = True
    record_bytes: int = 0

    def __post_init__(self) -> None:
        known = plugin.names(POLICIES)
        for kind, given, allowed in (
            ("eviction", self.policies, known),
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


@dataclass(frozen=True, kw_only=True, slots=True)
class Row:
    """One policy at one size.

    miss: misses / logical, where logical = tokens x top_k x layers. belady: the least that any
    policy can have; belady_forced: where every missed expert must be given a slot. gap_closed: the
    share of the way from the best of lru, lfu, lfru to `belady`; None where there is none.
    union_over_slots, over_slots_share: mean and share above 1 of an event's union over the layer's
    slots. state_bytes: of what the policy saves; held_bytes: of what it holds in memory.
    """

    policy: str
    predictor: str | None
    scope: str
    slots: int
    batch: int | None
    split: str
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


def simulate(
    trace: Trace, options: SimulateOptions, progress: Callable[[str], None] | None = None
) -> dict[str, Any]:
    """Replay `trace` as the options say; return what `simulate --json` prints.

    progress: is told of each replay before it starts. Raises CapacityError for slots below top_k,
    TraceError for a trace to learn from that is of another model, or has no steps to replay.
    """
    study = _Study(trace, options, progress or (lambda _: None))
    rows = [row for scope in options.scopes for row in study.rows(scope)]
    return {
        "trace": study.measured.name,
        "definitions": DEFINITIONS,
        "rows": [{name: getattr(row, name) for name in Row.__slots__} for row in rows],
    }


def default_slots(num_experts: int, top_k: int) -> tuple[int, ...]:
    """Return DEFAULT_SHARES of a layer's experts as slots, rising, none below top_k."""
    return tuple(sorted({max(top_k, round(share * num_experts)) for share in DEFAULT_SHARES}))


@dataclass(slots=True)
class _Study:
    """One trace, cut as the split says, and what is learned from its other part."""

    trace: Trace
    options: SimulateOptions
    progress: Callable[[str], None]
    measured: Trace = field(init=False)
    learned_from: Trace | None = field(init=False)
    states: dict[tuple[str, int | None], Mapping[str, Array]] = field(default_factory=dict)

    def __post_init__(self) -> None:
        trace, other = self.trace, self.options.learn_from
        if other is not None:
            _check_same_model(trace, other)
        if not self.options.keep_template:
            trace = without_prefix(trace, template_length(trace))
            other = other and without_prefix(other, template_length(other))
        self.measured, self.learned_from = trace, other
        if self.options.split == "in-domain":
            cut = int(_LEARNING_SHARE * trace.num_seqs)
            self.learned_from = trace.sequences(0, cut)
            self.measured = trace.sequences(cut, trace.num_seqs)
        if self.measured.num_tokens == 0:
            raise TraceError(f"trace {trace.name} has no tokens left to replay; give a longer one")

    def rows(self, scope: str) -> Iterable[Row]:
        trace, options = self.measured, self.options
        batches: tuple[int | None, ...] = (None,) if options.as_recorded else options.batches
        for batch in batches:
            steps = _steps(trace, batch)
            for slots in options.slots or default_slots(trace.num_experts, trace.top_k):
                yield from self._rows_of_size(scope, batch, steps, slots)

    def _rows_of_size(
        self, scope: str, batch: int | None, steps: Array, slots: int
    ) -> Iterable[Row]:
        shape = cache_shape(self.measured, slots, scope)
        guaranteed = 0 if scope == "global" else None
        results: dict[str, tuple[ReplayResult, EvictionPolicy]] = {}
        for name in dict.fromkeys((*self.options.policies, *BASELINES, "belady")):
            self.progress(f"{name}, {slots} slots, batch {batch or 'as recorded'}, {scope}")
            policy = self._policy(name, batch, shape, steps)
            result = replay(
                self.measured, steps, shape, policy, guaranteed, self.options.as_recorded
            )
            results[name] = result, policy
        optimum = belady_misses(self.measured, steps, shape)
        best = min(results[name][0].misses for name in BASELINES)
        for name in self.options.policies:
            result, policy = results[name]
            yield Row(
                policy=name,
                predictor=None,
                scope=scope,
                slots=slots,
                batch=batch,
                split=self.options.split,
                events=result.events,
                logical=result.logical,
                union=result.union,
                hits=result.hits,
                misses=result.misses,
                miss=result.miss,
                belady=optimum / result.logical,
                belady_forced=results["belady"][0].miss,
                gap_closed=(best - result.misses) / (best - optimum) if best > optimum else None,
                bytes_per_token=result.misses * self.options.record_bytes / result.num_tokens,
                union_over_slots=result.union_over_slots,
                over_slots_share=result.over_slots_share,
                us_per_event=result.us_per_event,
                state_bytes=sum(array.nbytes for array in policy.state().values()),
                held_bytes=held_bytes(policy),
            )

    def _policy(
        self, name: str, batch: int | None, shape: CacheShape, steps: Array
    ) -> EvictionPolicy:
        if name == "belady":
            trace = self.measured
            return belady.build(shape, belady.future(trace.ids, steps, trace.num_experts))
        state = None
        if self.learned_from is not None:
            if (name, batch) not in self.states:
                self.states[name, batch] = learned_state(name, self.learned_from, batch, shape)
            state = self.states[name, batch]
        policy: EvictionPolicy = plugin.load(POLICIES, name).build(shape, state)
        return policy


def learned_state(
    name: str, trace: Trace, batch: int | None, shape: CacheShape
) -> Mapping[str, Array]:
    """Return the state of policy `name` after it has seen all of `trace`; {} if it keeps none.

    batch: sequences at once, or None for the recorded steps.
    """
    policy: EvictionPolicy = plugin.load(POLICIES, name).build(shape)
    if not policy.state():
        return {}
    for step in replay_steps(trace, _steps(trace, batch)):
        for layer, union in enumerate(step.unions):
            policy.touch(step.number, layer, union)
    return policy.state()


def _steps(trace: Trace, batch: int | None) -> Array:
    return recorded_steps(trace) if batch is None else batched_steps(trace, batch)


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


def table(result: Mapping[str, Any]) -> str:
    """Return the rows of `simulate` as a table for people, one line each."""
    lines = [
        f"trace {result['trace']}; miss = blocks moved / (tokens x top_k x layers)",
        f"{'policy':<17}{'scope':<7}{'slots':>6}{'batch':>6}  {'split':<11}{'miss':>6}{'belady':>8}"
        f"{'forced':>8}{'gap closed':>12}{'r':>6}{'MB/token':>10}{'us/event':>10}{'state kB':>10}",
    ]
    for row in result["rows"]:
        gap = "-" if row["gap_closed"] is None else f"{row['gap_closed']:.0%}"
        lines.append(
            f"{row['policy']:<17}{row['scope']:<7}{row['slots']:>6}{row['batch'] or 'rec.':>6}  "
            f"{row['split']:<11}{row['miss']:>6.3f}{row['belady']:>8.3f}{row['belady_forced']:>8.3f}"
            f"{gap:>12}{row['union_over_slots']:>6.2f}{row['bytes_per_token'] / 1e6:>10.1f}"
            f"{row['us_per_event']:>10.1f}{row['state_bytes'] / 1e3:>10.1f}"
        )
    return "\n".join(lines)
