"""Runs experts on the rows that arrived for them. Here all experts are resident."""

from __future__ import annotations

from collections.abc import Callable

from torch import Tensor

from moe_serve.comm.base import Inbox
from moe_serve.kernels.moe.base import ExpertTable


class ResidentExperts:
    """Every expert of every MoE layer, held in memory. layers: tables by layer."""

    def __init__(self, moe: Callable[..., Tensor], layers: dict[int, ExpertTable]) -> None:
        self._moe = moe
        self.layers = layers

    def run(self, layer: int, inbox: Inbox) -> Tensor:
        """Return one row for each pair of the inbox, unweighted, [num_pairs, hidden_size]."""
        return self._moe(inbox.rows, inbox.row_of_pair, inbox.counts, self.layers[layer])
