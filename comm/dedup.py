"""A token's row once to each rank that needs it, a row for each expert back.

Exact; three collectives. Of u ranks that a token's k experts are on, u copies go out where
per_expert sends k.
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


class Dedup(RowsOnce):
    """See `comm.base.Dispatcher`."""

    def dispatch(
        self, layer: int, hidden: Tensor, routing: Routing, meanwhile: Meanwhile = None
    ) -> tuple[Inbox, Receipt]:
        world, ids = self._world, routing.expert_ids
        ranks = self._layout.choose(layer, ids)
        visits = torch.zeros(ranks.shape[0], world.size, dtype=torch.bool)
        visits[torch.arange(ranks.shape[0])[:, None], ranks] = True
        rank_of_row, token_of_row = visits.T.nonzero(as_tuple=True)
        experts = ids[token_of_row].where(ranks[token_of_row] == rank_of_row[:, None], -1)
        out_rows = visits.sum(0)
        one_each = [1] * world.size
        in_rows = world.exchange(out_rows[:, None], one_each, one_each).flatten().tolist()
        packed = world.exchange(
            pack(hidden, token_of_row, experts), out_rows.tolist(), in_rows, meanwhile
        )
        return self._received(packed, in_rows, hidden, routing, ranks)


def build(world: World, layout: Layout, combine: Callable[..., Tensor]) -> Dedup:
    """Build the dispatcher of this rank."""
    return Dedup(world, layout, combine)
