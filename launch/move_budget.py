"""How many bytes of experts may travel before a step, so that steps hardly take longer."""

from __future__ import annotations

# of the time of steps, for experts that travel
SHARE = 0.05
# of what was measured, how much the latest counts
_WEIGHT = 0.25


class MoveBudget:
    """Saves a share of every step's time, and spends it on moves once it has enough for one.

    What a move costs, so much at once and so much a byte, is learned from those that were made; the
    first one is as small as can be. fixed: bytes for each step instead of all this.
    """

    def __init__(self, fixed: int | None = None) -> None:
        self._fixed = fixed
        self._saved_s = 0.0
        self._least_s: float | None = None  # of the smallest move yet
        self._least_bytes = self._last_bytes = 0
        self._byte_s = 0.0

    def next_bytes(self) -> int:
        """Return what may travel before the next step; 0: nothing."""
        if self._fixed is not None:
            return self._fixed
        if self._least_s is None:
            return 1  # one record: they are never cut
        if self._saved_s < self._least_s:
            return 0
        if self._byte_s <= 0:  # more cost no more as yet: try twice as many
            return 2 * self._last_bytes
        return self._least_bytes + int((self._saved_s - self._least_s) / self._byte_s)

    def told(self, step_s: float, moved_bytes: int, moving_s: float) -> None:
        """Learn of a step: how long it took with all, what travelled before it, and how long."""
        self._saved_s += SHARE * max(0.0, step_s - moving_s) - moving_s
        if not moved_bytes:
            return
        self._last_bytes = moved_bytes
        if self._least_s is None or moved_bytes <= self._least_bytes:
            weight = 1.0 if self._least_s is None or moved_bytes < self._least_bytes else _WEIGHT
            self._least_s = weight * moving_s + (1 - weight) * (self._least_s or 0.0)
            self._least_bytes = moved_bytes
        else:
            byte_s = max(0.0, moving_s - self._least_s) / (moved_bytes - self._least_bytes)
            weight = _WEIGHT if self._byte_s else 1.0
            self._byte_s = weight * byte_s + (1 - weight) * self._byte_s
