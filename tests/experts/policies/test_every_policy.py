"""What holds for every file in experts/policies."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest

from moe_serve import plugin
from moe_serve.errors import ConfigError, TraceError
from moe_serve.experts.cache import ExpertCache
from moe_serve.experts.policies import belady
from moe_serve.experts.policies.base import CacheShape, EvictionPolicy
from moe_serve.experts.trace import Trace
from moe_serve.study.replay import batched_steps, belady_misses, cache_shape, replay, replay_steps
from tests.experts.routing import synthetic_trace

POLICIES = "moe_serve.experts.policies"
NAMES = plugin.names(POLICIES)
CAUSAL = tuple(name for name in NAMES if name != "belady")
LEARNING = ("adaptive", "learned", "static")


def build(name: str, trace: Trace, shape: CacheShape, batch: int) -> EvictionPolicy:
    state = None
    if name == "belady":
        state = belady.future(trace.ids, batched_steps(trace, batch), trace.num_experts)
    policy: EvictionPolicy = plugin.load(POLICIES, name).build(shape, state)
    return policy


def misses_of_events(name: str, trace: Trace, slots: int, batch: int) -> list[int]:
    shape = cache_shape(trace, slots, "layer")
    cache = ExpertCache(shape, build(name, trace, shape, batch), trace.top_k)
    return [
        cache.serve(step.number, layer, union)
        for step in replay_steps(trace, batched_steps(trace, batch))
        for layer, union in enumerate(step.unions)
    ]


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("scope", ["layer", "shared", "global"])
@pytest.mark.parametrize("batch", [1, 3])
def test_never_beats_the_optimum(name: str, scope: str, batch: int) -> None:
    trace = synthetic_trace()
    steps = batched_steps(trace, batch)
    shape = cache_shape(trace, 5, scope)

    guaranteed = 0 if scope == "global" else None
    result = replay(trace, steps, shape, build(name, trace, shape, batch), guaranteed)

    assert belady_misses(trace, steps, shape) <= result.misses <= result.union
    assert result.hits + result.misses == result.union


@pytest.mark.parametrize("name", NAMES)
def test_victims_are_distinct_candidates(name: str) -> None:
    trace = synthetic_trace()
    shape = cache_shape(trace, 16, "layer")
    policy = build(name, trace, shape, 1)
    rng = np.random.default_rng(0)
    for step in replay_steps(trace, batched_steps(trace, 1)):
        for layer, union in enumerate(step.unions):
            policy.touch(step.number, layer, union)
            candidates = [e for e in range(16) if e not in union and rng.random() < 0.6]
            count = min(len(candidates), int(rng.integers(1, 5)))
            if count:
                victims = policy.victims(layer, candidates, count)
                assert len(victims) == len(set(victims)) == count
                assert set(victims) <= set(candidates)
            assert np.isfinite(list(policy.scores(layer, union))).all()


@pytest.mark.parametrize("name", CAUSAL)
def test_ties_go_to_the_lower_id(name: str) -> None:
    trace = synthetic_trace()
    policy = build(name, trace, cache_shape(trace, 8, "layer"), 1)

    assert policy.victims(0, [4, 7, 9], 2) == [4, 7]


@pytest.mark.parametrize("name", NAMES)
def test_decides_alike_every_time(name: str) -> None:
    trace = synthetic_trace()

    assert misses_of_events(name, trace, 5, 2) == misses_of_events(name, trace, 5, 2)


@pytest.mark.parametrize("name", CAUSAL)
@pytest.mark.parametrize("batch", [1, 2])
def test_sees_no_future(name: str, batch: int) -> None:
    """Results on a prefix do not change when the rest is shuffled."""
    trace = synthetic_trace(num_seqs=8, seq_len=60)
    half = trace.num_tokens // 2
    order = np.concatenate(
        [np.arange(half), half + np.random.default_rng(1).permutation(trace.num_tokens - half)]
    )
    shuffled = replace(trace, ids=trace.ids[order])
    num_events = half // batch * trace.num_layers

    before = misses_of_events(name, trace, 5, batch)
    after = misses_of_events(name, shuffled, 5, batch)

    assert before[:num_events] == after[:num_events]
    assert before != after


@pytest.mark.parametrize("name", LEARNING)
def test_starts_from_its_own_state(name: str) -> None:
    trace = synthetic_trace()
    shape = cache_shape(trace, 5, "layer")
    policy = build(name, trace, shape, 1)
    replay(trace, batched_steps(trace, 1), shape, policy)
    state = policy.state()

    again = plugin.load(POLICIES, name).build(shape, state)

    assert {key: value.shape for key, value in again.state().items()} == {
        key: value.shape for key, value in state.items()
    }


@pytest.mark.parametrize("name", ["adaptive", "learned"])
def test_what_was_learned_helps(name: str) -> None:
    trace = synthetic_trace(seq_len=100)
    shape = cache_shape(trace, 5, "layer")
    steps = batched_steps(trace, 1)
    policy = build(name, trace, shape, 1)
    cold = replay(trace, steps, shape, policy).misses

    warm = replay(trace, steps, shape, plugin.load(POLICIES, name).build(shape, policy.state()))

    assert warm.misses < cold


@pytest.mark.parametrize("name", LEARNING)
def test_the_state_of_another_model_is_refused(name: str) -> None:
    trace = synthetic_trace()
    state = build(name, trace, cache_shape(trace, 5, "layer"), 1).state()
    other = CacheShape(num_layers=3, num_experts=12, slots_per_layer=4, total_slots=12)

    with pytest.raises(TraceError, match="another model"):
        plugin.load(POLICIES, name).build(other, state)


def test_belady_cannot_serve() -> None:
    shape = CacheShape(num_layers=1, num_experts=4, slots_per_layer=2, total_slots=2)
    with pytest.raises(ConfigError, match="knows the future"):
        belady.build(shape)
