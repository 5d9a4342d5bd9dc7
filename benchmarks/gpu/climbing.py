"""The search for sizes of tiles: from those in the table to neighbours, as long as it gets faster.

A kernel that does not compile, or does not fit, is one that is not taken. Knows no kernel.
"""

from __future__ import annotations

import statistics
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, Generic, TypeVar

_Tiles = TypeVar("_Tiles")

SHARED_BYTES = 227 * 1024
# float32 sums of a thread
_MOST_SUMS = 128
_LANES = 32
# what is not so much faster is noise
_WORTH = 0.98


@dataclass(frozen=True, slots=True)
class Found(Generic[_Tiles]):
    """What a climb ended with. start_s, best: seconds of the first and of the best, one each."""

    start: _Tiles
    best: _Tiles
    start_s: list[float]
    best_s: list[float]
    num_tried: int


def neighbours(
    tiles: _Tiles, steps: Mapping[str, Sequence[int]], fits: Callable[[_Tiles], bool]
) -> Iterator[_Tiles]:
    """Yield tiles that differ in one field, by one step; steps: a field's values, rising."""
    for name, values in steps.items():
        at = values.index(getattr(tiles, name)) if getattr(tiles, name) in values else None
        if at is None:
            continue
        for other in (at + 1, at - 1):
            if 0 <= other < len(values):
                changed: Any = replace(tiles, **{name: values[other]})  # type: ignore[type-var]
                if fits(changed):
                    yield changed


def climb(
    start: _Tiles,
    next_to: Callable[[_Tiles], Iterator[_Tiles]],
    measure: Callable[[_Tiles], list[float]],
    may_go_on: Callable[[], bool],
) -> Found[_Tiles]:
    """Try what is next to the best so far until nothing is faster, or there is no time.

    measure: seconds; it raises where tiles cannot run, which the first may not.
    """
    best, start_s = start, measure(start)
    best_s, tried = start_s, {start}
    is_better = True
    while is_better:
        is_better = False
        for tiles in next_to(best):
            if tiles in tried or not may_go_on():
                continue
            tried.add(tiles)
            try:
                seconds = measure(tiles)
            except Exception as error:
                print(f"   {tiles}: {type(error).__name__}", flush=True)
                continue
            if statistics.median(seconds) < _WORTH * statistics.median(best_s):
                best, best_s, is_better = tiles, seconds, True
    return Found(start, best, start_s, best_s, len(tried))


def product_fits(tiles: Any) -> bool:
    """Tell whether a product's tiles may find room: shared memory, and sums in registers."""
    num_bytes = 2 * (tiles.rows + tiles.columns) * tiles.depth * tiles.stages
    sums = tiles.rows * tiles.columns / (tiles.warps * _LANES)
    return bool(num_bytes <= SHARED_BYTES and sums <= _MOST_SUMS)
