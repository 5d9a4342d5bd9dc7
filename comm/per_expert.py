"""A row for each (token, expert) pair, there and back. Exact; three collectives."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from moe_serve.comm._between import Between, Meanwhile
from moe_serve.comm._layout import Layout, chosen
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
        world, layout, kernels = self._world, self._layout, self._kernels
        num_held, ids = layout.num_held(layer), routing.expert_ids
        ranks = chosen(self._replicas(layer, ids), ids)
        counts, token_of_row, places = kernels.sort_pairs(
            layout.keys(layer, ranks, ids), sum(num_held)
        )
        own = num_held[world.rank]
        came = world.exchange(counts[:, None], num_held, [own] * world.size)
        came = came.view(world.size, own)
        pairs_of_rank = counts.new_zeros(world.size)
        pairs_of_rank.index_add_(0, layout.rank_of_key(layer), counts)
        world.count_pairs(pairs_of_rank)
        out_rows, in_rows = world.read(pairs_of_rank, came.sum(1))
        rows = world.exchange(hidden[token_of_row], out_rows, in_rows, meanwhile)
        numbers = torch.arange(own, device=ids.device).repeat(world.size)
        number_of_row = numbers.repeat_interleave(came.flatten(), output_size=sum(in_rows))
        own_counts, row_of_pair, _ = kernels.sort_pairs(number_of_row[:, None], own)
        counts = counts.new_zeros(layout.num_experts)
        counts.index_copy_(0, layout.held(layer), own_counts)
        receipt = PairsReceipt(places, routing.weights, row_of_pair, out_rows, in_rows)
        return Inbox(rows, row_of_pair, counts), receipt

    def _send_back(self, outbox: Tensor, receipt: Receipt) -> Tensor:
        assert isinstance(receipt, PairsReceipt)
        back = torch.empty_like(outbox)
        back[receipt.row_of_pair] = outbox
        return self._world.exchange(back, receipt.in_rows, receipt.out_rows)


def build(world: World, layout: Layout, kernels: Kernels) -> PerExpert:
    """Build the dispatcher of this rank."""
    return PerExpert(world, layout, kernels)
