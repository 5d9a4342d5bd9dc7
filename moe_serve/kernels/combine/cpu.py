"""The weighted sum of experts by the native library; numbers as in reference.py."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from moe_serve.kernels.native.library import DTYPE_CODES, Native


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
        rows, pair_of_choice = rows.contiguous(), pair_of_choice.contiguous()
        weights = weights.contiguous()
        shared = None if shared is None else shared.contiguous()
        out = torch.empty(num_tokens, rows.shape[1], dtype=rows.dtype)
        function(
            torch.get_num_threads(),
            DTYPE_CODES[rows.dtype],
            rows.data_ptr(),
            pair_of_choice.data_ptr(),
            weights.data_ptr(),
            num_tokens,
            top_k,
            rows.shape[1],
            None if shared is None else shared.data_ptr(),
            None if shared_weights is None else shared_weights.data_ptr(),
            out.data_ptr(),
        )
        return out

    return combine
