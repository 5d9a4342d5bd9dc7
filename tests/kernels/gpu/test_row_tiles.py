"""Which tiles rows of a size get, and that the tables have a place for every size."""

from __future__ import annotations

import pytest

from moe_serve.kernels.gpu import row_tiles
from moe_serve.kernels.gpu.row_tiles import Table, Tiles, pieces, power_of_two, whole_rows

TABLES = [table for table in vars(row_tiles).values() if isinstance(table, tuple)]
TABLE = (Tiles(8, 64, 4), Tiles(1, 256, 8))


@pytest.mark.parametrize("table", TABLES)
def test_a_table_is_in_order(table: Table) -> None:
    columns = [tiles.columns for tiles in table]
    assert columns == sorted(set(columns))
    for tiles in table:
        for number in (tiles.rows, tiles.columns, tiles.warps):
            assert number == power_of_two(number)


@pytest.mark.parametrize(
    ("size", "whole", "piece"),
    [
        (1, Tiles(8, 1, 4), Tiles(8, 1, 4)),
        (33, Tiles(8, 64, 4), Tiles(8, 64, 4)),
        (65, Tiles(1, 128, 8), Tiles(1, 128, 8)),
        (256, Tiles(1, 256, 8), Tiles(1, 256, 8)),
        (257, Tiles(1, 512, 8), Tiles(1, 256, 8)),
    ],
)
def test_a_size_takes_the_first_tiles_that_hold_it(size: int, whole: Tiles, piece: Tiles) -> None:
    assert whole_rows(TABLE, size) == whole
    assert pieces(TABLE, size) == piece


def test_powers_of_two() -> None:
    assert [power_of_two(size) for size in (0, 1, 2, 3, 4, 5, 1025)] == [1, 1, 2, 4, 4, 8, 2048]
