"""Expert records: their header, their place in memory, and what packing leaves."""

from __future__ import annotations

import struct
import zlib
from dataclasses import replace

import pytest
import torch

from moe_serve.errors import CapacityError
from moe_serve.experts.records import RECORD_ALIGNMENT, ExpertArena, RecordHeader
from moe_serve.kernels.moe.base import HEADER_BYTES
from tests.experts.arenas import arena, random_experts
from tests.kernels.implementations import DTYPES, EACH, kernels
from tests.kernels.row_independence import same_bits

HEADER = RecordHeader(
    layout=1,
    dtype=torch.bfloat16,
    model_id=bytes(range(16)),
    layer=47,
    expert=511,
    record_bytes=2**33 + 4096,
    crc32=zlib.crc32(b"weights"),
)


@pytest.mark.parametrize(
    "header",
    [
        HEADER,
        replace(HEADER, dtype=torch.float32, layout=0, model_id=b"\0" * 16, crc32=0),
        replace(HEADER, dtype=torch.float16, layer=2**32 - 1, expert=0, crc32=2**32 - 1),
    ],
    ids=["bf16", "fp32", "fp16"],
)
def test_header_round_trip(header: RecordHeader) -> None:
    packed = header.pack()
    assert len(packed) == HEADER_BYTES == 64
    assert RecordHeader.unpack(packed) == header


def test_header_bytes_are_fixed() -> None:
    # what is written today must be read by what comes later
    expected = struct.pack(
        "<8s4H16sIIQI", b"MOEXPERT", 1, 1, 1, 0, bytes(range(16)), 47, 511, 2**33 + 4096,
        HEADER.crc32,
    )  # fmt: skip
    assert HEADER.pack() == expected + b"\0" * (64 - len(expected))


@pytest.mark.parametrize(
    ("place", "value"),
    [(0, b"X"), (8, b"\2"), (12, b"\7"), (14, b"\1")],
    ids=["magic", "version", "dtype", "quant"],
)
def test_another_kind_of_record_is_refused(place: int, value: bytes) -> None:
    packed = bytearray(HEADER.pack())
    packed[place : place + 1] = value
    with pytest.raises(ValueError, match="no expert record of version 1"):
        RecordHeader.unpack(bytes(packed))


@EACH
@DTYPES
def test_arena_layout(name: str, dtype: torch.dtype) -> None:
    chosen = kernels(name)
    gate_up, down = random_experts(3, 33, 17, dtype)
    made = arena(chosen, [2, 5], torch.stack([gate_up, -gate_up]), torch.stack([down, -down]))
    needed = chosen.record_bytes(33, 17, dtype)
    assert made.record_bytes % RECORD_ALIGNMENT == 0
    assert needed <= made.record_bytes < needed + RECORD_ALIGNMENT
    assert made.records.shape == (6, made.record_bytes)
    assert made.records.data_ptr() % RECORD_ALIGNMENT == 0
    assert made.records.is_contiguous()
    for slot, record in enumerate(made.records):
        header = RecordHeader.unpack(bytes(record[:HEADER_BYTES].tolist()))
        assert header == RecordHeader(
            layout=chosen.record_layout,
            dtype=dtype,
            model_id=b"\0" * 16,
            layer=(2, 5)[slot // 3],
            expert=slot % 3,
            record_bytes=made.record_bytes,
        )
        assert not record[needed:].any(), "padding"
    for layer, first in ((2, 0), (5, 3)):
        table = made.table(layer)
        assert table.records is made.records
        assert table.slot_of_expert.tolist() == [first, first + 1, first + 2]
        assert table.slot_of_expert.dtype == torch.int32
        assert table.uses.tolist() == [0, 0, 0]
        assert (table.num_experts, table.hidden_size, table.intermediate_size) == (3, 33, 17)
        assert table.dtype == dtype


@EACH
@DTYPES
def test_plain_weights_are_views_until_they_are_packed(name: str, dtype: torch.dtype) -> None:
    gate_up, down = random_experts(2, 5, 3, dtype)
    made = ExpertArena([7], 2, 5, 3, dtype, kernels(name).record_bytes(5, 3, dtype))
    plain_gate_up, plain_down = made.plain_weights(7)
    assert plain_gate_up.shape == (2, 6, 5)
    assert plain_down.shape == (2, 5, 3)
    plain_gate_up.copy_(gate_up)
    plain_down.copy_(down)
    for expert, record in enumerate(made.records):
        # gate, up, down, one after the other behind the header
        stored = record[HEADER_BYTES:].view(dtype)[: 3 * 15]
        assert same_bits(stored, torch.cat([gate_up[expert].flatten(), down[expert].flatten()]))


def test_the_reference_leaves_plain_weights_as_they_are() -> None:
    gate_up, down = random_experts(2, 5, 3, torch.float32)
    plain_gate_up, plain_down = arena(
        kernels("reference"), [0], gate_up[None], down[None]
    ).plain_weights(0)
    assert same_bits(plain_gate_up, gate_up)
    assert same_bits(plain_down, down)


def test_a_device_has_room_for_another_placement_of_as_many_experts() -> None:
    held = {1: (0, 2), 3: (1,)}
    device = torch.device("meta")  # which has sizes only
    arena = ExpertArena((1, 3), 4, 32, 16, torch.float32, 8000, held=held, device=device)
    assert arena.slots.shape == (5, 8192)
    table = arena.table(1)
    assert {table.records.device, table.slot_of_expert.device, table.uses.device} == {device}
    for expert in (1, 3):
        assert arena.add(1, expert).shape == (8192,)
    with pytest.raises(CapacityError, match="room for 5 experts on meta, and one more is to come"):
        arena.add(3, 0)
    arena.drop(1, 0)
    arena.add(3, 0)
