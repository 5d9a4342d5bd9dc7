"""The ranks that exchange rows: one collective, counted. Over gloo between processes, NCCL on GPUs.

All-to-all is all that dispatchers use, so that there is one thing to count and to time.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
import torch.distributed as dist
from torch import Tensor

from moe_serve.errors import CommError


class World:
    """A process group, and what went through it.

    num_collectives: calls since the start; bytes_sent: by this rank to others.
    """

    def __init__(self, group: dist.ProcessGroup) -> None:
        self._group = group
        self.rank = dist.get_rank(group)
        self.size = dist.get_world_size(group)
        self.num_collectives = 0
        self.bytes_sent = 0

    def exchange(
        self,
        rows: Tensor,
        out_rows: Sequence[int],
        in_rows: Sequence[int],
        meanwhile: Callable[[], None] | None = None,
    ) -> Tensor:
        """Send rows to every rank, and return what came from each, in the order of ranks.

        rows: [sum(out_rows), width], contiguous, those for rank 0 first; out_rows, in_rows: how
        many go to and come from each rank, this one too. Every rank must call it, also with none.
        meanwhile: called while they are on their way. Raises CommError when a rank is gone, or does
        not come within the group's timeout.
        """
        width = rows.shape[1]
        assert rows.shape[0] == sum(out_rows), (rows.shape, out_rows)
        out = rows.new_empty(sum(in_rows), width)
        # as bytes: gloo does not know every type, and no type is needed to move them
        size = width * rows.element_size()
        try:
            work = dist.all_to_all_single(
                out.view(torch.uint8).view(-1),
                rows.contiguous().view(torch.uint8).view(-1),
                [count * size for count in in_rows],
                [count * size for count in out_rows],
                group=self._group,
                async_op=meanwhile is not None,
            )
            if meanwhile is not None:
                meanwhile()
                work.wait()
        except RuntimeError as error:
            raise CommError(
                f"rank {self.rank} of {self.size}: another rank is gone or does not answer: {error}"
            ) from error
        self.num_collectives += 1
        self.bytes_sent += (sum(out_rows) - out_rows[self.rank]) * size
        return out

    def share(self, row: bytes) -> list[bytes]:
        """Return every rank's row, by rank; all have the same length. One collective."""
        mine = torch.frombuffer(bytearray(row), dtype=torch.uint8).repeat(self.size, 1)
        ones = [1] * self.size
        return [bytes(one.tolist()) for one in self.exchange(mine, ones, ones)]
