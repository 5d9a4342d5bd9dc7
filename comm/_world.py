"""The ranks that exchange rows: one collective, counted. Over gloo between processes, NCCL on GPUs.

All-to-all is all that dispatchers use, so that there is one thing to count and to time. What lies
in a GPU's memory travels over NCCL, in the order of the device's work: the host does not wait, and
so neither sees how long it takes nor that another rank is gone. What lies in host memory, as all
that ranks agree on, travels over gloo, also where the rows do not.
"""

from __future__ import annotations

import contextlib
import time
from collections.abc import Callable, Sequence

import torch
import torch.distributed as dist
from torch import Tensor

from moe_serve.errors import CommError

HOST = torch.device("cpu")


class World:
    """A process group, and what went through it.

    device: where rows are. num_collectives: calls since the start; bytes_sent: by this rank to
    others; both without what a CUDA graph has done again. exchange_s: seconds in the calls, waiting
    for others too, but without what was done meanwhile; None on a GPU, where nobody waits for them.
    num_waits: how often dispatchers had to know what the device has counted, for which the host
    waits until it has.
    """

    def __init__(self, group: dist.ProcessGroup, device: torch.device = HOST) -> None:
        """group: one that can carry host memory, and the device's."""
        self._group = group
        self._begin(dist.get_rank(group), dist.get_world_size(group), device)

    def _begin(self, rank: int, size: int, device: torch.device) -> None:
        self.rank = rank
        self.size = size
        self.device = device
        self._pairs = torch.zeros(size, dtype=torch.int64, device=device)
        self.num_collectives = 0
        self.bytes_sent = 0
        self.num_waits = 0
        self.exchange_s = 0.0 if device.type == "cpu" else None

    def exchange(
        self,
        rows: Tensor,
        out_rows: Sequence[int],
        in_rows: Sequence[int],
        meanwhile: Callable[[], None] | None = None,
        into: Tensor | None = None,
    ) -> Tensor:
        """Send rows to every rank, and return what came from each, in the order of ranks.

        rows: [sum(out_rows), width], contiguous, those for rank 0 first; out_rows, in_rows: how
        many go to and come from each rank, this one too. Every rank must call it, also with none.
        meanwhile: called while they are on their way. into: [sum(in_rows), width], for what comes,
        else it is new. Raises CommError when a rank is gone, or does not come within the group's
        timeout; of rows on a GPU nobody hears that here.
        """
        num_out, num_in, width = sum(out_rows), sum(in_rows), rows.shape[1]
        assert rows.shape[0] == num_out, (rows.shape, out_rows)
        out = rows.new_empty(num_in, width) if into is None else into
        assert out.shape == (num_in, width), (out.shape, num_in, width)
        self._all_to_all(out, rows.contiguous(), list(in_rows), list(out_rows), meanwhile)
        self.bytes_sent += (num_out - out_rows[self.rank]) * width * rows.element_size()
        return out

    def exchange_evenly(
        self,
        rows: Tensor,
        meanwhile: Callable[[], None] | None = None,
        into: Tensor | None = None,
    ) -> Tensor:
        """Send equally many rows to every rank, [size * each, width]; else as `exchange`."""
        assert rows.shape[0] % self.size == 0, (rows.shape, self.size)
        out = torch.empty_like(rows) if into is None else into
        assert out.shape == rows.shape, (out.shape, rows.shape)
        self._all_to_all(out, rows.contiguous(), None, None, meanwhile)
        self.bytes_sent += rows.nbytes // self.size * (self.size - 1)
        return out

    def share(self, row: bytes) -> list[bytes]:
        """Return every rank's row, by rank; all have the same length. One collective."""
        mine = torch.frombuffer(bytearray(row), dtype=torch.uint8).repeat(self.size, 1)
        return [bytes(one.tolist()) for one in self.exchange_evenly(mine)]

    def _all_to_all(
        self,
        out: Tensor,
        rows: Tensor,
        in_rows: list[int] | None,
        out_rows: list[int] | None,
        meanwhile: Callable[[], None] | None,
    ) -> None:
        start_s = time.perf_counter()
        meanwhile_s = 0.0
        # as bytes: gloo does not know every type, and no type is needed to move them
        try:
            work = dist.all_to_all_single(
                out.view(torch.uint8),
                rows.view(torch.uint8),
                in_rows,
                out_rows,
                group=self._group,
                async_op=meanwhile is not None,
            )
        except RuntimeError as error:
            raise self._lost(error) from error
        try:
            if meanwhile is not None:
                begun_s = time.perf_counter()
                meanwhile()
                meanwhile_s = time.perf_counter() - begun_s
        finally:  # what was begun is awaited, whatever became of the rest
            try:
                if work is not None:
                    work.wait()
            except RuntimeError as error:
                raise self._lost(error) from error
        self.num_collectives += 1
        if self.exchange_s is not None:
            self.exchange_s += time.perf_counter() - start_s - meanwhile_s

    def read(self, *counts: Tensor) -> list[list[int]]:
        """Return what the device has counted, of each tensor; the host waits for it, once for all.

        counts: int64 [size of its own]. Raises CommError where what they wait for has failed.
        """
        self.num_waits += 1
        try:
            numbers = iter(torch.cat(counts).tolist())
        except RuntimeError as error:
            raise self._lost(error) from error
        return [[next(numbers) for _ in range(len(one))] for one in counts]

    def connect(self) -> None:
        """Exchange something on the device, so that the first rows need not wait for it.

        Collective; the host waits. Raises CommError.
        """
        self.read(self.exchange_evenly(self._pairs[:, None])[:, 0])

    def count_pairs(self, pairs_of_rank: Tensor) -> None:
        """Count (token, expert) pairs of this rank, int64 [size], by the rank of their expert."""
        self._pairs.add_(pairs_of_rank)

    @property
    def pairs_sent(self) -> int:
        """(Token, expert) pairs of this rank whose expert was at another; the device is asked."""
        pairs: list[int] = self._pairs.tolist()
        return sum(pairs) - pairs[self.rank]

    def forget(self) -> None:
        """Count from now on: what was measured at start is over."""
        self.num_collectives = self.bytes_sent = self.num_waits = 0
        self._pairs.zero_()
        self.exchange_s = None if self.exchange_s is None else 0.0

    def close(self) -> None:
        """Give the group back; nothing can be exchanged any more."""
        with contextlib.suppress(RuntimeError, ValueError, AssertionError):
            dist.destroy_process_group(self._group)

    def _lost(self, error: RuntimeError) -> CommError:
        reason = (str(error).splitlines() or [""])[0].split(". This may")[0]
        return CommError(
            f"rank {self.rank} of {self.size}: another rank is gone or does not answer ({reason})"
        )
