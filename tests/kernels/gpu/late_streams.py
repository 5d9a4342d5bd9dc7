"""Streams that do all they are asked as late as events allow: who forgot to wait gets other bytes.

Nothing happens until somebody waits; then only what that event needs, stream by stream, and the
rest stays undone. By chance, when an event is looked at, some more of what may happen does.
"""

from __future__ import annotations

import random
from collections import deque
from collections.abc import Callable

import torch
from torch import Tensor

from moe_serve.kernels.gpu.streams import Event, Stream
from moe_serve.kernels.native.memory import allocate

_MOST_AT_A_LOOK = 3


class LateEvent:
    """See `streams.Event`."""

    def __init__(self, streams: LateStreams, stream: LateStream) -> None:
        self._streams = streams
        self._stream = stream
        self.has_happened = False

    def is_done(self) -> bool:
        self._streams.be_looked_at()
        return self.has_happened

    def wait(self) -> None:
        self._streams.num_waits += 1
        self.happen()

    def happen(self) -> None:
        """Do what this event needs, and nothing else."""
        while not self.has_happened:
            self._stream.do_next()


class LateStream:
    """See `streams.Stream`."""

    def __init__(self, streams: LateStreams, name: str) -> None:
        self.name = name
        self._streams = streams
        self._asked: deque[LateEvent | Callable[[], object]] = deque()

    def copy(self, into: Tensor, source: Tensor) -> None:
        assert (into.dtype, into.shape) == (source.dtype, source.shape), (into.shape, source.shape)
        assert into.is_contiguous()
        assert source.is_contiguous()
        self._streams.copies.append((self.name, into.numel() * into.itemsize))
        self.launch(lambda: into.copy_(source))

    def record(self) -> Event:
        event = LateEvent(self._streams, self)
        self.launch(lambda: setattr(event, "has_happened", True))
        return event

    def after(self, event: Event) -> None:
        assert isinstance(event, LateEvent), event
        self._asked.append(event)

    def launch(self, work: Callable[[], object]) -> None:
        """Have `work` done in the stream's order, as a kernel is."""
        self._asked.append(work)

    @property
    def may_go_on(self) -> bool:
        """Whether there is something to do, and all that it waits for has happened."""
        while self._asked:
            first = self._asked[0]
            if not isinstance(first, LateEvent):
                return True
            if not first.has_happened:
                return False
            self._asked.popleft()
        return False

    def do_next(self) -> None:
        """Do the next thing asked, and before it what it has to wait for."""
        first = self._asked.popleft()
        if isinstance(first, LateEvent):
            first.happen()
        else:
            first()


class LateStreams:
    """See `streams.Streams`. Its streams are called "kernels", "urgent" and "usual".

    copies: (stream, bytes) in the order of asking; num_waits: how often the host has waited.
    """

    def __init__(self, seed: int = 0, is_still: bool = False) -> None:
        """is_still: nothing happens by chance, only what is waited for."""
        self._is_still = is_still
        self.device = torch.device("cpu")
        self.chance = random.Random(seed)
        self.copies: list[tuple[str, int]] = []
        self.num_waits = 0
        self.kernels = LateStream(self, "kernels")
        self._all = [self.kernels]

    def pinned(self, num_bytes: int) -> Tensor:
        return allocate(num_bytes)

    def pin(self, memory: Tensor) -> Tensor:
        return memory

    def stream(self, *, is_urgent: bool = False) -> Stream:
        self._all.append(LateStream(self, "urgent" if is_urgent else "usual"))
        return self._all[-1]

    def current(self) -> Stream:
        return self.kernels

    def be_looked_at(self) -> None:
        if not self._is_still:
            self.stir(self.chance.randrange(_MOST_AT_A_LOOK + 1))

    def stir(self, most: int = _MOST_AT_A_LOOK) -> None:
        """Do up to `most` of the things that may happen now, of streams drawn by chance."""
        for _ in range(most):
            ready = [stream for stream in self._all if stream.may_go_on]
            if not ready:
                return
            self.chance.choice(ready).do_next()

    def finish(self) -> None:
        """Do all that was asked."""
        while any(stream.may_go_on for stream in self._all):
            self.stir()
