from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace

import pytest

from benchmarks.gpu.climbing import climb, neighbours, product_fits
from benchmarks.gpu.tiles import _of_exact, exact_neighbours
from moe_serve.kernels.gpu.gemm_tiles import DOWN, GATE_UP, LINEAR, Tiles

STEPS = {"rows": (16, 32, 64, 128), "stages": (2, 3, 4)}
START = Tiles(16, 64, 64, 4, 2)


def next_to(tiles: Tiles) -> Iterator[Tiles]:
    return neighbours(tiles, STEPS, lambda _: True)


def test_neighbours_differ_in_one_field_by_one_step() -> None:
    found = list(next_to(replace(START, rows=32)))
    assert [(one.rows, one.stages) for one in found] == [(64, 2), (16, 2), (32, 3)]
    assert list(neighbours(START, STEPS, lambda tiles: tiles.rows == 32)) == [
        replace(START, rows=32)
    ]


def test_the_best_is_found_over_several_steps() -> None:
    def seconds(tiles: Tiles) -> list[float]:
        return [1.0 + abs(tiles.rows - 128) + abs(tiles.stages - 3)]

    found = climb(START, next_to, seconds, lambda: True)
    assert (found.best.rows, found.best.stages) == (128, 3)
    assert found.best_s == [1.0]
    assert found.start_s == [114.0]


def test_noise_is_no_gain() -> None:
    found = climb(START, next_to, lambda tiles: [1.0 - tiles.rows / 1e5], lambda: True)
    assert found.best == START


def test_what_does_not_compile_is_not_taken() -> None:
    def seconds(tiles: Tiles) -> list[float]:
        if tiles.rows == 32:
            raise RuntimeError("out of shared memory")
        return [1.0 / tiles.stages]

    found = climb(START, next_to, seconds, lambda: True)
    assert (found.best.rows, found.best.stages) == (16, 4)
    with pytest.raises(RuntimeError, match="shared"):
        climb(replace(START, rows=32), next_to, seconds, lambda: True)


def test_a_search_ends_when_its_time_is_over() -> None:
    found = climb(START, next_to, lambda tiles: [1.0 / tiles.rows], lambda: False)
    assert (found.best, found.num_tried) == (START, 1)


def tables() -> Iterator[tuple[str, Tiles]]:
    for table in (LINEAR, GATE_UP, DOWN):
        for numerics, kinds in table.items():
            for choices in kinds["half"].values():
                for tiles in choices:
                    yield numerics, tiles


def test_what_is_in_the_tables_is_where_a_search_may_be() -> None:
    for numerics, tiles in tables():
        assert product_fits(tiles), tiles
        assert numerics == "fast" or _of_exact(tiles), tiles


def test_exact_neighbours_keep_the_instruction() -> None:
    start = Tiles(64, 128, 64, 4, 4)
    found = list(exact_neighbours(start))
    assert Tiles(128, 128, 64, 8, 4) in found
    for tiles in found:
        assert (tiles.columns, tiles.depth) == (128, 64)
        assert tiles.rows % 64 == 0
        assert tiles.warps == min(8, tiles.rows // 16)
