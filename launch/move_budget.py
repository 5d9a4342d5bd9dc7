"""How many bytes of experts may travel before a step, so that steps hardly take longer."""

from __future__ import annotations

# of the time of steps, for experts that travel; with what comes with them it is some more
SHARE = 0.05
# of what a move took, how much the latest counts
_WEIGHT = 0.5


class MoveBudget:
    """Saves a share of every step's time, and spends it on a move once it has enough for one.

    The first move is as small as can be. Each may be twice as large as the last while it takes less
    than twice the time of the quickest: so long it is the meeting of ranks that takes the time, not
    the bytes. fixed: bytes for each step instead of all this.
    """

    def __init__(self, fixed: int | None = None) -> None:
        self._fixed = fixed
        self._saved_s = 0.0
        self._expected_s = 0.0  # of the next move
        self._quickest_s: float | None = None
        self._next_bytes = 1  # one record: they are never cut

    def next_bytes(self) -> int:
        """Return what may travel before the next step; 0: nothing."""
        if self._fixed is not None:
            return self._fixed
        return self._next_bytes if self._saved_s >= self._expected_s else 0

    def told(self, step_s: float, moved_bytes: int, moving_s: float) -> None:
        """Learn of a step: how long it took with all, what travelled before it, and how long."""
        self._saved_s += SHARE * max(0.0, step_s - moving_s) - moving_s
        if not moved_bytes:
            return
        if self._quickest_s is None or moving_s < self._quickest_s:
            self._quickest_s = moving_s
        if moving_s < 2 * self._quickest_s:
            self._next_bytes = 2 * moved_bytes
        elif moving_s > 4 * self._quickest_s:
            self._next_bytes = max(1, moved_bytes // 2)
        else:
            self._next_bytes = moved_bytes
        self._expected_s = _WEIGHT * moving_s + (1 - _WEIGHT) * (self._expected_s or moving_s)
