from __future__ import annotations

import pytest
import torch

from benchmarks.gpu import timeline
from benchmarks.gpu.timeline import Span, covered, length_s, overlap_s, spans_of

TRACE = {
    "traceEvents": [
        {"cat": "kernel", "name": "moe", "ts": 30.0, "dur": 10.0},
        {"cat": "gpu_memcpy", "name": "Memcpy HtoD (Pinned -> Device)", "ts": 0.0, "dur": 20.0},
        {"cat": "gpu_memcpy", "name": "Memcpy DtoH (Device -> Pinned)", "ts": 50.0, "dur": 1.0},
        {"cat": "gpu_memset", "name": "Memset (Device)", "ts": 15.0, "dur": 10.0},
        {"cat": "cpu_op", "name": "aten::add", "ts": 0.0, "dur": 99.0},
        {"cat": "kernel", "name": "no end", "ts": 1.0},
        {"name": "process_name", "ph": "M"},
    ]
}


def spans(*times: tuple[float, float], kind: str = "kernel") -> list[Span]:
    return [Span(kind, "a", begin, end) for begin, end in times]


def test_what_the_device_did_is_read_off_a_trace() -> None:
    found = spans_of(TRACE)
    assert [span.kind for span in found] == ["copy in", "kernel", "kernel", "copy"]
    assert [span.begin_s for span in found] == pytest.approx([0.0, 15e-6, 30e-6, 50e-6])
    assert found[2].end_s == pytest.approx(40e-6)


def test_what_goes_on_twice_counts_once() -> None:
    assert covered(spans((3, 5), (0, 2), (1, 2.5), (5, 6))) == [(0, 2.5), (3, 6)]
    assert covered(spans((0, 5), (1, 2), (6, 7))) == [(0, 5), (6, 7)]
    assert length_s(covered(spans((3, 5), (0, 2), (1, 2.5)))) == 4.5


@pytest.mark.parametrize(
    ("left", "right", "want"),
    [
        ([(0, 10)], [(2, 3), (4, 6)], 3),
        ([(2, 3), (4, 6)], [(0, 10)], 3),
        ([(0, 1), (5, 9)], [(0.5, 6), (8, 20)], 2.5),
        ([(0, 1)], [(1, 2)], 0),
        ([], [(0, 1)], 0),
    ],
)
def test_overlap(
    left: list[tuple[float, float]], right: list[tuple[float, float]], want: float
) -> None:
    assert overlap_s(left, right) == pytest.approx(want)


def test_names_that_take_longest() -> None:
    found = [Span("kernel", name, 0.0, length) for name, length in (("a", 1), ("b", 3), ("a", 1))]
    assert timeline.longest(found, 1) == [("b", 3, 1)]
    assert timeline.longest(found, 5)[1] == ("a", 2, 2)


def test_a_drawing_shows_what_goes_on_at_once() -> None:
    found = spans((0.0, 0.5), kind="copy in") + spans((0.25, 1.0))
    kernels, copies, _ = timeline.drawn(found)
    assert kernels.count("#") == 72
    assert copies.count("=") == 48
    assert kernels.index("#") < copies.rindex("=")


def test_nothing_is_seen_without_a_device() -> None:
    assert timeline.recorded(torch.device("cpu"), lambda: torch.ones(3).sum()) == []
    assert timeline.drawn([]) == ["the device did nothing that a profiler sees"]
