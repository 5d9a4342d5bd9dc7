"""When the device did what: kernels and copies as a profiler saw them, and how far they overlap."""

from __future__ import annotations

import json
import tempfile
from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

_KINDS = {"kernel": "kernel", "gpu_memcpy": "copy", "gpu_memset": "kernel"}
_INTO_DEVICE = "HtoD"
_COLUMNS = 96


@dataclass(frozen=True, slots=True)
class Span:
    """Something that the device did. kind: "kernel", "copy in" or "copy"; times in seconds."""

    kind: str
    name: str
    begin_s: float
    end_s: float


def recorded(device: torch.device, work: Callable[[], object]) -> list[Span]:
    """Run the work under a profiler; return what the device did, in its order. On a CPU: []."""
    from torch.profiler import ProfilerActivity, profile

    is_cuda = device.type == "cuda"
    activities = [ProfilerActivity.CUDA if is_cuda else ProfilerActivity.CPU]
    with profile(activities=activities) as profiler:
        work()
        if is_cuda:
            torch.cuda.synchronize(device)
    with tempfile.TemporaryDirectory() as name:
        path = Path(name) / "trace.json"
        profiler.export_chrome_trace(str(path))
        return spans_of(json.loads(path.read_text()))


def spans_of(trace: dict[str, Any]) -> list[Span]:
    """Return the device's spans of a trace in Chrome's form, whose times are microseconds."""
    found = []
    for event in trace["traceEvents"]:
        kind = _KINDS.get(event.get("cat", ""))
        if kind is None or "dur" not in event:
            continue
        if kind == "copy" and _INTO_DEVICE in event["name"]:
            kind = "copy in"
        begin_s = event["ts"] / 1e6
        found.append(Span(kind, event["name"], begin_s, begin_s + event["dur"] / 1e6))
    return sorted(found, key=lambda span: span.begin_s)


def covered(spans: Iterable[Span]) -> list[tuple[float, float]]:
    """Return the times in which any of the spans went on: disjoint, in order."""
    found: list[tuple[float, float]] = []
    for span in sorted(spans, key=lambda span: span.begin_s):
        if found and span.begin_s <= found[-1][1]:
            found[-1] = (found[-1][0], max(found[-1][1], span.end_s))
        else:
            found.append((span.begin_s, span.end_s))
    return found


def length_s(times: Iterable[tuple[float, float]]) -> float:
    """Return how long disjoint times are together."""
    return sum(end - begin for begin, end in times)


def overlap_s(left: Sequence[tuple[float, float]], right: Sequence[tuple[float, float]]) -> float:
    """Return how long two kinds of disjoint times, each in order, went on at once."""
    total, at = 0.0, 0
    for begin, end in left:
        while at < len(right) and right[at][1] <= begin:
            at += 1
        index = at
        while index < len(right) and right[index][0] < end:
            total += min(end, right[index][1]) - max(begin, right[index][0])
            index += 1
    return total


def longest(spans: Iterable[Span], count: int) -> list[tuple[str, float, int]]:
    """Return the names that took longest in all, their seconds, and how often each ran."""
    seconds: Counter[str] = Counter()
    calls: Counter[str] = Counter()
    for span in spans:
        seconds[span.name] += span.end_s - span.begin_s  # type: ignore[assignment]
        calls[span.name] += 1
    return [(name, total, calls[name]) for name, total in seconds.most_common(count)]


def drawn(spans: Sequence[Span]) -> list[str]:
    """Return a line for kernels and one for copies in: a mark where they went on mostly."""
    if not spans:
        return ["the device did nothing that a profiler sees"]
    first, last = spans[0].begin_s, max(span.end_s for span in spans)
    width = (last - first) / _COLUMNS or 1e-9
    lines = []
    for kind, mark in (("kernel", "#"), ("copy in", "=")):
        times = covered(span for span in spans if span.kind == kind)
        cells = [
            overlap_s([(first + at * width, first + (at + 1) * width)], times) / width
            for at in range(_COLUMNS)
        ]
        row = "".join(mark if cell > 0.5 else "-" if cell > 0 else " " for cell in cells)
        lines.append(f"{kind:<8} |{row}|")
    return [*lines, f"{'':<8} {1e3 * (last - first):.2f} ms in all"]
