"""Homes of requests, and placements that are proposed while the engine runs."""

from __future__ import annotations

import random
import time

import numpy as np
import pytest
import torch

from moe_serve.config import RanksConfig
from moe_serve.experts.placement.base import Array, Mesh, Placement, from_owners
from moe_serve.experts.recent_routing import RecentRouting
from moe_serve.launch.homes import Homes
from moe_serve.launch.rebalancer import LEAST_TOKENS, Rebalancer, cost_of, propose
from moe_serve.types import Routing

NUM_EXPERTS, NUM_LAYERS, TOP_K = 16, 3, 4
MESH = Mesh(num_ranks=4, ranks_per_node=4)


def clustered(num_tokens: int, seed: int = 0) -> Array:
    """Return ids of tokens that each use one of four groups of four experts, spread by modulo.

    All groups equally often, in the turns that are learned from as in the others.
    """
    source = np.random.default_rng(seed)
    even = np.tile(np.arange(4), -(-num_tokens // 4))[:num_tokens, None]
    shift = source.integers(4, size=(1, NUM_LAYERS))
    group = ((even + shift) % 4)[:, :, None]
    return (group + 4 * np.arange(TOP_K)).astype(np.int16)


def contiguous() -> Placement:
    owners = np.tile(np.arange(NUM_EXPERTS) // 4, (NUM_LAYERS, 1))
    return from_owners(MESH, owners, "contiguous")


def by_group() -> Placement:
    owners = np.tile(np.arange(NUM_EXPERTS) % 4, (NUM_LAYERS, 1))
    return from_owners(MESH, owners, "by group")


def test_the_cost_is_ranks_visited_times_the_busiest_load() -> None:
    ids = np.tile(np.arange(TOP_K) * 4, (8, NUM_LAYERS, 1))  # one group alone
    assert cost_of(contiguous(), ids) == pytest.approx(4 * 1.0)
    assert cost_of(by_group(), ids) == pytest.approx(1 * 4.0)
    everywhere = Placement(
        MESH, NUM_EXPERTS, tuple(((0, 1, 2, 3),) * NUM_EXPERTS for _ in range(NUM_LAYERS))
    )
    assert cost_of(everywhere, ids) == pytest.approx(4 * (1 - 0.75**4))


def test_what_is_used_together_is_proposed_together() -> None:
    proposal = propose(RanksConfig(rebalance=1), contiguous(), clustered(2000))
    assert proposal.is_better
    assert proposal.cost < 1.1
    assert proposal.present_cost > 3.9


def test_what_is_as_good_moves_nothing() -> None:
    assert not propose(RanksConfig(rebalance=1), by_group(), clustered(2000)).is_better
    uniform = np.random.default_rng(1).permuted(
        np.tile(np.arange(NUM_EXPERTS), (4000, NUM_LAYERS, 1)), axis=2
    )[:, :, :TOP_K]
    assert not propose(RanksConfig(rebalance=1), contiguous(), uniform).is_better


def considered(rebalancer: Rebalancer) -> Placement | None:
    end_s = time.monotonic() + 20
    while rebalancer.report()["is_considering"] and time.monotonic() < end_s:
        found = rebalancer.found()
        if found is not None:
            return found
        time.sleep(0.01)
    return None


def test_a_rebalancer_finds_a_placement_once() -> None:
    rebalancer = Rebalancer(RanksConfig(rebalance=3), contiguous())
    assert [rebalancer.is_due() for _ in range(7)] == [False, False, True] * 2 + [False]
    rebalancer.learn([clustered(LEAST_TOKENS // 4)])
    rebalancer.consider()
    assert not rebalancer.report()["is_considering"]  # too few as yet
    rebalancer.learn([clustered(LEAST_TOKENS, 1), clustered(0)])
    rebalancer.consider()
    found = considered(rebalancer)
    assert found is not None
    rebalancer.present = found
    assert cost_of(found, clustered(500, 7)) < 1.2
    rebalancer.learn([clustered(LEAST_TOKENS, 2)])
    rebalancer.consider()
    assert considered(rebalancer) is None
    report = rebalancer.report()
    assert (report["considered"], report["adopted"], report["error"]) == (2, 1, None)
    assert report["last_s"] < 20
    rebalancer.close()


def test_a_strategy_that_fails_is_told_of_and_ends_nothing() -> None:
    options = RanksConfig(rebalance=1, rebalance_slots=2)  # 4 * 2 slots for 16 experts
    rebalancer = Rebalancer(options, contiguous())
    rebalancer.learn([clustered(LEAST_TOKENS)])
    rebalancer.consider()
    assert considered(rebalancer) is None
    assert "give at least 4 slots" in rebalancer.report()["error"]
    rebalancer.close()


def test_homes_are_where_the_fewest_tokens_are_to_come() -> None:
    homes = Homes(3, 10, None)
    assert [homes.choose([1], tokens) for tokens in (5, 2, 2, 1, 1, 4)] == [0, 1, 2, 1, 2, 1]
    homes.release(0, 5)
    assert homes.choose([1], 1) == 0


def test_homes_by_affinity_are_where_the_prompts_experts_are() -> None:
    homes = Homes(4, 10, by_group())
    tokens = np.array([3, 3, 5])
    used = np.stack([clustered(3)[0], clustered(3)[0], clustered(3)[0]])
    used[:2] = 2 + 4 * np.arange(TOP_K)
    used[2] = 1 + 4 * np.arange(TOP_K)
    homes.learn(tokens, used)
    assert homes.choose([3, 4], 10) == 2
    assert homes.choose([5], 10) == 1
    # at most one request more than the least loaded
    assert [homes.choose([3, 4], 10) for _ in range(2)] == [2, 0]
    homes.place(contiguous())
    assert homes.choose([9], 1) == 3  # nothing known of this placement: by load


def test_loads_stay_even_by_affinity() -> None:
    homes = Homes(4, 10, by_group())
    homes.learn(np.full(5, 3), clustered(5))
    chance = random.Random(0)
    loads = [0] * 4
    for _ in range(200):
        tokens = chance.randint(1, 20)
        loads[homes.choose([3], tokens)] += tokens
    assert max(loads) - min(loads) <= 40


def test_recent_routing_is_bounded_and_given_once() -> None:
    recent = RecentRouting([1, 4])
    for step in range(50):
        recent.begin(torch.full((300,), step))
        for layer in (1, 4):
            ids = torch.full((300, TOP_K), layer + step)
            recent.note(layer, Routing(ids, torch.ones(300, TOP_K)))
        recent.end()
    tokens, experts = recent.take()
    assert 8192 <= len(tokens) < 8192 + 300
    assert experts.shape == (len(tokens), 2, TOP_K)
    assert (experts[:, 0, 0] == tokens + 1).all()
    assert (experts[:, 1, 3] == tokens + 4).all()
    assert tokens[-1] == 49
    assert len(recent.take()[0]) == 0


def test_a_step_that_was_cut_short_is_not_kept() -> None:
    recent = RecentRouting([0, 1])
    recent.begin(torch.zeros(2))
    recent.note(0, Routing(torch.ones(2, 1, dtype=torch.int64), torch.ones(2, 1)))
    recent.end()
    recent.begin(torch.zeros(0))
    recent.end()
    assert len(recent.take()[0]) == 0


def test_what_is_noted_outside_of_a_step_is_nobodys() -> None:
    """Rows that a rank without a token, or after a failure, sends for others."""
    recent = RecentRouting([0])
    recent.begin(torch.zeros(2))
    recent.note(0, Routing(torch.ones(2, 1, dtype=torch.int64), torch.ones(2, 1)))
    recent.abandon()
    recent.note(0, Routing(torch.ones(0, 1, dtype=torch.int64), torch.ones(0, 1)))
    recent.end()
    assert len(recent.take()[0]) == 0


def test_one_look_at_a_time() -> None:
    rebalancer = Rebalancer(RanksConfig(rebalance=1), contiguous())
    for seed in range(40):
        rebalancer.learn([clustered(LEAST_TOKENS, seed)])
        rebalancer.consider()
    assert considered(rebalancer) is not None
    assert rebalancer.report()["considered"] == 1
    # a proposal that was made from another placement is of no use
    rebalancer.consider()
    rebalancer.present = by_group()
    assert considered(rebalancer) is None
    rebalancer.close()
