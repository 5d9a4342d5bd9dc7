"""Stop strings, found while the text is still coming, wherever the borders of its pieces are."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class StopMatch:
    """A stop string of `length` characters that ended just before `end` of the pushed piece."""

    end: int
    length: int


class StopStrings:
    """Watch a text for the first of some strings to be complete.

    The first to end wins; of two that end together, the longer. So the result does not depend on
    how the text was cut into pieces. Each character costs the same (Knuth, Morris and Pratt's
    search, one state per string).
    """

    def __init__(self, stop: Sequence[str]) -> None:
        self._stop = tuple(sorted(stop, key=len, reverse=True))
        self._failures = tuple(_failures(text) for text in self._stop)
        self._matched = [0] * len(self._stop)

    @property
    def num_held(self) -> int:
        """How many characters at the end of the text may be the start of a stop string."""
        return max(self._matched, default=0)

    def push(self, piece: str, is_armed: bool = True) -> StopMatch | None:
        """Read on; return the first match, after which no more may be pushed.

        Without `is_armed` matches are passed over; what they end with may begin a later one.
        """
        if not self._stop:
            return None
        for position, character in enumerate(piece):
            for index, text in enumerate(self._stop):
                matched = _advance(text, self._failures[index], self._matched[index], character)
                if matched == len(text):
                    if is_armed:
                        return StopMatch(position + 1, matched)
                    matched = self._failures[index][-1]
                self._matched[index] = matched
        return None


def _advance(text: str, failures: Sequence[int], matched: int, character: str) -> int:
    while matched and text[matched] != character:
        matched = failures[matched - 1]
    return matched + 1 if text[matched] == character else 0


def _failures(text: str) -> list[int]:
    """Return, for each start of `text`, its longest proper end that is also its start."""
    failures = [0]
    for character in text[1:]:
        failures.append(_advance(text, failures, failures[-1], character))
    return failures
