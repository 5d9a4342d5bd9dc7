"""Which slot holds which expert: the device's copy of what a cache keeps on the host."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import numpy as np
import torch
from torch import Tensor

from moe_serve.kernels.gpu.staging import Outgoing
from moe_serve.kernels.moe.base import ExpertTable

Array = np.ndarray[Any, Any]


class SlotTables:
    """The tables of all MoE layers, with slots that a kernel on the device can read.

    tables: in the order of the layers. flat: int32 [sum of num_experts], the slots of all layers,
    in place, or None where they were on the device from the start: then no expert is ever missing.
    """

    def __init__(
        self, device: torch.device, outgoing: Outgoing, tables: Sequence[ExpertTable]
    ) -> None:
        self._outgoing = outgoing
        self.flat: Tensor | None = None
        self.tables = list(tables)
        if any(table.slot_of_expert.device.type != "cpu" for table in tables):
            return
        self._of_layer: list[Array] = [table.slot_of_expert.numpy() for table in tables]
        sizes = [len(slots) for slots in self._of_layer]
        with torch.inference_mode(False):
            self.flat = torch.full((sum(sizes),), -1, dtype=torch.int32, device=device)
        self._sent = np.full(sum(sizes), -1, np.int32)
        self._now = self._sent.copy()
        views = torch.split(self.flat, sizes)
        self.tables = [
            replace(table, slot_of_expert=view) for table, view in zip(tables, views, strict=True)
        ]

    def refresh(self) -> None:
        """Send what has changed on the host, in the order of the current stream."""
        if self.flat is None or not len(self._now):
            return
        np.concatenate(self._of_layer, out=self._now)
        if np.array_equal(self._now, self._sent):
            return
        memory = self._outgoing.memory(self._now.nbytes)
        memory.numpy()[:] = self._now.view(np.uint8)
        self._outgoing.send(memory, self.flat.view(torch.uint8))
        self._sent[:] = self._now  # at last: what has failed is sent again

    def are_missing(self, number: int, counts: Array) -> bool:
        """Whether an expert with pairs has no slot; counts: int64 [num_experts] of MoE layer."""
        return self.flat is not None and bool((self._of_layer[number][counts > 0] < 0).any())
