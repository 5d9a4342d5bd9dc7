"""The experts that one sequence's tokens used, until they are told: for requests that ask for them.

Which experts a token uses depends on the tokens before it alone, so that what is computed again,
after a preemption, needs no second note.
"""

from __future__ import annotations

from typing import Any

import numpy as np

from moe_serve.types import RoutedExperts

Array = np.ndarray[Any, Any]


class RoutingLog:
    """num_tokens: how many of a sequence's first tokens have been noted; not told yet: the last."""

    __slots__ = ("_rows", "num_tokens")

    def __init__(self) -> None:
        self.num_tokens = 0
        self._rows: list[Array] = []

    def note(self, first: int, ids: Array) -> None:
        """Note tokens from position `first` on, at most `num_tokens`, that were run.

        ids: int16 [num_tokens, num_moe_layers, top_k]; not to be written to any more.
        """
        assert first <= self.num_tokens, (first, self.num_tokens)
        new = ids[self.num_tokens - first :]
        if len(new):
            self._rows.append(new)
            self.num_tokens += len(new)

    def forked(self) -> RoutingLog:
        """Return another sequence's log that begins alike; what is noted is shared, not copied."""
        log = RoutingLog()
        log.num_tokens, log._rows = self.num_tokens, self._rows.copy()
        return log

    def take(self) -> RoutedExperts | None:
        """Return what was not told yet, and forget it; None: nothing."""
        if not self._rows:
            return None
        ids = np.concatenate(self._rows)
        self._rows.clear()
        return RoutedExperts.of(self.num_tokens - len(ids), ids)
