"""Forbid what would make the host wait for a device, or ask it: such calls cannot be captured."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

_aten = torch.ops.aten
_ASK = {
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
_INDEX = {_aten.index, _aten.index_put, _aten.index_put_}


class _NoHostSync(TorchDispatchMode):  # type: ignore[no-untyped-call]
    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        packet = func.overloadpacket
        assert packet not in _ASK, f"{packet} waits for the device"
        if packet in _INDEX:
            masks = [i for i in args[1] if isinstance(i, Tensor) and i.dtype == torch.bool]
            assert not masks, f"{packet} by a mask waits for the device"
        return func(*args, **(kwargs or {}))


def _wait(tensor: Tensor, *args: object) -> None:
    raise AssertionError("this waits for the device")


@contextmanager
def no_host_sync() -> Iterator[None]:
    """Fail on any call of torch's that a CUDA graph could not have in it."""
    with pytest.MonkeyPatch.context() as patch, _NoHostSync():  # type: ignore[no-untyped-call]
        for name in ("tolist", "numpy", "cpu"):  # which torch does not dispatch on a CPU
            patch.setattr(Tensor, name, _wait)
        yield
