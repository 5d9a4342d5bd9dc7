"""What each way of dispatch sends: bytes of a rank, and collectives, for one layer of one step.

Of uniform routing, in which a token's experts are top_k different ones, all equally likely, and
tokens are shared evenly by the ranks. Names are those of the files in `comm`.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from math import comb

from moe_serve.comm._rounds import MOST_ROWS

DISPATCHERS = ("per_expert", "dedup", "all_gather", "static")
_COUNT_BYTES = 8  # a count of rows or pairs, int64
_NAME_BYTES = 2  # an expert named beside a row, int16


@dataclass(frozen=True, slots=True)
class Exchange:
    """Of one layer: collectives, and bytes that a rank sends to others."""

    num_collectives: int
    num_bytes: float


def ranks_per_token(num_held: Sequence[int], top_k: int) -> float:
    """Return on how many ranks a token's experts are; num_held: experts of each rank."""
    num_experts = sum(num_held)
    every = comb(num_experts, top_k)
    return sum(1 - comb(num_experts - held, top_k) / every for held in num_held)


def copies_per_token(name: str, num_held: Sequence[int], top_k: int) -> tuple[float, float]:
    """Return a token's rows to other ranks, and the rows that come back, without any padding."""
    num_ranks = len(num_held)
    away = (num_ranks - 1) / num_ranks
    out = {
        "per_expert": top_k * away,
        "dedup": ranks_per_token(num_held, top_k) * away,
        "all_gather": float(num_ranks - 1),
        "static": float(num_ranks - 1),
    }
    return out[name], top_k * away


def exchange(
    name: str, num_held: Sequence[int], top_k: int, num_tokens: int, row_bytes: int
) -> Exchange:
    """Return what a layer sends. num_tokens: of the rank with most of them; row_bytes: of a row."""
    num_ranks = len(num_held)
    others = num_ranks - 1
    out, back = copies_per_token(name, num_held, top_k)
    named_bytes = row_bytes + _NAME_BYTES * top_k
    if name == "per_expert":
        counts = max(num_held) * others * _COUNT_BYTES
        return Exchange(3, num_tokens * (out + back) * row_bytes + counts)
    if name == "static":
        most = max(1, num_tokens)
        capacity = min(MOST_ROWS, 1 << (most - 1).bit_length())
        num_rounds = -(-most // capacity)
        width = min(top_k, max(num_held))
        padded = others * capacity * (named_bytes + width * row_bytes)
        return Exchange(2 * num_rounds, float(num_rounds * padded))
    num_bytes = num_tokens * (out * named_bytes + back * row_bytes)
    if name == "dedup":
        return Exchange(3, num_bytes + 2 * others * _COUNT_BYTES)  # of rows, and of pairs
    return Exchange(2, num_bytes)
