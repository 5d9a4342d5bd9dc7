"""The ranks that exchange rows: one collective, counted. Over gloo between processes, NCCL on GPUs.

All-to-all is all that dispatchers use, so that there is one thing to count and to time.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.distributed as dist
from torch import Tensor


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

    def exchange(self, rows: Tensor, out_rows: Sequence[int], in_rows: Sequence[int]) -> Tensor:
        """Send rows to every rank, and return what came from each, in the order of ranks.

        rows: [sum(out_rows), width], contiguous, those for rank 0 first; out_rows, in_rows: how
        many go to and come from each rank, this one too. Every rank must call it, also with none.
        """
        width = rows.shape[1]
        assert rows.shape[0] == sum(out_rows), (rows.shape, out_rows)
        out = rows.new_empty(sum(in_rows), width)
        # as bytes: gloo does not know every type, and no type is needed to move them
        size = width * rows.element_size()
        dist.all_to_all_single(
            out.view(torch.uint8).view(-1),
            rows.contiguous().view(torch.uint8).view(-1),
            [count * size for count in in_rows],
            [count * size for count in out_rows],
            group=self._group,
        )
        self.num_collectives += 1
        self.bytes_sent += (sum(out_rows) - out_rows[self.rank]) * size
        return out
