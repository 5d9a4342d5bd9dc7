"""What the kernel between projection and attention must know of a layer."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor


@dataclass(frozen=True, kw_only=True, slots=True)
class Heads:
    """How a layer's projection becomes queries, keys and values.

    query_norm, key_norm: weights of a norm over each head, [head_dim], or over all heads at once
    (`is_norm_full`), or None. clip bounds what the projection gave (OLMoE). cos, sin: float32
    [max_model_len, head_dim / 2].
    """

    num_heads: int
    num_kv_heads: int
    head_dim: int
    cos: Tensor
    sin: Tensor
    query_norm: Tensor | None = None
    key_norm: Tensor | None = None
    is_norm_full: bool = False
    norm_eps: float = 0.0
    clip: float | None = None

    @property
    def qkv_width(self) -> int:
        return (self.num_heads + 2 * self.num_kv_heads) * self.head_dim
