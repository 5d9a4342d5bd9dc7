"""How often guesses came true: from what a predictor says to a precision that was counted.

A predictor's probabilities are right at best on the average of all experts. What is copied early is
chosen among experts that are not resident, which are the unlikely ones: there they may be too high.
"""

from __future__ import annotations

import math
from typing import Any

import numpy as np

Array = np.ndarray[Any, Any]
_BINS = 20
_KEPT = 1.0 - 1.0 / 1000  # of a bin's counts, at each guess that falls into it
# of so many guesses at once, which powers would take longer to work out
_FADES = _KEPT ** np.arange(4096)
_GROUP = 10.0  # guesses that bins are joined up to, before their precision is believed
_EVIDENCE = 50.0  # guesses above a threshold, without which there is none
_REFRESH = 2000  # guesses recorded between two looks at the counts


class Calibration:
    """Fading counts of guesses and of true ones, per distance and bin of probability.

    Record all candidates of an event, issued or not: what was not issued would never be learned
    again. Not every event need be recorded. A bin remembers its last thousand guesses, so that it
    follows a change of what is asked.
    """

    def __init__(self, furthest: int) -> None:
        """furthest: distances go from 1 to this one; 0 is before a step's first layer."""
        self._guesses = np.zeros((furthest + 1, _BINS))
        self._true = np.zeros((furthest + 1, _BINS))
        self._recorded = np.zeros(furthest + 1, np.int64)
        self._thresholds: dict[int, tuple[int, float, float | None]] = {}

    def record(self, distances: Array | int, probabilities: Array, was_used: Array) -> None:
        """Count guesses about one event.

        Of experts that were not resident, [num_candidates]: how far ahead each guess was, how sure
        (float), and whether it came true (bool).
        """
        bins = np.minimum((probabilities * _BINS).astype(np.int64), _BINS - 1)
        bins += distances * _BINS
        shape, size = self._guesses.shape, self._guesses.size
        new = np.bincount(bins, minlength=size).reshape(shape)
        keep = _FADES.take(new, mode="clip")
        self._guesses *= keep
        self._guesses += new
        self._true *= keep
        self._true += np.bincount(bins, weights=was_used, minlength=size).reshape(shape)
        self._recorded += new.sum(axis=1)

    @property
    def num_recorded(self) -> int:
        """Return how many guesses were recorded since the start."""
        return int(self._recorded.sum())

    def precision(self, distance: int, probability: float) -> float | None:
        """Return how often guesses about as probable came true, or None without evidence."""
        bin_ = min(int(probability * _BINS), _BINS - 1)
        guesses = self._guesses[distance, bin_]
        return float(self._true[distance, bin_] / guesses) if guesses >= _GROUP else None

    def threshold(self, distance: int, break_even: float) -> float | None:
        """Return the lowest probability from which guesses pay, or None: issue nothing.

        break_even: the precision at which guesses cost as much as they save, C / (B + C). From the
        threshold on the guesses of every bin are at least as precise, not only all together, since
        each that is issued has to pay for itself. It is looked up anew once in a while.
        """
        recorded = int(self._recorded[distance])
        kept = self._thresholds.get(distance)
        if kept is not None and kept[1] == break_even and recorded - kept[0] < _REFRESH:
            return kept[2]
        found = self._find(distance, break_even)
        self._thresholds[distance] = recorded, break_even, found
        return found

    def _find(self, distance: int, break_even: float) -> float | None:
        """Go down from the most probable bin as long as a group of bins is precise enough."""
        lowest, all_guesses, all_true = _BINS, 0.0, 0.0
        guesses = true = 0.0
        pairs = zip(self._guesses[distance].tolist(), self._true[distance].tolist(), strict=True)
        for bin_, (more, more_true) in reversed(list(enumerate(pairs))):
            guesses += more
            true += more_true
            if guesses < _GROUP:
                continue
            if true < break_even * guesses:
                break
            lowest, all_guesses, all_true = bin_, all_guesses + guesses, all_true + true
            guesses = true = 0.0
        if all_guesses < _EVIDENCE:
            return None
        precision = all_true / all_guesses
        error = math.sqrt(precision * (1 - precision) / all_guesses)
        return lowest / _BINS if precision - error >= break_even else None
