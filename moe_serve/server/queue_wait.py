"""How long a new request would wait for its turn, as the ones before it tell."""

from __future__ import annotations

import time
from collections import OrderedDict
from collections.abc import Callable

# of time with a queue: what is older than a few of these counts no more
_MEMORY_S = 3.0


class QueueWait:
    """Who waits for a first token, and how quickly first tokens come while somebody waits.

    Only time in which there is a queue counts: how often requests come to an idle server says
    nothing of how quickly it could serve them. tokens: of all prompts that wait. clock: seconds.
    """

    def __init__(self, clock: Callable[[], float] = time.monotonic) -> None:
        self.tokens = 0
        self._clock = clock
        self._waiting: OrderedDict[str, int] = OrderedDict()
        # since when there is a queue, or the last first token came, whichever is later
        self._since_s = clock()
        # with recent ones counting more: time with a queue, and what was served in it
        self._busy_s = 0.0
        self._served = 0.0
        self._served_tokens = 0.0

    def __len__(self) -> int:
        return len(self._waiting)

    def join(self, name: str, num_tokens: int) -> None:
        """Let a request wait, behind all others."""
        if not self._waiting:
            self._since_s = self._clock()
        self._waiting[name] = num_tokens
        self.tokens += num_tokens

    def leave(self, name: str) -> None:
        """Take a request out without its having been served, if it waits."""
        self.tokens -= self._waiting.pop(name, 0)

    def serve(self, name: str) -> None:
        """Take a request out, whose first token has come."""
        num_tokens = self._waiting.pop(name)
        self.tokens -= num_tokens
        now_s = self._clock()
        waited_s, self._since_s = now_s - self._since_s, now_s
        kept = max(0.0, 1 - waited_s / _MEMORY_S)
        self._busy_s = self._busy_s * kept + waited_s
        self._served = self._served * kept + 1
        self._served_tokens = self._served_tokens * kept + num_tokens

    def guess_s(self) -> float:
        """Return how long the queue takes; 0.0 while it is empty, or none was ever served.

        What it would be if its first were served now: the time since the last first token then
        counts as slowness. Of requests and of prompt tokens, whichever is short, each
        gives a guess, and their mean is taken.
        """
        if not self._waiting or not self._served:
            return 0.0
        first_tokens = next(iter(self._waiting.values()))
        busy_s = self._busy_s + self._clock() - self._since_s
        by_count = (len(self._waiting) - 1) / (self._served + 1)
        by_tokens = (self.tokens - first_tokens) / (self._served_tokens + first_tokens)
        return busy_s * (by_count + by_tokens) / 2
