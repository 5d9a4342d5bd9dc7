"""Memory for a cache's slots: how many there can be, and what is given back when they shrink."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

from moe_serve.errors import CapacityError
from moe_serve.kernels.native.memory import GrowingMemory


class SlotMemory(Protocol):
    """The arena that holds the slots. records: uint8 [at least most_slots, record_bytes]."""

    @property
    def records(self) -> Tensor: ...
    @property
    def most_slots(self) -> int: ...

    def resize(self, num_slots: int) -> None:
        """Make the first `num_slots` usable and give back the rest. Raises CapacityError."""
        ...


@dataclass(frozen=True, slots=True)
class FixedSlots:
    """Slots in front of records that stay: what they do not use is not given back."""

    records: Tensor
    most_slots: int

    def resize(self, num_slots: int) -> None:
        """Nothing changes."""


class GrowingSlots:
    """Slots in memory that is taken and given back as their number changes."""

    def __init__(self, num_slots: int, most_slots: int, record_bytes: int) -> None:
        """Raises CapacityError where there is no memory for `num_slots`."""
        self._record_bytes = record_bytes
        self._memory = GrowingMemory(most_slots * record_bytes, num_slots * record_bytes)
        self.records = self._memory.tensor.view(-1, record_bytes)
        self.most_slots = self.records.shape[0]

    def resize(self, num_slots: int) -> None:
        """See `SlotMemory`."""
        self._memory.resize(num_slots * self._record_bytes)


class DeviceSlots:
    """Slots in a device's memory: all of it is taken at the start, and given back at the end."""

    def __init__(self, num_slots: int, record_bytes: int, device: torch.device) -> None:
        """Raises CapacityError where the device has no memory for them."""
        try:
            self.records = torch.zeros(num_slots, record_bytes, dtype=torch.uint8, device=device)
        except RuntimeError as error:
            raise CapacityError(
                f"no memory on {device} for {num_slots} expert slots of {record_bytes} bytes "
                f"({error}); lower expert_cache_slots, "
                "expert_cache_gb or expert_stream_slots"
            ) from error
        self.most_slots = num_slots

    def resize(self, num_slots: int) -> None:
        """Nothing changes: kernels and graphs know where the slots are."""
