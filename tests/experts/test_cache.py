from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from moe_serve import plugin
from moe_serve.errors import CapacityError
from moe_serve.experts.cache import ExpertCache
from moe_serve.experts.policies import belady, lfru, lru
from moe_serve.experts.policies.base import CacheShape
from moe_serve.experts.trace import Trace, read_trace
from moe_serve.study.replay import batched_steps, belady_misses, cache_shape, replay
from tests.experts.routing import synthetic_trace

POLICIES = "moe_serve.experts.policies"
# offloading study, table 4.0a: 26 slots of 64, per layer, cold start
TABLE = {
    ("intent", 1): {"lru": 0.339, "lfu": 0.273, "lfru": 0.293, "belady": 0.176, "bound": 0.166},
    ("intent", 8): {"lru": 0.268, "lfu": 0.245, "lfru": 0.245, "belady": 0.213, "bound": 0.153},
    ("translation", 1): {
        "lru": 0.219,
        "lfu": 0.189,
        "lfru": 0.190,
        "belady": 0.111,
        "bound": 0.103,
    },
    ("translation", 8): {
        "lru": 0.215,
        "lfu": 0.197,
        "lfru": 0.197,
        "belady": 0.176,
        "bound": 0.120,
    },
}


def small_shape(slots: int, num_layers: int = 3, num_experts: int = 4) -> CacheShape:
    return CacheShape(
        num_layers=num_layers,
        num_experts=num_experts,
        slots_per_layer=slots,
        total_slots=slots * num_layers,
    )


def test_conformance_trace() -> None:
    """Zhang (arXiv 2608.07911): 3 layers x 4 experts, 5 steps, 2 slots a layer, LRU, cold."""
    shape = small_shape(2)
    cache = ExpertCache(shape, lru.build(shape), top_k=2)

    misses = [
        cache.serve(step, layer, union)
        for step, union in enumerate([[0, 1], [0, 2], [0, 1], [0, 3], [0, 1]])
        for layer in range(3)
    ]

    assert misses == [2, 2, 2] + [1] * 12
    total = cache.counters.total()
    assert (total["hits"], total["misses"]) == (12, 18)


# with -m slow: the other batch of each trace
QUICK = (("intent", 1), ("translation", 8))


@pytest.mark.parametrize(
    ("name", "batch"),
    [pytest.param(*key, marks=[] if key in QUICK else pytest.mark.slow) for key in TABLE],
)
def test_table_of_real_traces(shared_data: Path, name: str, batch: int) -> None:
    trace = read_trace(shared_data / "traces" / f"{name}.npz")
    steps = batched_steps(trace, batch)
    shape = cache_shape(trace, 26, "layer")

    found = {"bound": belady_misses(trace, steps, shape) / (trace.num_tokens * 26 * 6)}
    for policy in ("lru", "lfu", "lfru", "belady"):
        state = belady.future(trace.ids, steps, 64) if policy == "belady" else None
        built = plugin.load(POLICIES, policy).build(shape, state)
        found[policy] = replay(trace, steps, shape, built).miss

    assert found == {
        key: pytest.approx(value, abs=0.002) for key, value in TABLE[name, batch].items()
    }


def sequential_misses(trace: Trace, slots: int) -> int:
    """Replay with LFRU where every expert of an event is an event of its own."""
    shape = cache_shape(trace, slots, "layer")
    cache = ExpertCache(shape, lfru.build(shape), 1)
    for token, row in enumerate(np.sort(trace.ids, axis=2).tolist()):
        for layer, experts in enumerate(row):
            for place, expert in enumerate(experts):
                cache.serve(token * trace.top_k + place, layer, [expert])
    return cache.counters.total()["misses"]


@pytest.mark.parametrize(("top_k", "is_equal"), [(1, True), (4, False)])
def test_events_are_atomic(top_k: int, is_equal: bool) -> None:
    """Serving an event expert by expert counts otherwise, unless it has one expert only."""
    trace = synthetic_trace(top_k=top_k)
    shape = cache_shape(trace, 6, "layer")
    atomic = replay(trace, batched_steps(trace, 1), shape, lfru.build(shape)).misses

    assert (atomic == sequential_misses(trace, 6)) is is_equal


def test_a_fresh_expert_is_not_evicted_while_its_event_lasts() -> None:
    """A new expert has the lowest LFRU score; taking its slot in the same event corrupts it."""
    shape = small_shape(3, num_layers=1, num_experts=6)
    cache = ExpertCache(shape, lfru.build(shape), top_k=2)
    for step in range(5):
        cache.serve(step, 0, [0, 1, 2])
    event = cache.begin(5, 0, [3, 4, 5])

    slots = [slot for wave in cache.waves(event) for _, slot in wave.loads]

    assert len(slots) == len(set(slots)) == 3


def test_guesses_and_evictions_are_counted_by_layer() -> None:
    shape = small_shape(2)
    cache = ExpertCache(shape, lru.build(shape), top_k=2)
    for expert in (0, 1):
        assert cache.guess(1, expert) is not None
        cache.loaded(1, expert)
    assert cache.guess(1, 0) is None, "it is there"
    cache.serve(0, 1, [0, 2])  # 0 came true, 1 gives way
    cache.drop(1, 2)
    issued = [0] * shape.num_layers
    issued[1] = 2
    assert cache.counters.per_layer()["issued"] == issued
    assert cache.counters.per_layer()["evictions"] == issued
    assert (cache.counters.total()["useful"], cache.counters.total()["wasted"]) == (1, 1)


def test_too_few_slots_are_refused_with_the_number() -> None:
    shape = small_shape(1)
    with pytest.raises(CapacityError, match="at least expert_cache_slots 2"):
        ExpertCache(shape, lru.build(shape), top_k=2)


def test_a_guess_for_the_layer_that_is_being_served_comes_too_late() -> None:
    shape = small_shape(3)
    cache = ExpertCache(shape, lru.build(shape), top_k=2)
    event = cache.begin(0, 1, [0, 1])

    assert cache.guess(1, 0) is None
    assert cache.guess(1, 3) is None
    assert cache.guess(2, 3) is not None
    cache.end(event)


def test_an_event_of_which_all_experts_are_arriving_is_served() -> None:
    shape = small_shape(3)
    cache = ExpertCache(shape, lru.build(shape), top_k=2)
    assert cache.guess(0, 1) is not None
    assert cache.guess(0, 2) is not None

    assert cache.serve(0, 0, [1, 2]) == 2
    assert cache.residents(0) == [1, 2]
    assert cache.counters.total()["late"] == 2
