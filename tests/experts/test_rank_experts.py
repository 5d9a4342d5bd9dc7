"""Experts of a rank: what moves arrives as it was, what comes is counted."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from moe_serve.comm.base import Inbox
from moe_serve.errors import CommError
from moe_serve.experts.executor import ResidentExperts
from moe_serve.experts.rank_experts import RankExperts
from moe_serve.experts.records import ExpertArena
from moe_serve.kernels.moe.base import ExpertTable
from moe_serve.types import Routing
from tests.experts.arenas import random_experts

LAYER, NUM_EXPERTS, HIDDEN, SIZE = 2, 4, 32, 16
KINDS = ("cpu", pytest.param("cuda", marks=pytest.mark.gpu))


def rank_of(held: tuple[int, ...], kind: str) -> tuple[RankExperts, ExpertArena]:
    arena = ExpertArena(
        [LAYER],
        NUM_EXPERTS,
        HIDDEN,
        SIZE,
        torch.float32,
        8000,
        held={LAYER: held},
        device=torch.device(kind),
        spare_slots=1,
    )
    weights = random_experts(NUM_EXPERTS, HIDDEN, SIZE, torch.float32)
    for plain, values in zip(arena.plain_weights(LAYER), weights, strict=True):
        plain.copy_(values[list(held)])
    arena.pack(lambda *_: None, layout=0)
    tables = {LAYER: arena.table(LAYER)}
    experts = ResidentExperts(lambda *_: None, tables, 2, arenas={LAYER: arena})  # type: ignore[arg-type]
    return RankExperts(experts), arena


@pytest.mark.parametrize("kind", KINDS)
def test_a_record_travels_as_it_is_and_runs_once_it_was_taken_over(kind: str) -> None:
    source, sources = rank_of((1, 3), kind)
    target, targets = rank_of((0, 2), kind)
    rows = source.packed(LAYER, [3])
    assert rows.device.type == "cpu"
    assert rows.shape == (1, source.message_bytes(LAYER))
    target.receive(LAYER, [3], rows)
    slots = target.layers[LAYER].slot_of_expert
    assert slots.tolist()[3] == -1, "not before all ranks know"
    target.take_over(LAYER, [0, 3])
    assert [slot >= 0 for slot in slots.tolist()] == [True, False, False, True]
    assert torch.equal(targets.record(LAYER, 3), sources.record(LAYER, 3))


@pytest.mark.parametrize("kind", KINDS)
def test_a_record_that_was_damaged_on_its_way_is_refused(kind: str) -> None:
    source, _ = rank_of((1, 3), kind)
    target, _ = rank_of((0, 2), kind)
    rows = source.packed(LAYER, [1])
    rows[0, 100] ^= 1
    with pytest.raises(CommError, match="expert 1 of layer 2 was damaged"):
        target.receive(LAYER, [1], rows)


TABLE = ExpertTable(
    torch.zeros(3, 64, dtype=torch.uint8),
    torch.arange(3, dtype=torch.int32),
    torch.zeros(3, dtype=torch.int64),
    hidden_size=4,
    intermediate_size=4,
    dtype=torch.float32,
)
ROUTING = Routing(torch.zeros(1, 1, dtype=torch.int64), torch.ones(1, 1))


def failing(rows: Tensor, row_of_pair: Tensor, counts: Tensor, experts: ExpertTable) -> Tensor:
    if len(row_of_pair) > 5:
        raise MemoryError("too many")
    return rows[row_of_pair]


def test_pairs_are_counted_also_where_there_is_room_for_more() -> None:
    experts = RankExperts(ResidentExperts(failing, {0: TABLE}, top_k=1))
    rows, counts = torch.ones(2, 4), torch.tensor([2, 0, 1])
    experts.run(0, Inbox(rows, torch.tensor([0, 1, 0]), counts), ROUTING, rows)
    assert experts.pairs_computed == 3
    with_room = Inbox(rows, torch.tensor([0, 1, 0, 0, 0]), counts, has_room=True)
    for _ in range(2):
        assert experts.run(0, with_room, ROUTING, rows).shape == (5, 4)
    assert experts.pairs_computed == 9
    # what fails has come as well, and its rows say so
    lost = Inbox(rows, torch.zeros(6, dtype=torch.int64), counts, has_room=True)
    assert bool(experts.run(0, lost, ROUTING, rows).isnan().all())
    assert experts.pairs_computed == 12
