from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
import torch

from benchmarks.gpu import clock


class FakeCuda:
    """What a clock asks of CUDA, noted in order; a call takes 3 ms."""

    def __init__(self) -> None:
        self.asked: list[str] = []
        self.cycles: list[int] = []

    def get_device_properties(self, device: torch.device) -> Any:
        return SimpleNamespace(L2_cache_size=1024)

    def synchronize(self, device: torch.device) -> None:
        self.asked.append("wait")

    def _sleep(self, cycles: int) -> None:
        self.asked.append("busy")
        self.cycles.append(cycles)

    def Event(self, enable_timing: bool) -> Any:
        assert enable_timing
        return SimpleNamespace(
            record=lambda: self.asked.append("event"),
            synchronize=lambda: self.asked.append("wait"),
            elapsed_time=lambda end: 6.0,
        )


@pytest.fixture
def cuda(monkeypatch: pytest.MonkeyPatch) -> FakeCuda:
    fake = FakeCuda()
    monkeypatch.setattr(clock, "_cuda", fake)
    return fake


def test_the_device_is_warm_and_busy_before_it_is_timed(cuda: FakeCuda) -> None:
    turns: list[int] = []

    def work(turn: int) -> None:
        turns.append(turn)
        cuda.asked.append("work")

    timer = clock.CudaClock(torch.device("cpu"))
    assert timer.samples(work, 2, calls=2) == [0.003, 0.003]
    assert turns == list(range(8)), "inputs do not rotate"
    sample = ["busy", "event", "work", "work", "event", "wait"]
    assert cuda.asked == [*3 * ["work"], "wait", "work", "wait", *sample, *sample]
    assert all(cycles >= 100_000 for cycles in cuda.cycles)


def test_inputs_come_from_memory_where_that_is_asked_for(
    cuda: FakeCuda, monkeypatch: pytest.MonkeyPatch
) -> None:
    timer = clock.CudaClock(torch.device("cpu"))
    assert timer._other.nbytes == 8 * 1024
    flushed: list[str] = []
    other = SimpleNamespace(sum=lambda: cuda.asked.append("read other"))
    monkeypatch.setattr(timer, "_other", other)
    timer.samples(lambda _: flushed.append("work"), 1, is_cold=True)
    assert cuda.asked[-5:] == ["read other", "busy", "event", "event", "wait"]


def test_the_host_s_time_of_asking_is_not_that_of_the_end() -> None:
    waited: list[int] = []
    asked, done = clock.host_samples(lambda _: None, 3, 4, lambda: waited.append(1))
    assert len(asked) == len(done) == 3
    assert all(one <= other for one, other in zip(asked, done, strict=True))
    assert len(waited) == 6


def test_round_trips_leave_out_the_first() -> None:
    turns: list[int] = []
    found = clock.round_trips([turns.append, turns.append], 2, lambda: None)
    assert len(found) == 2
    assert turns == [0, 0, 1, 1, 2, 2]
