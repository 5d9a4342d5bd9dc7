"""Moves from one placement to another: what travels, from where, and in what pieces."""

from __future__ import annotations

import random
import threading
from argparse import Namespace
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest
import torch

from moe_serve.comm._layout import Layout
from moe_serve.engine.mover import Mover, moves_of
from moe_serve.experts.placement.base import Mesh, Placement

LAYERS, NUM_EXPERTS, NUM_RANKS, RECORD = (2, 5, 6), 9, 4, 1000
MESH = Mesh(num_ranks=NUM_RANKS, ranks_per_node=2)


def placement(chance: random.Random) -> Placement:
    return Placement(
        MESH,
        NUM_EXPERTS,
        tuple(
            tuple(
                tuple(sorted(chance.sample(range(NUM_RANKS), chance.randint(1, 3))))
                for _ in range(NUM_EXPERTS)
            )
            for _ in LAYERS
        ),
    )


def test_records_come_from_a_holder_near_if_there_is_one() -> None:
    old, new = [(0, 2), (1,), (3,)], [(0, 1, 3), (1,), (0,)]
    moves = [(m.expert, m.source, m.target) for m in moves_of(old, new, 2)]
    assert moves == [(0, 0, 1), (0, 2, 3), (2, 3, 0)]


class Rank:
    """The experts of one rank, as numbers; what it packs are names."""

    is_moving_records = True

    def __init__(self, rank: int, held: dict[int, set[int]]) -> None:
        self.rank = rank
        self.held = held
        self.arrived: dict[int, set[int]] = {layer: set() for layer in LAYERS}

    def message_bytes(self, layer: int) -> int:
        return RECORD

    def packed(self, layer: int, experts: list[int]) -> torch.Tensor:
        assert set(experts) <= self.held[layer], "sends what it does not hold"
        return torch.tensor(experts, dtype=torch.int64).view(-1, 1)

    def receive(self, layer: int, experts: list[int], rows: torch.Tensor) -> None:
        assert rows[:, 0].tolist() == experts
        self.arrived[layer] |= set(experts)

    def take_over(self, layer: int, held: list[int]) -> None:
        assert set(held) <= self.held[layer] | self.arrived[layer], "holds what never came"
        self.held[layer] = set(held)


class Exchange:
    """An all-to-all between threads, one of which is each rank."""

    def __init__(self) -> None:
        self._barrier = threading.Barrier(NUM_RANKS)
        self._sent: list[Any] = [None] * NUM_RANKS
        self.most = 0

    def of(self, rank: int) -> Any:
        world = Namespace(rank=rank, size=NUM_RANKS)
        world.exchange = lambda rows, out, into: self._exchange(rank, rows, out, into)
        return world

    def _exchange(
        self, rank: int, rows: torch.Tensor, out: list[int], into: list[int]
    ) -> torch.Tensor:
        self._sent[rank] = torch.split(rows, out)
        self._barrier.wait(10)
        parts = [sent[rank] for sent in self._sent]
        assert [len(part) for part in parts] == into, "ranks differ in what travels"
        self.most = max(self.most, sum(len(part) for sent in self._sent for part in sent))
        self._barrier.wait(10)
        return torch.cat(parts)


def held_by(given: Placement, rank: int) -> dict[int, set[int]]:
    return {layer: set(given.experts_of(rank, index)) for index, layer in enumerate(LAYERS)}


@pytest.mark.parametrize("records", [1, 4, 1000])
def test_every_layer_arrives_whole_and_within_the_budget(records: int) -> None:
    for seed in range(10):
        chance = random.Random(seed)
        old, new = placement(chance), placement(chance)
        exchange = Exchange()
        layouts = [Layout(old.ranks, NUM_RANKS, 2, LAYERS, rank) for rank in range(NUM_RANKS)]
        ranks = [Rank(rank, held_by(old, rank)) for rank in range(NUM_RANKS)]
        told: list[list[tuple[int, int]]] = [[] for _ in ranks]

        def run(rank: int) -> None:
            own: Any = ranks[rank]  # noqa: B023 - the threads end within the turn
            mover = Mover(exchange.of(rank), layouts[rank], own, old, new)  # noqa: B023
            while not mover.is_done:
                told[rank].append(mover.advance(records * RECORD))  # noqa: B023

        with ThreadPoolExecutor(NUM_RANKS) as pool:
            list(pool.map(run, range(NUM_RANKS)))
        for rank, own in enumerate(ranks):
            assert own.held == held_by(new, rank)
        assert all(one == told[0] for one in told)
        assert all(count <= records and size == count * RECORD for count, size in told[0])
        assert exchange.most <= records
        num_moves = sum(len(moves_of(a, b, 2)) for a, b in zip(old.ranks, new.ranks, strict=True))
        assert sum(count for count, _ in told[0]) == num_moves
        assert {layout.epoch for layout in layouts} == {len(LAYERS)}


def test_a_mover_on_one_rank_needs_no_other() -> None:
    mesh = Mesh(num_ranks=1, ranks_per_node=1)
    layers = tuple(((0,),) * NUM_EXPERTS for _ in LAYERS)
    same = Placement(mesh, NUM_EXPERTS, layers)
    layout = Layout(same.ranks, 1, 1, LAYERS, 0)
    rank: Any = Rank(0, {layer: set(range(NUM_EXPERTS)) for layer in LAYERS})
    mover = Mover(Exchange().of(0), layout, rank, same, same)
    assert mover.is_done
    assert mover.advance(10**9) == (0, 0)
    assert layout.epoch == 0
