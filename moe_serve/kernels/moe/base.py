"""Experts as a kernel reads them: records in memory, and which slot holds which expert."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

# bytes before a record's weights: see experts/records.py
HEADER_BYTES = 64


@dataclass(frozen=True, slots=True)
class ExpertTable:
    """One layer's experts.

    records: uint8 [num_slots, record_bytes], each a header and then the weights as the kernel packs
    them. slot_of_expert: int32 [num_experts], -1 where absent; uses: int64 [num_experts], to which
    the kernel adds how many rows each expert was given.
    """

    records: Tensor
    slot_of_expert: Tensor
    uses: Tensor
    hidden_size: int
    intermediate_size: int
    dtype: torch.dtype

    @property
    def num_experts(self) -> int:
        return self.slot_of_expert.shape[0]


def plain_weights(
    records: Tensor, hidden_size: int, intermediate_size: int, dtype: torch.dtype
) -> tuple[Tensor, Tensor]:
    """View the weights of records that are not packed: what a checkpoint is read into.

    records: uint8 [num_slots, record_bytes]. Returns gate_up [num_slots, 2 * intermediate_size,
    hidden_size], gate before up, and down [num_slots, hidden_size, intermediate_size].
    """
    num_slots, record_bytes = records.shape
    size = intermediate_size * hidden_size
    flat = records.view(dtype)
    stride = record_bytes // dtype.itemsize
    first = int(flat.storage_offset()) + HEADER_BYTES // dtype.itemsize

    def view(rows: int, columns: int, offset: int) -> Tensor:
        return flat.as_strided((num_slots, rows, columns), (stride, columns, 1), first + offset)

    return view(2 * intermediate_size, hidden_size, 0), view(
        hidden_size, intermediate_size, 2 * size
    )
