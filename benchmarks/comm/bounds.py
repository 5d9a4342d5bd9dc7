"""Bytes that each layout must send to other ranks: of the routing that was used, and on average."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from benchmarks.comm.shape import Shape
from moe_serve.comm._rounds import MOST_ROWS

_DTYPE_BYTES = 2  # bfloat16
_NAME_BYTES = 2


def needed_bytes(name: str, shape: Shape, ranks: Tensor, own: int, num_ranks: int) -> float | None:
    """Return the bytes that a token's rows and results are, for this rank's tokens; None: unknown.

    ranks: int64 [num_tokens, top_k], where each choice's expert is; own: this rank. Results, which
    others send, are counted with the tokens that they are of. No counts of rows: they are not asked
    for by what is sent, but by how.
    """
    num_tokens = ranks.shape[0]
    row = shape.hidden_size * _DTYPE_BYTES
    with_names = row + shape.top_k * _NAME_BYTES
    pairs = int((ranks != own).sum())
    visits = torch.zeros(num_tokens, num_ranks, dtype=torch.bool).scatter_(1, ranks, True)
    visits[:, own] = False
    capacity = min(MOST_ROWS, 1 << (max(1, num_tokens) - 1).bit_length())
    slots = -(-max(1, num_tokens) // capacity) * capacity * (num_ranks - 1)
    width = min(shape.top_k, -(-shape.num_experts // num_ranks))
    total = {
        "per_expert": 2 * pairs * row,
        "dedup": int(visits.sum()) * with_names + pairs * row,
        "all_gather": num_tokens * (num_ranks - 1) * with_names + pairs * row,
        "static": slots * (with_names + width * row),
    }.get(name)
    return None if total is None else total / num_tokens


def expected_bytes(name: str, shape: Shape, num_ranks: int) -> float | None:
    """Return the expectation of `needed_bytes` under uniform routing, or None.

    Experts are spread evenly: every choice is elsewhere with (num_ranks - 1) / num_ranks; a rank is
    visited unless all choices are among the experts of the others (hypergeometric).
    """
    row = shape.hidden_size * _DTYPE_BYTES
    with_names = row + shape.top_k * _NAME_BYTES
    pairs = shape.top_k * (num_ranks - 1) / num_ranks
    others = shape.num_experts - shape.num_experts // num_ranks
    missed = math.comb(others, shape.top_k) / math.comb(shape.num_experts, shape.top_k)
    visited = (num_ranks - 1) * (1 - missed)
    return {
        "per_expert": 2 * pairs * row,
        "dedup": visited * with_names + pairs * row,
        "all_gather": (num_ranks - 1) * with_names + pairs * row,
    }.get(name)
