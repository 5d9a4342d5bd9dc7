"""Sizes of tiles for the tables in moe_serve/kernels/gpu, by trying: prints what to paste there.

Exact kernels keep one width, one depth and 64 rows or a multiple to each group of 4 warps, for all
numbers of rows, so that there is one matrix instruction and one split over K: each width is tried
with all numbers of rows, and the one that is best in the mean of them is told. Fast ones are free.
"""

from __future__ import annotations

import math
import statistics
import time
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager
from dataclasses import dataclass, replace
from functools import partial
from typing import Any, cast
from unittest import mock

import torch

from benchmarks.gpu import cases
from benchmarks.gpu.cases import Bench
from benchmarks.gpu.climbing import Found, climb, neighbours, product_fits
from benchmarks.gpu.clock import Work
from benchmarks.gpu.figures import Failure, Figure, attempted, plain, told
from benchmarks.gpu.setting import Setting
from benchmarks.gpu.shapes import QWEN3_30B, TINY
from moe_serve.kernels import suite
from moe_serve.kernels.gpu import attention_plan, gemm_tiles
from moe_serve.kernels.gpu.gemm_tiles import BySize, Tiles
from moe_serve.kernels.gpu.numerics import NUMERICS, Numerics

_FREE = {
    "rows": (16, 32, 64, 128, 256),
    "columns": (32, 64, 128, 256),
    "depth": (32, 64, 128, 256),
    "warps": (4, 8),
    "stages": (2, 3, 4, 5, 6, 8),
}
_EXACT = {"rows": (64, 128, 256), "stages": (2, 3, 4, 5, 6, 8)}
# of exact products, beside what is in the table
_WIDTHS = ((128, 64), (64, 64), (256, 64), (128, 128), (64, 128))
_ATTENTION = {
    "rows": (16, 32, 64, 128),
    "warps": (4, 8),
    "stages": (2, 3, 4),
    "programs": (1, 2, 3, 4),
}
_EXACT_ATTENTION = {"stages": (2, 3, 4), "programs": (1, 2, 3, 4)}
_REPEATS = 5
_DRY_TRIES = 2
# of the time that a part has: the rest is for what it begins with
_SHARE = 0.9


@dataclass(frozen=True, slots=True)
class Product:
    """A kernel with a table of `Tiles` by rows. rows: what each line of it is tried with."""

    name: str
    table: BySize
    rows: dict[int, int]
    work: Callable[[int], Work]
    installed: Callable[[Tiles], AbstractContextManager[Any]]


def run(setting: Setting) -> Iterator[Figure | Failure]:
    """Search for each kernel and numerics."""
    if not setting.has_triton:
        print("-- Triton is not here: there are no tiles", flush=True)
        return
    shape = setting.pick(QWEN3_30B, TINY)
    searches: dict[str, Callable[[float], Iterator[Figure]]] = {}
    for numerics in NUMERICS:
        bench = Bench(shape, suite.load("triton", numerics=numerics))
        search = _exact if numerics == "exact" else _fast
        for product in _products(bench, numerics, setting):
            name = f"{product.name}, {numerics}"
            searches[name] = partial(search, setting, product, name)
        for kind in ("decode", "chunk"):
            name = f"attention {kind}, {numerics}"
            searches[name] = partial(_attention, setting, bench, kind, numerics, name)
    wanted = [name for name in searches if setting.wants(name)]
    for name in wanted:
        seconds = _SHARE * setting.seconds / len(wanted)
        yield from attempted(name, partial(searches[name], seconds))


def _measure(setting: Setting, work: Callable[[], Work], installed: Any, tiles: Any) -> list[float]:
    with installed(tiles), torch.inference_mode():
        return setting.clock.samples(work(), setting.pick(_REPEATS, 1), is_cold=True)


def _budget(setting: Setting, seconds: float) -> Callable[[], bool]:
    """Return what says whether a search may go on."""
    latest_s = time.perf_counter() + seconds
    left = iter(range(_DRY_TRIES - 1))
    if setting.is_dry:
        return lambda: next(left, None) is not None
    return lambda: time.perf_counter() < latest_s


def _figure(name: str, found: Found[Any]) -> Figure:
    best, start = statistics.median(found.best_s), statistics.median(found.start_s)
    title = (
        f"{name}: {written(found.best)}, of {found.num_tried} (ratio: of the first's time to its)"
    )
    figure = plain(title, [1e6 * one for one in found.best_s], "us")
    return replace(figure, row=replace(figure.row, ratio=start / best))


def written(tiles: Any) -> str:
    """Return tiles as the tables have them."""
    fields = (getattr(tiles, name) for name in tiles.__dataclass_fields__)
    return f"Tiles({', '.join(str(value) for value in fields)})"


# -- products --------------------------------------------------------------------------------------


def _products(bench: Bench, numerics: Numerics, setting: Setting) -> list[Product]:
    from moe_serve.kernels.moe import triton as moe_triton

    sizes = {1: 4, 17: 32, 33: 64, 129: 512, 1024: 4096}
    means = {1: 1, 5: 8, 13: 32, 96: 256, 768: 1024}

    def of_linear(tiles: Tiles) -> AbstractContextManager[Any]:
        return mock.patch.dict(gemm_tiles.LINEAR[numerics], {"half": {1: (tiles,)}})

    def of_experts(name: str) -> Callable[[Tiles], AbstractContextManager[Any]]:
        def install(tiles: Tiles) -> AbstractContextManager[Any]:
            return mock.patch.object(moe_triton, name, {numerics: {"half": {1: (tiles,)}}})

        return install

    def linear(rows: int) -> Work:
        works = [case.work for case in cases.linear(bench, (rows,), ("qkv", "output"))]
        return lambda turn: [work(turn) for work in works]

    def experts(mean: int) -> Work:
        shape = bench.shape
        tokens = max(1, mean * shape.num_experts // shape.top_k)
        return next(cases.moe(bench, (tokens,))).work

    def tried(table: BySize, rows: dict[int, int]) -> dict[int, int]:
        of_table = {least: rows[least] for least in table}
        return dict(list(of_table.items())[:1]) if setting.is_dry else of_table

    found: list[tuple[str, dict[Numerics, gemm_tiles.Table], dict[int, int], Any, Any]] = [
        ("linear", gemm_tiles.LINEAR, sizes, linear, of_linear),
        ("GATE_UP", gemm_tiles.GATE_UP, means, experts, of_experts("GATE_UP")),
        ("DOWN", gemm_tiles.DOWN, means, experts, of_experts("DOWN")),
    ]
    return [
        Product(
            name, tables[numerics]["half"], tried(tables[numerics]["half"], rows), work, install
        )
        for name, tables, rows, work, install in found
    ]


def _fast(setting: Setting, product: Product, name: str, seconds: float) -> Iterator[Figure]:
    lines = []
    for least, rows in product.rows.items():
        found = climb(
            product.table[least][0],
            lambda tiles: neighbours(tiles, _FREE, product_fits),
            partial(_measure, setting, partial(product.work, rows), product.installed),
            _budget(setting, seconds / len(product.rows)),
        )
        lines.append(f"    {least}: ({written(found.best)},),")
        yield _figure(f"{name}, from {least} rows, with {rows}", found)
    print(f"-- {name}:", *lines, sep="\n", flush=True)


def _of_exact(tiles: Tiles) -> bool:
    return product_fits(tiles) and tiles.warps == min(8, tiles.rows // 16)


def exact_neighbours(tiles: Tiles) -> Iterator[Tiles]:
    """Yield tiles of the same width and depth, with warps as their rows need them."""
    for other in neighbours(tiles, _EXACT, lambda _: True):
        changed = replace(other, warps=min(8, other.rows // 16))
        if _of_exact(changed):
            yield changed


def _exact(setting: Setting, product: Product, name: str, seconds: float) -> Iterator[Figure]:
    first = product.table[1][0]
    own = (first.columns, first.depth)
    widths = [own, *(width for width in _WIDTHS if width != own)]
    means: dict[tuple[int, int], float] = {}
    lines: dict[tuple[int, int], list[str]] = {}
    for columns, depth in setting.pick(widths, widths[:2]):
        total, lines_of_width = 0.0, []
        for least, rows in product.rows.items():
            start = replace(product.table[least][0], columns=columns, depth=depth)
            while not product_fits(start) and start.stages > 2:
                start = replace(start, stages=start.stages - 1)
            try:
                found = climb(
                    start,
                    exact_neighbours,
                    partial(_measure, setting, partial(product.work, rows), product.installed),
                    _budget(setting, seconds / len(widths) / len(product.rows)),
                )
            except Exception as error:
                print(f"   {start}, with {rows} rows: {told(error)}", flush=True)
                total = math.inf
                break
            total += math.log(statistics.median(found.best_s))
            lines_of_width.append(f"    {least}: ({written(found.best)},),")
            yield _figure(f"{name}, {columns} x {depth}, from {least} rows, with {rows}", found)
        means[columns, depth] = total / len(product.rows)
        lines[columns, depth] = lines_of_width
    best = min(means, key=lambda width: means[width])
    gain = math.exp(means[own] - means[best])
    print(f"-- {name}, {best}, {gain:.3f} times as fast:", *lines[best], sep="\n", flush=True)


# -- attention -------------------------------------------------------------------------------------


def _attention(
    setting: Setting, bench: Bench, kind: str, numerics: Numerics, name: str, seconds: float
) -> Iterator[Figure]:
    key = cast(Any, (kind, numerics, cases.DTYPE.itemsize))
    by_width = attention_plan._TILES[key]
    real = ((32, 1, 1024),) if kind == "decode" else ((1, 2048, 8192),)
    dry = ((2, 1, 70),) if kind == "decode" else ((1, 5, 70),)
    width = min((one for one in by_width if bench.shape.head_dim <= one), default=max(by_width))
    steps = _EXACT_ATTENTION if numerics == "exact" else _ATTENTION

    def installed(tiles: attention_plan.Tiles) -> AbstractContextManager[Any]:
        return mock.patch.dict(by_width, {width: tiles})

    def work() -> Work:
        return next(cases.attention(bench, setting.pick(real, dry))).work

    found = climb(
        by_width[width],
        lambda tiles: neighbours(tiles, steps, lambda _: True),
        partial(_measure, setting, work, installed),
        _budget(setting, seconds),
    )
    print(f"-- {name}, {width}: {written(found.best)}", flush=True)
    yield _figure(f"{name}, heads of {width}", found)
