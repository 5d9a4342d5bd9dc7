"""A device whose tensors have no bytes, with kernels that are launched there and do not run."""

from __future__ import annotations

import importlib
import weakref
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

# tensors there cannot be mixed with those on the host
ELSEWHERE = torch.device("meta")


class Launches:
    """Takes kernels' launches: checks where their tensors are, runs none."""

    def __init__(self) -> None:
        self.names: set[str] = set()

    def run(self, kernel: Any, *args: Any, grid: Any, warmup: bool, **kwargs: Any) -> None:
        name = kernel.fn.__name__
        self.names.add(name)
        for place, value in enumerate([*args, *kwargs.values()]):
            if isinstance(value, Tensor):
                assert value.device == ELSEWHERE, f"{name}: argument {place} is on {value.device}"


@contextmanager
def launches() -> Iterator[Launches]:
    """Have Triton's kernels be on that device."""
    from triton.runtime.interpreter import InterpretedFunction

    from moe_serve.kernels.gpu import triton as gpu

    if not gpu.IS_INTERPRETED:
        pytest.skip("kernels are compiled here")
    taken = Launches()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(InterpretedFunction, "run", lambda *a, **k: taken.run(*a, **k))
        for module in ("gpu", "linear", "moe", "sampling"):
            found = importlib.import_module(f"moe_serve.kernels.{module}.triton")
            if hasattr(found, "device"):
                patch.setattr(found, "device", lambda: ELSEWHERE)
        yield taken


class LiveBytes(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Counts what tensors that were made within it hold at once. peak: the most, in bytes."""

    def __init__(self, device: torch.device = ELSEWHERE) -> None:
        """device: whose tensors count."""
        super().__init__()  # type: ignore[no-untyped-call]
        self.peak = 0
        self._device = device
        self._now = 0
        self._known: set[int] = set()

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        inputs = [one.untyped_storage()._cdata for one in _tensors((args, kwargs))]
        result = func(*args, **(kwargs or {}))
        for tensor in _tensors(result):
            self._add(tensor.untyped_storage(), inputs)
        return result

    def _add(self, storage: Any, inputs: list[int]) -> None:
        key = storage._cdata
        if key in self._known or key in inputs or storage.device != self._device:
            return
        self._known.add(key)
        size = storage.nbytes()
        self._now += size
        self.peak = max(self.peak, self._now)

        def gone() -> None:
            self._known.remove(key)
            self._now -= size

        weakref.finalize(storage, gone)


def _tensors(value: Any) -> list[Tensor]:
    if isinstance(value, Tensor):
        return [value]
    if isinstance(value, dict):
        value = value.values()
    if isinstance(value, tuple | list | type({}.values())):
        return [tensor for part in value for tensor in _tensors(part)]
    return []
