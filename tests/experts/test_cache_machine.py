"""Whatever is served, guessed, lost or resized: a slot holds what the cache says it holds.

Beside the cache a shadow notes which expert's record was last brought into each slot, and whether
it has arrived. Every expert that an event runs is looked up as a kernel would, and must be there.
"""

from __future__ import annotations

import random
from collections import Counter
from collections.abc import Container

import numpy as np
import pytest
from hypothesis import HealthCheck, settings
from hypothesis import strategies as st
from hypothesis.stateful import (
    RuleBasedStateMachine,
    initialize,
    invariant,
    rule,
    run_state_machine_as_test,
)

from moe_serve.experts.cache import ExpertCache
from moe_serve.experts.policies import learned, lfru, lru
from moe_serve.experts.policies.base import CacheShape

EXAMPLES, STEPS = 60, 50
LONG_RUN_STEPS = 100_000
NUM_LAYERS, NUM_EXPERTS, TOP_K = 3, 8, 2
POLICIES = {"lru": lru, "lfru": lfru, "learned": learned}


def shape_of(slots: int, is_shared: bool) -> CacheShape:
    return CacheShape(
        num_layers=NUM_LAYERS,
        num_experts=NUM_EXPERTS,
        slots_per_layer=None if is_shared else slots,
        total_slots=slots * NUM_LAYERS,
    )


class World:
    """A cache, what lies in its slots, and what has been counted by hand."""

    def __init__(self, policy: str, slots: int, is_shared: bool, guaranteed: int) -> None:
        shape = shape_of(slots, is_shared)
        self.is_shared = is_shared
        self.guaranteed = guaranteed
        self.cache = ExpertCache(shape, POLICIES[policy].build(shape), TOP_K, guaranteed, 10)
        self.arrived: dict[int, tuple[int, int]] = {}  # slot -> (layer, expert)
        self.on_its_way: dict[tuple[int, int], int] = {}  # guesses and preloads -> slot
        self.step = 0
        self.seen: Counter[str] = Counter()

    # -- what moves ----------------------------------------------------------------------------

    def start(self, layer: int, expert: int, slot: int) -> None:
        """Begin to overwrite a slot. It must not be one that something is being written to."""
        assert slot not in self.on_its_way.values(), "a slot that is loading was given away"
        assert 0 <= slot < self.cache.shape.total_slots
        self.arrived.pop(slot, None)
        self.on_its_way[layer, expert] = slot

    def arrive(self, layer: int, expert: int) -> None:
        assert not self.cache.is_resident(layer, expert)
        slot = self.on_its_way.pop((layer, expert))
        self.arrived[slot] = (layer, expert)
        self.cache.loaded(layer, expert)
        self.seen["fetched"] += 1

    def lose(self, layer: int, expert: int) -> None:
        del self.on_its_way[layer, expert]
        self.cache.failed(layer, expert)
        self.seen["lost"] += 1

    def run_expert(self, layer: int, expert: int) -> None:
        """Read an expert's record where the kernel would."""
        slot = int(self.cache.slot_of_expert[layer, expert])
        assert self.arrived.get(slot) == (layer, expert), "the kernel would read something else"

    # -- what can happen -----------------------------------------------------------------------

    def serve(self, layer: int, union: list[int], rng: random.Random) -> None:
        """Serve an event, with things happening between its waves; every wait must end."""
        cache = self.cache
        self.step += 1
        before = {e for e in range(NUM_EXPERTS) if cache.is_resident(layer, e)}
        held = [sum(key[0] == other for key in self.held()) for other in range(NUM_LAYERS)]
        num_lost = self.seen["lost"]
        event = cache.begin(self.step, layer, union)
        assert set(event.hits) == before & set(union)
        assert sorted([*event.hits, *event.arriving, *event.misses]) == union
        self.seen["used"] += len(union)
        self.seen["misses"] += len(union) - len(event.hits)
        to_run = set(union)
        if event.misses and rng.random() < 0.2:
            elsewhere = rng.sample(event.misses, rng.randint(1, len(event.misses)))
            cache.computed(event, elsewhere)
            to_run -= set(elsewhere)
            self.seen["computed"] += len(elsewhere)
        for index, wave in enumerate(cache.waves(event)):
            assert index < 4 * NUM_EXPERTS + NUM_LAYERS * cache.shape.total_slots, "no end"
            for expert, slot in wave.loads:
                self.start(layer, expert, slot)
            if wave.loads and rng.random() < 0.02:
                self.lose(layer, wave.loads[0][0])
                to_run = set()
                self.seen["given up"] += 1
                break
            for expert in wave.run:
                if (layer, expert) in self.on_its_way:
                    self.arrive(layer, expert)
                self.run_expert(layer, expert)
                to_run.remove(expert)
            if rng.random() < 0.2:
                self.guess(rng)
            if not wave.loads and not wave.run:
                self.settle_one(rng, spared={(layer, expert) for expert in union})
                self.seen["waited"] += 1
        assert not to_run, "an expert was never run"
        cache.end(event)
        for key in [key for key in self.on_its_way if key[0] == layer and key[1] in union]:
            self.arrive(*key)
        self.seen["streamed"] += event.is_streamed
        if self.is_shared and self.seen["lost"] == num_lost:
            for other in range(NUM_LAYERS):
                if other != layer:
                    now = sum(key[0] == other for key in self.held())
                    assert now >= min(held[other], self.guaranteed), "a guarantee was broken"

    def guess(self, rng: random.Random) -> None:
        layer, expert = rng.randrange(NUM_LAYERS), rng.randrange(NUM_EXPERTS)
        keep = {rng.randrange(NUM_EXPERTS) for _ in range(3)}
        was_absent = self.cache.is_absent(layer, expert)
        kept = {e for e in keep if self.cache.is_resident(layer, e)}
        slot = self.cache.guess(layer, expert, keep)
        if slot is not None:
            assert was_absent
            self.start(layer, expert, slot)
            self.seen["guessed"] += 1
        for other in kept:
            self.run_expert(layer, other)

    def settle_one(
        self, rng: random.Random, spared: Container[tuple[int, int]] = frozenset()
    ) -> None:
        """Let one of the records that are on their way arrive, or fail, but none of `spared`."""
        keys = sorted(key for key in self.on_its_way if key not in spared)
        if keys:
            key = rng.choice(keys)
            if rng.random() < 0.7:
                self.arrive(*key)
            else:
                self.lose(*key)

    def preload(self, rng: random.Random) -> None:
        wanted = [(rng.randrange(NUM_LAYERS), rng.randrange(NUM_EXPERTS)) for _ in range(6)]
        for layer, expert, slot in self.cache.preload(wanted):
            self.start(layer, expert, slot)
            self.seen["preloaded"] += 1

    def drop(self, rng: random.Random) -> None:
        if self.arrived:
            slot = rng.choice(sorted(self.arrived))
            self.cache.drop(*self.arrived.pop(slot))

    def resize(self, slots: int, rng: random.Random) -> None:
        while self.on_its_way:
            self.settle_one(rng)
        old = dict(self.arrived)
        for layer, expert, source, target in self.cache.resize(shape_of(slots, self.is_shared)):
            assert target not in {slot for slot in self.arrived if slot != source} or not any(
                self.cache.slot_of_expert[key] == target for key in [old[target]]
            ), "a record was moved over one that stays"
            assert old[source] == (layer, expert)
            assert not self.cache.is_resident(layer, expert), "read before it was copied"
            self.arrived[target] = old[source]
            self.cache.moved(layer, expert)
        self.seen["resized"] += 1

    # -- what must hold ------------------------------------------------------------------------

    def held(self) -> list[tuple[int, int]]:
        resident = [(la, e) for la in range(NUM_LAYERS) for e in self.cache.residents(la)]
        return resident + list(self.on_its_way)

    def check(self) -> None:
        cache, shape = self.cache, self.cache.shape
        held = self.held()
        assert len(held) == len(set(held)) <= shape.total_slots
        if shape.slots_per_layer is not None:
            assert max(Counter(key[0] for key in held).values(), default=0) <= shape.slots_per_layer
        slots = []
        for layer in range(NUM_LAYERS):
            residents = np.flatnonzero(cache.slot_of_expert[layer] >= 0).tolist()
            assert residents == cache.residents(layer)
            for expert in residents:
                self.run_expert(layer, expert)
                slots.append(int(cache.slot_of_expert[layer, expert]))
        slots += self.on_its_way.values()
        assert len(slots) == len(set(slots)), "two experts in one slot"
        assert all(0 <= slot < shape.total_slots for slot in slots)
        # what was evicted may still lie in its slot, but the shadow need not know it
        self.arrived = {
            slot: key for slot, key in self.arrived.items() if cache.slot_of_expert[key] == slot
        }
        total = cache.counters.total()
        assert total["hits"] + total["misses"] == self.seen["used"]
        assert total["misses"] == self.seen["misses"]
        assert total["computed_on_cpu"] == self.seen["computed"]
        assert total["fetched"] == self.seen["fetched"]
        assert total["bytes"] == 10 * self.seen["fetched"]
        # an expert that a preload is bringing in when its event begins is late, too
        early = self.seen["guessed"] + self.seen["preloaded"]
        assert total["useful"] + total["late"] + total["wasted"] <= early


def happen(world: World, rng: random.Random) -> None:
    """Let one thing happen, an event most of the time."""
    chance = rng.random()
    if chance < 0.6:
        size = rng.choice((1, 2, 2, 2, 3, 5, 8))
        world.serve(rng.randrange(NUM_LAYERS), sorted(rng.sample(range(NUM_EXPERTS), size)), rng)
    elif chance < 0.75:
        world.guess(rng)
    elif chance < 0.9:
        world.settle_one(rng)
    elif chance < 0.94:
        world.preload(rng)
    elif chance < 0.97:
        world.drop(rng)
    else:
        world.resize(rng.randint(TOP_K, NUM_EXPERTS), rng)
    world.check()


def run_at_random(num_steps: int, seed: int) -> Counter[str]:
    """Run worlds of 200 happenings each, `num_steps` in all; return what was seen."""
    rng = random.Random(seed)
    seen: Counter[str] = Counter()
    for _ in range(num_steps // 200):
        world = World(
            rng.choice(sorted(POLICIES)),
            rng.randint(TOP_K, NUM_EXPERTS),
            rng.random() < 0.5,
            rng.choice((0, TOP_K)),
        )
        for _ in range(200):
            happen(world, rng)
        seen += world.seen
        seen.update(world.cache.counters.total())
    return seen


class Machine(RuleBasedStateMachine):
    """The same by hypothesis, which shrinks what fails."""

    @initialize(
        policy=st.sampled_from(sorted(POLICIES)),
        slots=st.integers(TOP_K, NUM_EXPERTS),
        is_shared=st.booleans(),
        guaranteed=st.sampled_from((0, TOP_K)),
    )
    def build(self, policy: str, slots: int, is_shared: bool, guaranteed: int) -> None:
        self.world = World(policy, slots, is_shared, guaranteed)

    @rule(
        layer=st.integers(0, NUM_LAYERS - 1),
        union=st.sets(st.integers(0, NUM_EXPERTS - 1), min_size=1),
        rng=st.randoms(use_true_random=False),
    )
    def serve(self, layer: int, union: set[int], rng: random.Random) -> None:
        self.world.serve(layer, sorted(union), rng)

    @rule(rng=st.randoms(use_true_random=False))
    def guess(self, rng: random.Random) -> None:
        self.world.guess(rng)

    @rule(rng=st.randoms(use_true_random=False))
    def settle(self, rng: random.Random) -> None:
        self.world.settle_one(rng)

    @rule(rng=st.randoms(use_true_random=False))
    def preload(self, rng: random.Random) -> None:
        self.world.preload(rng)

    @rule(rng=st.randoms(use_true_random=False))
    def drop(self, rng: random.Random) -> None:
        self.world.drop(rng)

    @rule(slots=st.integers(TOP_K, NUM_EXPERTS), rng=st.randoms(use_true_random=False))
    def resize(self, slots: int, rng: random.Random) -> None:
        self.world.resize(slots, rng)

    @invariant()
    def holds(self) -> None:
        if hasattr(self, "world"):
            self.world.check()


def test_state_machine() -> None:
    run_state_machine_as_test(
        Machine,
        settings=settings(
            max_examples=EXAMPLES,
            stateful_step_count=STEPS,
            deadline=None,
            suppress_health_check=list(HealthCheck),
        ),
    )


def test_random_runs_meet_everything_that_is_to_be_tested() -> None:
    seen = run_at_random(14_000, seed=1)

    for what in ("streamed", "useful", "late", "wasted", "lost", "computed", "waited", "resized"):
        assert seen[what] > 20, f"{what}: only {seen[what]}"


@pytest.mark.slow
def test_long_run() -> None:
    seen = run_at_random(LONG_RUN_STEPS, seed=2)

    assert seen["wasted"] > LONG_RUN_STEPS // 1000
