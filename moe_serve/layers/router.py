"""A layer's router: logits in float32, then the recipe."""

from __future__ import annotations

from torch import Tensor

from moe_serve.kernels.suite import Kernels
from moe_serve.layers.linear import Linear
from moe_serve.types import RouterRecipe, Routing


class Router:
    """Choose experts for each token.

    weight: float32 [num_experts, hidden_size]; bias: float32 [num_experts], on logits (gpt-oss);
    selection_bias: float32 [num_experts], only for the choice (DeepSeek-V3). Logits are never
    rounded to the model's dtype: two experts that are close would change places.
    """

    def __init__(
        self,
        kernels: Kernels,
        recipe: RouterRecipe,
        weight: Tensor,
        bias: Tensor | None = None,
        selection_bias: Tensor | None = None,
    ) -> None:
        self.recipe = recipe
        self._route = kernels.route
        self.scorer = Linear(kernels, weight, bias)
        self.selection_bias = selection_bias

    def __call__(self, hidden: Tensor) -> Routing:
        """Return the routing of `hidden`, [num_tokens, hidden_size]."""
        return self._route(self.scorer(hidden), self.recipe, self.selection_bias)
