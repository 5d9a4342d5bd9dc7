"""Each policy's own rule, on examples that can be checked by hand."""

from __future__ import annotations

import numpy as np
import pytest

from moe_serve.experts.policies import (
    activation,
    adaptive,
    belady,
    expert_buffering,
    heat,
    learned,
    lfru,
    lfu,
    static,
)
from moe_serve.experts.policies.base import CacheShape, EvictionPolicy
from moe_serve.study.replay import (
    batched_steps,
    belady_misses,
    cache_shape,
    replay,
    static_misses,
)
from tests.experts.routing import synthetic_trace

SHAPE = CacheShape(num_layers=2, num_experts=4, slots_per_layer=3, total_slots=6)


def seen(policy: EvictionPolicy, *unions: list[int]) -> EvictionPolicy:
    """Show layer 0 these events in turn."""
    for step, union in enumerate(unions):
        policy.touch(step, 0, union)
    return policy


def test_lfu_counts_uses() -> None:
    policy = seen(lfu.build(SHAPE), [0, 1], [0, 2], [0, 2])

    assert list(policy.scores(0, [0, 1, 2, 3])) == [3, 1, 2, 0]
    assert policy.victims(0, [0, 1, 2], 2) == [1, 2]
    assert list(policy.scores(1, [0, 1])) == [0, 0]


def test_lfru_divides_by_age() -> None:
    policy = seen(lfru.build(SHAPE), [0], [0], [0], [1], [2])

    assert list(policy.scores(0, [0, 1, 2, 3])) == [1.0, 0.5, 1.0, 0.0]


def test_heat_is_a_moving_average() -> None:
    policy = heat.build(SHAPE)
    expected = np.zeros(4)
    rng = np.random.default_rng(0)
    for step in range(5000):  # long enough for the growing weight to be brought down
        union = np.flatnonzero(rng.random(4) < 0.3).tolist()
        policy.touch(step, 0, union)
        expected *= 0.92
        expected[union] += 0.08

    assert np.allclose(policy.scores(0, range(4)), expected, rtol=1e-6)


def test_activation_weighs_visits_since_the_expert_came_in() -> None:
    policy = seen(activation.build(SHAPE), [0, 1], [0, 2], [0, 3])
    before = policy.scores(0, [0])[0]

    assert policy.victims(0, [0, 1, 2], 1) == [1]
    assert policy.victims(0, [0], 1) == [0]
    assert policy.scores(0, [0])[0] < before / 1000


def test_activation_prefers_early_layers() -> None:
    policy = activation.build(SHAPE)
    policy.touch(0, 0, [0])
    policy.touch(0, 1, [0])

    assert policy.scores(0, [0])[0] > policy.scores(1, [0])[0]


def test_expert_buffering_evicts_who_came_last() -> None:
    policy = seen(expert_buffering.build(SHAPE), [0], [1], [2], [0])

    assert policy.victims(0, [0, 1, 2], 1) == [2]
    policy.touch(4, 0, [2])  # comes in again, after 0 and 1
    assert policy.victims(0, [0, 1, 2], 2) == [2, 1]


def test_belady_evicts_who_is_needed_last() -> None:
    ids = np.array([[[0], [0]], [[1], [0]], [[2], [0]], [[1], [0]], [[0], [0]]])
    policy = belady.build(SHAPE, belady.future(ids, np.arange(5), 4))
    policy.touch(0, 0, [0])
    policy.touch(0, 1, [0])

    assert policy.victims(0, [0, 1, 2, 3], 4) == [3, 0, 2, 1]
    with pytest.raises(AssertionError, match="announced"):
        policy.touch(1, 0, [3])


@pytest.mark.parametrize("batch", [1, 3])
def test_misses_of_static_follow_from_the_histogram(batch: int) -> None:
    trace = synthetic_trace()
    steps = batched_steps(trace, batch)
    shape = cache_shape(trace, 8, "layer")
    counts = np.stack([np.bincount(trace.ids[:, la].ravel(), minlength=16) for la in range(3)])
    policy = static.build(shape, {"counts": counts})
    chosen = [{e for e in range(16) if policy.admits(la, e)} for la in range(3)]

    result = replay(trace, steps, shape, policy)

    first_uses = sum(
        len(experts & set(trace.ids[:, la].ravel().tolist())) for la, experts in enumerate(chosen)
    )
    assert [len(experts) for experts in chosen] == [8, 8, 8]
    assert result.misses == static_misses(trace, steps, chosen) + first_uses


def test_static_without_counts_stays_with_its_first_window() -> None:
    policy = static.build(SHAPE)
    for step in range(256):
        assert policy.admits(0, 3)
        policy.touch(step, 0, [0, 1, 2] if step % 2 else [0, 1])

    assert [policy.admits(0, expert) for expert in range(4)] == [True, True, True, False]
    assert policy.admits(1, 3), "a layer that was not used goes on counting"


@pytest.mark.parametrize("module", [learned, adaptive])
def test_learning_closes_part_of_the_gap(module: object) -> None:
    """Routing that goes round in circles: LRU and LFU always evict what comes next."""
    trace = synthetic_trace(num_seqs=1, seq_len=600)
    circle = (np.arange(600)[:, None, None] * 2 + np.arange(2)) % 14
    trace.ids[:] = np.broadcast_to(circle, trace.ids.shape)
    steps = batched_steps(trace, 1)
    shape = cache_shape(trace, 8, "layer")

    ours = replay(trace, steps, shape, module.build(shape)).misses  # type: ignore[attr-defined]
    best = min(replay(trace, steps, shape, m.build(shape)).misses for m in (lfu, lfru))
    optimum = belady_misses(trace, steps, shape)

    assert (best - ours) / (best - optimum) > 0.5


def test_learned_weighs_the_experts_own_history_where_there_are_too_many_for_the_rest() -> None:
    trace = synthetic_trace(num_experts=16, seq_len=100)
    wide = CacheShape(num_layers=3, num_experts=300, slots_per_layer=8, total_slots=24)
    policy = learned.build(wide)

    result = replay(trace, batched_steps(trace, 1), wide, policy)

    assert "gram" not in policy.state()
    assert result.misses < result.union / 2


def test_adaptive_turns_away_from_what_misses_more() -> None:
    """First a hot set amid a scan, LFU's strength; then a moving set, which LFU is slow to see."""
    shape = CacheShape(num_layers=1, num_experts=32, slots_per_layer=6, total_slots=6)
    trace = synthetic_trace(num_seqs=2, seq_len=1500, num_layers=1, num_experts=32, top_k=2)
    rng = np.random.default_rng(0)
    hot = rng.integers(0, 4, 1500)
    trace.ids[:1500, 0] = np.stack([hot, 4 + np.arange(1500) % 28], axis=1)
    moving = (np.arange(1500) // 50 * 3) % 28
    trace.ids[1500:, 0] = np.stack([moving + rng.integers(0, 2, 1500), moving + 2], axis=1)
    steps = batched_steps(trace, 1)

    misses = {
        module.__name__: replay(trace, steps, shape, module.build(shape)).misses
        for module in (adaptive, lfu, lfru)
    }

    assert misses[adaptive.__name__] <= 1.02 * min(misses.values())
