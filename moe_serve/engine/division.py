"""Memory for experts against memory for keys and values: where a byte saves most bytes a token.

More slots mean fewer misses; more KV means more sequences at once, whose tokens share what is
brought in (FlexGen's policy search, arXiv 2303.06865, with experts in place of whole layers). At
the best division the last byte on either side saves the same.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np

Array = np.ndarray[Any, Any]


@dataclass(frozen=True, kw_only=True, slots=True)
class Demand:
    """What is divided, and what for.

    chances: float [num_layers, num_experts], how likely a token is to use each expert.
    slot_bytes: of one expert; sequence_bytes: KV of one running sequence; num_seqs: at most so many
    run at once; top_k: the least slots of a layer.
    """

    chances: Array
    slot_bytes: int
    sequence_bytes: int
    num_seqs: int
    top_k: int


def misses_per_token(chances: Array, slots: int, num_seqs: int) -> float:
    """Return how many experts a token has brought in, with the most used ones held.

    slots: of each layer; num_seqs: sequences that run at once, one token each, as if independent.
    """
    coldest = np.sort(chances, axis=1)[:, : max(0, chances.shape[1] - slots)]
    return float((1 - (1 - coldest) ** num_seqs).sum()) / num_seqs


def divided(free_bytes: int, demand: Demand) -> tuple[int, int] | None:
    """Return slots of each layer and bytes of KV that cost the fewest bytes a token.

    free_bytes: for both together. None where it holds not even top_k slots and one sequence.
    """
    layer_bytes = demand.chances.shape[0] * demand.slot_bytes
    num_experts = demand.chances.shape[1]
    best: tuple[float, int, int] | None = None
    for num_seqs in _some_up_to(demand.num_seqs):
        kv_bytes = num_seqs * demand.sequence_bytes
        slots = min(num_experts, (free_bytes - kv_bytes) // layer_bytes)
        if slots < demand.top_k:
            break
        cost = misses_per_token(demand.chances, slots, num_seqs)
        if best is None or cost < best[0]:
            best = cost, slots, kv_bytes
    return None if best is None else best[1:]


def _some_up_to(most: int) -> list[int]:
    """Return numbers from 1 to `most`: all up to 64, then sixteen for each doubling."""
    found = {*range(1, min(most, 64) + 1), most}
    number = 64.0
    while number < most:
        found.add(round(number))
        number *= 2 ** (1 / 16)
    return sorted(found)
