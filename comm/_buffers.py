"""Memory for what travels, kept from one layer and step to the next.

What was kept once stays where it is, also when more is needed: a CUDA graph may go on using it. The
sizes double, so that all together are less than twice the largest.
"""

from __future__ import annotations

import torch
from torch import Tensor

KEPT_BYTES = 2**25  # a larger one, of a long prompt, lives no longer than its layer


class Buffers:
    """Tensors by name. What one held is lost, or not, when it is asked for again.

    Nothing in them was never written: bytes that mean nothing travel too.
    """

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._outgrown: list[Tensor] = []
        self._memory: dict[str, Tensor] = {}
        self._views: dict[str, Tensor] = {}

    def take(self, name: str, num_rows: int, size: int, dtype: torch.dtype) -> Tensor:
        """Return [num_rows, size] of the buffer of this name; valid until it is taken again."""
        view = self._views.get(name)
        if view is not None and view.shape == (num_rows, size) and view.dtype is dtype:
            return view
        num_bytes = num_rows * size * dtype.itemsize
        if num_bytes > KEPT_BYTES:
            return torch.zeros(num_rows, size, dtype=dtype, device=self._device)
        memory = self._memory.get(name)
        if memory is None or memory.shape[0] < num_bytes:
            if memory is not None:
                self._outgrown.append(memory)
            size_kept = 1 << max(0, num_bytes - 1).bit_length()
            memory = torch.zeros(size_kept, dtype=torch.uint8, device=self._device)
            self._memory[name] = memory
        view = memory[:num_bytes].view(dtype).view(num_rows, size)
        self._views[name] = view
        return view
