"""The weighted sum of experts by the native library; numbers as in reference.py."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from moe_serve.kernels.native.loader import Native
from moe_serve.kernels.native.pointers import dtype_code, empty, pointer, pointer_or_null


def build(native: Native) -> Callable[..., Tensor]:
    """Return `combine`."""
    function = native.function("combine", "iippplllppp")

    def combine(
        rows: Tensor,
        pair_of_choice: Tensor,
        weights: Tensor,
        shared: Tensor | None = None,
        shared_weights: Tensor | None = None,
    ) -> Tensor:
        num_tokens, top_k = weights.shape
        dtype, size = rows.dtype, rows.shape[1]
        rows, pair_of_choice = rows.contiguous(), pair_of_choice.contiguous()
        weights = weights.contiguous()
        shared = None if shared is None else shared.contiguous()
        out = empty(num_tokens, size, dtype=dtype)
        function(
            torch.get_num_threads(),
            dtype_code(dtype),
            pointer(rows, dtype),
            pointer(pair_of_choice, torch.int64),
            pointer(weights, torch.float32),
            num_tokens,
            top_k,
            size,
            pointer_or_null(shared, dtype),
            pointer_or_null(shared_weights, torch.float32),
            pointer(out, dtype),
        )
        return out

    return combine
