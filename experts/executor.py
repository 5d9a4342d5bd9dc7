"""Runs experts on the rows that arrived for them. Here all experts are resident."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from torch import Tensor

from moe_serve.comm.base import Inbox


@dataclass(frozen=True, slots=True)
class ExpertWeights:
    """One layer's experts: gate_up [num_experts, 2 * intermediate_size, hidden_size], gate before
    up; down [num_experts, hidden_size, intermediate_size]."""

    gate_up: Tensor
    down: Tensor


class ResidentExperts:
    """Every expert of every MoE layer, held in memory."""

    def __init__(self, moe: Callable[..., Tensor], layers: dict[int, ExpertWeights]) -> None:
        self._moe = moe
        self._layers = layers

    def run(self, layer: int, inbox: Inbox) -> Tensor:
        """Return one row for each pair of the inbox, unweighted, [num_pairs, hidden_size]."""
        weights = self._layers[layer]
        return self._moe(inbox.rows, inbox.row_of_pair, inbox.counts, weights.gate_up, weights.down)
