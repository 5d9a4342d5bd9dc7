"""A row for each (token, expert) pair, there and back. Exact; three collectives."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from moe_serve.comm._layout import Layout
from moe_serve.comm._world import World
from moe_serve.comm.base import Inbox, Receipt
from moe_serve.types import Routing


@dataclass(frozen=True, slots=True)
class PairsReceipt(Receipt):
    """And how many rows went to and came from each rank, and in which order they are to return."""

    row_of_pair: Tensor
    out_rows: Sequence[int]
    in_rows: Sequence[int]


class PerExpert:
    """See `comm.base.Dispatcher`."""

    def __init__(self, world: World, layout: Layout, combine: Callable[..., Tensor]) -> None:
        self._world = world
        self._layout = layout
        self._combine = combine

    def begin_step(self, num_tokens: Sequence[int]) -> None:
        """Nothing is needed beforehand: counts are exchanged in each layer."""

    def dispatch(self, layer: int, hidden: Tensor, routing: Routing) -> tuple[Inbox, Receipt]:
        world, num_local = self._world, self._layout.num_local(layer)
        ranks, slots = self._layout.choose(layer, routing.expert_ids)
        first = torch.tensor([0, *num_local]).cumsum(0)
        key = (first[ranks] + slots).flatten()
        order = key.argsort(stable=True)
        counts = key.bincount(minlength=int(first[-1]))
        own = num_local[world.rank]
        came = world.exchange(counts[:, None], num_local, [own] * world.size)
        came = came.view(world.size, own)
        in_rows = came.sum(1).tolist()
        out_rows = [int(part.sum()) for part in torch.split(counts, num_local)]
        top_k = ranks.shape[1]
        rows = world.exchange(hidden[order // top_k], out_rows, in_rows)
        slot_of_row = torch.arange(own).repeat(world.size).repeat_interleave(came.flatten())
        row_of_pair = slot_of_row.argsort(stable=True)
        places = torch.empty_like(order)
        places[order] = torch.arange(len(order))
        receipt = PairsReceipt(
            places.view_as(ranks), routing.weights, row_of_pair, out_rows, in_rows
        )
        return Inbox(rows, row_of_pair, came.sum(0)), receipt

    def combine(
        self,
        outbox: Tensor,
        receipt: Receipt,
        shared: Tensor | None = None,
        shared_weights: Tensor | None = None,
    ) -> Tensor:
        assert isinstance(receipt, PairsReceipt)
        back = torch.empty_like(outbox)
        back[receipt.row_of_pair] = outbox
        home = self._world.exchange(back, receipt.in_rows, receipt.out_rows)
        return self._combine(home, receipt.pair_of_choice, receipt.weights, shared, shared_weights)


def build(world: World, layout: Layout, combine: Callable[..., Tensor]) -> PerExpert:
    """Build the dispatcher of this rank."""
    return PerExpert(world, layout, combine)
