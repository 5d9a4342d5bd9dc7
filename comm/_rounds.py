"""Room of fixed size for each pair of ranks, and as many rounds as tokens need."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from moe_serve.comm._between import Meanwhile
from moe_serve.comm._layout import Layout
from moe_serve.comm._rows import RowsOnce
from moe_serve.comm._world import World
from moe_serve.kernels.suite import Kernels

MOST_ROWS = 64


class InRounds(RowsOnce):
    """Exchanges [rounds, num_ranks, capacity] rows, a round at a time."""

    def __init__(self, world: World, layout: Layout, kernels: Kernels) -> None:
        super().__init__(world, layout, kernels)
        self._capacity = self._rounds = 1

    def begin_step(self, num_tokens: Sequence[int]) -> None:
        """Choose the capacity, and how many rounds there are, by the rank with most tokens."""
        most = max(1, *num_tokens)
        self._capacity = min(MOST_ROWS, 1 << (most - 1).bit_length())
        self._rounds = -(-most // self._capacity)

    def _in_rounds(self, rows: Tensor, into: Tensor, meanwhile: Meanwhile = None) -> Tensor:
        """Exchange [rounds, ranks, ...], a collective each; return what came, which is `into`."""
        if self._rounds == 1:
            return self._world.exchange_evenly(rows, meanwhile, into)
        in_round = rows.shape[0] // self._rounds
        parts = zip(torch.split(rows, in_round), torch.split(into, in_round), strict=True)
        for number, (part, into_part) in enumerate(parts):
            self._world.exchange_evenly(part, None if number else meanwhile, into_part)
        return into
