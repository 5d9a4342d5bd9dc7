"""A row for each (token, expert) pair, there and back. Exact; three collectives."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from moe_serve.comm._between import Between, Meanwhile
from moe_serve.comm._layout import Layout
from moe_serve.comm._world import World
from moe_serve.comm.base import Inbox, Receipt
from moe_serve.kernels.suite import Kernels
from moe_serve.types import Routing


@dataclass(frozen=True, slots=True)
class PairsReceipt(Receipt):
    """And how many rows went to and came from each rank, and in which order they are to return."""

    row_of_pair: Tensor
    out_rows: Sequence[int]
    in_rows: Sequence[int]


class PerExpert(Between):
    """See `comm.base.Dispatcher`."""

    def dispatch(
        self, layer: int, hidden: Tensor, routing: Routing, meanwhile: Meanwhile = None
    ) -> tuple[Inbox, Receipt]:
        world, layout = self._world, self._layout
        num_held, num_experts = layout.num_held(layer), layout.num_experts
        ids = routing.expert_ids
        key = (layout.choose(layer, ids) * num_experts + ids).flatten()
        order = key.argsort(stable=True)
        counts = key.bincount(minlength=world.size * num_experts)[layout.held_keys(layer)]
        own = num_held[world.rank]
        came = world.exchange(counts[:, None], num_held, [own] * world.size)
        came = came.view(world.size, own)
        in_rows = came.sum(1).tolist()
        out_rows = [int(part.sum()) for part in torch.split(counts, num_held)]
        world.pairs_sent += len(order) - out_rows[world.rank]
        top_k = ids.shape[1]
        rows = world.exchange(hidden[order // top_k], out_rows, in_rows, meanwhile)
        expert_of_row = layout.held(layer).repeat(world.size).repeat_interleave(came.flatten())
        row_of_pair = expert_of_row.argsort(stable=True)
        places = torch.empty_like(order)
        places[order] = torch.arange(len(order))
        receipt = PairsReceipt(places.view_as(ids), routing.weights, row_of_pair, out_rows, in_rows)
        return Inbox(rows, row_of_pair, expert_of_row.bincount(minlength=num_experts)), receipt

    def _send_back(self, outbox: Tensor, receipt: Receipt) -> Tensor:
        assert isinstance(receipt, PairsReceipt)
        back = torch.empty_like(outbox)
        back[receipt.row_of_pair] = outbox
        return self._world.exchange(back, receipt.in_rows, receipt.out_rows)


def build(world: World, layout: Layout, kernels: Kernels) -> PerExpert:
    """Build the dispatcher of this rank."""
    return PerExpert(world, layout, kernels)
