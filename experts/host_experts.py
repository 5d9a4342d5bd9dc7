"""Experts that a device misses, run where their records lie: in host memory, beside the device.

Rows come down, results go up; both are a small part of a record. The host adds up in another order
than the device does, so what an expert gives depends on where it ran: a named mode, never exact.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

from moe_serve.experts.split import MissPlanner
from moe_serve.kernels.forward.base import Pairs
from moe_serve.kernels.gpu.streams import Event, Streams
from moe_serve.kernels.moe import reference
from moe_serve.kernels.moe.base import ExpertTable

Array = np.ndarray[Any, Any]

_STEP_BYTES = 2**20  # what the memory for results grows by


class HostExperts:
    """All experts' records in host memory, in plain rows, and what chooses which of them run there.

    tables: by the number among MoE layers, with every expert resident.
    """

    def __init__(
        self, tables: Mapping[int, ExpertTable], planner: MissPlanner | None, streams: Streams
    ) -> None:
        """planner: None: nothing runs here, and records are only copied from here."""
        self.planner = planner
        self._tables = tables
        self._streams = streams
        self._memory = torch.empty(0, dtype=torch.uint8)  # pinned: results on their way up
        self._is_free: Event | None = None

    def begin(
        self, layer: int, experts: Sequence[int], counts: Array, pairs: Pairs, uses: Tensor
    ) -> Callable[[], None]:
        """Fetch the rows of `experts`; return what runs them and sends the results.

        counts: int64 [num_experts], how many pairs each expert has. uses: of the device's table, to
        which theirs are added. Waits for the device, which has nothing else to do by now. What is
        returned does not wait for it: the results are in `pairs.out` for whatever runs later in the
        kernels' stream.
        """
        table, own = self._tables[layer], np.zeros_like(counts)
        own[list(experts)] = counts[list(experts)]
        places = torch.from_numpy(np.flatnonzero(np.repeat(own > 0, counts)))
        places = places.to(pairs.rows.device)  # of pairs, which are sorted by expert
        rows = pairs.rows.index_select(0, pairs.row_of_pair.index_select(0, places)).cpu()
        own_counts = torch.from_numpy(own)
        uses.add_(own_counts.to(uses.device))

        def run() -> None:
            results = reference.moe(rows, torch.arange(rows.shape[0]), own_counts, table)
            self._send(results, own, counts, pairs.out)

        return run

    def _send(self, results: Tensor, own: Array, counts: Array, out: Tensor) -> None:
        """Copy each expert's results to its pairs' places, in the order of the kernels."""
        kept, stream = self._kept(results), self._streams.current()
        ends, own_ends = np.cumsum(counts).tolist(), np.cumsum(own).tolist()
        for expert in np.flatnonzero(own).tolist():
            number, end, own_end = int(own[expert]), ends[expert], own_ends[expert]
            stream.copy(out[end - number : end], kept[own_end - number : own_end])
        self._is_free = stream.record()

    def _kept(self, results: Tensor) -> Tensor:
        """Copy results to memory that the device may read later, once it has read what was there.

        Returns them there.
        """
        if self._is_free is not None:
            self._is_free.wait()
        num_bytes = results.numel() * results.itemsize
        if num_bytes > self._memory.shape[0]:
            self._memory = self._streams.pinned(-(-num_bytes // _STEP_BYTES) * _STEP_BYTES)
        return self._memory[:num_bytes].view(results.dtype).view(results.shape).copy_(results)
