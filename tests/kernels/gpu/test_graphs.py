"""Captured work: that it is done again, that it may not wait, and that memory may run out."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
import torch

from moe_serve.errors import CapacityError
from moe_serve.kernels.gpu import graphs
from tests.kernels.gpu.taped_graphs import TapedGraphs

CPU = torch.device("cpu")
EACH_ON_A_CPU = pytest.mark.parametrize(
    "made", [graphs.graphs(CPU), TapedGraphs()], ids=["host", "taped"]
)


@EACH_ON_A_CPU
def test_a_replay_reads_what_is_in_place_now(made: graphs.Graphs) -> None:
    given, out = torch.zeros(3), torch.zeros(3)

    def work() -> None:
        out.copy_(given * 2 + 1)

    graph = made.capture(work)
    given.copy_(torch.arange(3.0))
    graph.replay()
    assert out.tolist() == [1, 3, 5]


@EACH_ON_A_CPU
def test_work_that_waits_is_not_captured(made: graphs.Graphs) -> None:
    given = torch.ones(3)

    def work() -> None:
        given.fill_(given.sum().item())

    with pytest.raises(AssertionError, match="waits"):
        made.capture(work)


def test_a_tape_does_not_decide_again_and_spoils_what_it_allocated() -> None:
    given, out = torch.zeros(3), torch.zeros(3)
    factor, kept = [2.0], []

    def work() -> None:
        kept.append(given * factor[0])
        out.copy_(kept[-1])

    graph = TapedGraphs().capture(work)
    assert kept[-1].isnan().all()
    given.fill_(1)
    factor[0] = 5.0
    graph.replay()
    assert out.tolist() == [2, 2, 2]
    assert kept[-1].isnan().all()


class _Cuda:
    """Stands for torch.cuda: so much free memory, and what captures do."""

    def __init__(self, free: int, ends: Exception | None = None) -> None:
        self.free = free
        self.ends = ends
        self.calls: list[str] = []
        self.error_mode = ""

    def __getattr__(self, name: str) -> Any:
        return lambda *args, **kwargs: self.calls.append(name)

    def memory_allocated(self, device: torch.device) -> int:
        return 100

    def max_memory_allocated(self, device: torch.device) -> int:
        return 100 + (64 << 20)

    def mem_get_info(self, device: torch.device) -> tuple[int, int]:
        return self.free, self.free

    def empty_cache(self) -> None:
        self.calls.append("empty_cache")

    def stream(self, stream: Any) -> Any:
        return pytest.MonkeyPatch.context()

    def CUDAGraph(self) -> Any:
        def end() -> None:
            self.calls.append("end")
            if self.ends is not None:
                raise self.ends

        def begin(pool: Any, capture_error_mode: str) -> None:
            self.calls.append("begin")
            self.error_mode = capture_error_mode

        return SimpleNamespace(capture_begin=begin, capture_end=end)


def _capture(monkeypatch: pytest.MonkeyPatch, cuda: _Cuda, work: Any) -> None:
    monkeypatch.setattr(graphs, "_cuda", cuda)
    graphs.CudaGraphs(torch.device("cuda")).capture(work)


def test_a_capture_runs_the_work_before_it(monkeypatch: pytest.MonkeyPatch) -> None:
    cuda = _Cuda(free=1 << 40)
    _capture(monkeypatch, cuda, lambda: cuda.calls.append("work"))
    assert [call for call in cuda.calls if call in ("work", "begin", "end")] == [
        "work", "begin", "work", "end",
    ]  # fmt: skip
    assert "empty_cache" not in cuda.calls
    assert cuda.error_mode == "thread_local", "threads that transfer go on"


def test_a_capture_is_not_begun_where_memory_is_short(monkeypatch: pytest.MonkeyPatch) -> None:
    cuda = _Cuda(free=200 << 20)
    with pytest.raises(CapacityError, match="lower gpu_memory_utilization"):
        _capture(monkeypatch, cuda, lambda: None)
    assert "empty_cache" in cuda.calls
    assert "begin" not in cuda.calls


@pytest.mark.parametrize("ends", [None, RuntimeError("capture invalidated")])
def test_memory_that_runs_out_within_a_capture_is_told_as_such(
    monkeypatch: pytest.MonkeyPatch, ends: Exception | None
) -> None:
    cuda = _Cuda(free=1 << 40, ends=ends)

    def work() -> None:
        if "begin" in cuda.calls:
            raise torch.OutOfMemoryError("too little")

    with pytest.raises(CapacityError, match="no memory for a CUDA graph"):
        _capture(monkeypatch, cuda, work)
    # and what comes next has a pool of its own: the old one went with its only graph
    assert cuda.calls[-2:] == ["end", "graph_pool_handle"]


def test_other_errors_stay_what_they_are(monkeypatch: pytest.MonkeyPatch) -> None:
    cuda = _Cuda(free=1 << 40, ends=RuntimeError("illegal"))
    with pytest.raises(RuntimeError, match="illegal"):
        _capture(monkeypatch, cuda, lambda: None)


@pytest.mark.gpu
def test_cuda_replays_on_what_is_in_place() -> None:
    device = torch.device("cuda")
    made = graphs.graphs(device)
    given, out = torch.zeros(3, device=device), torch.zeros(3, device=device)

    def begin() -> None:
        out.copy_(given * 2 + 1)

    def go_on() -> None:
        out.add_(given)

    first, second = made.capture(begin), made.capture(go_on)
    given.copy_(torch.arange(3.0))
    first.replay()
    second.replay()
    assert out.tolist() == [1, 4, 7]


@pytest.mark.gpu
def test_after_a_capture_that_failed_others_succeed() -> None:
    device = torch.device("cuda")
    made = graphs.graphs(device)
    out = torch.zeros(3, device=device)
    calls = []

    def work() -> None:
        calls.append(1)
        if len(calls) == 2:
            raise torch.OutOfMemoryError("in the capture")
        out.fill_(len(calls))

    with pytest.raises(CapacityError):
        made.capture(work)
    graph = made.capture(work)
    out.zero_()
    graph.replay()
    assert out.tolist() == [4, 4, 4]
