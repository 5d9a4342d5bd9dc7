"""A token's row once to each rank that needs it, a row for each expert back.

Exact; three collectives. Of u ranks that a token's k experts are on, u copies go out where
per_expert sends k.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from moe_serve.comm._layout import Layout
from moe_serve.comm._rows import RowsReceipt, pack, pair_of_choice, receive, send_back, unpack
from moe_serve.comm._world import World
from moe_serve.comm.base import Inbox, Receipt
from moe_serve.types import Routing


class Dedup:
    """See `comm.base.Dispatcher`."""

    def __init__(self, world: World, layout: Layout, combine: Callable[..., Tensor]) -> None:
        self._world = world
        self._layout = layout
        self._combine = combine

    def begin_step(self, num_tokens: Sequence[int]) -> None:
        """Nothing is needed beforehand: counts are exchanged in each layer."""

    def dispatch(self, layer: int, hidden: Tensor, routing: Routing) -> tuple[Inbox, Receipt]:
        world, own = self._world, self._layout.num_local(layer)[self._world.rank]
        ranks, slots = self._layout.choose(layer, routing.expert_ids)
        num_tokens, top_k = ranks.shape
        visits = torch.zeros(num_tokens, world.size, dtype=torch.bool)
        visits[torch.arange(num_tokens)[:, None], ranks] = True
        rank_of_row, token_of_row = visits.T.nonzero(as_tuple=True)
        of_rank = slots[token_of_row].where(ranks[token_of_row] == rank_of_row[:, None], -1)
        out_rows = visits.sum(0)
        one_each = [1] * world.size
        in_rows = world.exchange(out_rows[:, None], one_each, one_each).flatten().tolist()
        packed = world.exchange(pack(hidden, token_of_row, of_rank), out_rows.tolist(), in_rows)
        rows, came = unpack(packed, hidden, top_k)
        inbox, order, pairs_out = receive(rows, came, in_rows, own)
        pairs_in = ranks.flatten().bincount(minlength=world.size).tolist()
        receipt = RowsReceipt(pair_of_choice(ranks), routing.weights, order, pairs_in, pairs_out)
        return inbox, receipt

    def combine(
        self,
        outbox: Tensor,
        receipt: Receipt,
        shared: Tensor | None = None,
        shared_weights: Tensor | None = None,
    ) -> Tensor:
        assert isinstance(receipt, RowsReceipt)
        home = send_back(self._world, outbox, receipt)
        return self._combine(home, receipt.pair_of_choice, receipt.weights, shared, shared_weights)


def build(world: World, layout: Layout, combine: Callable[..., Tensor]) -> Dedup:
    """Build the dispatcher of this rank."""
    return Dedup(world, layout, combine)
