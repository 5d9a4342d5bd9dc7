"""Small tensors that travel between host and device together, in one copy through pinned memory."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, TypeVar, cast
from weakref import WeakKeyDictionary

import torch
from torch import Tensor

from moe_serve.kernels.gpu.streams import Event, Streams

_ALIGNMENT = 256  # of each tensor: what kernels load best, and torch's allocator gives
# copies that may be under way before a new one waits for the first
_TURNS = 4

Shape = tuple[int, ...]
T = TypeVar("T")


class Layout:
    """Where tensors lie in one piece of memory. fields: dtype and shape of each, by name."""

    def __init__(self, fields: Mapping[str, tuple[torch.dtype, Shape]]) -> None:
        self._places: dict[str, tuple[torch.dtype, Shape, int, int]] = {}
        end = 0
        for name, (dtype, shape) in fields.items():
            num_bytes = math.prod(shape) * dtype.itemsize
            self._places[name] = dtype, shape, end, end + num_bytes
            end += -(-num_bytes // _ALIGNMENT) * _ALIGNMENT
        self.num_bytes = end

    def views(self, memory: Tensor) -> dict[str, Tensor]:
        """Return the tensors in `memory`, uint8 of at least num_bytes."""
        return {
            name: memory[begin:end].view(dtype).view(shape)
            for name, (dtype, shape, begin, end) in self._places.items()
        }


class Outgoing:
    """The way from host to device: copies in the order of the current stream, not awaited."""

    def __init__(self, streams: Streams) -> None:
        self._streams = streams
        self._turns: list[tuple[Tensor, Event | None]] = []
        self._views: list[WeakKeyDictionary[Layout, dict[str, Tensor]]] = []
        self._turn = 0

    def memory(self, num_bytes: int) -> Tensor:
        """Return pinned uint8 [num_bytes] to be filled, then sent.

        What is in it is what somebody left there. Waits only where more copies are under way than
        there should be. Raises CapacityError.
        """
        self._turn = (self._turn + 1) % _TURNS
        if len(self._turns) < _TURNS:
            self._turn = len(self._turns)
            self._turns.append((self._streams.pinned(num_bytes), None))
            self._views.append(WeakKeyDictionary())
        memory, event = self._turns[self._turn]
        if event is not None and not event.is_done():
            event.wait()
        if memory.shape[0] < num_bytes:
            memory = self._streams.pinned(1 << (num_bytes - 1).bit_length())
            self._turns[self._turn] = memory, None
            # what was outgrown goes with its views: no copy from it is under way
            self._views[self._turn] = WeakKeyDictionary()
        return memory[:num_bytes]

    def views(self, layout: Layout) -> dict[str, Tensor]:
        """Return the tensors of `layout` in what `memory` gave last, for that many bytes.

        Kept for as long as layout and memory are: to cut them takes longer than to fill them.
        """
        found = self._views[self._turn].get(layout)
        if found is None:
            found = self._views[self._turn][layout] = layout.views(self._turns[self._turn][0])
        return found

    def send(self, memory: Tensor, into: Tensor) -> None:
        """Copy what `memory` gave last to `into`, uint8 of the same size on the device."""
        stream = self._streams.current()
        stream.copy(into, memory)
        self._turns[self._turn] = self._turns[self._turn][0], stream.record()

    def tensors(self, tensors: Sequence[Tensor]) -> list[Tensor]:
        """Return these on the device: those in host memory copied, the others as they are."""
        on_host = [tensor for tensor in tensors if tensor.device.type == "cpu"]
        if not on_host:
            return list(tensors)
        layout = Layout({str(i): (t.dtype, tuple(t.shape)) for i, t in enumerate(on_host)})
        memory = self.memory(layout.num_bytes)
        for view, tensor in zip(layout.views(memory).values(), on_host, strict=True):
            view.copy_(tensor)
        into = torch.empty(layout.num_bytes, dtype=torch.uint8, device=self._streams.device)
        self.send(memory, into)
        copied = iter(layout.views(into).values())
        return [next(copied) if tensor.device.type == "cpu" else tensor for tensor in tensors]


class Incoming:
    """The way from device to host. The memory it fills is written again by the next `fetch`."""

    def __init__(self, streams: Streams) -> None:
        self._streams = streams
        self._memory = streams.pinned(0)

    def fetch(self, sources: Sequence[Tensor]) -> list[Tensor]:
        """Return contiguous tensors of the device in host memory; waits for them."""
        layout = Layout({str(i): (t.dtype, tuple(t.shape)) for i, t in enumerate(sources)})
        if self._memory.shape[0] < layout.num_bytes:
            self._memory = self._streams.pinned(1 << (layout.num_bytes - 1).bit_length())
        copied = list(layout.views(self._memory).values())
        stream = self._streams.current()
        for into, source in zip(copied, sources, strict=True):
            stream.copy(into, source)
        stream.record().wait()
        return copied


class Shuttle:
    """Takes values to the device and brings them back, all tensors of one in a single copy.

    A value is a tensor, a tuple of values (named or not), or anything else, which stays as it is.
    Where the device is the CPU so are tensors.
    """

    def __init__(self, streams: Streams) -> None:
        self._is_here = streams.device.type == "cpu"
        self._outgoing, self._incoming = Outgoing(streams), Incoming(streams)

    def sent(self, value: T) -> T:
        """Return it with the tensors that are in host memory on the device. Nothing waits for it.

        But a call that comes when several others are under way: see `Outgoing.memory`.
        """
        if self._is_here:
            return value
        return cast(T, _with(value, iter(self._outgoing.tensors(list(_tensors_in(value))))))

    def fetched(self, value: T) -> T:
        """Return it, whose tensors are on the device, in host memory; waits for it, once.

        Valid until the next call.
        """
        if self._is_here:
            return value
        sources = list(_tensors_in(value))
        if not sources:
            return value
        # the widest first: each then begins at a multiple of its own width
        order = sorted(range(len(sources)), key=lambda index: -sources[index].itemsize)
        packed = torch.cat([sources[index].reshape(-1).view(torch.uint8) for index in order])
        (memory,) = self._incoming.fetch([packed])
        found: dict[int, Tensor] = {}
        begin = 0
        for index in order:
            source = sources[index]
            end = begin + source.nbytes
            found[index] = memory[begin:end].view(source.dtype).view(source.shape)
            begin = end
        return cast(T, _with(value, (found[index] for index in range(len(sources)))))


def _tensors_in(value: Any) -> Iterator[Tensor]:
    if isinstance(value, Tensor):
        yield value
    elif isinstance(value, tuple):
        for part in value:
            yield from _tensors_in(part)


def _with(value: Any, tensors: Iterator[Tensor]) -> Any:
    """Return `value` with these tensors in place of its own, in their order."""
    if isinstance(value, Tensor):
        return next(tensors)
    if not isinstance(value, tuple):
        return value
    parts = [_with(part, tensors) for part in value]
    return tuple(parts) if type(value) is tuple else type(value)(*parts)
