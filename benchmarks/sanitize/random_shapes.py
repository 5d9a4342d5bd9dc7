"""How large the random calls are."""

from __future__ import annotations

import random

import torch


def size_of(chance: random.Random, most: int) -> int:
    """Return 1 to `most`: often small, or beside a multiple of 16, where vectors and tiles end."""
    kind = chance.randrange(3)
    if kind == 0:
        return chance.randint(1, min(most, 20))
    if kind == 1:
        beside = 16 * chance.randint(1, max(1, most // 16)) + chance.choice([-1, 0, 1])
        return min(most, max(1, beside))
    return chance.randint(1, most)


def count_of(chance: random.Random, most: int) -> int:
    return 0 if chance.random() < 0.1 else size_of(chance, most)


def dtype_of(chance: random.Random) -> torch.dtype:
    return chance.choice([torch.bfloat16, torch.float32])
