"""The dispatcher of one process: nothing travels; pairs are sorted by expert and put back."""

from __future__ import annotations

from collections.abc import Callable, Sequence

from torch import Tensor

from moe_serve.comm.base import Inbox, Receipt
from moe_serve.kernels.suite import Kernels
from moe_serve.types import Routing


class LocalDispatcher:
    """See `comm.base.Dispatcher`."""

    has_ranks = False

    def __init__(self, num_experts: int, kernels: Kernels) -> None:
        self.num_experts = num_experts
        self._sort_pairs = kernels.sort_pairs
        self._combine = kernels.combine

    def begin_step(self, num_tokens: Sequence[int]) -> None:
        """One rank needs no agreement."""

    def dispatch(
        self,
        layer: int,
        hidden: Tensor,
        routing: Routing,
        meanwhile: Callable[[], None] | None = None,
    ) -> tuple[Inbox, Receipt]:
        if meanwhile is not None:
            meanwhile()
        counts, row_of_pair, pair_of_choice = self._sort_pairs(routing.expert_ids, self.num_experts)
        return Inbox(hidden, row_of_pair, counts), Receipt(pair_of_choice, routing.weights)

    def combine(
        self,
        outbox: Tensor,
        receipt: Receipt,
        shared: Tensor | None = None,
        shared_weights: Tensor | None = None,
    ) -> Tensor:
        return self._combine(
            outbox, receipt.pair_of_choice, receipt.weights, shared, shared_weights
        )


def build(num_experts: int, kernels: Kernels) -> LocalDispatcher:
    """Build the dispatcher for layers of `num_experts` experts, all in this process."""
    return LocalDispatcher(num_experts, kernels)
