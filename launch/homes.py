"""Which rank a request runs on: its home, which schedules it and keeps its keys and values."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np

from moe_serve.experts.placement.base import Placement

Array = np.ndarray[Any, Any]


class Homes:
    """Gives requests homes by how many tokens ranks have to come, and by what they hold.

    The prompt's routing is not known before it has run; what tokens of the same ids used before
    stands for it (much of a layer's choice follows from the token: research, token tables).
    """

    def __init__(self, num_ranks: int, vocab_size: int, placement: Placement | None) -> None:
        """placement: None to look at loads alone."""
        self._loads = [0] * num_ranks
        self._shares: Array | None = None
        if placement is not None:
            # of what a token of an id used, how much each rank held, summed over its occurrences
            self._shares = np.zeros((vocab_size, num_ranks), np.float32)
            self.place(placement)

    def choose(self, prompt_ids: Sequence[int], num_tokens: int) -> int:
        """Return the home of a request that may come to `num_tokens` tokens, and count them.

        The least loaded; by affinity, of those that have at most this request more to do than the
        least loaded the one that holds most of what the prompt's tokens used; ties: the lower rank.
        """
        ranks = range(len(self._loads))
        home = min(ranks, key=lambda rank: (self._loads[rank], rank))
        if self._shares is not None:
            held = self._shares[list(prompt_ids)].sum(axis=0)
            most = self._loads[home] + num_tokens
            near = [rank for rank in ranks if self._loads[rank] <= most]
            home = min(near, key=lambda rank: (-held[rank], self._loads[rank], rank))
        self._loads[home] += num_tokens
        return home

    def release(self, home: int, num_tokens: int) -> None:
        """Take back what `choose` counted: the request has ended."""
        self._loads[home] -= num_tokens

    def learn(self, token_ids: Array, experts: Array) -> None:
        """Learn what tokens used: int [num_tokens], and [num_tokens, num_layers, top_k]."""
        if self._shares is None or not len(token_ids):
            return
        layers = np.arange(experts.shape[1])[None, :, None]
        held = self._is_nearest[layers, experts]  # [num_tokens, num_layers, top_k, num_ranks]
        np.add.at(self._shares, token_ids, held.mean(axis=(1, 2), dtype=np.float32))

    def place(self, placement: Placement) -> None:
        """Take note of another placement; what was learned of the one before is forgotten."""
        if self._shares is not None:
            self._is_nearest = placement.holds()
            self._shares.fill(0.0)
