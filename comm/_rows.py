"""What dispatchers share that send a token's row once to a rank, with the experts it is for."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from moe_serve.comm._between import Between
from moe_serve.comm.base import Inbox, Receipt
from moe_serve.types import Routing

_NAME = torch.int16  # what names an expert on the way; -1: one of another rank


@dataclass(frozen=True, slots=True)
class RowsReceipt(Receipt):
    """And how results go back: pairs for each rank, and this rank's own from each.

    order: int64 [num_pairs], where in the rows' order each pair of the inbox is.
    """

    order: Tensor
    pairs_in: Sequence[int]
    pairs_out: Sequence[int]


class RowsOnce(Between):
    """Gets rows with the experts they are for; sends back a row for each of those."""

    def _received(
        self, packed: Tensor, in_rows: Sequence[int], hidden: Tensor, routing: Routing, to: Tensor
    ) -> tuple[Inbox, RowsReceipt]:
        """Return inbox and receipt. to: the rank of each of this rank's own choices."""
        rows, experts = unpack(packed, hidden, to.shape[1])
        inbox, order = inbox_of(rows, experts, self._layout.num_experts)
        ends = torch.tensor(in_rows).cumsum(0)
        pairs_before = (experts >= 0).sum(1).cumsum(0)
        before = torch.cat([pairs_before.new_zeros(1), pairs_before])[ends].tolist()
        pairs_out = [end - begin for begin, end in zip([0, *before[:-1]], before, strict=True)]
        pairs_in = to.flatten().bincount(minlength=self._world.size).tolist()
        return inbox, RowsReceipt(_places(to), routing.weights, order, pairs_in, pairs_out)

    def _send_back(self, outbox: Tensor, receipt: Receipt) -> Tensor:
        assert isinstance(receipt, RowsReceipt)
        back = torch.empty_like(outbox)
        back[receipt.order] = outbox
        return self._world.exchange(back, receipt.pairs_out, receipt.pairs_in)


def pack(hidden: Tensor, token_of_row: Tensor, experts: Tensor) -> Tensor:
    """Return uint8 [num_rows, bytes]: a token each, and its experts there, int16 [top_k]."""
    rows = hidden[token_of_row].contiguous().view(torch.uint8)
    names = torch.empty(experts.shape, dtype=_NAME).copy_(experts)  # packed, also of no row
    return torch.cat([rows, names.view(torch.uint8)], 1)


def unpack(packed: Tensor, hidden: Tensor, top_k: int) -> tuple[Tensor, Tensor]:
    """Return rows like `hidden`, and experts int64 [num_rows, top_k], -1 for those elsewhere."""
    size = hidden.shape[1] * hidden.element_size()
    rows = packed[:, :size].reshape(-1).view(hidden.dtype)
    experts = packed[:, size:].reshape(-1).view(_NAME)
    return rows.view(-1, hidden.shape[1]), experts.view(-1, top_k).long()


def inbox_of(rows: Tensor, experts: Tensor, num_experts: int) -> tuple[Inbox, Tensor]:
    """Return the inbox, and where each of its pairs is in the order of rows and choices."""
    row, choice = (experts >= 0).nonzero(as_tuple=True)
    expert = experts[row, choice]
    order = expert.argsort(stable=True)
    return Inbox(rows, row[order], expert.bincount(minlength=num_experts)), order


def _places(ranks: Tensor) -> Tensor:
    """Return where each choice's result is once all came back, int64 [num_tokens, top_k].

    Results come rank by rank, and of one rank in the order of tokens and choices.
    """
    order = ranks.flatten().argsort(stable=True)
    places = torch.empty_like(order)
    places[order] = torch.arange(len(order))
    return places.view_as(ranks)
