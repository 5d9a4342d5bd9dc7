"""A mixture-of-experts layer: route, dispatch, compute, combine."""

from __future__ import annotations

import torch
from torch import Tensor

from moe_serve.comm.base import Dispatcher
from moe_serve.experts.executor import ResidentExperts
from moe_serve.layers.mlp import GatedMlp
from moe_serve.layers.router import Router


class MoeLayer:
    """Routed experts, and a shared one if the model has it.

    shared_gate: float32 [hidden_size]; the shared expert's result is weighed by the sigmoid of the
    token's product with it (Qwen2-MoE), or not at all when None.
    """

    def __init__(
        self,
        layer: int,
        router: Router,
        dispatcher: Dispatcher,
        experts: ResidentExperts,
        shared: GatedMlp | None = None,
        shared_gate: Tensor | None = None,
    ) -> None:
        self.layer = layer
        self.router = router
        self.dispatcher = dispatcher
        self.experts = experts
        self._shared = shared
        self._shared_gate = shared_gate

    def __call__(self, hidden: Tensor) -> Tensor:
        """Return [num_tokens, hidden_size], like `hidden`."""
        routing = self.router(hidden)
        inbox, receipt = self.dispatcher.dispatch(self.layer, hidden, routing)
        outbox = self.experts.run(self.layer, inbox)  # [num_pairs, hidden_size]
        return self.dispatcher.combine(outbox, receipt, self._shared_part(hidden))

    def _shared_part(self, hidden: Tensor) -> Tensor | None:
        """Return the shared expert's weighed result, float32 [num_tokens, hidden_size]."""
        if self._shared is None:
            return None
        out = self._shared(hidden).float()
        if self._shared_gate is None:
            return out
        # one output feature: a plain sum over the row, which does not depend on other rows
        logit = (hidden.float() * self._shared_gate).sum(-1, keepdim=True)  # [num_tokens, 1]
        return out / (1.0 + torch.exp(-logit))
