"""The dispatcher of one process: nothing travels; pairs are sorted by expert and put back."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from moe_serve.comm.base import Inbox, Receipt
from moe_serve.types import Routing


class LocalDispatcher:
    """See `comm.base.Dispatcher`."""

    def __init__(self, num_experts: int, combine: Callable[..., Tensor]) -> None:
        self.num_experts = num_experts
        self._combine = combine

    def dispatch(self, layer: int, hidden: Tensor, routing: Routing) -> tuple[Inbox, Receipt]:
        expert_of_pair = routing.expert_ids.flatten()
        # stable: within an expert, rows keep the order of the tokens
        expert_of_pair, order = torch.sort(expert_of_pair, stable=True)  # [num_pairs]
        counts = torch.bincount(expert_of_pair, minlength=self.num_experts).tolist()
        pair_of_choice = torch.empty_like(order)
        pair_of_choice[order] = torch.arange(order.shape[0], device=order.device)
        top_k = routing.expert_ids.shape[1]
        inbox = Inbox(hidden, order // top_k, counts)
        return inbox, Receipt(pair_of_choice.view_as(routing.expert_ids), routing.weights)

    def combine(self, outbox: Tensor, receipt: Receipt, shared: Tensor | None) -> Tensor:
        return self._combine(outbox, receipt.pair_of_choice, receipt.weights, shared)


def build(num_experts: int, combine: Callable[..., Tensor]) -> LocalDispatcher:
    """Build the dispatcher for layers of `num_experts` experts, all in this process."""
    return LocalDispatcher(num_experts, combine)
