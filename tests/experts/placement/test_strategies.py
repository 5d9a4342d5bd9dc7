"""Placements: each strategy keeps the rules; solvers reach the optimum where it can be known."""

from __future__ import annotations

import itertools
from dataclasses import replace
from typing import Any

import numpy as np
import pytest

from moe_serve.errors import CapacityError, ConfigError
from moe_serve.experts import routing_stats
from moe_serve.experts.placement import affinity, eplb, joint, lina
from moe_serve.experts.placement._pack import pack
from moe_serve.experts.placement._transport import assign
from moe_serve.experts.placement.base import Mesh, Placement, PlacementOptions, RoutingStats
from moe_serve.plugin import load, names

Array = np.ndarray[Any, Any]
FOLDER = "moe_serve.experts.placement"
STRATEGIES = names(FOLDER)


def routing(
    seed: int, num_tokens: int = 600, num_layers: int = 3, num_experts: int = 16, top_k: int = 3
) -> Array:
    """Return ids with hot experts, groups that are used together, and paths through layers."""
    source = np.random.default_rng(seed)
    topics = source.integers(0, 4, num_tokens)
    ids = np.empty((num_tokens, num_layers, top_k), np.int64)
    for layer in range(num_layers):
        favour = np.random.default_rng(100 + layer).permutation(num_experts) % 4
        bias = 2.5 * (favour[None, :] == topics[:, None]) + np.linspace(1, 0, num_experts)
        scores = bias + source.gumbel(size=(num_tokens, num_experts))
        ids[:, layer] = np.argsort(-scores, axis=1)[:, :top_k]
    return ids


def stats_of(seed: int = 0, **shape: int) -> RoutingStats:
    ids = routing(seed, **shape)
    return routing_stats.count(ids, shape.get("num_experts", 16))


def test_there_are_the_strategies_that_the_readme_names() -> None:
    assert set(STRATEGIES) == {
        "affinity", "balanced", "coactivation", "contiguous", "eplb", "joint", "lina",
        "round_robin",
    }  # fmt: skip


@pytest.mark.parametrize("name", STRATEGIES)
@pytest.mark.parametrize(
    ("num_ranks", "per_node", "slots"),
    [(1, 1, None), (2, 2, None), (3, 3, None), (4, 2, None), (4, 4, 5), (5, 5, 4), (16, 4, None)],
)
def test_every_expert_is_somewhere_and_no_rank_is_overfull(
    name: str, num_ranks: int, per_node: int, slots: int | None
) -> None:
    mesh = Mesh(num_ranks=num_ranks, ranks_per_node=per_node)
    stats = stats_of()
    placement = load(FOLDER, name).place(stats, mesh, slots, PlacementOptions())
    holds = placement.holds()
    assert holds.shape == (3, 16, num_ranks)
    assert holds.any(axis=2).all()
    room = slots if slots is not None else -(-16 // num_ranks)
    assert holds.sum(axis=1).max() <= room
    assert placement.strategy == name
    again = load(FOLDER, name).place(stats, mesh, slots, PlacementOptions())
    assert again.ranks == placement.ranks, "not deterministic"


@pytest.mark.parametrize("name", STRATEGIES)
def test_too_few_slots_are_refused(name: str) -> None:
    mesh = Mesh(num_ranks=4, ranks_per_node=4)
    with pytest.raises(CapacityError, match="hold 12 experts, but there are 16; give at least 4"):
        load(FOLDER, name).place(stats_of(), mesh, 3, PlacementOptions())


def test_statistics_are_counts_of_tokens() -> None:
    ids = routing(1, num_tokens=50)
    stats = routing_stats.count(ids, 16)
    load_, together, hops = np.zeros((3, 16)), np.zeros((3, 16, 16)), np.zeros((2, 16, 16))
    for token in ids:
        for layer, chosen in enumerate(token):
            load_[layer, chosen] += 1
            for a, b in itertools.permutations(chosen, 2):
                together[layer, a, b] += 1
            if layer:
                for a, b in itertools.product(token[layer - 1], chosen):
                    hops[layer - 1, a, b] += 1 / 9
    assert np.array_equal(stats.load, load_)
    assert np.array_equal(stats.coactivation, together)
    assert np.allclose(stats.transitions, hops)


# -- the pieces --------------------------------------------------------------------------------


def test_eplb_reproduces_the_published_example() -> None:
    """The 12 experts of the README of github.com/deepseek-ai/EPLB, as sets of each rank."""
    weights = np.array(
        [
            [90, 132, 40, 61, 104, 165, 39, 4, 73, 56, 183, 86],
            [20, 107, 104, 64, 19, 197, 187, 157, 172, 86, 16, 27],
        ],
        float,
    )
    published = np.array(
        [
            [5, 6, 5, 7, 8, 4, 3, 4, 10, 9, 10, 2, 0, 1, 11, 1],
            [7, 10, 6, 8, 6, 11, 8, 9, 2, 4, 5, 1, 5, 0, 3, 1],
        ]
    )
    mesh = Mesh(num_ranks=8, ranks_per_node=4)
    nothing = np.zeros((2, 12, 12))
    stats = RoutingStats(
        num_tokens=1, top_k=1, load=weights, coactivation=nothing, transitions=nothing[:1]
    )
    placement = eplb.place(stats, mesh, 2, PlacementOptions(groups=4))
    for layer, row in enumerate(published):
        ranks = [placement.experts_of(rank, layer) for rank in range(8)]
        assert ranks == [sorted(row[2 * rank : 2 * rank + 2].tolist()) for rank in range(8)]


def test_replicas_go_to_the_highest_load_a_replica() -> None:
    load_ = np.array([100.0, 60.0, 30.0, 10.0])
    assert eplb.replicate(load_, 4, 4).tolist() == [1, 1, 1, 1]
    assert eplb.replicate(load_, 6, 4).tolist() == [2, 2, 1, 1]
    assert eplb.replicate(load_, 8, 2).tolist() == [2, 2, 2, 2], "no more than there are ranks"
    assert eplb.replicate(load_, 7, 4, bias=1).tolist() == [4, 1, 1, 1]


def test_packing_never_puts_an_expert_twice_on_a_rank() -> None:
    source = np.random.default_rng(3)
    for _ in range(200):
        num_ranks, num_experts = int(source.integers(2, 7)), int(source.integers(3, 12))
        slots = -(-num_experts // num_ranks) + int(source.integers(0, 3))
        slots = min(slots, num_experts)
        load_ = source.lognormal(sigma=1.5, size=num_experts)
        counts = eplb.replicate(load_, slots * num_ranks, num_ranks)
        experts = np.repeat(np.arange(num_experts), counts)
        ranks = pack(load_[experts] / counts[experts], [slots] * num_ranks, experts.tolist())
        assert len({*zip(experts.tolist(), ranks.tolist(), strict=True)}) == len(experts)
        assert np.bincount(ranks, minlength=num_ranks).max() <= slots


def test_assignment_is_the_best_there_is() -> None:
    source = np.random.default_rng(4)
    for case in range(120):
        num_ranks = int(source.integers(1, 4))
        room = source.integers(1, 4, num_ranks).tolist()
        num_experts = int(source.integers(1, min(sum(room), 6) + 1))
        gain = source.normal(size=(num_experts, num_ranks))
        if case % 3 == 0:
            gain = gain.round()  # ties
        best = max(
            sum(gain[expert, rank] for expert, rank in enumerate(owners))
            for owners in itertools.product(range(num_ranks), repeat=num_experts)
            if all(owners.count(rank) <= room[rank] for rank in range(num_ranks))
        )
        owners = assign(gain, room)
        assert all(np.bincount(owners, minlength=num_ranks) <= room)
        assert gain[np.arange(num_experts), owners].sum() == pytest.approx(best)
        again = assign(gain, room, owners)
        assert gain[np.arange(num_experts), again].sum() == pytest.approx(best)


def viterbi(hops: Array, num_ranks: int) -> float:
    """Return the most hops that can stay, over all balanced placements: exactly."""
    num_experts = hops.shape[1]
    size = num_experts // num_ranks
    states = [
        owners
        for owners in itertools.product(range(num_ranks), repeat=num_experts)
        if all(owners.count(rank) == size for rank in range(num_ranks))
    ]
    members = np.eye(num_ranks)[np.array(states)].reshape(len(states), -1)
    value = np.zeros(len(states))
    for hop in hops:
        moved = members.reshape(len(states), num_experts, num_ranks).transpose(0, 2, 1) @ hop
        moved = moved.transpose(0, 2, 1).reshape(len(states), -1)
        value = (value[:, None] + moved @ members.T).max(axis=0)
    return float(value.max())


@pytest.mark.parametrize(("num_experts", "num_ranks"), [(8, 2), (6, 3), (8, 4)])
@pytest.mark.parametrize("seed", range(4))
def test_affinity_is_within_one_percent_of_the_optimum(
    num_experts: int, num_ranks: int, seed: int
) -> None:
    ids = routing(seed, num_layers=5, num_experts=num_experts, top_k=2)
    hops = routing_stats.count(ids, num_experts).transitions
    owners = affinity.solve(hops, [num_experts // num_ranks] * num_ranks, restarts=4, seed=0)
    assert affinity.stays(hops, owners) >= 0.99 * viterbi(hops, num_ranks)


def test_affinity_fills_nodes_before_ranks() -> None:
    stats = stats_of(num_layers=5)
    flat = affinity.place(stats, Mesh(num_ranks=4, ranks_per_node=4), None, PlacementOptions())
    staged = affinity.place(stats, Mesh(num_ranks=4, ranks_per_node=2), None, PlacementOptions())

    def of_nodes(placement: Placement) -> float:
        return affinity.stays(stats.transitions, placement.owners() // 2)

    assert of_nodes(staged) >= of_nodes(flat) - 1e-9


def ranks_a_token(placement: Placement, ids: Array) -> float:
    owners = placement.owners()
    visits = [
        len(set(owners[layer, token[layer]])) for token in ids for layer in range(ids.shape[1])
    ]
    return float(np.mean(visits))


def test_joint_saves_ranks_and_stays_even_and_coactivation_saves_more() -> None:
    train, test = routing(0, 2000), routing(1, 2000)
    stats, mesh = routing_stats.count(train, 16), Mesh(num_ranks=4, ranks_per_node=4)
    options = PlacementOptions()
    packed = eplb.place(stats, mesh, None, options)
    both = joint.place(stats, mesh, None, options)
    alone = load(FOLDER, "coactivation").place(stats, mesh, None, options)
    assert ranks_a_token(both, test) < 0.9 * ranks_a_token(packed, test)
    assert ranks_a_token(alone, test) <= ranks_a_token(both, test) + 0.02

    def imbalance(placement: Placement) -> float:
        loads = np.einsum("le,ler->lr", stats.load, placement.holds().astype(float))
        return float((loads.max(axis=1) / loads.mean(axis=1) - 1).max())

    assert imbalance(both) <= 0.06
    uneven = joint.place(stats, mesh, None, replace(options, balance=0.0, most_imbalance=9.0))
    assert imbalance(uneven) >= imbalance(both)


def test_lina_gives_popular_experts_slots_in_proportion() -> None:
    counts = lina.in_proportion(np.array([50.0, 25.0, 15.0, 10.0]), 8, 4)
    assert counts.tolist() == [4, 2, 1, 1]
    assert lina.in_proportion(np.array([97.0, 1.0, 1.0, 1.0]), 6, 3).tolist() == [3, 1, 1, 1]
    assert lina.in_proportion(np.zeros(4), 4, 2).tolist() == [1, 1, 1, 1]


def test_groups_must_divide_the_experts() -> None:
    with pytest.raises(ConfigError, match="16 experts cannot be in 5 groups"):
        eplb.place(
            stats_of(), Mesh(num_ranks=4, ranks_per_node=2), None, PlacementOptions(groups=5)
        )


@pytest.mark.parametrize(
    ("ranks", "says"),
    [
        ((((0,), ()),), "expert 1 of the placement's layer 0 is on no rank"),
        ((((0,), (1, 1)),), "is twice on a rank"),
        ((((0,), (2,)),), r"is on ranks \[2\], of which there are 2"),
        ((((0,),),), "has 1 experts, not 2"),
    ],
)
def test_a_placement_that_breaks_the_rules_is_refused(ranks: Any, says: str) -> None:
    with pytest.raises(ConfigError, match=says):
        Placement(Mesh(num_ranks=2, ranks_per_node=2), 2, ranks)


@pytest.mark.parametrize(("num_ranks", "per_node"), [(0, 1), (4, 0), (4, 3)])
def test_a_mesh_that_is_none_is_refused(num_ranks: int, per_node: int) -> None:
    with pytest.raises(ConfigError):
        Mesh(num_ranks=num_ranks, ranks_per_node=per_node)


@pytest.mark.parametrize(
    ("num_experts", "num_ranks", "per_node"), [(3, 8, 4), (1, 4, 2), (2, 2, 1)]
)
@pytest.mark.parametrize("name", STRATEGIES)
def test_fewer_experts_than_ranks(
    name: str, num_experts: int, num_ranks: int, per_node: int
) -> None:
    ids = np.zeros((20, 2, 1), np.int64) if num_experts == 1 else routing(
        0, 20, 2, num_experts, 1
    )  # fmt: skip
    stats = routing_stats.count(ids, num_experts)
    mesh = Mesh(num_ranks=num_ranks, ranks_per_node=per_node)
    placement = load(FOLDER, name).place(stats, mesh, None, PlacementOptions())
    assert placement.holds().sum() == 2 * num_experts


@pytest.mark.parametrize("name", ["groups", "bias", "balance", "restarts"])
def test_options_below_zero_are_refused(name: str) -> None:
    with pytest.raises(ConfigError, match=f"{name} is -1; give 0 or more"):
        PlacementOptions(**{name: -1})
