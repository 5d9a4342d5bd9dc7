"""What the machine can do, measured once in each process that compares something with it."""

from __future__ import annotations

import statistics
from functools import cached_property
from typing import Any

import torch
from torch import Tensor

from benchmarks.gpu.clock import Work, round_trips
from benchmarks.gpu.setting import Setting

_cuda: Any = torch.cuda
_DEVICE_BYTES = 4 << 30
_HOST_BYTES = 1 << 30
_DRY_BYTES = 1 << 16
_MATRIX = 8192
_DRY_MATRIX = 64


class Limits:
    """Rates, in 1e9 bytes or 1e12 operations a second; each is measured when it is asked for."""

    def __init__(self, setting: Setting) -> None:
        self._setting = setting

    @cached_property
    def read_gb_s(self) -> float:
        """The most that any kernel here reads of the device's memory."""
        return max(statistics.median(rates) for rates in self.read_rates.values())

    @cached_property
    def copy_gb_s(self) -> float:
        """Bytes read and bytes written, of a copy within the device."""
        return statistics.median(self.copy_rates)

    @cached_property
    def matrix_tflop_s(self) -> float:
        """torch.matmul, bfloat16, random numbers."""
        return statistics.median(self.matrix_rates)

    @cached_property
    def link_gb_s(self) -> float:
        """From pinned host memory to the device."""
        return statistics.median(self.link_rates("in", is_pinned=True))

    @cached_property
    def read_rates(self) -> dict[str, list[float]]:
        setting = self._setting
        num_bytes = setting.pick(_DEVICE_BYTES, _DRY_BYTES)
        source = torch.ones(num_bytes // 4, device=setting.device)
        works: dict[str, Work] = {"torch.sum": lambda _: source.sum()}
        if setting.has_triton:
            from benchmarks.gpu import triton as own

            works["Triton"] = lambda _: own.read(source)
        return {name: self._rates(work, num_bytes, setting.repeats) for name, work in works.items()}

    @cached_property
    def copy_rates(self) -> list[float]:
        setting = self._setting
        num_bytes = setting.pick(_DEVICE_BYTES, _DRY_BYTES)
        source = torch.ones(num_bytes // 4, device=setting.device)
        into = torch.empty_like(source)
        return self._rates(lambda _: into.copy_(source), 2 * num_bytes, setting.repeats)

    @cached_property
    def matrix_rates(self) -> list[float]:
        setting = self._setting
        size = setting.pick(_MATRIX, _DRY_MATRIX)
        left, right, out = (
            torch.randn(size, size, device=setting.device).bfloat16() for _ in range(3)
        )
        seconds = setting.clock.samples(
            lambda _: torch.matmul(left, right, out=out), setting.repeats
        )
        return [2.0 * size**3 / one / 1e12 for one in seconds]

    def link_rates(self, direction: str, *, is_pinned: bool) -> list[float]:
        """Return the rates of one large copy "in" to the device, or "out" of it."""
        setting = self._setting
        on_host, on_device = self.host_and_device(is_pinned)
        work = copy_work(direction, on_host, on_device)
        seconds = round_trips([work], setting.repeats, setting.clock.wait)
        return [on_host.numel() / one / 1e9 for one in seconds]

    def both_ways(self) -> list[float]:
        """Return the rates of pinned copies in and out at once, bytes of both together."""
        setting = self._setting
        pairs = [self.host_and_device(is_pinned=True) for _ in range(2)]
        works = [
            beside(setting.device, copy_work(direction, *pair))
            for direction, pair in zip(("in", "out"), pairs, strict=True)
        ]
        seconds = round_trips(works, setting.repeats, setting.clock.wait)
        return [2 * pairs[0][0].numel() / one / 1e9 for one in seconds]

    def host_and_device(self, is_pinned: bool) -> tuple[Tensor, Tensor]:
        """Return memory on both sides of the link."""
        setting = self._setting
        num_bytes = setting.pick(_HOST_BYTES, _DRY_BYTES)
        may_pin = is_pinned and setting.device.type == "cuda"
        on_host = torch.empty(num_bytes, dtype=torch.uint8, pin_memory=may_pin).fill_(1)
        return on_host, torch.ones(num_bytes, dtype=torch.uint8, device=setting.device)

    def _rates(self, work: Work, num_bytes: int, repeats: int) -> list[float]:
        seconds = self._setting.clock.samples(work, repeats)
        return [num_bytes / one / 1e9 for one in seconds]


def copy_work(direction: str, on_host: Tensor, on_device: Tensor) -> Work:
    """Return a copy "in" to the device, or "out" of it."""
    if direction == "in":
        return lambda _: on_device.copy_(on_host, non_blocking=True)
    return lambda _: on_host.copy_(on_device, non_blocking=True)


def beside(device: torch.device, work: Work) -> Work:
    """Return the same work in a stream of its own."""
    if device.type != "cuda":
        return work
    stream = _cuda.Stream(device)

    def run(turn: int) -> None:
        with _cuda.stream(stream):
            work(turn)

    return run
