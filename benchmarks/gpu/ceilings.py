"""What this card gives: memory, link, matrix products, launches, graphs. All else is beside it."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import torch

from benchmarks.gpu import links
from benchmarks.gpu.clock import Work, always, host_samples
from benchmarks.gpu.figures import Figure, plain
from benchmarks.gpu.limits import Limits
from benchmarks.gpu.setting import Setting
from benchmarks.results import Row

_cuda: Any = torch.cuda


def run(setting: Setting) -> Iterator[Figure]:
    """Measure, the links of the tree first."""
    print(*links.told(), sep="\n", flush=True)
    whole = float(links.are_whole())
    yield Figure(row=Row.of("links of the tree", [whole], "whole", ratio=whole), goal=1.0)
    limits = Limits(setting)
    for name, rates in limits.read_rates.items():
        yield plain(f"read of device memory, {name}", rates, "GB/s")
    yield plain("copy within the device, bytes in and out", limits.copy_rates, "GB/s")
    yield plain("torch.matmul, bfloat16", limits.matrix_rates, "TFLOP/s")
    for kind, is_pinned in (("pinned", True), ("pageable", False)):
        for direction, words in (("in", "host to device"), ("out", "device to host")):
            rates = limits.link_rates(direction, is_pinned=is_pinned)
            yield plain(f"{words}, {kind}", rates, "GB/s")
    yield plain("both directions at once, pinned", limits.both_ways(), "GB/s")
    yield from _launches(setting)
    yield from _graphs(setting)


def _works(setting: Setting) -> dict[str, Work]:
    """Return work that takes next to no time on the device."""
    one = torch.zeros(1, device=setting.device)
    works: dict[str, Work] = {"torch op": lambda _: one.add_(1)}
    if setting.has_triton:
        from benchmarks.gpu import triton as own

        works["Triton kernel"] = lambda _: own.store_one(one)
    return works


def _launches(setting: Setting) -> Iterator[Figure]:
    calls, clock = setting.pick(500, 2), setting.clock
    for name, work in _works(setting).items():
        asked, _ = host_samples(work, setting.repeats, calls, clock.wait)
        yield plain(f"{name}: host time of a launch", [1e6 * one for one in asked], "us")
        on_device = clock.samples(work, setting.repeats, calls=setting.pick(50, 2))
        yield plain(f"{name}: device time of a launch", [1e6 * one for one in on_device], "us")
        _, done = host_samples(work, setting.repeats, 1, clock.wait)
        yield plain(f"{name}: from launch to its end, seen", [1e6 * one for one in done], "us")


def _graphs(setting: Setting) -> Iterator[Figure]:
    most = setting.pick(1000, 3)
    for name, work in _works(setting).items():
        for num_nodes in (1, most):
            replay = _captured(setting, work, num_nodes)
            asked, done = host_samples(always(replay), setting.repeats, 1, setting.clock.wait)
            told = f"graph of {num_nodes} x {name}"
            yield plain(f"{told}: host time of a replay", [1e6 * one for one in asked], "us")
            per_node = [1e6 * one / num_nodes for one in done]
            yield plain(f"{told}: from replay to its end, per node", per_node, "us")


def _captured(setting: Setting, work: Work, num_nodes: int) -> Callable[[], None]:
    """Return what launches so much work again: a CUDA graph, or, without a GPU, the work."""

    def all_of_it() -> None:
        for number in range(num_nodes):
            work(number)

    if setting.device.type != "cuda":
        return all_of_it
    all_of_it()
    setting.clock.wait()
    graph = _cuda.CUDAGraph()
    with _cuda.graph(graph):
        all_of_it()
    replay: Callable[[], None] = graph.replay
    return replay
