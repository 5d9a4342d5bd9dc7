"""A device that is far: whatever the host learns from it, it has to wait for, and that is counted.

Its tensors have their numbers in host memory, so all that is asked of it gives what a CPU gives;
but what torch would answer only once a GPU is done is a wait here. So is a copy either way, as that
is what one from or to memory that is not pinned is; the copies of its streams are none.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, ClassVar
from unittest import mock

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode, _disable_current_modes
from torch.utils._pytree import tree_iter, tree_map

from moe_serve.kernels.gpu.streams import Event, Stream
from moe_serve.kernels.gpu.waiting import INDEXING, WAITING

# of torch's devices without a driver the one that it takes everywhere
FAR = torch.device("meta")

_aten = torch.ops.aten
# in inference mode they come as they are called, not as what they are made of
_COPYING = {_aten.copy_, _aten._to_copy, _aten.to}


class Waits:
    """How often the host has waited, and at what."""

    def __init__(self) -> None:
        self.reasons: list[str] = []

    def add(self, reason: object) -> None:
        self.reasons.append(str(reason))


class FarTensor(Tensor):
    """A tensor of the far device. near: its numbers. waits: where those for it are counted."""

    near: Tensor
    waits: ClassVar[Waits]

    @staticmethod
    def __new__(cls, near: Tensor) -> FarTensor:
        found: FarTensor = Tensor._make_wrapper_subclass(
            cls,
            near.shape,
            strides=near.stride(),
            storage_offset=near.storage_offset(),
            dtype=near.dtype,
            device=FAR,
        )
        found.near = near
        return found

    __torch_function__ = torch._C._disabled_torch_function_impl  # type: ignore[assignment]

    @classmethod
    def __torch_dispatch__(  # type: ignore[override]
        cls, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        raise AssertionError(f"{func} outside of `far_device`")

    # which torch does not dispatch, or not for classes of ours

    def tolist(self) -> Any:
        return self._told("tolist")

    def numpy(self, *args: Any, **kwargs: Any) -> Any:
        return self._told("numpy")

    def cpu(self, *args: Any, **kwargs: Any) -> Any:
        return self._told("cpu")

    def __bool__(self) -> bool:
        return bool(self._told("__bool__"))

    def _told(self, name: str) -> Any:
        self.waits.add(name)
        with _disable_current_modes():
            return getattr(self.near, name)()


def near(value: Any) -> Any:
    """Return a value with the numbers of its far tensors."""
    return tree_map(lambda one: one.near if isinstance(one, FarTensor) else one, value)


def far(value: Any) -> Any:
    """Return a value with its tensors on the device, as if they had always been there."""
    return tree_map(lambda one: FarTensor(one) if isinstance(one, Tensor) else one, value)


class _Device(TorchDispatchMode):  # type: ignore[no-untyped-call]
    def __init__(self, waits: Waits) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self._waits = waits

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        kwargs = dict(kwargs or {})
        packet = func.overloadpacket
        tensors = [one for one in tree_iter((args, kwargs)) if isinstance(one, Tensor)]
        is_far = [isinstance(one, FarTensor) for one in tensors]
        device = kwargs.get("device")
        if device is None:
            device = next((one for one in args if isinstance(one, torch.device)), None)
        goes_far = any(is_far) if device is None else device.type == FAR.type
        if any(is_far) or goes_far:
            if packet in _COPYING:
                if not all(is_far) or not goes_far:
                    self._waits.add(func)
            elif packet in WAITING or packet is _aten.item:
                self._waits.add(func)
            elif packet in INDEXING:
                indices = [one for one in args[1] if one is not None]
                for one in indices:
                    if one.dtype == torch.bool or not isinstance(one, FarTensor):
                        self._waits.add(func)
            else:
                assert all(
                    known or not one.dim() for known, one in zip(is_far, tensors, strict=True)
                ), f"{func} mixes tensors of the host and of the device"
        cpu = torch.device("cpu")
        args, kwargs = tree_map(
            lambda one: cpu if isinstance(one, torch.device) else one, near((args, kwargs))
        )
        result = func(*args, **kwargs)
        if not goes_far:
            return result
        known = {id(one.near): one for one in tensors if isinstance(one, FarTensor)}
        return tree_map(
            lambda one: known.get(id(one), FarTensor(one)) if isinstance(one, Tensor) else one,
            result,
        )


@contextmanager
def far_device() -> Iterator[Waits]:
    """Let there be such a device; interpreted kernels run on it."""
    from triton.runtime.interpreter import GridExecutor

    waits = Waits()
    run, tensor = GridExecutor.__call__, torch.tensor

    def launched(executor: Any, *args: Any, **kwargs: Any) -> None:
        with _disable_current_modes():
            run(executor, *near(args), **near(kwargs))

    def uploaded(data: Any, *, device: Any = None, **kwargs: Any) -> Tensor:
        made = tensor(data, **kwargs)
        if device is None or torch.device(device).type != FAR.type:
            return made
        waits.add("torch.tensor")
        return FarTensor(made)

    with (
        mock.patch.object(GridExecutor, "__call__", launched),
        mock.patch.object(torch, "tensor", uploaded),
        mock.patch.object(FarTensor, "waits", waits, create=True),
        _Device(waits),
    ):
        yield waits


class FarEvent:
    """See `streams.Event`: it has happened once the host has waited for it, or for a later one."""

    def __init__(self, streams: FarStreams, number: int) -> None:
        self._streams = streams
        self._number = number

    def is_done(self) -> bool:
        return self._number <= self._streams.num_done

    def wait(self) -> None:
        self._streams.waits.add("event")
        self._streams.num_done = max(self._streams.num_done, self._number)


class FarStream:
    """See `streams.Stream`."""

    def __init__(self, streams: FarStreams) -> None:
        self._streams = streams

    def copy(self, into: Tensor, source: Tensor) -> None:
        assert into.is_contiguous()
        assert source.is_contiguous()
        self._streams.num_copies += 1
        with _disable_current_modes():
            near(into).copy_(near(source))

    def record(self) -> Event:
        self._streams.num_asked += 1
        return FarEvent(self._streams, self._streams.num_asked)

    def after(self, event: Event) -> None:
        """All is done in the order of asking."""


class FarStreams:
    """See `streams.Streams`: those of the far device. num_copies: that they were asked for."""

    def __init__(self, waits: Waits) -> None:
        self.device = FAR
        self.waits = waits
        self.num_asked = 0
        self.num_done = 0
        self.num_copies = 0

    def pinned(self, num_bytes: int) -> Tensor:
        return torch.zeros(num_bytes, dtype=torch.uint8)

    def pin(self, memory: Tensor) -> Tensor:
        return memory

    def stream(self, *, is_urgent: bool = False) -> Stream:
        return FarStream(self)

    def current(self) -> Stream:
        return FarStream(self)
