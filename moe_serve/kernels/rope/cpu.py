"""From projection to cache by the native library; numbers as in reference.py."""

from __future__ import annotations

import ctypes

import torch
from torch import Tensor

from moe_serve.kernels.native.loader import Native
from moe_serve.kernels.native.pointers import dtype_code, pointer, pointer_or_null
from moe_serve.kernels.rope.base import Heads


class HeadsArguments(ctypes.Structure):
    """See native/arguments.h."""

    _fields_ = (
        ("num_heads", ctypes.c_int64),
        ("num_kv_heads", ctypes.c_int64),
        ("head_dim", ctypes.c_int64),
        ("query_norm", ctypes.c_void_p),
        ("key_norm", ctypes.c_void_p),
        ("cos", ctypes.c_void_p),
        ("sin", ctypes.c_void_p),
        ("is_norm_full", ctypes.c_int32),
        ("norm_eps", ctypes.c_float),
        ("clip", ctypes.c_float),
    )

    @classmethod
    def of(cls, heads: Heads, dtype: torch.dtype) -> HeadsArguments:
        """Point to the tensors of `heads`, which must live on; dtype: the model's."""
        assert (heads.query_norm is None) == (heads.key_norm is None), "both are normed, or none"
        return cls(
            heads.num_heads,
            heads.num_kv_heads,
            heads.head_dim,
            pointer_or_null(heads.query_norm, dtype),
            pointer_or_null(heads.key_norm, dtype),
            pointer(heads.cos, torch.float32),
            pointer(heads.sin, torch.float32),
            heads.is_norm_full,
            heads.norm_eps,
            heads.clip or 0.0,
        )


class RopeKernels:
    """`rope_write_kv`, as reference.py has it."""

    def __init__(self, native: Native) -> None:
        self._write = native.function("rope_write_kv", "iipplppppl")

    def rope_write_kv(
        self,
        qkv: Tensor,
        heads: Heads,
        positions: Tensor,
        slots: Tensor,
        key_cache: Tensor,
        value_cache: Tensor,
    ) -> Tensor:
        num_tokens, width = qkv.shape
        assert width == heads.qkv_width, (width, heads.qkv_width)
        dtype = qkv.dtype
        qkv, positions, slots = qkv.contiguous(), positions.contiguous(), slots.contiguous()
        arguments = HeadsArguments.of(heads, dtype)
        self._write(
            torch.get_num_threads(),
            dtype_code(dtype),
            ctypes.addressof(arguments),
            pointer(qkv, dtype),
            num_tokens,
            pointer(positions, torch.int64),
            pointer(slots, torch.int64),
            pointer(key_cache, dtype),
            pointer(value_cache, dtype),
            key_cache.shape[1],
        )
        query_width = heads.num_heads * heads.head_dim
        return qkv[:, :query_width].view(num_tokens, heads.num_heads, heads.head_dim)
