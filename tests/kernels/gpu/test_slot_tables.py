"""The device's copy of the slots: sent when they have changed, and only then."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from moe_serve.errors import CapacityError
from moe_serve.kernels.gpu.slot_tables import SlotTables
from moe_serve.kernels.gpu.staging import Outgoing
from moe_serve.kernels.moe.base import ExpertTable
from tests.kernels.gpu.late_streams import LateStreams

CPU = torch.device("cpu")


def _tables(slots: list[np.ndarray]) -> list[ExpertTable]:
    records = torch.zeros(4, 128, dtype=torch.uint8)
    return [
        ExpertTable(
            records, torch.from_numpy(row), torch.zeros(len(row), dtype=torch.int64), 2, 2,
            torch.float32,
        )
        for row in slots
    ]  # fmt: skip


def test_what_has_changed_is_sent_in_one_copy() -> None:
    streams = LateStreams()
    cached = [np.full(3, -1, np.int32), np.full(5, -1, np.int32)]
    tables = SlotTables(CPU, Outgoing(streams), _tables(cached))
    for changes in ({}, {(0, 1): 2, (1, 4): 3}, {}, {(0, 1): -1}, {(1, 4): -1}, {}):
        before = len(streams.copies)
        for (layer, expert), slot in changes.items():
            cached[layer][expert] = slot
        tables.refresh()
        assert len(streams.copies) == before + bool(changes)
        streams.finish()
        for table, row in zip(tables.tables, cached, strict=True):
            assert table.slot_of_expert.tolist() == row.tolist()


def test_what_could_not_be_sent_is_sent_the_next_time(monkeypatch: pytest.MonkeyPatch) -> None:
    streams, cached = LateStreams(), [np.full(3, -1, np.int32)]
    tables = SlotTables(CPU, Outgoing(streams), _tables(cached))
    cached[0][1] = 2

    def fail(num_bytes: int) -> torch.Tensor:
        raise CapacityError(f"{num_bytes} bytes cannot be pinned")

    with monkeypatch.context() as patch:
        patch.setattr(streams, "pinned", fail)
        with pytest.raises(CapacityError):
            tables.refresh()
    tables.refresh()
    streams.finish()
    assert tables.tables[0].slot_of_expert.tolist() == [-1, 2, -1]


def test_an_expert_is_missing_where_it_has_pairs_and_no_slot() -> None:
    cached = [np.array([0, -1, 2], np.int32), np.array([-1, 1], np.int32)]
    tables = SlotTables(CPU, Outgoing(LateStreams()), _tables(cached))
    assert not tables.are_missing(0, np.array([3, 0, 1]))
    assert tables.are_missing(0, np.array([0, 1, 0]))
    assert tables.are_missing(1, np.array([1, 1]))
    assert not tables.are_missing(1, np.array([0, 1]))


def test_a_model_without_experts_has_none() -> None:
    tables = SlotTables(CPU, Outgoing(LateStreams()), [])
    tables.refresh()
    assert tables.tables == []
