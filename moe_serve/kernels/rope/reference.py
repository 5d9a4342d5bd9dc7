"""Rotary position embedding (Su et al. 2021, arXiv 2104.09864), and the write into the KV cache.

Pairs are (i, i + head_dim / 2), as Hugging Face checkpoints have them. Rounding points: the norms
of queries and keys, as rms_norm has them; the rotated row, once, to the model's dtype; the rotation
itself is float32.
"""

from __future__ import annotations

import torch
from torch import Tensor

from moe_serve.kernels.rms_norm.reference import rms_norm
from moe_serve.kernels.rope.base import Heads


def rope(rows: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Rotate each head by its token's position.

    rows: [num_tokens, num_heads, head_dim]; cos, sin: float32 [num_tokens, 1, head_dim / 2].
    """
    wide = rows.float()
    half = rows.shape[-1] // 2
    first, second = wide[..., :half], wide[..., half:]
    out = wide.new_empty(wide.shape)
    out[..., :half] = first * cos - second * sin
    out[..., half:] = second * cos + first * sin
    return out.to(rows.dtype)


def rope_write_kv(
    qkv: Tensor,
    heads: Heads,
    positions: Tensor,
    slots: Tensor,
    key_cache: Tensor,
    value_cache: Tensor,
) -> Tensor:
    """Norm, clip and rotate queries and keys, write keys and values, return the queries.

    qkv: [num_tokens, (num_heads + 2 * num_kv_heads) * head_dim], used up: it may be written to.
    positions, slots: int64 [num_tokens]; caches: [num_kv_heads, num_slots, head_dim], changed in
    place at `slots`. Returns [num_tokens, num_heads, head_dim], perhaps a view of qkv.
    """
    num_tokens = qkv.shape[0]
    width, kv_width = heads.num_heads * heads.head_dim, heads.num_kv_heads * heads.head_dim
    query, key, value = torch.split(qkv, [width, kv_width, kv_width], dim=-1)
    if heads.is_norm_full:
        query, key = _norm(query, key, heads)
    if heads.clip is not None:
        query, key, value = (t.clamp(-heads.clip, heads.clip) for t in (query, key, value))
    dim = heads.head_dim
    query = query.reshape(num_tokens, heads.num_heads, dim)
    key, value = (t.reshape(num_tokens, heads.num_kv_heads, dim) for t in (key, value))
    if not heads.is_norm_full:
        query, key = _norm(query, key, heads)
    cos, sin = heads.cos[positions].unsqueeze(1), heads.sin[positions].unsqueeze(1)
    key_cache.index_copy_(1, slots, rope(key, cos, sin).transpose(0, 1))
    value_cache.index_copy_(1, slots, value.transpose(0, 1))
    return rope(query, cos, sin)


def _norm(query: Tensor, key: Tensor, heads: Heads) -> tuple[Tensor, Tensor]:
    if heads.query_norm is None or heads.key_norm is None:
        return query, key
    eps = heads.norm_eps
    return rms_norm(query, heads.query_norm, eps), rms_norm(key, heads.key_norm, eps)
