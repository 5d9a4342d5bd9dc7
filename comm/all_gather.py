"""Every token's row to every rank, a row for each expert back. Exact; two collectives.

How many come from each rank the step has said beforehand. Made of all-to-all. It pays where a
token's experts are on most ranks anyway.
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


class AllGather:
    """See `comm.base.Dispatcher`."""

    def __init__(self, world: World, layout: Layout, combine: Callable[..., Tensor]) -> None:
        self._world = world
        self._layout = layout
        self._combine = combine
        self._num_tokens: list[int] = [0] * world.size

    def begin_step(self, num_tokens: Sequence[int]) -> None:
        """Take note of how many tokens every rank has in this step."""
        self._num_tokens = list(num_tokens)

    def dispatch(self, layer: int, hidden: Tensor, routing: Routing) -> tuple[Inbox, Receipt]:
        world, own = self._world, self._layout.num_local(layer)[self._world.rank]
        ranks, slots = self._layout.choose(layer, routing.expert_ids)
        num_tokens, top_k = ranks.shape
        assert num_tokens == self._num_tokens[world.rank], "the step has said another number"
        every = torch.arange(world.size)[:, None, None]
        of_rank = slots.where(ranks == every, -1).view(-1, top_k)
        token_of_row = torch.arange(num_tokens).repeat(world.size)
        packed = world.exchange(
            pack(hidden, token_of_row, of_rank), [num_tokens] * world.size, self._num_tokens
        )
        rows, came = unpack(packed, hidden, top_k)
        inbox, order, pairs_out = receive(rows, came, self._num_tokens, own)
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


def build(world: World, layout: Layout, combine: Callable[..., Tensor]) -> AllGather:
    """Build the dispatcher of this rank."""
    return AllGather(world, layout, combine)
