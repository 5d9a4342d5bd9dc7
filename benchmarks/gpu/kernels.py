"""Each kernel beside what bounds it: bytes over bandwidth, or operations over the matrix rate."""

from __future__ import annotations

import statistics
from collections.abc import Iterator
from dataclasses import replace
from functools import partial

import torch

from benchmarks.gpu import cases
from benchmarks.gpu.cases import Bench, Case
from benchmarks.gpu.figures import Failure, Figure, attempted, compared, plain, rate
from benchmarks.gpu.limits import Limits
from benchmarks.gpu.setting import Setting
from benchmarks.gpu.shapes import REAL, TINY
from moe_serve.kernels import suite

GOAL_OF_BANDWIDTH, GOAL_OF_MATRIX_RATE, MOST_SLOWER = 0.8, 0.6, 1.3
# the goals speak of what moves so much, and of so many tokens
_LARGE_BYTES, _MANY_TOKENS = 64e6, 4096
_ROWS = (1, 8, 32, 128, 512, 4096)
_DRY_ROWS = (1, 5)
# sequences, new tokens of each, context
_BATCHES = ((1, 1, 1024), (32, 1, 1024), (256, 1, 1024), (1, 1, 32_768), (1, 8192, 8192))
_DRY_BATCHES = ((2, 1, 70), (1, 20, 70))
_SAMPLED = (1, 32, 256)

# of a kernel's case: its seconds, and whether it had a goal
Taken = dict[tuple[str, int], tuple[list[float], bool]]


def run(setting: Setting) -> Iterator[Figure | Failure]:
    """Measure at every shape, the fast kernels first, then the exact ones beside them."""
    limits = Limits(setting)
    for shape_name, shape in setting.pick(REAL, {"tiny": TINY}).items():
        fast: Taken = {}
        for numerics in ("fast", "exact"):
            bench = Bench(shape, suite.load(setting.kernels, numerics=numerics))
            where = f"{shape_name}, {numerics}"
            for name, found in _cases(setting, bench, numerics == "fast").items():
                told = f"{where}, {name}"
                if setting.wants(told):
                    yield from attempted(told, partial(_all, setting, limits, found, where, fast))


def _cases(setting: Setting, bench: Bench, is_fast: bool) -> dict[str, Iterator[Case]]:
    """Return the cases by their kernels' names."""
    rows = setting.pick(_ROWS, _DRY_ROWS)
    found = {
        "moe": cases.moe(bench, rows),
        "attention": cases.attention(bench, setting.pick(_BATCHES, _DRY_BATCHES)),
        "linear": cases.linear(bench, rows),
    }
    if is_fast:  # these are the same in both
        few = rows[-1:] if setting.is_dry else rows
        found |= {make.__name__: cases.of_rows(bench, make, few) for make in cases.ROW_KERNELS}
        found["sampling"] = cases.sampling(bench, setting.pick(_SAMPLED, (2,)))
    return found


def _all(
    setting: Setting, limits: Limits, found: Iterator[Case], where: str, fast: Taken
) -> Iterator[Figure | Failure]:
    with torch.inference_mode():
        for number, case in enumerate(found):
            name = f"{where}, {case.kernel}, {case.name}, {case.num_rows} rows"
            key = (case.kernel, number)
            yield from attempted(name, partial(measured, setting, limits, case, name, key, fast))


def measured(
    setting: Setting, limits: Limits, case: Case, name: str, key: tuple[str, int], fast: Taken
) -> Iterator[Figure]:
    """Yield a case's rate beside its limit, and torch's where it has the same.

    fast: the seconds of fast kernels so far, and whether there was a goal; an exact one is beside
    them.
    """
    clock, is_exact = setting.clock, key in fast
    bandwidth = limits.copy_gb_s if case.writes else limits.read_gb_s
    bytes_s = case.num_bytes / bandwidth / 1e9
    is_memory_bound = bytes_s >= case.flop / limits.matrix_tflop_s / 1e12
    seconds = clock.samples(case.work, setting.repeats, is_cold=True)
    goal = None if is_exact else goal_of(case, is_memory_bound)
    if is_memory_bound:
        yield rate(name, seconds, case.num_bytes / 1e9, "GB/s", bandwidth, goal)
    else:
        yield rate(name, seconds, case.flop / 1e12, "TFLOP/s", limits.matrix_tflop_s, goal)
    yield plain(f"{name}: time", [1e6 * one for one in seconds], "us")
    if is_exact:
        others, had_goal = fast[key]
        most = MOST_SLOWER if had_goal else None
        yield compared(f"{name}: against fast", seconds, others, most, is_most=True)
    fast.setdefault(key, (seconds, goal is not None))
    if case.torch is not None and not is_exact:
        others = clock.samples(case.torch, setting.repeats, is_cold=True)
        ratio = statistics.median(others) / statistics.median(seconds)
        told = f"{name}: torch's time (ratio: theirs to ours)"
        figure = plain(told, [1e6 * one for one in others], "us")
        yield replace(figure, row=replace(figure.row, ratio=ratio))


def goal_of(case: Case, is_memory_bound: bool) -> float | None:
    """Return the share of its limit that a fast kernel is to reach, if that was asked for."""
    if is_memory_bound:
        return GOAL_OF_BANDWIDTH if case.num_bytes >= _LARGE_BYTES else None
    is_grouped = case.kernel == "moe" and case.num_rows >= _MANY_TOKENS
    return GOAL_OF_MATRIX_RATE if is_grouped else None
