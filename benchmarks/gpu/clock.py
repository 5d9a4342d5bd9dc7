"""How work on a device is timed: by its own events, warm, and from memory where that is wanted.

Before each sample the device is kept busy for longer than the host takes to ask for the work, so
that a gap before a launch is not counted. Where inputs are to come from memory, the cache is first
filled by reading something else: what is written would have to be written back meanwhile.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from typing import Any, Protocol

import torch

Work = Callable[[int], object]

_cuda: Any = torch.cuda  # parts of which have no types
_WARM_CALLS = 3
# of the device's clock, about; kept between these bounds
_CYCLES_PER_S = 2e9
_LEAST_CYCLES, _MOST_CYCLES = 100_000, 20_000_000
_FLUSH_TIMES = 8  # so many times the cache


def always(call: Callable[..., object], *given: object) -> Work:
    """Return work that is the same call in every turn."""
    return lambda _: call(*given)


class Clock(Protocol):
    """Times work on one device."""

    def samples(
        self, work: Work, repeats: int, *, is_cold: bool = False, calls: int = 1
    ) -> list[float]:
        """Return the seconds of a call, one sample for each repeat, after calls that warm up.

        work: called with 0, 1, 2 ... so that its inputs can rotate. is_cold: nothing of them is in
        the device's cache at first. calls: in one sample, whose mean counts.
        """
        ...

    def wait(self) -> None:
        """Wait until the device has done what it was asked."""
        ...


def clock_of(device: torch.device) -> Clock:
    """Return the clock of a device."""
    return CudaClock(device) if device.type == "cuda" else HostClock()


class HostClock:
    """See `Clock`: for a dry run, where work is done when its call returns."""

    def samples(
        self, work: Work, repeats: int, *, is_cold: bool = False, calls: int = 1
    ) -> list[float]:
        found = []
        for number in range(repeats):
            start_s = time.perf_counter()
            for call in range(calls):
                work(number * calls + call)
            found.append(max(time.perf_counter() - start_s, 1e-9) / calls)
        return found

    def wait(self) -> None:
        """There is nothing to wait for."""


class CudaClock:
    """See `Clock`."""

    def __init__(self, device: torch.device) -> None:
        self._device = device
        cache_bytes = int(_cuda.get_device_properties(device).L2_cache_size)
        self._other = torch.ones(_FLUSH_TIMES * cache_bytes // 4, device=device)

    def samples(
        self, work: Work, repeats: int, *, is_cold: bool = False, calls: int = 1
    ) -> list[float]:
        for turn in range(_WARM_CALLS):
            work(turn)
        self.wait()
        start_s = time.perf_counter()
        work(_WARM_CALLS)
        asking_s = time.perf_counter() - start_s
        self.wait()
        cycles = int(2 * calls * asking_s * _CYCLES_PER_S)
        found = []
        for number in range(repeats):
            start, end = (_cuda.Event(enable_timing=True) for _ in range(2))
            if is_cold:
                self._other.sum()
            _cuda._sleep(min(max(cycles, _LEAST_CYCLES), _MOST_CYCLES))
            start.record()
            for call in range(calls):
                work(_WARM_CALLS + 1 + number * calls + call)
            end.record()
            end.synchronize()
            found.append(start.elapsed_time(end) / 1e3 / calls)
        return found

    def wait(self) -> None:
        _cuda.synchronize(self._device)


def host_samples(
    work: Work, repeats: int, calls: int, wait: Callable[[], None]
) -> tuple[list[float], list[float]]:
    """Return the seconds of a call as the host sees it: to ask for it, and until all were done.

    Of each a sample is the mean of `calls`; for the first nobody waits between them.
    """
    asked, done = [], []
    work(0)
    for _ in range(repeats):
        wait()
        start_s = time.perf_counter()
        for call in range(calls):
            work(call)
        asked.append(max(time.perf_counter() - start_s, 1e-9) / calls)
        wait()
        done.append(max(time.perf_counter() - start_s, 1e-9) / calls)
    return asked, done


def round_trips(works: Sequence[Work], repeats: int, wait: Callable[[], None]) -> list[float]:
    """Return the seconds from asking for all of `works`, one after the other, to their end."""
    found = []
    for number in range(repeats + 1):
        wait()
        start_s = time.perf_counter()
        for work in works:
            work(number)
        wait()
        found.append(max(time.perf_counter() - start_s, 1e-9))
    return found[1:]  # the first one warmed up
