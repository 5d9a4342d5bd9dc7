"""The one architecture: embedding, layers of attention and experts (or a dense MLP), norm, head.

What a model type differs in is data (`ModelSpec`); what computes is handed in (`Kernels`). The
decoder knows nothing of requests: it sees a `ForwardBatch` and the caches.
"""

from __future__ import annotations

import torch
from torch import Tensor

from moe_serve.comm import local
from moe_serve.experts.executor import ExpertWeights, ResidentExperts
from moe_serve.kernels.suite import Kernels
from moe_serve.layers.attention import Attention, AttentionInput, LayerCache
from moe_serve.layers.linear import Linear
from moe_serve.layers.mlp import GatedMlp
from moe_serve.layers.moe import MoeLayer
from moe_serve.layers.rope import rope_table
from moe_serve.layers.router import Router
from moe_serve.models.spec import LayerSpec, ModelSpec
from moe_serve.types import CacheGroup, ForwardBatch


class DecoderLayer:
    """Norm, attention, norm, experts or MLP, each added to the residual stream."""

    def __init__(
        self,
        kernels: Kernels,
        attention_norm: Tensor,
        attention: Attention,
        mlp_norm: Tensor,
        mlp: GatedMlp | MoeLayer,
        norm_eps: float,
    ) -> None:
        self._kernels = kernels
        self._attention_norm = attention_norm
        self._attention = attention
        self._mlp_norm = mlp_norm
        self.mlp = mlp
        self._norm_eps = norm_eps

    def __call__(
        self, delta: Tensor | None, residual: Tensor, cache: LayerCache, step: AttentionInput
    ) -> tuple[Tensor, Tensor]:
        """Take the last layer's (not yet added) result and the residual; return the next two.

        Both [num_tokens, hidden_size]; delta is None before the first layer.
        """
        if delta is None:
            hidden = self._kernels.rms_norm(residual, self._attention_norm, self._norm_eps)
        else:
            hidden, residual = self._kernels.add_rms_norm(
                delta, residual, self._attention_norm, self._norm_eps
            )
        hidden = self._attention(hidden, cache, step)
        hidden, residual = self._kernels.add_rms_norm(
            hidden, residual, self._mlp_norm, self._norm_eps
        )
        return self.mlp(hidden), residual


class Decoder:
    """A decoder-only language model.

    weights: what `ModelSpec.weights` names; taken out of the dictionary as they are packed, so that
    nothing is held twice. max_model_len: how many positions the rotary table has.
    """

    def __init__(
        self, spec: ModelSpec, weights: dict[str, Tensor], kernels: Kernels, max_model_len: int
    ) -> None:
        self.spec = spec
        self.kernels = kernels
        self.embedding = weights.pop("embedding")
        self.dtype = self.embedding.dtype
        self.groups: tuple[CacheGroup, ...] = spec.cache_groups(self.dtype.itemsize)
        self._group_of_layer = {
            layer: index for index, group in enumerate(self.groups) for layer in group.layers
        }
        self._cos, self._sin = (
            table.unsqueeze(1)
            for table in rope_table(spec.attention.rope, spec.attention.head_dim, max_model_len)
        )
        experts = {
            index: ExpertWeights(
                weights.pop(f"layers.{index}.experts.gate_up"),
                weights.pop(f"layers.{index}.experts.down"),
            )
            for index, layer in enumerate(spec.layers)
            if layer.moe is not None
        }
        self.experts = ResidentExperts(kernels.moe, experts)
        self.layers = [
            self._build_layer(index, layer, weights) for index, layer in enumerate(spec.layers)
        ]
        self._norm = weights.pop("norm")
        head = self.embedding if spec.is_embedding_tied else weights.pop("head")
        self._head = Linear(kernels, head)
        assert not weights, f"weights that no part took: {sorted(weights)}"

    def _build_layer(
        self, index: int, layer: LayerSpec, weights: dict[str, Tensor]
    ) -> DecoderLayer:
        spec, kernels = self.spec.attention, self.kernels
        name = f"layers.{index}"

        def linear(part: str) -> Linear:
            return Linear(
                kernels, weights.pop(f"{name}.{part}"), weights.pop(f"{name}.{part}_bias", None)
            )

        norms = None
        if spec.qk_norm is not None:
            norms = (weights.pop(f"{name}.q_norm"), weights.pop(f"{name}.k_norm"))
        attention = Attention(
            kernels,
            qkv=linear("qkv"),
            output=linear("output"),
            num_heads=spec.num_heads,
            num_kv_heads=spec.num_kv_heads,
            head_dim=spec.head_dim,
            norm_eps=self.spec.norm_eps,
            qk_norm_weights=norms,
            is_norm_full=spec.qk_norm == "full",
            qkv_clip=spec.qkv_clip,
        )
        mlp: GatedMlp | MoeLayer
        if layer.moe is None:
            mlp = GatedMlp(kernels, linear("mlp.gate_up"), linear("mlp.down"))
        else:
            recipe = layer.moe.router
            shared, gate = None, None
            if layer.moe.shared_intermediate_size:
                shared = GatedMlp(kernels, linear("shared.gate_up"), linear("shared.down"))
            if layer.moe.has_shared_gate:
                gate = weights.pop(f"{name}.shared_gate")[0]
            mlp = MoeLayer(
                index,
                Router(kernels, recipe, weights.pop(f"{name}.router")),
                local.build(recipe.num_experts, kernels.combine),
                self.experts,
                shared,
                gate,
            )
        return DecoderLayer(
            kernels,
            weights.pop(f"{name}.attention_norm"),
            attention,
            weights.pop(f"{name}.mlp_norm"),
            mlp,
            self.spec.norm_eps,
        )

    def forward(self, batch: ForwardBatch, caches: list[LayerCache]) -> Tensor:
        """Run one step; return the residual stream after the last norm, [num_tokens, hidden_size].

        caches: one per layer, written at the batch's slots.
        """
        cos, sin = self._cos[batch.positions], self._sin[batch.positions]
        steps = [
            AttentionInput(
                cos,
                sin,
                slots,
                self.kernels.plan_attention(
                    batch.query_lens, batch.context_lens, table, batch.block_size, group.window
                ),
            )
            for slots, table, group in zip(
                batch.slot_mapping, batch.block_tables, self.groups, strict=True
            )
        ]
        residual = self.embedding[batch.token_ids]
        delta: Tensor | None = None
        for index, layer in enumerate(self.layers):
            step = steps[self._group_of_layer[index]]
            delta, residual = layer(delta, residual, caches[index], step)
        assert delta is not None
        return self.kernels.add_rms_norm(delta, residual, self._norm, self.spec.norm_eps)[0]

    def logits(self, hidden: Tensor) -> Tensor:
        """Return float32 [num_rows, vocab_size] for rows of `forward`'s result.

        Rounded to the model's dtype first, as everywhere in the forward pass.
        """
        return self._head(hidden).float()

    def allocate_caches(self, num_blocks: tuple[int, ...], block_size: int) -> list[LayerCache]:
        """Return caches, one per layer; num_blocks: per group, without the null block.

        Only the null block, the first, is written: memory is taken from the system as it is used.
        """
        spec = self.spec.attention

        def empty(num_slots: int) -> Tensor:
            cache = torch.empty(spec.num_kv_heads, num_slots, spec.head_dim, dtype=self.dtype)
            cache[:, :block_size] = 0
            return cache

        sizes = [(count + 1) * block_size for count in num_blocks]
        slots = [sizes[self._group_of_layer[layer]] for layer in range(self.spec.num_layers)]
        return [LayerCache(empty(num_slots), empty(num_slots)) for num_slots in slots]
