"""Room of fixed size for each pair of ranks: no counts, the same shapes each time.

Two collectives. Rank-major: [ranks, capacity] rows out, unused ones naming no expert, and
[ranks, capacity, width] results back, where width is the most experts of a layer that a token can
have on one rank. The capacity is the step's most tokens, rounded up to a power of two, and at most
MOST_ROWS: what does not fit goes in another round, nothing is dropped. Exact. Only the exchanges
have fixed shapes: what is between them depends on the routing, and no CUDA graph can hold it yet.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from moe_serve.comm._between import Between, Meanwhile
from moe_serve.comm._layout import Layout
from moe_serve.comm._rows import inbox_of, pack, unpack
from moe_serve.comm._world import World
from moe_serve.comm.base import Inbox, Receipt
from moe_serve.types import Routing

MOST_ROWS = 64


@dataclass(frozen=True, slots=True)
class StaticReceipt(Receipt):
    """place: int64 [num_pairs], where in the buffer of results each pair of the inbox goes."""

    place: Tensor
    width: int


class Static(Between):
    """See `comm.base.Dispatcher`."""

    def __init__(self, world: World, layout: Layout, combine: Callable[..., Tensor]) -> None:
        super().__init__(world, layout, combine)
        self._capacity = self._rounds = 1

    def begin_step(self, num_tokens: Sequence[int]) -> None:
        """Choose the capacity, and how many rounds there are, by the rank with most tokens."""
        most = max(1, *num_tokens)
        self._capacity = min(MOST_ROWS, 1 << (most - 1).bit_length())
        self._rounds = -(-most // self._capacity)

    def dispatch(
        self, layer: int, hidden: Tensor, routing: Routing, meanwhile: Meanwhile = None
    ) -> tuple[Inbox, Receipt]:
        world, layout = self._world, self._layout
        ranks = layout.choose(layer, routing.expert_ids)
        num_tokens, top_k = ranks.shape
        width = min(top_k, max(layout.num_held(layer)))
        capacity, size = self._capacity, world.size
        room = self._rounds * capacity
        assert num_tokens <= room, "the step has said another number"
        every = torch.arange(size)[:, None, None]
        is_there = ranks == every  # [ranks, tokens, top_k]
        for_rank = torch.full((size, room, top_k), -1)
        for_rank[:, :num_tokens] = routing.expert_ids.where(is_there, -1)
        padded = hidden.new_zeros(room, hidden.shape[1])
        padded[:num_tokens] = hidden
        each = [capacity] * size
        rows, came = [], []
        for number in range(self._rounds):
            part = slice(number * capacity, (number + 1) * capacity)
            token_of_row = torch.arange(part.start, part.stop).repeat(size)
            packed = pack(padded, token_of_row, for_rank[:, part].reshape(-1, top_k))
            came_now = world.exchange(packed, each, each, None if number else meanwhile)
            some_rows, some_experts = unpack(came_now, hidden, top_k)
            rows.append(some_rows)
            came.append(some_experts)
        experts = torch.cat(came)  # [rounds * ranks * capacity, top_k]
        inbox, order = inbox_of(torch.cat(rows), experts, layout.num_experts)
        is_here = experts >= 0
        turn = is_here.cumsum(1) - 1  # of a row's pairs here, the first, the second, ...
        place = inbox.row_of_pair * width + turn[is_here][order]
        # where this rank's results come back: round, rank, row, turn
        own_turn = (is_there.cumsum(2) - 1).gather(0, ranks[None])[0]
        token = torch.arange(num_tokens)[:, None]
        of_round = token // capacity * size + ranks
        back = (of_round * capacity + token % capacity) * width + own_turn
        return inbox, StaticReceipt(back, routing.weights, place, width)

    def _send_back(self, outbox: Tensor, receipt: Receipt) -> Tensor:
        assert isinstance(receipt, StaticReceipt)
        in_round = self._world.size * self._capacity * receipt.width
        buffer = outbox.new_zeros(self._rounds * in_round, outbox.shape[1])
        buffer[receipt.place] = outbox
        each = [self._capacity * receipt.width] * self._world.size
        return torch.cat(
            [self._world.exchange(part, each, each) for part in torch.split(buffer, in_round)]
        )


def build(world: World, layout: Layout, combine: Callable[..., Tensor]) -> Static:
    """Build the dispatcher of this rank."""
    return Static(world, layout, combine)
