"""Grouped-query attention over a paged cache."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

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

    cos, sin: float32 [num_tokens, 1, head_dim / 2]; slots: int64 [num_tokens], where this step's
    keys and values go; tiles: the kernel's plan.
    """

    cos: Tensor
    sin: Tensor
    slots: Tensor
    tiles: Any


class Attention:
    """qkv projection, norms of query and key, rotation, cache write, attention, output.

    qk_norm_weights: ([head_dim], [head_dim]) for a norm over each head, or the full widths for one
    over all heads at once (`is_norm_full`). qkv_clip bounds what the projection gives (OLMoE).
    """

    def __init__(
        self,
        kernels: Kernels,
        qkv: Linear,
        output: Linear,
        num_heads: int,
        num_kv_heads: int,
        head_dim: int,
        norm_eps: float,
        qk_norm_weights: tuple[Tensor, Tensor] | None = None,
        is_norm_full: bool = False,
        qkv_clip: float | None = None,
    ) -> None:
        self._kernels = kernels
        self._qkv = qkv
        self._output = output
        self._widths = [num_heads * head_dim, num_kv_heads * head_dim, num_kv_heads * head_dim]
        self._head_dim = head_dim
        self._norm_eps = norm_eps
        self._qk_norm_weights = qk_norm_weights
        self._is_norm_full = is_norm_full
        self._qkv_clip = qkv_clip

    def __call__(self, hidden: Tensor, cache: LayerCache, step: AttentionInput) -> Tensor:
        """Return [num_tokens, hidden_size], like `hidden`; writes this step's part of the cache."""
        kernels = self._kernels
        num_tokens = hidden.shape[0]
        query, key, value = torch.split(self._qkv(hidden), self._widths, dim=-1)
        if self._qk_norm_weights is not None and self._is_norm_full:
            query, key = self._norm(query, key)
        if self._qkv_clip is not None:
            query, key, value = (
                part.clamp(-self._qkv_clip, self._qkv_clip) for part in (query, key, value)
            )
        query, key, value = (
            part.view(num_tokens, -1, self._head_dim) for part in (query, key, value)
        )
        if self._qk_norm_weights is not None and not self._is_norm_full:
            query, key = self._norm(query, key)
        query = kernels.rope_write_kv(
            query, key, value, step.cos, step.sin, cache.key, cache.value, step.slots
        )
        out = kernels.paged_attention(
            query, cache.key, cache.value, step.tiles, self._head_dim**-0.5
        )
        return self._output(out.view(num_tokens, -1))

    def _norm(self, query: Tensor, key: Tensor) -> tuple[Tensor, Tensor]:
        assert self._qk_norm_weights is not None
        query_weight, key_weight = self._qk_norm_weights
        norm = self._kernels.rms_norm
        return norm(query, query_weight, self._norm_eps), norm(key, key_weight, self._norm_eps)
