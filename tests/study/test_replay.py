from __future__ import annotations

from dataclasses import replace
from itertools import product

import numpy as np
import pytest

from moe_serve.errors import ConfigError, TraceError
from moe_serve.experts.cache import ExpertCache
from moe_serve.experts.policies import lfru, lru
from moe_serve.experts.trace import Trace
from moe_serve.study.replay import (
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
from tests.experts.routing import synthetic_trace


def with_lengths(*lengths: int) -> Trace:
    trace = synthetic_trace(num_seqs=1, seq_len=sum(lengths))
    return replace(trace, seq_offsets=np.cumsum([0, *lengths]))


def test_places_are_refilled_at_once_in_order() -> None:
    steps = batched_steps(with_lengths(3, 1, 2, 2), 2)

    # the first place runs sequence 0 and then 3; the second 1 and then 2
    assert steps.tolist() == [0, 1, 2, 0, 1, 2, 3, 4]


def test_batch_one_takes_token_after_token() -> None:
    assert batched_steps(with_lengths(3, 0, 2), 1).tolist() == [0, 1, 2, 3, 4]


def test_an_event_has_the_union_of_its_tokens() -> None:
    trace = with_lengths(3, 1, 2, 2)
    steps = batched_steps(trace, 2)

    found = list(replay_steps(trace, steps))

    assert [step.number for step in found] == [0, 1, 2, 3, 4]
    for step in found:
        rows = np.flatnonzero(steps == step.number)
        assert step.num_tokens == len(rows)
        for layer in range(trace.num_layers):
            experts, counts = np.unique(trace.ids[rows, layer], return_counts=True)
            assert step.unions[layer] == experts.tolist()
            assert step.counts[layer] == counts.tolist()


def test_chunks_make_no_difference(monkeypatch: pytest.MonkeyPatch) -> None:
    trace = synthetic_trace()
    whole = list(replay_steps(trace, batched_steps(trace, 3)))
    monkeypatch.setattr("moe_serve.study.replay._CHUNK_BYTES", 1)

    assert list(replay_steps(trace, batched_steps(trace, 3))) == whole


def test_recorded_steps_keep_their_numbers() -> None:
    trace = with_lengths(2, 2)
    recorded = replace(trace, step=np.array([7, 9, 9, 12], np.int32))

    found = list(replay_steps(recorded, recorded_steps(recorded)))

    assert [(step.number, step.num_tokens) for step in found] == [(7, 1), (9, 2), (12, 1)]
    with pytest.raises(TraceError, match="no field 'step'"):
        recorded_steps(trace)


def test_counts_agree_with_the_cache() -> None:
    trace = synthetic_trace()
    shape = cache_shape(trace, 5, "layer")
    result = replay(trace, batched_steps(trace, 3), shape, lfru.build(shape))

    cache = ExpertCache(shape, lfru.build(shape), trace.top_k)
    unions = [
        (cache.serve(step.number, layer, union), len(union))
        for step in replay_steps(trace, batched_steps(trace, 3))
        for layer, union in enumerate(step.unions)
    ]

    assert result.misses == sum(misses for misses, _ in unions) == sum(result.misses_per_layer)
    assert result.union == sum(size for _, size in unions)
    assert result.events == len(unions)
    assert result.logical == trace.num_tokens * 3 * 2
    assert result.union_over_slots == pytest.approx(np.mean([size / 5 for _, size in unions]))
    assert result.over_slots_share == np.mean([size > 5 for _, size in unions])


def fewest_misses(unions: list[list[int]], slots: int) -> int:
    """Search all contents after each event, for the least misses."""
    costs = {frozenset[int](): 0}
    for union in unions:
        after: dict[frozenset[int], int] = {}
        for content, cost in costs.items():
            missed = cost + len(set(union) - content)
            pool = sorted(content | set(union))
            for chosen in product((False, True), repeat=len(pool)):
                kept = frozenset(e for e, is_kept in zip(pool, chosen, strict=True) if is_kept)
                if len(kept) <= slots:
                    after[kept] = min(after.get(kept, missed), missed)
        costs = after
    return min(costs.values())


@pytest.mark.parametrize("seed", range(8))
@pytest.mark.parametrize("batch", [1, 2])
def test_the_bound_is_the_optimum(seed: int, batch: int) -> None:
    trace = synthetic_trace(num_seqs=4, seq_len=4, num_layers=1, num_experts=6, top_k=2, seed=seed)
    steps = batched_steps(trace, batch)
    unions = [step.unions[0] for step in replay_steps(trace, steps)]

    bound = belady_misses(trace, steps, cache_shape(trace, 3, "layer"))

    assert bound == fewest_misses(unions, 3)


def test_layers_that_share_slots_can_miss_less() -> None:
    trace = synthetic_trace()
    trace.ids[:, 0] = np.arange(2)  # one layer needs two slots only
    steps = batched_steps(trace, 1)

    own, shared = (
        belady_misses(trace, steps, cache_shape(trace, 4, s)) for s in ("layer", "shared")
    )

    assert shared < own


def test_an_unknown_scope_is_refused() -> None:
    with pytest.raises(ConfigError, match="layer, shared, global"):
        cache_shape(synthetic_trace(), 4, "rank")


def test_a_shared_template_is_found_and_dropped() -> None:
    trace = synthetic_trace(num_seqs=6, seq_len=30)
    for begin in trace.seq_offsets[:-1]:
        trace.ids[begin : begin + 7] = trace.ids[:7]
    trace.ids[30 + 2, 1] = 15, 14  # a rounding that went another way

    rest = without_prefix(trace, template_length(trace))

    assert template_length(trace) == 7
    assert rest.seq_offsets.tolist() == [0, 23, 46, 69, 92, 115, 138]
    assert (rest.ids[23:46] == trace.ids[37:60]).all()
    assert template_length(rest) == 0


def test_sequences_shorter_than_the_prefix_become_empty() -> None:
    rest = without_prefix(with_lengths(3, 1, 4), 2)

    assert rest.seq_offsets.tolist() == [0, 1, 1, 3]
    assert rest.num_tokens == 3


def test_held_bytes_counts_arrays_and_lists_once() -> None:
    shape = cache_shape(synthetic_trace(), 4, "layer")
    array = np.zeros(1000)
    policy = lru.build(shape)
    size = held_bytes(policy)
    policy.extra = [array, array[3:]]  # type: ignore[attr-defined]

    assert 3 * 16 * 8 < size < 4000
    assert size + 8000 <= held_bytes(policy) < size + 8400
