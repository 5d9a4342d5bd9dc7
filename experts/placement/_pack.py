"""Packing slots onto ranks by load: heaviest first, each to the lightest rank with room."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from moe_serve.experts.placement.base import Array


def pack(weights: Array, room: Sequence[int], experts: Sequence[int] | None = None) -> Array:
    """Return the bin of each item, int64 [num_items].

    weights: float64 [num_items]; room: items that each bin takes. experts: what each item is a
    replica of: no bin takes two of one, where the others have room for them.
    """
    loads = [0.0] * len(room)
    left = list(room)
    held: list[set[int]] = [set() for _ in room]
    bins = np.full(len(weights), -1, np.int64)
    for item in np.argsort(-weights, kind="stable").tolist():
        expert = item if experts is None else int(experts[item])
        free = [index for index, count in enumerate(left) if count]
        others = [index for index in free if expert not in held[index]]
        if not others:
            _make_way(item, expert, bins, held, loads, left, weights, experts)
            continue
        best = min(others, key=lambda index: (loads[index], index))
        _put(item, expert, best, bins, held, loads, left, weights)
    return bins


def _put(
    item: int, expert: int, target: int, bins: Array, held: list[set[int]], loads: list[float],
    left: list[int], weights: Array,
) -> None:  # fmt: skip
    bins[item] = target
    held[target].add(expert)
    loads[target] += float(weights[item])
    left[target] -= 1


def _make_way(
    item: int, expert: int, bins: Array, held: list[set[int]], loads: list[float],
    left: list[int], weights: Array, experts: Sequence[int] | None,
) -> None:  # fmt: skip
    """Put an item where a bin without its expert gives another item to a bin that has room."""
    best: tuple[float, int, int, int] | None = None
    for other in np.flatnonzero(bins >= 0).tolist():
        origin = int(bins[other])
        name = other if experts is None else int(experts[other])
        if expert in held[origin]:
            continue
        for target, count in enumerate(left):
            if count and name not in held[target]:
                highest = max(
                    loads[origin] - weights[other] + weights[item], loads[target] + weights[other]
                )
                if best is None or (highest, other, origin, target) < best:
                    best = (float(highest), other, origin, target)
    assert best is not None, "more replicas of an expert than bins"
    _, other, origin, target = best
    name = other if experts is None else int(experts[other])
    held[origin].discard(name)
    loads[origin] -= float(weights[other])
    left[origin] += 1
    _put(other, name, target, bins, held, loads, left, weights)
    _put(item, expert, origin, bins, held, loads, left, weights)
