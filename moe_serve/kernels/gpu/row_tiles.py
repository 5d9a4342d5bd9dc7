"""How kernels that only move rows are cut into programs: plain data, for Hopper.

Such kernels are bound by memory. Chosen by reasoning: loads of 16 bytes a thread, and 32 KB or more
on the way to each of the 132 multiprocessors where there are rows enough.
"""

from __future__ import annotations

from dataclasses import dataclass, replace


@dataclass(frozen=True, slots=True)
class Tiles:
    """rows, and elements of each row (`columns`), of a program; warps: that work on them."""

    rows: int
    columns: int
    warps: int


# In the order of `columns`: a row takes the first that it fits into, or else the last.
Table = tuple[Tiles, ...]

NORM: Table = (
    Tiles(16, 64, 4),
    Tiles(8, 128, 4),
    Tiles(4, 256, 4),
    Tiles(2, 512, 4),
    Tiles(1, 1024, 4),
    Tiles(1, 4096, 8),
    Tiles(1, 8192, 16),
)
# rows are heads of one token, columns half of a head
ROPE: Table = (Tiles(8, 64, 4), Tiles(8, 128, 8), Tiles(4, 256, 8))
# columns are experts
ROUTE: Table = (Tiles(4, 128, 4), Tiles(1, 512, 1))
# columns are pairs of a token and an expert: all that there are, or a chunk
SORT_FEW: Table = (Tiles(1, 1024, 4), Tiles(1, 4096, 16))
SORT_MANY = Tiles(1, 128, 8)
# rows are tokens, columns their choices: 2048 or more at once, as counting is bound by waiting
CHOICES: Table = (Tiles(1024, 2, 4), Tiles(512, 4, 4), Tiles(256, 8, 4), Tiles(128, 16, 4))
# columns are units of 2 bytes, of a row that is moved as it is
MOVE: Table = (Tiles(1, 256, 1), Tiles(1, 1024, 4))
COMBINE: Table = (Tiles(1, 256, 2), Tiles(1, 512, 4))
# columns are tokens of the vocabulary
VOCABULARY: Table = (Tiles(64, 64, 4), Tiles(16, 256, 4), Tiles(4, 1024, 4), Tiles(1, 4096, 8))
# columns are the tokens that a filter is looked for among
CUT = Tiles(1, 8192, 16)
# columns are pieces of a row of the vocabulary
JOIN: Table = (Tiles(16, 64, 4), Tiles(4, 256, 4), Tiles(1, 1024, 4))


def first_that_holds(table: Table, size: int) -> Tiles:
    """Return the tiles of a row of `size` elements as the table has them."""
    return next((tiles for tiles in table if tiles.columns >= size), table[-1])


def whole_rows(table: Table, size: int) -> Tiles:
    """Return tiles of rows that are not cut; `columns` is the power of two that holds `size`."""
    return replace(first_that_holds(table, size), columns=power_of_two(size))


def pieces(table: Table, size: int) -> Tiles:
    """Return tiles that may be less than a row of `size` elements, and are little more."""
    tiles = first_that_holds(table, size)
    return replace(tiles, columns=min(tiles.columns, power_of_two(size)))


def power_of_two(size: int) -> int:
    """Return the least one that is not less than `size`."""
    return 1 << max(0, size - 1).bit_length()
