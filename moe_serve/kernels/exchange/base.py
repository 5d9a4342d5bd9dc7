"""Rows as they travel between ranks, and where results return: what the kernels agree on.

A row is a token's hidden row, and after it int16 [top_k], the experts that it is for at the rank it
goes to, -1 where a choice is elsewhere. So it names no more than 32767 experts.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

NAME = torch.int16
MOST_EXPERTS = torch.iinfo(NAME).max


@dataclass(frozen=True, slots=True)
class RowPlan:
    """Where rows and results lie in what ranks exchange.

    capacity: slots for rows, [rounds, num_ranks, capacity], token t in slot t % capacity of round
    t // capacity, unused ones naming no expert; None: only rows that are needed, for rank 0 first.
    width: slots for results, so many for each row's slot; None: only results that there are, of
    rank 0 first, in the order of rows and choices.
    """

    num_ranks: int
    capacity: int | None = None
    rounds: int = 1
    width: int | None = None

    def num_rows(self, num_tokens: int, top_k: int) -> int:
        """Return how many rows all ranks may be sent at most."""
        if self.capacity is None:
            return num_tokens * min(self.num_ranks, top_k)
        return self.rounds * self.num_ranks * self.capacity


class Replicas(NamedTuple):
    """The ranks that may take an expert's tokens; t of a batch goes to ranks[e, t % counts[e]].

    ranks: int64 [num_experts, most]; counts: int64 [num_experts].
    """

    ranks: Tensor
    counts: Tensor

    def to(self, device: torch.device) -> Replicas:
        """Return the same on another device."""
        return Replicas(self.ranks.to(device), self.counts.to(device))


class Packed(NamedTuple):
    """What `pack_rows` tells of the rows it wrote.

    place_of_choice: int64 [num_tokens, top_k], where each choice's result is once all came back;
    rows_of_rank, pairs_of_rank: int64 [num_ranks], rows to and results from each.
    """

    place_of_choice: Tensor
    rows_of_rank: Tensor
    pairs_of_rank: Tensor


class Unpacked(NamedTuple):
    """Rows that are for an expert of this rank, and their pairs, sorted by expert, then by row.

    rows: [num_received, hidden_size]; row_of_pair, place_of_pair: int64 [num_pairs], a pair's row,
    and where its result goes among those that return; counts: int64 [num_experts], pairs of each;
    pairs_of_rank: int64 [num_ranks], results that return to each. On a GPU, where only the device
    knows how many rows and pairs there are, all have room for the most that there may be: behind
    the last row is nothing of meaning, behind the last pair row 0 and place -1.
    """

    rows: Tensor
    row_of_pair: Tensor
    place_of_pair: Tensor
    counts: Tensor
    pairs_of_rank: Tensor


def row_bytes(hidden_size: int, dtype: torch.dtype, top_k: int) -> int:
    """Return the bytes of a row with its experts."""
    return hidden_size * dtype.itemsize + top_k * NAME.itemsize
