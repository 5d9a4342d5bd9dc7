"""Where a tensor lies, for native code, which believes whatever it is told."""

from __future__ import annotations

import torch
from torch import Tensor

DTYPE_CODES = {torch.float32: 0, torch.bfloat16: 1}


def dtype_code(dtype: torch.dtype) -> int:
    """Return how native code calls a model's dtype. Raises TypeError for one it does not have."""
    code = DTYPE_CODES.get(dtype)
    if code is None:
        raise TypeError(f"native kernels have bfloat16 and float32, not {dtype}")
    return code


def pointer(tensor: Tensor, dtype: torch.dtype) -> int:
    """Return the address of a tensor that native code may read as one row after another.

    Raises TypeError for any other dtype, device or layout: it would be read all the same.
    """
    if tensor.dtype is not dtype or tensor.device.type != "cpu" or not tensor.is_contiguous():
        raise TypeError(
            f"a contiguous {dtype} tensor on the CPU is wanted, not {tensor.dtype} on "
            f"{tensor.device} with strides {tensor.stride()}"
        )
    return tensor.data_ptr()


def pointer_or_null(tensor: Tensor | None, dtype: torch.dtype) -> int | None:
    """Return `pointer`, or None for None."""
    return None if tensor is None else pointer(tensor, dtype)


def empty(*shape: int, dtype: torch.dtype) -> Tensor:
    """Return a tensor for native code to fill, whatever torch's default dtype and device are."""
    return torch.empty(shape, dtype=dtype, device="cpu")
