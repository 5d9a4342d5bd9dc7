"""Streams on a clock of their own: copies and kernels take the time they are said to take.

What is asked is done at once, so it says nothing about orders that were forgotten: `late_streams`
does. One link, which serves all streams in the order of asking; kernels run one after the other.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from moe_serve.kernels.gpu.streams import Event, Stream
from moe_serve.kernels.native.memory import allocate


@dataclass(frozen=True, slots=True)
class Times:
    """Seconds. link_byte_s, device_byte_s: a byte copied to the device, and within it.

    ask_s: the host asks for something; wake_s: it hears of an event that it waited for.
    """

    link_byte_s: float
    device_byte_s: float
    ask_s: float
    wake_s: float


class TimedEvent:
    """See `streams.Event`."""

    def __init__(self, streams: TimedStreams, at_s: float) -> None:
        self._streams = streams
        self.at_s = at_s

    def is_done(self) -> bool:
        return self._streams.now_s >= self.at_s

    def wait(self) -> None:
        if not self.is_done():
            self._streams.now_s = self.at_s + self._streams.times.wake_s


class TimedStream:
    """See `streams.Stream`."""

    def __init__(self, streams: TimedStreams) -> None:
        self._streams = streams
        self._free_s = 0.0

    def copy(self, into: Tensor, source: Tensor) -> None:
        into.copy_(source)
        streams = self._streams
        if streams.is_on_host(source):
            self._free_s = streams.over_link(self._free_s, source.numel())
        else:
            self.work(streams.times.device_byte_s * source.numel())

    def work(self, seconds: float) -> None:
        """Have something done that takes so long."""
        streams = self._streams
        streams.now_s += streams.times.ask_s
        self._free_s = max(self._free_s, streams.now_s) + seconds

    def record(self) -> Event:
        return TimedEvent(self._streams, self._free_s)

    def after(self, event: Event) -> None:
        assert isinstance(event, TimedEvent), event
        self._free_s = max(self._free_s, event.at_s)


class TimedStreams:
    """See `streams.Streams`. now_s: the host's time; link_s: how long the link was busy."""

    def __init__(self, times: Times) -> None:
        self.times = times
        self.device = torch.device("cpu")
        self.now_s = 0.0
        self.link_s = 0.0
        self._link_free_s = 0.0
        self._pinned: list[Tensor] = []
        self.kernels = TimedStream(self)

    def pinned(self, num_bytes: int) -> Tensor:
        return self.pin(allocate(num_bytes))

    def pin(self, memory: Tensor) -> Tensor:
        self._pinned.append(memory)
        return memory

    def stream(self, *, is_urgent: bool = False) -> Stream:
        return TimedStream(self)

    def current(self) -> Stream:
        return self.kernels

    def is_on_host(self, source: Tensor) -> bool:
        address = source.data_ptr()
        return any(
            memory.data_ptr() <= address < memory.data_ptr() + memory.numel()
            for memory in self._pinned
        )

    def over_link(self, free_s: float, num_bytes: int) -> float:
        """Return when bytes are there that a stream may send from `free_s` on."""
        self.now_s += self.times.ask_s
        seconds = self.times.link_byte_s * num_bytes
        self.link_s += seconds
        self._link_free_s = max(self._link_free_s, free_s, self.now_s) + seconds
        return self._link_free_s
