"""Memory for what travels, kept from one layer and step to the next."""

from __future__ import annotations

import torch
from torch import Tensor

KEPT_BYTES = 2**25  # a larger one, of a long prompt, lives no longer than its layer


class Buffers:
    """Tensors by name. What one held is lost, or not, when it is asked for again.

    Nothing in them was never written: bytes that mean nothing travel too.
    """

    def __init__(self) -> None:
        self._memory: dict[str, Tensor] = {}
        self._views: dict[str, Tensor] = {}

    def take(self, name: str, num_rows: int, size: int, dtype: torch.dtype) -> Tensor:
        """Return [num_rows, size] of the buffer of this name; valid until it is taken again."""
        view = self._views.get(name)
        if view is not None and view.shape == (num_rows, size) and view.dtype is dtype:
            return view
        num_bytes = num_rows * size * dtype.itemsize
        if num_bytes > KEPT_BYTES:
            return torch.zeros(num_rows, size, dtype=dtype, device="cpu")
        memory = self._memory.get(name)
        if memory is None or memory.shape[0] < num_bytes:
            memory = torch.zeros(num_bytes, dtype=torch.uint8, device="cpu")
            self._memory[name] = memory
        view = memory[:num_bytes].view(dtype).view(num_rows, size)
        self._views[name] = view
        return view
