"""The C library's heap of a server's process: what was freed in it goes back to the system.

glibc keeps what is freed below the top of a heap, for ever: after a burst of long prompts tens of
MB, and a little more with every thousand requests, as holes that nothing fits (docs/log.md).
"""

from __future__ import annotations

import ctypes
import time
from collections.abc import Callable

# while requests are under way all the time; it takes 2 to 6 ms
_AFTER_S = 60.0


def _trim_of_library() -> Callable[[int], int] | None:
    try:
        return ctypes.CDLL(None).malloc_trim
    except (OSError, AttributeError):  # not glibc
        return None


class Heap:
    """Gives free memory back when there is nothing to do, and now and then where there always is.

    For one thread, which calls `tick` every second or so.
    """

    def __init__(self, clock: Callable[[], float] = time.monotonic) -> None:
        self._trim = _trim_of_library()
        self._clock = clock
        self._last_s = clock()
        self._was_used = False

    def tick(self, num_requests: int) -> bool:
        """Say how many requests are under way; return whether memory was given back."""
        self._was_used = self._was_used or num_requests > 0
        is_due = num_requests == 0 or self._clock() - self._last_s >= _AFTER_S
        if self._trim is None or not self._was_used or not is_due:
            return False
        self._trim(0)
        self._last_s = self._clock()
        self._was_used = num_requests > 0
        return True
