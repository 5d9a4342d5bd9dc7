"""The experts of one rank of several, to which the others send their tokens too."""

from __future__ import annotations

import logging
import zlib
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import numpy as np
import torch
from torch import Tensor

from moe_serve.comm.base import Inbox
from moe_serve.errors import STEP_FAULTS, CommError
from moe_serve.experts.executor import ResidentExperts
from moe_serve.experts.offload import OffloadedExperts
from moe_serve.experts.recent_routing import RecentRouting
from moe_serve.kernels.forward.base import Watcher
from moe_serve.kernels.moe.base import ExpertTable
from moe_serve.types import ForwardBatch, Routing

logger = logging.getLogger(__name__)

_CRC_BYTES = 4


class RankExperts:
    """See `executor.Experts`. What fails gives NaN, for the others wait for their rows.

    Sequences that used those experts then end with an error, at their own ranks; others go on.
    Experts may move to other ranks: as whole records where they are held in memory; where a cache
    stands before a store, which has all, none needs to travel. pairs_computed: (token, expert)
    pairs that came since the start, from all ranks; the device may be asked for it.
    """

    def __init__(self, inner: ResidentExperts | OffloadedExperts, is_noting: bool = False) -> None:
        """is_noting: keep what the latest tokens used."""
        self.inner = inner
        self._num_pairs = 0
        self._counted: Tensor | None = None  # pairs, where the device alone knows how many
        self.recent = RecentRouting(sorted(inner.layers)) if is_noting else None
        self.layers: dict[int, ExpertTable] = inner.layers
        self._index = {layer: index for index, layer in enumerate(sorted(inner.layers))}

    @contextmanager
    def step(self, batch: ForwardBatch, is_noted: bool = False) -> Iterator[Watcher | None]:
        recent = self.recent if batch.num_seqs > 0 else None
        if recent is not None:
            recent.begin(batch.token_ids)
        try:
            with self.inner.step(batch, is_noted) as watcher:
                yield watcher
        except BaseException:
            if recent is not None:
                recent.abandon()
            raise
        if recent is not None:
            recent.end()

    def run(self, layer: int, inbox: Inbox, routing: Routing, residual: Tensor) -> Tensor:
        self._count(inbox)
        if self.recent is not None:
            self.recent.note(layer, routing)
        try:
            return self.inner.run(layer, inbox, routing, residual)
        except STEP_FAULTS as error:
            logger.error("experts of layer %d: %s: %s", layer, type(error).__name__, error)
            num_pairs, size = inbox.row_of_pair.shape[0], self.layers[layer].hidden_size
            return inbox.rows.new_full((num_pairs, size), float("nan"))

    @property
    def pairs_computed(self) -> int:
        return self._num_pairs + (0 if self._counted is None else int(self._counted))

    def _count(self, inbox: Inbox) -> None:
        if not inbox.has_room:
            self._num_pairs += inbox.row_of_pair.shape[0]
            return
        if self._counted is None:
            self._counted = torch.zeros((), dtype=torch.int64, device=inbox.counts.device)
        self._counted.add_(inbox.counts.sum())

    def resident(self) -> list[list[int]]:
        return self.inner.resident()

    def rehearsal(self) -> ResidentExperts:
        return self.inner.rehearsal()

    def report(self) -> dict[str, Any]:
        return self.inner.report()

    def close(self) -> None:
        self.inner.close()

    def abandon(self) -> None:
        self.inner.abandon()

    # -- experts that move -------------------------------------------------------------------------

    @property
    def is_moving_records(self) -> bool:
        """Whether an expert that comes to this rank must be sent to it."""
        return isinstance(self.inner, ResidentExperts)

    def message_bytes(self, layer: int) -> int:
        """Return the size of an expert's record with its checksum, as it travels."""
        return int(self.layers[layer].records.shape[1]) + _CRC_BYTES

    def packed(self, layer: int, experts: Sequence[int]) -> Tensor:
        """Return held experts as they travel, uint8 [num_experts, message_bytes], on the host."""
        out = torch.empty(len(experts), self.message_bytes(layer), dtype=torch.uint8, device="cpu")
        for row, expert in zip(out, experts, strict=True):
            row[:-_CRC_BYTES] = self._arena(layer).record(layer, expert)  # to the host
            crc = zlib.crc32(row[:-_CRC_BYTES].numpy()).to_bytes(_CRC_BYTES, "little")
            row[-_CRC_BYTES:] = torch.frombuffer(bytearray(crc), dtype=torch.uint8)
        return out

    def receive(self, layer: int, experts: Sequence[int], rows: Tensor) -> None:
        """Keep experts that came; they run once they were shown. Raises CommError if damaged."""
        for expert, row in zip(experts, rows.cpu(), strict=True):
            sent = int.from_bytes(row[-_CRC_BYTES:].numpy().tobytes(), "little")
            if zlib.crc32(row[:-_CRC_BYTES].numpy()) != sent:
                raise CommError(f"expert {expert} of layer {layer} was damaged on its way")
            self._arena(layer).add(layer, expert)[:] = row[:-_CRC_BYTES]

    def take_over(self, layer: int, held: Sequence[int]) -> None:
        """Hold these experts of a layer, which are here, and no others. Between steps."""
        if isinstance(self.inner, OffloadedExperts):
            is_held = self.inner.cache.is_held[self._index[layer]]
            is_held[:] = False
            is_held[list(held)] = True
            return
        arena = self._arena(layer)
        before = np.flatnonzero(self.layers[layer].slot_of_expert.cpu().numpy() >= 0).tolist()
        for expert in sorted(set(held) - set(before)):
            arena.show(layer, expert)
        for expert in sorted(set(before) - set(held)):
            arena.drop(layer, expert)

    def _arena(self, layer: int) -> Any:
        assert isinstance(self.inner, ResidentExperts)
        assert self.inner.arenas is not None
        return self.inner.arenas[layer]
