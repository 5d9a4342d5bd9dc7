"""Experts that move between ranks arrive as they were, wherever a rank keeps them."""

from __future__ import annotations

import pytest
import torch

from moe_serve.errors import CommError
from moe_serve.experts.executor import ResidentExperts
from moe_serve.experts.rank_experts import RankExperts
from moe_serve.experts.records import ExpertArena
from tests.experts.arenas import random_experts

LAYER, NUM_EXPERTS, HIDDEN, SIZE = 2, 4, 32, 16
KINDS = ("cpu", pytest.param("cuda", marks=pytest.mark.gpu))


def rank_of(held: tuple[int, ...], kind: str) -> tuple[RankExperts, ExpertArena]:
    device = None if kind == "cpu" else torch.device(kind)
    arena = ExpertArena(
        [LAYER], NUM_EXPERTS, HIDDEN, SIZE, torch.float32, 8000, held={LAYER: held}, device=device
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
