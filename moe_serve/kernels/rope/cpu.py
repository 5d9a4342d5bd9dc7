"""From projection to cache by the native library; numbers as in reference.py."""

from __future__ import annotations

import ctypes

import torch
from torch import Tensor

from moe_serve.kernels.native.library import DTYPE_CODES, Native
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
    def of(cls, heads: Heads) -> HeadsArguments:
        """Point to the tensors of `heads`, which must live on."""
        assert heads.cos.is_contiguous(), "the kernel reads rows of head_dim / 2"
        assert heads.sin.is_contiguous(), "the kernel reads rows of head_dim / 2"
        return cls(
            heads.num_heads,
            heads.num_kv_heads,
            heads.head_dim,
            None if heads.query_norm is None else heads.query_norm.data_ptr(),
            None if heads.key_norm is None else heads.key_norm.data_ptr(),
            heads.cos.data_ptr(),
            heads.sin.data_ptr(),
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
        qkv = qkv.contiguous()
        arguments = HeadsArguments.of(heads)
        self._write(
            torch.get_num_threads(),
            DTYPE_CODES[qkv.dtype],
            ctypes.addressof(arguments),
            qkv.data_ptr(),
            num_tokens,
            positions.data_ptr(),
            slots.data_ptr(),
            key_cache.data_ptr(),
            value_cache.data_ptr(),
            key_cache.shape[1],
        )
        query_width = heads.num_heads * heads.head_dim
        return qkv[:, :query_width].view(num_tokens, heads.num_heads, heads.head_dim)
