"""Which of one sequence's tokens had their experts told: for requests that ask for them.

Which experts a token uses depends on the tokens before it alone, so that what is computed again,
after a preemption, needs not be told again.
"""

from __future__ import annotations

from typing import Any

import numpy as np

from moe_serve.types import RoutedExperts

Array = np.ndarray[Any, Any]


class RoutingLog:
    """num_tokens: the experts of so many first tokens of a sequence have been told."""

    __slots__ = ("num_tokens",)

    def __init__(self, num_tokens: int = 0) -> None:
        self.num_tokens = num_tokens

    def new(self, first: int, ids: Array) -> RoutedExperts | None:
        """Return what is to be told of tokens that were run, from position `first` on; or None.

        first: at most num_tokens. ids: int16 [num_tokens, num_moe_layers, top_k].
        """
        told = self.num_tokens
        assert first <= told, (first, told)
        ids = ids[told - first :]
        if not len(ids):
            return None
        self.num_tokens += len(ids)
        return RoutedExperts.of(told, ids)
