"""Rotary position embedding (Su et al. 2021, arXiv 2104.09864), and the write into the KV cache.

Pairs are (i, i + head_dim / 2), as Hugging Face checkpoints have them. Rounding point: the rotated
row, once, to the model's dtype; the rotation itself is float32.
"""

from __future__ import annotations

from torch import Tensor


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
    query: Tensor,
    key: Tensor,
    value: Tensor,
    cos: Tensor,
    sin: Tensor,
    key_cache: Tensor,
    value_cache: Tensor,
    slots: Tensor,
) -> Tensor:
    """Rotate query and key, write key and value into the cache, return the rotated query.

    query: [num_tokens, num_heads, head_dim]; key, value: [num_tokens, num_kv_heads, head_dim];
    cos, sin: as in `rope`; caches: [num_kv_heads, num_slots, head_dim], changed in place at
    `slots`, int64 [num_tokens].
    """
    key_cache.index_copy_(1, slots, rope(key, cos, sin).transpose(0, 1))
    value_cache.index_copy_(1, slots, value.transpose(0, 1))
    return rope(query, cos, sin)
