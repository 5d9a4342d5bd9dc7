"""The one architecture: embedding, layers of attention and experts (or a dense MLP), norm, head.

What a model type differs in is data (`ModelSpec`); what computes is handed in (`Kernels`). The
decoder knows nothing of requests: it sees a `ForwardBatch` and the caches.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from moe_serve.comm import local
from moe_serve.comm.base import Dispatcher
from moe_serve.errors import CapacityError
from moe_serve.experts.executor import Experts
from moe_serve.kernels.forward.base import Forward, LayerPart, ModelPart, Watcher
from moe_serve.kernels.rope.base import Heads
from moe_serve.kernels.suite import Kernels
from moe_serve.layers.attention import Attention, AttentionInput, LayerCache
from moe_serve.layers.linear import Linear
from moe_serve.layers.mlp import GatedMlp
from moe_serve.layers.moe import MoeLayer
from moe_serve.layers.rope import rope_table
from moe_serve.layers.router import Router
from moe_serve.models.expert_weights import ExpertWeights
from moe_serve.models.spec import LayerSpec, ModelSpec
from moe_serve.types import CacheGroup, ForwardBatch


@dataclass(frozen=True, slots=True)
class FusedPass:
    """`Decoder.forward` on its caches as one call. run: the kernels' own."""

    run: Forward
    plans: Callable[[ForwardBatch], list[Any]]

    def __call__(self, batch: ForwardBatch, watcher: Watcher | None = None) -> Tensor:
        """Run one step; watcher: whom to ask at the experts, if anyone."""
        slots = batch.slot_mapping
        return self.run(batch.token_ids, batch.positions, slots, self.plans(batch), watcher)


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
        self.attention = attention
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
        hidden = self.attention(hidden, cache, step)
        hidden, residual = self._kernels.add_rms_norm(
            hidden, residual, self._mlp_norm, self._norm_eps
        )
        if isinstance(self.mlp, MoeLayer):
            return self.mlp(hidden, residual), residual
        return self.mlp(hidden), residual

    def with_mlp(self, mlp: GatedMlp | MoeLayer) -> DecoderLayer:
        """Return this layer, of the same weights, with another MLP."""
        other = copy.copy(self)
        other.mlp = mlp
        return other

    def part(self, cache: LayerCache, group: int) -> LayerPart:
        """Return this layer as the fused forward pass takes it."""
        moe = self.mlp.part() if isinstance(self.mlp, MoeLayer) else None
        dense = self.mlp.shared if isinstance(self.mlp, MoeLayer) else self.mlp
        return LayerPart(
            attention_norm=self._attention_norm,
            qkv=self.attention.qkv.part(),
            heads=self.attention.heads,
            output=self.attention.output.part(),
            scale=self.attention.scale,
            key_cache=cache.key,
            value_cache=cache.value,
            group=group,
            mlp_norm=self._mlp_norm,
            gate_up=None if dense is None else dense.gate_up.part(),
            down=None if dense is None else dense.down.part(),
            moe=moe,
        )


def build_decoder(
    spec: ModelSpec,
    dtype: torch.dtype,
    kernels: Kernels,
    max_model_len: int,
    load: Callable[[Mapping[str, Tensor]], dict[str, Tensor]],
) -> Decoder:
    """Allocate the experts' records, have all weights loaded, pack them, put the model together.

    load: given tensors to fill, by name, returns all weights of `spec`, those among them.
    """
    expert_weights = ExpertWeights(spec, dtype, kernels)
    plain = expert_weights.plain()
    weights = load(plain)
    for name in plain:
        del weights[name]
    plain.clear()
    return Decoder(spec, weights, expert_weights.packed(), kernels, max_model_len)


class Decoder:
    """A decoder-only language model.

    weights: what `ModelSpec.weights` names, but the experts; taken out of the dictionary as they
    are packed, so that nothing is held twice. experts: those of all MoE layers, packed.
    max_model_len: how many positions the rotary table has. dispatcher: between ranks; None where
    all experts are in this process.
    """

    def __init__(
        self,
        spec: ModelSpec,
        weights: dict[str, Tensor],
        experts: Experts,
        kernels: Kernels,
        max_model_len: int,
        dispatcher: Dispatcher | None = None,
    ) -> None:
        self.spec = spec
        self.dispatcher = dispatcher
        self.kernels = kernels
        self.experts = experts
        self.max_model_len = max_model_len
        embedding = weights.pop("embedding")
        self.dtype = embedding.dtype
        self.groups: tuple[CacheGroup, ...] = spec.cache_groups(self.dtype.itemsize)
        self._group_of_layer = {
            layer: index for index, group in enumerate(self.groups) for layer in group.layers
        }
        cos, sin = rope_table(spec.attention.rope, spec.attention.head_dim, max_model_len)
        self._rope = cos.to(kernels.device), sin.to(kernels.device)
        self.layers = [
            self._build_layer(index, layer, weights) for index, layer in enumerate(spec.layers)
        ]
        self._norm = weights.pop("norm")
        # tied, the embedding is gathered from the packed head
        self.embedding = None if spec.is_embedding_tied else embedding
        head = embedding if spec.is_embedding_tied else weights.pop("head")
        self._head = Linear(kernels, head)
        assert not weights, f"weights that no part took: {sorted(weights)}"

    def _build_layer(
        self, index: int, layer: LayerSpec, weights: dict[str, Tensor]
    ) -> DecoderLayer:
        kernels = self.kernels
        name = f"layers.{index}"

        def linear(part: str) -> Linear:
            return Linear(
                kernels, weights.pop(f"{name}.{part}"), weights.pop(f"{name}.{part}_bias", None)
            )

        attention = Attention(kernels, linear("qkv"), self._heads(name, weights), linear("output"))
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
                kernels,
                Router(kernels, recipe, weights.pop(f"{name}.router")),
                self.dispatcher or local.build(recipe.num_experts, kernels),
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

    def _heads(self, layer: str, weights: dict[str, Tensor]) -> Heads:
        spec = self.spec.attention
        cos, sin = self._rope
        return Heads(
            num_heads=spec.num_heads,
            num_kv_heads=spec.num_kv_heads,
            head_dim=spec.head_dim,
            cos=cos,
            sin=sin,
            query_norm=weights.pop(f"{layer}.q_norm", None),
            key_norm=weights.pop(f"{layer}.k_norm", None),
            is_norm_full=spec.qk_norm == "full",
            norm_eps=self.spec.norm_eps,
            clip=spec.qkv_clip,
        )

    def forward(self, batch: ForwardBatch, caches: list[LayerCache]) -> Tensor:
        """Run one step; return the residual stream after the last norm, [num_tokens, hidden_size].

        caches: one per layer, written at the batch's slots.
        """
        steps = [
            AttentionInput(batch.positions, slots, plan)
            for slots, plan in zip(batch.slot_mapping, self.plans(batch), strict=True)
        ]
        residual = self.embed(batch.token_ids)
        delta: Tensor | None = None
        for index, layer in enumerate(self.layers):
            step = steps[self._group_of_layer[index]]
            delta, residual = layer(delta, residual, caches[index], step)
        assert delta is not None
        return self.kernels.add_rms_norm(delta, residual, self._norm, self.spec.norm_eps)[0]

    def take_part(self, num_tokens: int, done: int | None = None) -> None:
        """Send `num_tokens` rows of no meaning through the MoE layers after layer `done`.

        A rank that has no token, or whose step has failed, owes its part to the others.
        """
        empty = torch.zeros(
            num_tokens, self.spec.hidden_size, dtype=self.dtype, device=self.kernels.device
        )
        for index, layer in enumerate(self.layers):
            if isinstance(layer.mlp, MoeLayer) and (done is None or index > done):
                layer.mlp(empty, empty)

    def rehearsal(self, dispatcher: Dispatcher | None = None) -> Decoder:
        """Return this model, of the same weights and caches, for tokens that belong to nobody.

        Outside of any step: nobody notes what they use, brings it in, or learns from it.
        dispatcher: in place of the model's own.
        """
        experts = self.experts.rehearsal()
        other = copy.copy(self)
        other.layers = [
            layer.with_mlp(layer.mlp.with_parts(dispatcher or layer.mlp.dispatcher, experts))
            if isinstance(layer.mlp, MoeLayer)
            else layer
            for layer in self.layers
        ]
        return other

    def plans(self, batch: ForwardBatch) -> list[Any]:
        """Return the attention kernel's plan of a step, for each cache group."""
        return [
            self.kernels.plan_attention(
                batch.query_lens, batch.context_lens, table, batch.block_size, group.window
            )
            for table, group in zip(batch.block_tables, self.groups, strict=True)
        ]

    def embed(self, token_ids: Tensor) -> Tensor:
        """Return [num_tokens, hidden_size] for token_ids int64 [num_tokens]."""
        if self.embedding is None:
            return self._head.rows(token_ids)
        return self.embedding[token_ids]

    def fused(self, caches: list[LayerCache]) -> FusedPass | None:
        """Return `forward` on these caches as one call of the kernels, where they have that.

        None, too, where a pass must stop for other ranks.
        """
        if self.kernels.build_forward is None or self.dispatcher is not None:
            return None
        run = self.kernels.build_forward(
            ModelPart(
                layers=[
                    layer.part(cache, self._group_of_layer[index])
                    for index, (layer, cache) in enumerate(zip(self.layers, caches, strict=True))
                ],
                embedding=self._head.weight if self.embedding is None else self.embedding,
                norm=self._norm,
                norm_eps=self.spec.norm_eps,
            )
        )
        return FusedPass(run, self.plans)

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
            shape = (spec.num_kv_heads, num_slots, spec.head_dim)
            try:
                cache = torch.empty(shape, dtype=self.dtype, device=self.kernels.device)
            except (RuntimeError, MemoryError) as error:
                raise CapacityError(
                    f"no memory for the keys of {num_slots} tokens in one layer; "
                    "lower kv_cache_gb or num_kv_blocks"
                ) from error
            cache[:, :block_size] = 0
            return cache

        sizes = [(count + 1) * block_size for count in num_blocks]
        slots = [sizes[self._group_of_layer[layer]] for layer in range(self.spec.num_layers)]
        return [LayerCache(empty(num_slots), empty(num_slots)) for num_slots in slots]
