"""Every token's row to every rank, a row for each expert back. Exact; two collectives.

How many come from each rank the step has said beforehand. Made of all-to-all. It pays where a
token's experts are on most ranks anyway.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from moe_serve.comm._between import Meanwhile
from moe_serve.comm._layout import Layout
from moe_serve.comm._rows import RowsOnce, pack
from moe_serve.comm._world import World
from moe_serve.comm.base import Inbox, Receipt
from moe_serve.types import Routing


class AllGather(RowsOnce):
    """See `comm.base.Dispatcher`."""

    def dispatch(
        self, layer: int, hidden: Tensor, routing: Routing, meanwhile: Meanwhile = None
    ) -> tuple[Inbox, Receipt]:
        world = self._world
        ranks = self._layout.choose(layer, routing.expert_ids)
        num_tokens, top_k = ranks.shape
        assert num_tokens == self._num_tokens[world.rank], "the step has said another number"
        every = torch.arange(world.size)[:, None, None]
        experts = routing.expert_ids.where(ranks == every, -1).view(-1, top_k)
        token_of_row = torch.arange(num_tokens).repeat(world.size)
        out_rows, in_rows = [num_tokens] * world.size, self._num_tokens
        packed = world.exchange(pack(hidden, token_of_row, experts), out_rows, in_rows, meanwhile)
        return self._received(packed, in_rows, hidden, routing, ranks)


def build(world: World, layout: Layout, combine: Callable[..., Tensor]) -> AllGather:
    """Build the dispatcher of this rank."""
    return AllGather(world, layout, combine)
