"""Grouped-query attention over a paged cache."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from torch import Tensor

from moe_serve.kernels.rope.base import Heads
from moe_serve.kernels.suite import Kernels
from moe_serve.layers.linear import Linear


@dataclass(frozen=True, slots=True)
class LayerCache:
    """Keys and values of one layer: [num_kv_heads, num_slots, head_dim] each."""

    key: Tensor
    value: Tensor


@dataclass(frozen=True, slots=True)
class AttentionInput:
    """What all layers of a cache group need in a step.

    positions, slots: int64 [num_tokens]: where each token is in its sequence, and where its key and
    value go; plan: the kernel's.
    """

    positions: Tensor
    slots: Tensor
    plan: Any


class Attention:
    """qkv projection, norms and rotation, cache write, attention, output."""

    def __init__(self, kernels: Kernels, qkv: Linear, heads: Heads, output: Linear) -> None:
        self._kernels = kernels
        self.qkv = qkv
        self.heads = heads
        self.output = output
        self.scale = heads.head_dim**-0.5

    def __call__(self, hidden: Tensor, cache: LayerCache, step: AttentionInput) -> Tensor:
        """Return [num_tokens, hidden_size], like `hidden`; writes this step's part of the cache."""
        kernels = self._kernels
        query = kernels.rope_write_kv(
            self.qkv(hidden), self.heads, step.positions, step.slots, cache.key, cache.value
        )
        out = kernels.paged_attention(query, cache.key, cache.value, step.plan, self.scale)
        return self.output(out.view(hidden.shape[0], -1))
