"""What dispatchers share that send a token's row once to a rank, with the experts it is for."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from moe_serve.comm._between import Between
from moe_serve.comm._buffers import Buffers
from moe_serve.comm._layout import Layout
from moe_serve.comm._world import World
from moe_serve.comm.base import Inbox, Receipt
from moe_serve.kernels.exchange.base import Packed, RowPlan, row_bytes
from moe_serve.kernels.suite import Kernels
from moe_serve.types import Routing


@dataclass(frozen=True, slots=True)
class RowsReceipt(Receipt):
    """And how results go back: pairs for each rank, and this rank's own from each.

    place_of_pair: int64 [num_pairs], where among the results each pair of the inbox goes.
    """

    place_of_pair: Tensor
    pairs_in: Sequence[int]
    pairs_out: Sequence[int]


class RowsOnce(Between):
    """Gets rows with the experts they are for; sends back a row for each of those."""

    def __init__(self, world: World, layout: Layout, kernels: Kernels) -> None:
        super().__init__(world, layout, kernels)
        self._buffers = Buffers(world.device)

    def _pack(
        self, layer: int, hidden: Tensor, routing: Routing, plan: RowPlan
    ) -> tuple[Tensor, Packed]:
        """Return rows as they travel, uint8 [plan.num_rows, row_bytes], and what they are."""
        num_tokens, top_k = routing.expert_ids.shape
        size = row_bytes(hidden.shape[1], hidden.dtype, top_k)
        num_rows = plan.num_rows(num_tokens, top_k)
        rows = self._buffers.take("out", num_rows, size, torch.uint8)
        replicas = self._replicas(layer, routing.expert_ids)
        packed = self._kernels.pack_rows(hidden, routing.expert_ids, replicas, plan, rows)
        self._world.count_pairs(packed.pairs_of_rank)
        return rows, packed

    def _told(self, packed: Packed) -> tuple[Tensor, list[list[int]]]:
        """Tell all ranks how many rows and pairs go to them. Collective; the host waits.

        Returns the rows that come from each rank, and as numbers: rows out and in, pairs in and
        out, [num_ranks] each.
        """
        mine = torch.stack([packed.rows_of_rank, packed.pairs_of_rank], 1)  # [num_ranks, 2]
        in_rows, pairs_out = self._world.exchange_evenly(mine).t().contiguous().unbind()
        counts = (packed.rows_of_rank, in_rows, packed.pairs_of_rank, pairs_out)
        return in_rows, self._world.read(*counts)

    def _room(self, num_rows: int, like: Tensor) -> Tensor:
        """Return room for rows to come, as many bytes each as in `like`."""
        return self._buffers.take("in", num_rows, like.shape[1], torch.uint8)

    def _unpack(
        self,
        came: Tensor,
        in_rows: Tensor | None,
        hidden: Tensor,
        top_k: int,
        plan: RowPlan,
    ) -> tuple[Inbox, Tensor, Tensor]:
        """Return the inbox, the place of each pair's result, and how many go to each rank.

        Of inbox and places there may be more than there are pairs; see `Inbox.has_room`.
        """
        rows = self._buffers.take("rows", came.shape[0], hidden.shape[1], hidden.dtype)
        num_experts = self._layout.num_experts
        unpacked = self._kernels.unpack_rows(came, in_rows, num_experts, top_k, plan, rows)
        inbox = Inbox(unpacked.rows, unpacked.row_of_pair, unpacked.counts, has_room=True)
        return inbox, unpacked.place_of_pair, unpacked.pairs_of_rank

    def _received(
        self,
        inbox: Inbox,
        places: Tensor,
        routing: Routing,
        packed: Packed,
        pairs_in: Sequence[int],
        pairs_out: Sequence[int],
    ) -> tuple[Inbox, RowsReceipt]:
        """Return inbox and receipt, where no more results go back than there are.

        pairs_in, pairs_out: results from and to each rank.
        """
        inbox, places = without_room(inbox, places, sum(pairs_out))
        return inbox, RowsReceipt(
            packed.place_of_choice, routing.weights, places, pairs_in, pairs_out
        )

    def _send_back(self, outbox: Tensor, receipt: Receipt) -> Tensor:
        assert isinstance(receipt, RowsReceipt)
        num_pairs, size = outbox.shape
        results = self._buffers.take("results", num_pairs, size, outbox.dtype)
        self._kernels.scatter_rows(outbox, receipt.place_of_pair, results)
        home = self._buffers.take("home", sum(receipt.pairs_in), size, outbox.dtype)
        return self._world.exchange(results, receipt.pairs_out, receipt.pairs_in, into=home)


def without_room(inbox: Inbox, places: Tensor, num_pairs: int) -> tuple[Inbox, Tensor]:
    """Return an inbox and its pairs' places where it is known how many pairs there are."""
    row_of_pair = inbox.row_of_pair[:num_pairs]
    return replace(inbox, row_of_pair=row_of_pair, has_room=False), places[:num_pairs]
