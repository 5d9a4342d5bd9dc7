"""A mixture-of-experts layer: route, dispatch, compute, combine."""

from __future__ import annotations

import copy
import logging

import torch
from torch import Tensor

from moe_serve.comm.base import Dispatcher
from moe_serve.experts.executor import Experts
from moe_serve.kernels.forward.base import MoePart
from moe_serve.kernels.suite import Kernels
from moe_serve.layers.mlp import GatedMlp
from moe_serve.layers.router import Router

logger = logging.getLogger(__name__)


class MoeLayer:
    """Routed experts, and a shared one if the model has it.

    shared_gate: float32 [hidden_size]; the shared expert's result is weighed by the sigmoid of the
    token's product with it (Qwen2-MoE), or not at all when None.
    """

    def __init__(
        self,
        layer: int,
        kernels: Kernels,
        router: Router,
        dispatcher: Dispatcher,
        experts: Experts,
        shared: GatedMlp | None = None,
        shared_gate: Tensor | None = None,
    ) -> None:
        self.layer = layer
        self.router = router
        self.dispatcher = dispatcher
        self.experts = experts
        self.shared = shared
        self.shared_gate = shared_gate
        self._shared_weights = kernels.shared_weights

    def __call__(self, hidden: Tensor, residual: Tensor) -> Tensor:
        """Return [num_tokens, hidden_size], like `hidden`.

        residual: what entered the norm that gave `hidden`; shown to those who predict, not changed.
        """
        routing = self.router(hidden)
        shared = None if self.shared is None else _Shared(self, hidden)
        inbox, receipt = self.dispatcher.dispatch(self.layer, hidden, routing, shared)
        outbox = self.experts.run(self.layer, inbox, routing, residual)  # [num_pairs, hidden_size]
        if shared is None:
            return self.dispatcher.combine(outbox, receipt)
        return self.dispatcher.combine(outbox, receipt, shared.rows, shared.weights)

    def run_shared(self, hidden: Tensor) -> tuple[Tensor, Tensor | None]:
        """Return the shared expert's rows, and what they are weighed by."""
        assert self.shared is not None
        weights = None
        if self.shared_gate is not None:
            weights = self._shared_weights(hidden, self.shared_gate)
        return self.shared(hidden), weights

    def with_parts(self, dispatcher: Dispatcher, experts: Experts) -> MoeLayer:
        """Return this layer, of the same weights, with other parts around them."""
        other = copy.copy(self)
        other.dispatcher, other.experts = dispatcher, experts
        return other

    def part(self) -> MoePart:
        """Return this layer, but its shared expert, as the fused forward pass takes it."""
        return MoePart(
            router=self.router.scorer.part(),
            recipe=self.router.recipe,
            selection_bias=self.router.selection_bias,
            experts=self.experts.layers[self.layer],
            shared_gate=self.shared_gate,
        )


class _Shared:
    """The shared expert of a layer, run while tokens are on their way to the others."""

    def __init__(self, layer: MoeLayer, hidden: Tensor) -> None:
        self._layer = layer
        self._hidden = hidden
        self.rows: Tensor | None = None
        self.weights: Tensor | None = None

    def __call__(self) -> None:
        try:
            self.rows, self.weights = self._layer.run_shared(self._hidden)
        except (RuntimeError, MemoryError) as error:
            if not self._layer.dispatcher.has_ranks:
                raise
            # other ranks wait for this one: only its own tokens end with an error
            logger.error("shared expert of layer %d: %s", self._layer.layer, error)
            self.rows = torch.full_like(self._hidden, float("nan"))
