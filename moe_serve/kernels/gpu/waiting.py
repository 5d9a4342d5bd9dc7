"""Finds calls of torch's that would make the host wait for a device: a graph cannot have them."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

_aten = torch.ops.aten
WAITING = {
    _aten._local_scalar_dense,
    _aten.nonzero,
    _aten.masked_select,
    _aten.bincount,
    _aten.equal,
    _aten.is_nonzero,
    _aten.repeat_interleave,
    _aten._unique2,
    _aten.unique_dim,
    _aten.unique_consecutive,
}
INDEXING = {_aten.index, _aten.index_put, _aten.index_put_}


class NoWaiting(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Fails on such a call, also where the device is the CPU. Sees what torch dispatches, only."""

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        packet = func.overloadpacket
        assert packet not in WAITING, f"{packet} waits for the device"
        if packet in INDEXING:
            masks = [i for i in args[1] if isinstance(i, Tensor) and i.dtype == torch.bool]
            assert not masks, f"{packet} by a mask waits for the device"
        return func(*args, **(kwargs or {}))
