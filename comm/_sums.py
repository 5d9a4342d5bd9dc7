"""What dispatchers share that send back one row for each row: the sum of its experts there.

Not exact: a rank adds up its own part and rounds it, where one process rounds once.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
from torch import Tensor

from moe_serve.comm._rows import RowsOnce, without_room
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
        num_pairs: int | None = None,
    ) -> tuple[Inbox, SumsReceipt]:
        """Take rows apart that came; plan.width must be top_k. Returns inbox and receipt.

        num_pairs: of the inbox; None where only the device knows.
        """
        top_k, size = routing.expert_ids.shape[1], hidden.shape[1]
        inbox, places, _ = self._unpack(came, in_rows, weighted, top_k, plan)
        if num_pairs is not None:
            inbox, places = without_room(inbox, places, num_pairs)
        num_slots = came.shape[0]
        names = _tail(came, 0, top_k, NAME)
        told = _tail(came, top_k * NAME.itemsize, top_k, _WEIGHT)
        is_here = names >= 0
        those_here_first = torch.sort(is_here, dim=1, descending=True, stable=True).indices
        counted = torch.arange(top_k, device=came.device)
        has_pair = counted < is_here.sum(1, keepdim=True)
        weights = told.gather(1, those_here_first).where(has_pair, torch.zeros_like(told))
        # one more, for what has no place
        pairs = places.new_zeros(num_slots * top_k + 1)
        at = places.where(places >= 0, places.new_full((), num_slots * top_k))
        pairs.index_copy_(0, at, torch.arange(len(places), device=places.device))
        pairs = pairs[:-1].view(num_slots, top_k)
        # what is not there weighs 0, and is the row's own first: NaN stays where it is
        pairs = torch.where(has_pair, pairs, pairs[:, :1])
        is_first = about.place_of_choice % top_k == 0
        inbox = replace(inbox, rows=inbox.rows[:, :size].contiguous())
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
