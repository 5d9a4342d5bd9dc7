"""Expert records: one expert, one contiguous block of memory, which is also what a store moves.

A record is a header of 64 bytes, then the weights: plain while a checkpoint is read (gate, up,
down), then packed in place as the kernels want them, zeros up to the next multiple of 4,096. Here
they lie side by side in one arena per shape, and the CPU kernels execute them where they are.
"""

from __future__ import annotations

import struct
from collections.abc import Callable, Iterable
from dataclasses import dataclass

import torch
from torch import Tensor

from moe_serve.kernels.moe.base import HEADER_BYTES, ExpertTable, plain_weights
from moe_serve.kernels.native.memory import allocate

MAGIC = b"MOEXPERT"
VERSION = 1
RECORD_ALIGNMENT = 4096

_DTYPES = {torch.float32: 0, torch.bfloat16: 1, torch.float16: 2}
# magic, version, layout, dtype, quantisation, model id, layer, expert, bytes, crc32
_HEADER = struct.Struct("<8sHHHH16sIIQI")
_UNQUANTISED = 0


@dataclass(frozen=True, slots=True)
class RecordHeader:
    """What a record says of itself.

    layout: the kernels' `record_layout` (0: plain rows, 1: the native kernels' tiles).
    record_bytes: header, weights and padding. crc32: of the weights as they are packed, 0 where it
    was not taken (in memory).
    """

    layout: int
    dtype: torch.dtype
    model_id: bytes
    layer: int
    expert: int
    record_bytes: int
    crc32: int = 0

    def pack(self) -> bytes:
        """Return the 64 bytes."""
        fields = _HEADER.pack(
            MAGIC, VERSION, self.layout, _DTYPES[self.dtype], _UNQUANTISED, self.model_id,
            self.layer, self.expert, self.record_bytes, self.crc32,
        )  # fmt: skip
        return fields.ljust(HEADER_BYTES, b"\0")

    @classmethod
    def unpack(cls, header: bytes) -> RecordHeader:
        """Read 64 bytes. Raises ValueError for what is no record of this version."""
        magic, version, layout, dtype, quant, model_id, layer, expert, size, crc = _HEADER.unpack(
            header[: _HEADER.size]
        )
        dtypes = {code: kept for kept, code in _DTYPES.items()}
        is_known = version == VERSION and quant == _UNQUANTISED and dtype in dtypes
        if magic != MAGIC or not is_known:
            raise ValueError(f"no expert record of version {VERSION}: {header[:16]!r}")
        return cls(layout, dtypes[dtype], model_id, layer, expert, size, crc)


class ExpertArena:
    """Records of all experts of layers of one shape, slot by slot: a layer's are consecutive."""

    def __init__(
        self,
        layers: Iterable[int],
        num_experts: int,
        hidden_size: int,
        intermediate_size: int,
        dtype: torch.dtype,
        bytes_of_kernel: int,
        slots_before: int = 0,
    ) -> None:
        """Allocate. bytes_of_kernel: `record_bytes` of the kernels, before rounding up.

        slots_before: how many slots to leave free in front, for a cache of these records.
        """
        self.layers = tuple(layers)
        self.num_experts = num_experts
        self.hidden_size = hidden_size
        self.intermediate_size = intermediate_size
        self.dtype = dtype
        self.record_bytes = -(-bytes_of_kernel // RECORD_ALIGNMENT) * RECORD_ALIGNMENT
        num_slots = slots_before + len(self.layers) * num_experts
        memory = allocate(num_slots * self.record_bytes)
        self.slots = memory.view(num_slots, self.record_bytes)
        self.records = self.slots[slots_before:]

    def plain_weights(self, layer: int) -> tuple[Tensor, Tensor]:
        """View a layer's gate_up and down before they are packed; see kernels/moe/base.py."""
        return plain_weights(self._of(layer), self.hidden_size, self.intermediate_size, self.dtype)

    def pack(
        self,
        pack_records_: Callable[[Tensor, int, int, torch.dtype], None],
        layout: int,
        model_id: bytes = b"",
    ) -> None:
        """Pack all records, whose plain weights were filled, and write their headers."""
        pack_records_(self.records, self.hidden_size, self.intermediate_size, self.dtype)
        for index, layer in enumerate(self.layers):
            for expert in range(self.num_experts):
                header = RecordHeader(
                    layout, self.dtype, model_id, layer, expert, self.record_bytes
                ).pack()
                slot = index * self.num_experts + expert
                self.records[slot, :HEADER_BYTES] = torch.frombuffer(
                    bytearray(header), dtype=torch.uint8
                )

    def table(self, layer: int) -> ExpertTable:
        """Return a layer's experts, all resident."""
        first = self.layers.index(layer) * self.num_experts
        return ExpertTable(
            self.records,
            torch.arange(first, first + self.num_experts, dtype=torch.int32),
            torch.zeros(self.num_experts, dtype=torch.int64),
            self.hidden_size,
            self.intermediate_size,
            self.dtype,
        )

    def _of(self, layer: int) -> Tensor:
        first = self.layers.index(layer) * self.num_experts
        return self.records[first : first + self.num_experts]
