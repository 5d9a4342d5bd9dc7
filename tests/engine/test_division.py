"""Memory is divided between experts and KV where both sides save the same."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest

from moe_serve.engine.division import Demand, divided, misses_per_token

SKEWED = np.tile(np.linspace(0.9, 0.02, 16) ** 2, (4, 1))  # [4 layers, 16 experts]
DEMAND = Demand(chances=SKEWED, slot_bytes=1000, sequence_bytes=4000, num_seqs=32, top_k=2)


def test_misses_are_those_of_the_experts_that_are_not_held() -> None:
    chances = np.array([[0.5, 0.25, 0.25]])
    assert misses_per_token(chances, 3, 1) == 0
    assert misses_per_token(chances, 1, 1) == pytest.approx(0.5)
    # two tokens share what is brought in for both
    assert misses_per_token(chances, 1, 2) == pytest.approx((1 - 0.75**2) * 2 / 2)


def _every_division(free: int, demand: Demand) -> list[tuple[float, int, int]]:
    layers, experts = demand.chances.shape
    found = []
    for num_seqs in range(1, demand.num_seqs + 1):
        kv = num_seqs * demand.sequence_bytes
        slots = min(experts, (free - kv) // (layers * demand.slot_bytes))
        if slots >= demand.top_k:
            found.append((misses_per_token(demand.chances, slots, num_seqs), slots, kv))
    return found


@pytest.mark.parametrize("free", [13_000, 20_000, 40_000, 60_000, 100_000, 300_000])
@pytest.mark.parametrize("sequence_bytes", [200, 4000, 30_000])
def test_no_other_division_costs_less(free: int, sequence_bytes: int) -> None:
    demand = replace(DEMAND, sequence_bytes=sequence_bytes)
    every = _every_division(free, demand)
    found = divided(free, demand)
    if not every:
        assert found is None
        return
    assert found is not None
    slots, kv = found
    assert demand.top_k <= slots <= 16
    assert 4 * slots * demand.slot_bytes + kv <= free
    cost = misses_per_token(SKEWED, slots, kv // sequence_bytes)
    assert cost <= 1.02 * min(every)[0] + 1e-12


def test_a_hot_set_is_held_and_what_all_use_alike_is_shared() -> None:
    even = replace(DEMAND, sequence_bytes=2000, chances=np.full((4, 16), SKEWED.mean()))
    hot = replace(even, chances=np.tile([0.99] * 3 + [0.05] * 13, (4, 1)))
    found_even, found_hot = divided(40_000, even), divided(40_000, hot)
    assert found_even is not None
    assert found_hot is not None
    assert found_hot[0] >= 3
    assert found_even[0] < found_hot[0]
    assert found_even[1] > found_hot[1]
