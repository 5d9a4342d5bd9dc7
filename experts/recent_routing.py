"""What the latest tokens used, kept for those who place experts while the engine runs."""

from __future__ import annotations

from collections import deque
from typing import Any

import numpy as np
from torch import Tensor

from moe_serve.types import Routing

Array = np.ndarray[Any, Any]

_MOST_BYTES = 2**22
_MOST_TOKENS = 8192


class RecentRouting:
    """The experts of the latest tokens, as many as 4 MiB hold, but at most 8,192."""

    def __init__(self, layers: list[int]) -> None:
        """layers: the model's numbers of those that have experts."""
        self._index = {layer: index for index, layer in enumerate(layers)}
        self._steps: deque[tuple[Array, Array]] = deque()
        self._num_tokens = 0
        self._ids: Array | None = None
        self._is_open = False
        self._token_ids: Array = np.empty(0, np.int32)

    def begin(self, token_ids: Tensor) -> None:
        """Begin a step of these tokens, int64 [num_tokens]."""
        self._token_ids = token_ids.cpu().numpy().astype(np.int32)
        self._ids, self._is_open = None, True

    def note(self, layer: int, routing: Routing) -> None:
        """Take note of a layer's choices."""
        if not self._is_open:
            return
        ids = routing.expert_ids.cpu().numpy()
        if self._ids is None:
            self._ids = np.full((len(ids), len(self._index), ids.shape[1]), -1, np.int16)
        self._ids[:, self._index[layer]] = ids

    def abandon(self) -> None:
        """Forget the step that was begun; nothing is noted until another one is."""
        self._ids, self._is_open = None, False

    def end(self) -> None:
        """Keep the step, if every layer was noted, and forget the oldest that are too many."""
        ids = self._ids
        self.abandon()
        if ids is None or not len(ids) or (ids[:, :, 0] < 0).any():
            return
        self._steps.append((self._token_ids, ids))
        self._num_tokens += len(ids)
        most = min(_MOST_TOKENS, _MOST_BYTES // ids[0].nbytes)
        while self._num_tokens - len(self._steps[0][1]) >= most:
            self._num_tokens -= len(self._steps.popleft()[1])

    def take(self) -> tuple[Array, Array]:
        """Return token ids int32 [num_tokens] and experts int16 [num_tokens, num_layers, top_k].

        Oldest first. What was returned is forgotten.
        """
        steps = list(self._steps)
        self._steps.clear()
        self._num_tokens = 0
        if not steps:
            return np.empty(0, np.int32), np.empty((0, len(self._index), 1), np.int16)
        return np.concatenate([t for t, _ in steps]), np.concatenate([ids for _, ids in steps])
