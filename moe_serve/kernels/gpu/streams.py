"""Streams of copies beside the kernels: the only place that names CUDA's streams, events, memory.

A stream does what it is asked in order; between streams nothing is in order but what `after` and
the host's `wait` say. On a CPU everything is done at once, so the same code runs there.
"""

from __future__ import annotations

import contextlib
import ctypes
from typing import Any, Protocol

import torch
from torch import Tensor

from moe_serve.errors import CapacityError
from moe_serve.kernels.native.memory import allocate

_cuda: Any = torch.cuda  # parts of which have no types
_FOR_ALL_DEVICES = 1  # cudaHostRegisterPortable
_URGENT, _USUAL = -1, 0


class Event(Protocol):
    """A place in a stream's order: done once all that was asked of the stream before it is."""

    def is_done(self) -> bool: ...

    def wait(self) -> None:
        """Let the host wait until it is done."""
        ...


class Stream(Protocol):
    """Does what it is asked one after the other, beside the host and other streams."""

    def copy(self, into: Tensor, source: Tensor) -> None:
        """Copy, in the stream's order; the host does not wait.

        Both of one dtype and shape, contiguous, in pinned memory or on the device, and neither
        written nor given back before it is done.
        """
        ...

    def record(self) -> Event:
        """Return the event of all that was asked so far."""
        ...

    def after(self, event: Event) -> None:
        """Let all that is asked from now on wait for `event`, of any stream."""
        ...


class Streams(Protocol):
    """A device's streams. device: where what runs in them is."""

    @property
    def device(self) -> torch.device: ...

    def pinned(self, num_bytes: int) -> Tensor:
        """Return uint8 [num_bytes] of zeros in host memory that copies travel from directly.

        Aligned to 4,096. Raises CapacityError.
        """
        ...

    def pin(self, memory: Tensor) -> Tensor:
        """Return `memory`, uint8 of the host, where it is, but pinned for as long as this lives.

        Raises CapacityError.
        """
        ...

    def stream(self, *, is_urgent: bool = False) -> Stream:
        """Return a new stream; the kernels of an urgent one come first, copies as they were asked.

        A device's copy engine serves all streams in the order of asking: what must not be waited
        for must not be asked yet.
        """
        ...

    def current(self) -> Stream:
        """Return the stream that this thread's kernels run on."""
        ...


def streams(device: torch.device) -> Streams:
    """Return the streams of `device`; of a CPU those that do everything at once."""
    return CudaStreams(device) if device.type == "cuda" else HostStreams(device)


# -- without a device ------------------------------------------------------------------------------


class HostEvent:
    """See `Event`: it is done."""

    def is_done(self) -> bool:
        return True

    def wait(self) -> None:
        """It is done."""


class HostStream:
    """See `Stream`: what it is asked is done when the call returns."""

    def copy(self, into: Tensor, source: Tensor) -> None:
        into.copy_(source)

    def record(self) -> Event:
        return HostEvent()

    def after(self, event: Event) -> None:
        event.wait()


class HostStreams:
    """See `Streams`."""

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self._current = HostStream()

    def pinned(self, num_bytes: int) -> Tensor:
        return allocate(num_bytes)

    def pin(self, memory: Tensor) -> Tensor:
        return memory

    def stream(self, *, is_urgent: bool = False) -> Stream:
        return HostStream()

    def current(self) -> Stream:
        return self._current


# -- CUDA ------------------------------------------------------------------------------------------


class CudaEvent:
    """See `Event`."""

    def __init__(self, event: Any) -> None:
        self.event = event

    def is_done(self) -> bool:
        return bool(self.event.query())

    def wait(self) -> None:
        self.event.synchronize()


class CudaStream:
    """See `Stream`."""

    def __init__(self, stream: Any) -> None:
        self._stream = stream

    def copy(self, into: Tensor, source: Tensor) -> None:
        with _cuda.stream(self._stream):
            into.copy_(source, non_blocking=True)

    def record(self) -> Event:
        return CudaEvent(self._stream.record_event())

    def after(self, event: Event) -> None:
        assert isinstance(event, CudaEvent), event
        self._stream.wait_event(event.event)


class CudaStreams:
    """See `Streams`."""

    def __init__(self, device: torch.device) -> None:
        self.device = device

    def pinned(self, num_bytes: int) -> Tensor:
        # not by torch, which rounds up to a power of two: twice of what is there
        return self.pin(allocate(num_bytes))

    def pin(self, memory: Tensor) -> Tensor:
        num_bytes = memory.numel()
        if not num_bytes:
            return memory
        assert memory.is_contiguous()
        view = (ctypes.c_uint8 * num_bytes).from_address(memory.data_ptr())
        setattr(view, "owner", _Registration(memory))  # noqa: B010 - mypy knows no such attribute
        return torch.frombuffer(view, dtype=torch.uint8).view(memory.shape)

    def stream(self, *, is_urgent: bool = False) -> Stream:
        priority = _URGENT if is_urgent else _USUAL
        return CudaStream(_cuda.Stream(self.device, priority=priority))

    def current(self) -> Stream:
        return CudaStream(_cuda.current_stream(self.device))


class _Registration:
    """Memory that CUDA has pinned, until this goes."""

    def __init__(self, memory: Tensor) -> None:
        """Raises CapacityError where it cannot be pinned."""
        cudart = _cuda.cudart()
        self._memory = memory
        self._unregister: Any = None
        num_bytes = memory.numel()
        error = cudart.cudaHostRegister(memory.data_ptr(), num_bytes, _FOR_ALL_DEVICES)
        if int(error) != 0:
            _clear_error(cudart)
            raise CapacityError(
                f"{num_bytes} bytes of host memory cannot be pinned ({error}), which copies to the "
                "GPU need; close what else uses memory, or raise the limit of locked memory "
                "(ulimit -l)"
            )
        self._unregister = cudart.cudaHostUnregister

    def __del__(self) -> None:
        if self._unregister is not None:
            self._unregister(self._memory.data_ptr())


def _clear_error(cudart: Any) -> None:
    """Have CUDA forget its last error, which torch would raise at the next launch of a kernel."""
    clear = getattr(cudart, "cudaGetLastError", None)  # torch 2.11 has none
    if clear is not None:
        clear()
        return
    with contextlib.suppress(RuntimeError):  # this launch raises it, which clears it
        torch.ones(1, device="cuda")
