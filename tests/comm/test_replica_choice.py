"""Replicas: near ones first, in turns, or so that a batch is spread evenly."""

from __future__ import annotations

import itertools
import random

import pytest
import torch

from moe_serve.comm._layout import Layout
from moe_serve.comm._replica_choice import candidates, filled

NUM_RANKS = 4


def test_near_ones_come_first() -> None:
    holders = [(0, 1, 2), (2, 3), (1, 3), (3,)]
    ranks, counts = candidates(holders, 0, 2, "nearest")
    assert [ranks[e, : counts[e]].tolist() for e in range(4)] == [[0], [2, 3], [1], [3]]
    ranks, counts = candidates(holders, 0, 2, "round_robin")
    assert [tuple(ranks[e, : counts[e]].tolist()) for e in range(4)] == holders


def least_maximum(loads: list[int], experts: list[tuple[list[int], int]]) -> int:
    """Return the least highest load there can be, by trying everything."""
    best = 10**9
    ways = [
        [
            split
            for split in itertools.product(range(count + 1), repeat=len(ranks))
            if sum(split) == count
        ]
        for ranks, count in experts
    ]
    for chosen in itertools.product(*ways):
        found = list(loads)
        for (ranks, _), split in zip(experts, chosen, strict=True):
            for rank, share in zip(ranks, split, strict=True):
                found[rank] += share
        best = min(best, max(found))
    return best


@pytest.mark.parametrize("seed", range(30))
def test_water_is_level_where_one_expert_has_replicas(seed: int) -> None:
    chance = random.Random(seed)
    holders: list[tuple[int, ...]] = [(chance.randrange(NUM_RANKS),) for _ in range(6)]
    several = chance.randrange(6)
    holders[several] = tuple(sorted(chance.sample(range(NUM_RANKS), chance.randint(2, 4))))
    ids = torch.tensor([chance.sample(range(6), 2) for _ in range(chance.randint(1, 12))])
    layout = Layout([holders], NUM_RANKS, NUM_RANKS, (0,), 0, "water_filling")
    ranks = layout.choose(0, ids)
    for expert, rank in zip(ids.flatten().tolist(), ranks.flatten().tolist(), strict=True):
        assert rank in holders[expert]
    loads = [0] * NUM_RANKS
    for expert in ids[ids != several].tolist():
        loads[holders[expert][0]] += 1
    best = least_maximum(loads, [(list(holders[several]), int((ids == several).sum()))])
    assert int(ranks.flatten().bincount(minlength=NUM_RANKS).max()) == best


def test_water_is_hardly_above_the_least_level() -> None:
    """Greedy over experts: not always the best, but near, and never worse than turns."""
    chance = random.Random(1)
    over, turns = [], []
    for _ in range(60):
        holders = [tuple(sorted(chance.sample(range(3), chance.choice((1, 2))))) for _ in range(5)]
        ids = torch.tensor([chance.sample(range(5), 2) for _ in range(6)])
        several = [e for e in range(5) if len(holders[e]) > 1 and (ids == e).any()]
        loads = [0] * 3
        for expert in ids.flatten().tolist():
            if len(holders[expert]) == 1:
                loads[holders[expert][0]] += 1
        best = least_maximum(loads, [(list(holders[e]), int((ids == e).sum())) for e in several])
        highest = {}
        for choice in ("water_filling", "round_robin"):
            layout = Layout([holders], 3, 3, (0,), 0, choice)
            highest[choice] = int(layout.choose(0, ids).flatten().bincount().max())
        over.append(highest["water_filling"] - best)
        turns.append(highest["round_robin"] - best)
    assert max(over) <= 1
    assert sum(over) < sum(turns) / 3


def test_without_replicas_nothing_is_filled() -> None:
    replicas = candidates([(0,), (1,)], 0, 2, "water_filling")
    assert filled(replicas, torch.tensor([[0, 1]]), 2) is replicas
    both = candidates([(0, 1), (1,)], 0, 2, "water_filling")
    assert filled(both, torch.tensor([[1]]), 2) is both
