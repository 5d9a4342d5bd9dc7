"""Every token's row to every rank, a row for each expert back. Exact; two collectives.

How many come from each rank the step has said beforehand. Made of all-to-all. It pays where a
token's experts are on most ranks anyway.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from moe_serve.comm._between import Meanwhile
from moe_serve.comm._layout import Layout
from moe_serve.comm._rows import RowsOnce
from moe_serve.comm._world import World
from moe_serve.comm.base import Inbox, Receipt
from moe_serve.kernels.exchange.base import RowPlan
from moe_serve.kernels.suite import Kernels
from moe_serve.types import Routing


class AllGather(RowsOnce):
    """See `comm.base.Dispatcher`."""

    def __init__(self, world: World, layout: Layout, kernels: Kernels) -> None:
        super().__init__(world, layout, kernels)
        self._in_rows = torch.zeros(world.size, dtype=torch.int64, device=world.device)

    def begin_step(self, num_tokens: Sequence[int]) -> None:
        super().begin_step(num_tokens)
        self._in_rows = torch.tensor(self._num_tokens, device=self._world.device)

    def dispatch(
        self, layer: int, hidden: Tensor, routing: Routing, meanwhile: Meanwhile = None
    ) -> tuple[Inbox, Receipt]:
        world, in_rows, num_tokens = self._world, self._num_tokens, hidden.shape[0]
        assert num_tokens == in_rows[world.rank], "the step has said another number"
        plan = RowPlan(world.size, capacity=num_tokens)
        rows, packed = self._pack(layer, hidden, routing, plan)
        room = self._room(sum(in_rows), rows)
        came = world.exchange(rows, [num_tokens] * world.size, in_rows, meanwhile, room)
        top_k = routing.expert_ids.shape[1]
        inbox, places, pairs_out = self._unpack(came, self._in_rows, hidden, top_k, plan)
        pairs = world.read(packed.pairs_of_rank, pairs_out)
        return self._received(inbox, places, routing, packed, *pairs)


def build(world: World, layout: Layout, kernels: Kernels) -> AllGather:
    """Build the dispatcher of this rank."""
    return AllGather(world, layout, kernels)
