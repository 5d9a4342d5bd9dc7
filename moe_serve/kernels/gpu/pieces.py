"""A decoder's forward pass in pieces that end where experts are chosen, by any suite's kernels.

Launches what models/decoder.py does layer by layer, in the same order: the same bits. Knows nothing
of graphs, caches or the host: a piece waits for nothing.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import Tensor

from moe_serve.kernels.forward.base import LayerPart, LinearPart, ModelPart
from moe_serve.kernels.moe.base import ExpertTable
from moe_serve.types import Routing


class Operations(Protocol):
    """The kernels of a suite that a forward pass is made of; see `suite.Kernels`."""

    @property
    def device(self) -> torch.device: ...
    @property
    def linear(self) -> Callable[..., Tensor]: ...
    @property
    def gather(self) -> Callable[[Any, Tensor], Tensor]: ...
    @property
    def rms_norm(self) -> Callable[[Tensor, Tensor, float], Tensor]: ...
    @property
    def add_rms_norm(self) -> Callable[[Tensor, Tensor, Tensor, float], tuple[Tensor, Tensor]]: ...
    @property
    def rope_write_kv(self) -> Callable[..., Tensor]: ...
    @property
    def paged_attention(self) -> Callable[..., Tensor]: ...
    @property
    def route(self) -> Callable[..., Routing]: ...
    @property
    def sort_pairs(self) -> Callable[..., tuple[Tensor, Tensor, Tensor]]: ...
    @property
    def shared_weights(self) -> Callable[[Tensor, Tensor], Tensor]: ...
    @property
    def moe(self) -> Callable[..., Tensor]: ...
    @property
    def silu_and_mul(self) -> Callable[[Tensor], Tensor]: ...
    @property
    def combine(self) -> Callable[..., Tensor]: ...


@dataclass(frozen=True, slots=True)
class StepInputs:
    """A step, on the device; see `cpu.Forward`.

    num_rows: int32 [1], the rows behind so many only pad a batch; None where there are none.
    """

    token_ids: Tensor
    positions: Tensor
    slots: Sequence[Tensor]
    plans: Sequence[Any]
    num_rows: Tensor | None = None


@dataclass(frozen=True, slots=True)
class Routed:
    """What goes from a layer's router to its experts, and to those who add up what they give.

    hidden, residual: [num_tokens, hidden_size]; ids, weights: as of `Routing`; counts, row_of_pair,
    pair_of_choice: as of `sort_pairs`; shared, shared_weights: of the shared expert, as `combine`
    takes them.
    """

    hidden: Tensor
    residual: Tensor
    ids: Tensor
    weights: Tensor
    counts: Tensor
    row_of_pair: Tensor
    pair_of_choice: Tensor
    shared: Tensor | None
    shared_weights: Tensor | None


class Pieces:
    """The pieces of one model's pass: up to a router, experts, and on to the next router.

    moe_layers: the layers that have experts, by the model's number; pieces count them from 0.
    """

    def __init__(self, kernels: Operations, model: ModelPart) -> None:
        self._kernels = kernels
        self.model = model
        self.moe_layers = [i for i, layer in enumerate(model.layers) if layer.moe is not None]

    def begin(self, inputs: StepInputs) -> Routed | Tensor:
        """Run up to the first router; return what it chose.

        Where no layer has experts this is the whole pass, and the result the residual stream after
        the last norm.
        """
        residual = self._kernels.gather(self.model.embedding, inputs.token_ids)
        return self._to_a_router(0, None, residual, inputs)

    def experts(
        self,
        number: int,
        routed: Routed,
        table: ExpertTable,
        only: Tensor | None = None,
        out: Tensor | None = None,
    ) -> Tensor:
        """Run a layer's experts on their pairs; only, out: as of `moe`."""
        return self._kernels.moe(routed.hidden, routed.row_of_pair, routed.counts, table, only, out)

    def go_on(
        self, number: int, routed: Routed, outbox: Tensor, inputs: StepInputs
    ) -> Routed | Tensor:
        """Add up what the experts gave, and run up to the next router or the end, as `begin`.

        outbox: [num_pairs, hidden_size].
        """
        delta = self._kernels.combine(
            outbox, routed.pair_of_choice, routed.weights, routed.shared, routed.shared_weights
        )
        return self._to_a_router(self.moe_layers[number] + 1, delta, routed.residual, inputs)

    def sorted(
        self, number: int, ids: Tensor, num_rows: Tensor | None
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Sort the pairs of a layer's choices; see `sort_pairs`."""
        moe = self.model.layers[self.moe_layers[number]].moe
        assert moe is not None
        return self._kernels.sort_pairs(ids, moe.recipe.num_experts, num_rows)

    def _to_a_router(
        self, first: int, delta: Tensor | None, residual: Tensor, inputs: StepInputs
    ) -> Routed | Tensor:
        kernels, eps = self._kernels, self.model.norm_eps
        for layer in self.model.layers[first:]:
            if delta is None:
                hidden = kernels.rms_norm(residual, layer.attention_norm, eps)
            else:
                hidden, residual = kernels.add_rms_norm(delta, residual, layer.attention_norm, eps)
            hidden = self._attend(layer, hidden, inputs)
            hidden, residual = kernels.add_rms_norm(hidden, residual, layer.mlp_norm, eps)
            if layer.moe is not None:
                return self._route(layer, hidden, residual, inputs.num_rows)
            delta = self._mlp(layer, hidden)
        assert delta is not None
        return kernels.add_rms_norm(delta, residual, self.model.norm, eps)[0]

    def _attend(self, layer: LayerPart, hidden: Tensor, inputs: StepInputs) -> Tensor:
        kernels, group = self._kernels, layer.group
        caches = layer.key_cache, layer.value_cache
        query = kernels.rope_write_kv(
            self._linear(hidden, layer.qkv),
            layer.heads,
            inputs.positions,
            inputs.slots[group],
            *caches,
        )
        out = kernels.paged_attention(query, *caches, inputs.plans[group], layer.scale)
        return self._linear(out.view(hidden.shape[0], -1), layer.output)

    def _route(
        self, layer: LayerPart, hidden: Tensor, residual: Tensor, num_rows: Tensor | None
    ) -> Routed:
        kernels, moe = self._kernels, layer.moe
        assert moe is not None
        logits = self._linear(hidden, moe.router)
        routing = kernels.route(logits, moe.recipe, moe.selection_bias)
        shared, shared_weights = None, None
        if layer.gate_up is not None:
            if moe.shared_gate is not None:
                shared_weights = kernels.shared_weights(hidden, moe.shared_gate)
            shared = self._mlp(layer, hidden)
        pairs = kernels.sort_pairs(routing.expert_ids, moe.recipe.num_experts, num_rows)
        return Routed(
            hidden, residual, routing.expert_ids, routing.weights, *pairs, shared, shared_weights
        )

    def _mlp(self, layer: LayerPart, hidden: Tensor) -> Tensor:
        assert layer.gate_up is not None
        assert layer.down is not None
        inner = self._kernels.silu_and_mul(self._linear(hidden, layer.gate_up))
        return self._linear(inner, layer.down)

    def _linear(self, rows: Tensor, part: LinearPart) -> Tensor:
        return self._kernels.linear(rows, part.weight, part.bias)
