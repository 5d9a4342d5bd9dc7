"""What dispatchers share that send a token's row once to a rank, with the slots it is for."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from moe_serve.comm._world import World
from moe_serve.comm.base import Inbox, Receipt

_SLOT = torch.int16  # what names a local slot on the way; -1: not for this rank


@dataclass(frozen=True, slots=True)
class RowsReceipt(Receipt):
    """And how results go back: pairs for each rank, and this rank's own from each.

    order: int64 [num_pairs], where in the rows' order each pair of the inbox is.
    """

    order: Tensor
    pairs_in: Sequence[int]
    pairs_out: Sequence[int]


def pack(hidden: Tensor, token_of_row: Tensor, slots: Tensor) -> Tensor:
    """Return uint8 [num_rows, bytes]: a token each, and its slots there, int16 [top_k]."""
    rows = hidden[token_of_row].contiguous().view(torch.uint8)
    names = torch.empty(slots.shape, dtype=_SLOT).copy_(slots)  # packed, also when there is none
    return torch.cat([rows, names.view(torch.uint8)], 1)


def unpack(packed: Tensor, hidden: Tensor, top_k: int) -> tuple[Tensor, Tensor]:
    """Return rows like `hidden`, and slots int64 [num_rows, top_k]."""
    size = hidden.shape[1] * hidden.element_size()
    rows = packed[:, :size].reshape(-1).view(hidden.dtype)
    slots = packed[:, size:].reshape(-1).view(_SLOT)
    return rows.view(-1, hidden.shape[1]), slots.view(-1, top_k).long()


def receive(
    rows: Tensor, slots: Tensor, in_rows: Sequence[int], num_local: int
) -> tuple[Inbox, Tensor, list[int]]:
    """Return the inbox, `order`, and pairs from each rank. slots: [num_rows, top_k]."""
    row, choice = (slots >= 0).nonzero(as_tuple=True)
    expert = slots[row, choice]
    order = expert.argsort(stable=True)
    counts = expert.bincount(minlength=num_local)
    ends = torch.tensor(in_rows).cumsum(0)
    pairs_before = (slots >= 0).sum(1).cumsum(0)
    before = torch.cat([pairs_before.new_zeros(1), pairs_before])[ends].tolist()
    from_each = [end - begin for begin, end in zip([0, *before[:-1]], before, strict=True)]
    return Inbox(rows, row[order], counts), order, from_each


def pair_of_choice(ranks: Tensor) -> Tensor:
    """Return where each choice's result is once all came back, int64 [num_tokens, top_k].

    Results come rank by rank, and of one rank in the order of tokens and choices.
    """
    order = ranks.flatten().argsort(stable=True)
    places = torch.empty_like(order)
    places[order] = torch.arange(len(order))
    return places.view_as(ranks)


def send_back(world: World, outbox: Tensor, receipt: RowsReceipt) -> Tensor:
    """Return the results of this rank's own pairs, rank by rank, [num_pairs, hidden_size]."""
    back = torch.empty_like(outbox)
    back[receipt.order] = outbox
    return world.exchange(back, receipt.pairs_out, receipt.pairs_in)
