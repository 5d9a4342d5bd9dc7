"""What dispatchers share that send back one row for each row: the sum of its experts there.

Not exact: a rank adds up its own part and rounds it, where one process rounds once.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from moe_serve.comm._rows import RowsOnce
from moe_serve.comm.base import Inbox, Receipt
from moe_serve.kernels.exchange.base import NAME, Packed, RowPlan
from moe_serve.types import Routing

_WEIGHT = torch.float32


@dataclass(frozen=True, slots=True)
class SumsReceipt(Receipt):
    """And what this rank adds up for others.

    pairs, pair_weights: int64, float32 [num_slots, top_k], the pairs of each row that came, and
    what they weigh: 0 for those that there are not.
    """

    pairs: Tensor
    pair_weights: Tensor
    in_rows: list[int] | None = None
    out_rows: list[int] | None = None


class Sums(RowsOnce):
    """Rows travel with their weights; the results of a row are added up where they are made."""

    def _pack_weighted(
        self, layer: int, hidden: Tensor, routing: Routing, plan: RowPlan
    ) -> tuple[Tensor, Tensor, Packed]:
        """Return rows that have their weights behind them, such rows as they travel, and where."""
        weights = routing.weights.to(_WEIGHT).contiguous().view(torch.uint8)
        rows = torch.cat([hidden.contiguous().view(torch.uint8), weights], 1).view(hidden.dtype)
        packed, about = self._pack(layer, rows, routing, plan)
        return rows, packed, about

    def _unpack_weighted(
        self,
        came: Tensor,
        in_rows: Tensor | None,
        weighted: Tensor,
        hidden: Tensor,
        routing: Routing,
        plan: RowPlan,
        about: Packed,
    ) -> tuple[Inbox, SumsReceipt]:
        """Take rows apart that came; plan.width must be top_k. Returns inbox and receipt."""
        top_k, size = routing.expert_ids.shape[1], hidden.shape[1]
        inbox, places, _ = self._unpack(came, in_rows, weighted, top_k, plan)
        num_slots, num_pairs = came.shape[0], len(places)
        names = _tail(came, 0, top_k, NAME)
        told = _tail(came, top_k * NAME.itemsize, top_k, _WEIGHT)
        is_here = names >= 0
        turn = is_here.cumsum(1) - 1
        slot, choice = is_here.nonzero(as_tuple=True)
        weights = torch.zeros(num_slots, top_k)
        weights[slot, turn[slot, choice]] = told[slot, choice]
        pairs = torch.zeros(num_slots, top_k, dtype=torch.int64)
        pairs.view(-1)[places] = torch.arange(num_pairs)
        # what is not there weighs 0, and is the row's own first: NaN stays where it is
        pairs = torch.where(torch.arange(top_k) < is_here.sum(1, keepdim=True), pairs, pairs[:, :1])
        is_first = about.place_of_choice % top_k == 0
        inbox = Inbox(inbox.rows[:, :size].contiguous(), inbox.row_of_pair, inbox.counts)
        receipt = SumsReceipt(about.place_of_choice // top_k, is_first.to(_WEIGHT), pairs, weights)
        return inbox, receipt

    def _summed(self, outbox: Tensor, receipt: SumsReceipt) -> Tensor:
        """Return the sums of the rows that came, [num_slots, hidden_size]."""
        if not len(outbox):
            return outbox.new_zeros(len(receipt.pairs), outbox.shape[1])
        sums: Tensor = self._kernels.combine(outbox, receipt.pairs, receipt.pair_weights)
        return sums


def _tail(rows: Tensor, after: int, count: int, dtype: torch.dtype) -> Tensor:
    """Return `count` numbers that end `after` bytes before each row's end, [num_rows, count]."""
    end = rows.shape[1] - after
    # a copy: where they lie they need not be aligned
    part = rows[:, end - count * dtype.itemsize : end].flatten().clone()
    return part.view(dtype).view(-1, count)
