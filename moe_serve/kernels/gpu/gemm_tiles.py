"""Sizes of the tiles in which products with weights are computed: plain data, for Hopper.

Chosen by reasoning for 132 multiprocessors of 227 KB of shared memory each: few rows are bound by
the bytes of weights in flight (two programs on a multiprocessor, 48 KB or more each), many by the
bytes that a tile reads from the cache for each product (the larger, the fewer).
"""

from __future__ import annotations

from dataclasses import dataclass

import torch

from moe_serve.kernels.gpu.numerics import Numerics

NUM_MULTIPROCESSORS = 132
# a sum over k is split, but not in parts of fewer steps, until so many programs read a weight
_ENOUGH_PROGRAMS = 96
_LEAST_STEPS = 4
# a result of fewer tiles has programs for each part of a split sum
MOST_SPREAD_TILES = 96


@dataclass(frozen=True, slots=True)
class Tiles:
    """How rows [m, k] times a weight [n, k] are cut.

    rows, columns, depth: of a program's tile, in m, n and k. warps: of a program. stages: how many
    tiles of depth are in shared memory at once.
    """

    rows: int
    columns: int
    depth: int
    warps: int
    stages: int


@dataclass(frozen=True, slots=True)
class Schedule:
    """How one product is computed.

    steps: of depth, in each of the `splits` parts of the sum over k, which are added in order.
    is_spread: whether each part has programs of its own, or one program computes all of them.
    """

    tiles: Tiles
    splits: int
    steps: int
    is_spread: bool


# By kind of operands and the least number of rows: tiles, of which the first is taken that gives
# every multiprocessor a program, or else the last. "exact" has one width and one depth for a kind,
# and 64 rows or a multiple of them, so that each row is summed by the same instructions.
BySize = dict[int, tuple[Tiles, ...]]
Table = dict[str, BySize]

_FLOAT32: BySize = {1: (Tiles(64, 64, 32, 4, 3),)}
_ROUTER: BySize = {1: (Tiles(64, 64, 64, 4, 3),)}
LINEAR: dict[Numerics, Table] = {
    "exact": {
        "half": {
            1: (Tiles(64, 128, 64, 4, 4),),
            129: (Tiles(128, 128, 64, 8, 4), Tiles(64, 128, 64, 4, 4)),
        },
        "router": _ROUTER,
        "float32": _FLOAT32,
    },
    "fast": {
        "half": {
            1: (Tiles(16, 64, 128, 4, 6),),
            17: (Tiles(32, 64, 128, 4, 5),),
            33: (Tiles(64, 128, 64, 4, 4),),
            129: (Tiles(128, 128, 64, 8, 3), Tiles(64, 128, 64, 4, 4)),
            1024: (
                Tiles(128, 256, 64, 8, 4),
                Tiles(128, 128, 64, 8, 3),
                Tiles(64, 128, 64, 4, 4),
            ),
        },
        "router": _ROUTER,
        "float32": _FLOAT32,
    },
}
# By the mean number of rows of an expert. Half of the columns of gate_up are of gates.
GATE_UP: dict[Numerics, Table] = {
    "exact": {
        "half": {
            # two programs to a multiprocessor; or one, with as many bytes on their way
            1: (Tiles(64, 128, 64, 4, 4), Tiles(64, 128, 64, 4, 8)),
            96: (Tiles(128, 128, 64, 8, 3),),
            768: (Tiles(256, 128, 64, 8, 4), Tiles(128, 128, 64, 8, 3)),
        },
        "float32": _FLOAT32,
    },
    "fast": {
        "half": {
            1: (Tiles(16, 64, 128, 4, 6),),
            5: (Tiles(32, 64, 128, 4, 5),),
            13: (Tiles(64, 128, 64, 4, 4),),
            96: (Tiles(128, 256, 64, 8, 4),),
        },
        "float32": _FLOAT32,
    },
}
DOWN = GATE_UP


def operands(rows: torch.dtype, weight: torch.dtype) -> str:
    """Return the kind of a product, a key of the tables."""
    if weight.itemsize == 2:
        return "half"
    return "router" if rows == torch.bfloat16 else "float32"


def row_tiles(tiles: Tiles, num_rows: int, num_experts: int = 1) -> int:
    """Return the most tiles that rows of as many experts can be in, each of one expert's rows."""
    used = min(num_rows, num_experts)
    return used + (num_rows - used) // tiles.rows


def chosen(table: BySize, num_rows: int, num_experts: int, out_features: int) -> Tiles:
    """Return the tiles for as many rows, one or more, of as many experts."""
    mean = -(-num_rows // num_experts)
    largest_first = table[max(least for least in table if least <= mean)]
    for tiles in largest_first:
        columns = -(-out_features // tiles.columns)
        if row_tiles(tiles, num_rows, num_experts) * columns >= NUM_MULTIPROCESSORS:
            return tiles
    return largest_first[-1]


def schedule(
    numerics: Numerics, kind: str, num_rows: int, out_features: int, in_features: int
) -> Schedule:
    """Plan the product of rows with a weight; for "exact", `splits` is the weight's alone."""
    table = LINEAR[numerics][kind]
    tiles = chosen(table, num_rows, 1, out_features)
    columns = -(-out_features // tiles.columns)
    programs = row_tiles(tiles, num_rows) * columns
    readers = programs if numerics == "fast" else columns
    all_steps = -(-in_features // tiles.depth)
    parts = 1
    while readers * parts < _ENOUGH_PROGRAMS and all_steps >= 2 * parts * _LEAST_STEPS:
        parts *= 2
    steps = -(-all_steps // parts)
    splits = -(-all_steps // steps)
    return Schedule(tiles, splits, steps, splits > 1 and programs < MOST_SPREAD_TILES)
