"""What dispatchers between ranks are made of."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence

from torch import Tensor

from moe_serve.comm._layout import Layout
from moe_serve.comm._world import World
from moe_serve.comm.base import Receipt
from moe_serve.kernels.exchange.base import Replicas
from moe_serve.kernels.suite import Kernels

Meanwhile = Callable[[], None] | None


class Between(ABC):
    """A dispatcher of one rank: the ranks, where experts are, and the kernels."""

    has_ranks = True

    def __init__(self, world: World, layout: Layout, kernels: Kernels) -> None:
        self._world = world
        self._layout = layout
        self._kernels = kernels
        self._num_tokens: list[int] = [0] * world.size

    def begin_step(self, num_tokens: Sequence[int]) -> None:
        """Take note of how many tokens every rank has in this step."""
        self._num_tokens = list(num_tokens)

    def combine(
        self,
        outbox: Tensor,
        receipt: Receipt,
        shared: Tensor | None = None,
        shared_weights: Tensor | None = None,
    ) -> Tensor:
        """See `comm.base.Dispatcher`."""
        home = self._send_back(outbox, receipt)
        return self._kernels.combine(
            home, receipt.pair_of_choice, receipt.weights, shared, shared_weights
        )

    def _replicas(self, layer: int, expert_ids: Tensor) -> Replicas:
        """Return which rank each token takes for each expert; see `Layout.replicas`."""
        self._world.num_waits += self._layout.is_filled(layer)
        return self._layout.replicas(layer, expert_ids)

    @abstractmethod
    def _send_back(self, outbox: Tensor, receipt: Receipt) -> Tensor:
        """Return the results of this rank's own choices, where `pair_of_choice` has them."""
