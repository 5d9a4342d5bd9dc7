"""Expert records: one expert, one contiguous block of memory, which is also what a store moves.

A record is a header of 64 bytes, then the weights: plain while a checkpoint is read (gate, up,
down), then packed in place as the kernels want them, zeros up to the next multiple of 4,096. Here
they lie side by side in one arena per shape, and the CPU kernels execute them where they are.
"""

from __future__ import annotations

import struct
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from moe_serve.errors import CapacityError
from moe_serve.experts.slots import DeviceSlots
from moe_serve.kernels.moe.base import HEADER_BYTES, ExpertTable, plain_weights
from moe_serve.kernels.native.memory import GrowingMemory, allocate

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
    """Records of experts of layers of one shape, in slots: at first a layer's are consecutive.

    Of a rank, which keeps a part of the experts, the part may change; see `add` and `drop`.
    """

    def __init__(
        self,
        layers: Iterable[int],
        num_experts: int,
        hidden_size: int,
        intermediate_size: int,
        dtype: torch.dtype,
        bytes_of_kernel: int,
        slots_before: int = 0,
        held: Mapping[int, Sequence[int]] | None = None,
        device: torch.device | None = None,
    ) -> None:
        """Allocate. bytes_of_kernel: `record_bytes` of the kernels, before rounding up.

        slots_before: how many slots to leave free in front, for a cache of these records. held: the
        experts of each layer that are kept here, rising; None: all. device: where the records are,
        None: in host memory; on a device there is room for as many more as a layer has at most.
        Raises CapacityError.
        """
        self.layers = tuple(layers)
        self.num_experts = num_experts
        self.hidden_size = hidden_size
        self.intermediate_size = intermediate_size
        self.dtype = dtype
        self.record_bytes = -(-bytes_of_kernel // RECORD_ALIGNMENT) * RECORD_ALIGNMENT
        self.held = {
            layer: tuple(range(num_experts) if held is None else held[layer])
            for layer in self.layers
        }
        self._slot: dict[tuple[int, int], int] = {}
        for layer in self.layers:
            for expert in self.held[layer]:
                self._slot[layer, expert] = len(self._slot)
        self._num_slots = len(self._slot)  # usable, from the first on
        self._free: list[int] = []
        num_slots = slots_before + self._num_slots
        self._device = torch.device("cpu") if device is None else device
        self._memory: GrowingMemory | None = None
        if self._device.type != "cpu":
            if held is not None:
                num_slots += max(map(len, self.held.values()))
            memory = DeviceSlots(num_slots, self.record_bytes, self._device).records.view(-1)
        elif held is None:
            memory = allocate(num_slots * self.record_bytes)
        else:
            assert not slots_before, "a rank's records have no cache before them"
            most = len(self.layers) * num_experts
            self._memory = GrowingMemory(most * self.record_bytes, num_slots * self.record_bytes)
            memory, num_slots = self._memory.tensor, most
        self.slots = memory[: num_slots * self.record_bytes].view(num_slots, self.record_bytes)
        self.records = self.slots[slots_before:]
        self._tables: dict[int, ExpertTable] = {}

    def plain_weights(self, layer: int) -> tuple[Tensor, Tensor]:
        """View gate_up and down of a layer's held experts, unpacked; see kernels/moe/base.py."""
        first = self._slot[layer, self.held[layer][0]] if self.held[layer] else 0
        records = self.records[first : first + len(self.held[layer])]
        return plain_weights(records, self.hidden_size, self.intermediate_size, self.dtype)

    def pack(
        self,
        pack_records_: Callable[[Tensor, int, int, torch.dtype], None],
        layout: int,
        model_id: bytes = b"",
    ) -> None:
        """Pack all records, whose plain weights were filled, and write their headers."""
        records = self.records[: self._num_slots]
        pack_records_(records, self.hidden_size, self.intermediate_size, self.dtype)
        for (layer, expert), slot in self._slot.items():
            header = RecordHeader(
                layout, self.dtype, model_id, layer, expert, self.record_bytes
            ).pack()
            records[slot, :HEADER_BYTES] = torch.frombuffer(bytearray(header), dtype=torch.uint8)

    def table(self, layer: int) -> ExpertTable:
        """Return a layer's experts, those held resident; always the same table."""
        if layer not in self._tables:
            slots = torch.full((self.num_experts,), -1, dtype=torch.int32)
            for expert in self.held[layer]:
                slots[expert] = self._slot[layer, expert]
            self._tables[layer] = ExpertTable(
                self.records,
                slots.to(self._device),
                torch.zeros(self.num_experts, dtype=torch.int64, device=self._device),
                self.hidden_size,
                self.intermediate_size,
                self.dtype,
            )
        return self._tables[layer]

    # -- a part that changes -----------------------------------------------------------------------

    def record(self, layer: int, expert: int) -> Tensor:
        """Return a held expert's record, uint8 [record_bytes]."""
        return self.records[self._slot[layer, expert]]

    def add(self, layer: int, expert: int) -> Tensor:
        """Return room for the record of one more expert; it runs once it was shown.

        Raises CapacityError.
        """
        if not self._free:
            self._grow()
            self._free.append(self._num_slots)
            self._num_slots += 1
        self._slot[layer, expert] = slot = self._free.pop()
        return self.records[slot]

    def _grow(self) -> None:
        num_slots = self._num_slots + 1
        if self._memory is not None:
            self._memory.resize(num_slots * self.record_bytes)
        elif num_slots > len(self.records):
            raise CapacityError(
                f"there is room for {len(self.records)} experts on {self._device}, and one more is "
                "to come: use a placement in which each rank holds as many as before"
            )

    def show(self, layer: int, expert: int) -> None:
        """Let the kernels see an expert that `add` made room for, now that its record is there."""
        self.table(layer).slot_of_expert[expert] = self._slot[layer, expert]

    def drop(self, layer: int, expert: int) -> None:
        """Give up an expert, shown or not."""
        self.table(layer).slot_of_expert[expert] = -1
        self._free.append(self._slot.pop((layer, expert)))
