"""Asks a predictor what comes next, and has it brought in before it is needed, where that pays.

Only experts that are not resident are candidates. How sure a guess must be follows from what was
measured: a correct one saves the wait for a load, a wrong one delays what is needed by up to one
chunk and may have evicted something useful; below the precision at which both are equal, C / (B +
C), nothing is issued. Knows nothing of the predictor but its contract.
"""

from __future__ import annotations

import logging
import statistics
import time
from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from moe_serve.experts.cache import ExpertCache
from moe_serve.experts.calibration import Calibration
from moe_serve.experts.transfer import Transfers
from moe_serve.kernels.forward.base import Stopped
from moe_serve.predictors.base import START, Observation, Predictor
from moe_serve.types import ForwardBatch

logger = logging.getLogger(__name__)

Array = np.ndarray[Any, Any]
MAX_DISTANCE = 6


# a resident that is this likely to be used itself does not give way to a guess
_MAY_BE_USED = 0.05
# a guess is not worth its slot below this, whatever the link costs
_LEAST_PRECISION = 0.6
# Counting how often guesses came true takes as long as making them: once so many were counted, one
# step of four is.
_COUNTED_TO_SETTLE, _SETTLED_TURN = 20_000, 4
_STEPS_TO_JUDGE = 64
_STEPS_TO_LEARN = 512
_FIRST_PAUSE_STEPS = 256
_MOST_PAUSE_STEPS = 16_384


@dataclass(slots=True)
class PrefetchStats:
    """Since the start. issued: guesses; paused: how often guessing was switched off as a loss.

    predictor_s: seconds spent on predicting and planning; num_layers: in how many layers' events;
    asking_s: of the latest of them, what the predictor alone took.
    """

    issued: int = 0
    given_up: int = 0
    paused: int = 0
    predictor_s: float = 0.0
    num_layers: int = 0
    asking_s: deque[float] = field(default_factory=lambda: deque(maxlen=4096))
    break_even: float = 1.0


@dataclass(slots=True)
class _Forecast:
    """What was foretold of a layer of this step: of those absent then, how probable each was."""

    distance: int
    candidates: Array
    said: Array


@dataclass(slots=True)
class _Window:
    """Counts when the steps that are judged together began."""

    steps: int = 0
    issued: int = 0
    given_up: int = 0
    useful: int = 0
    wasted: int = 0
    late: int = 0
    predictor_s: float = 0.0


@dataclass(frozen=True, kw_only=True, slots=True)
class LinkTimes:
    """Seconds, measured at start: load_s for one record, chunk_s for one chunk of it."""

    load_s: float
    chunk_s: float


class Prefetcher:
    """Guesses for the layers ahead of each event of a step.

    kind: "on" never pauses; "auto" pauses where a window of steps gained less than it cost.
    max_guesses: how many may be under way at once: what bounds speculative bytes.
    """

    def __init__(
        self,
        predictor: Predictor,
        cache: ExpertCache,
        queue: Transfers,
        calibration: Calibration,
        link: LinkTimes,
        kind: str = "auto",
        max_guesses: int = 4,
        distances: Sequence[int] = (1, 2, 4),
    ) -> None:
        self._predictor = predictor
        self._cache = cache
        self._queue = queue
        self._calibration = calibration
        self._link = link
        self._kind = kind
        self._max_guesses = max_guesses
        self._distances = distances
        self._forecasts: dict[int, list[_Forecast]] = {}
        self._sequences: list[int] = []
        self._batch: ForwardBatch | None = None
        self._window = _Window()
        self._pause_until = 0
        self._pause_steps = _FIRST_PAUSE_STEPS
        self._step = 0
        self._asking_s = 0.0
        self._is_counting = True
        self.is_on = True
        self.stats = PrefetchStats()

    # -- a step ------------------------------------------------------------------------------------

    def start_step(self, step: int, batch: ForwardBatch) -> None:
        """Begin a step: what is known of its tokens is shown to the predictor."""
        self._step = step
        self._judge()
        if not self.is_on:
            return
        start_s = time.perf_counter()
        is_settled = self._calibration.num_recorded >= _COUNTED_TO_SETTLE
        self._is_counting = not is_settled or step % _SETTLED_TURN == 0
        self._batch = batch if batch.num_seqs else None
        self._forecasts.clear()
        if self._batch is None:
            return
        sequence_ids = batch.sequence_ids.cpu().numpy()
        self._sequences = list(dict.fromkeys(sequence_ids.tolist()))
        none = np.empty((batch.num_tokens, 0))
        self._predictor.observe(
            Observation(
                layer=START,
                expert_ids=none.astype(np.int64),
                weights=none.astype(np.float32),
                sequence_ids=sequence_ids,
                token_ids=batch.token_ids.cpu().numpy(),
            )
        )
        self.stats.predictor_s += time.perf_counter() - start_s
        self.plan(START)

    def look_ahead(self, layer: int, stopped: Stopped) -> None:
        """Settle what was foretold of an event, show it to the predictor, and plan from there."""
        if self.is_on and self._batch is not None:
            self._asking_s = 0.0
            self._observe(layer, stopped, self._batch)
            self.plan(layer)
            self.stats.asking_s.append(self._asking_s)

    def _observe(self, layer: int, stopped: Stopped, batch: ForwardBatch) -> None:
        start_s = time.perf_counter()
        forecasts = self._forecasts.pop(layer, ())
        if forecasts:
            asked = np.concatenate([forecast.candidates for forecast in forecasts])
            self._calibration.record(
                np.repeat(
                    [forecast.distance for forecast in forecasts],
                    [len(forecast.candidates) for forecast in forecasts],
                ),
                np.concatenate([forecast.said for forecast in forecasts]),
                stopped.counts[asked] > 0,
            )
        hidden = None
        if "hidden" in self._predictor.needs:
            hidden = stopped.residual.float().cpu().numpy()
        asked_s = time.perf_counter()
        self._predictor.observe(
            Observation(
                layer=layer,
                expert_ids=stopped.expert_ids,
                weights=stopped.weights,
                sequence_ids=batch.sequence_ids.cpu().numpy(),
                token_ids=batch.token_ids.cpu().numpy(),
                hidden=hidden,
            )
        )
        self._asking_s += time.perf_counter() - asked_s
        self.stats.num_layers += 1
        self.stats.predictor_s += time.perf_counter() - start_s

    def plan(self, layer: int) -> None:
        """Foretell layers ahead of `layer`, and start the guesses that are worth it."""
        if not self.is_on:
            return
        start_s = time.perf_counter()
        last = self._cache.shape.num_layers - 1
        targets = [layer + distance for distance in self._distances if layer + distance <= last]
        if targets:
            probabilities = self._predictor.predict_layers(targets, self._sequences)
            self._asking_s += time.perf_counter() - start_s
            for target, said in zip(targets, probabilities, strict=True):
                self._foretell(target, target - layer if layer != START else 0, said)
        self.stats.predictor_s += time.perf_counter() - start_s

    def report(self) -> dict[str, Any]:
        """Return what was guessed since the start, and what that took."""
        stats = self.stats
        return {
            "is_on": self.is_on,
            "issued": stats.issued,
            "given_up": stats.given_up,
            "paused": stats.paused,
            "break_even_precision": stats.break_even,
            "predictor_us_per_layer": 1e6 * statistics.median(stats.asking_s or (0.0,)),
            "planning_us_per_layer": 1e6 * stats.predictor_s / max(1, stats.num_layers),
        }

    def give_up(self, layer: int) -> None:
        """Drop the guesses for a layer that has been reached: what is needed was hurried."""
        for expert in self._cache.guesses(layer):
            self.stats.given_up += self._queue.give_up(layer, expert)

    def _foretell(self, target: int, distance: int, probabilities: Array) -> None:
        candidates = np.flatnonzero(self._cache.absent(target))
        said = probabilities[candidates]
        if self._is_counting:
            self._forecasts.setdefault(target, []).append(_Forecast(distance, candidates, said))
        threshold = self._calibration.threshold(distance, self._break_even())
        if threshold is None:
            return
        is_sure = said >= threshold
        if not is_sure.any():
            return
        room = self._max_guesses - self._queue.num_guesses
        if room <= 0:
            return
        keep = set(np.flatnonzero(probabilities >= _MAY_BE_USED).tolist())
        order = np.argsort(-said[is_sure], kind="stable")[:room]
        for expert in candidates[is_sure][order].tolist():
            slot = self._cache.guess(target, expert, keep)
            if slot is not None:
                self._queue.guess(target, expert, slot)
                self.stats.issued += 1

    # -- does it pay -------------------------------------------------------------------------------

    def _break_even(self) -> float:
        """Return the precision below which guessing loses, from measured times (C / (B + C))."""
        gain_s = self._link.load_s
        # half a chunk in front of what is needed, and the reload of what a wrong guess evicted
        cost_s = self._link.chunk_s / 2 + self._link.load_s
        self.stats.break_even = max(_LEAST_PRECISION, cost_s / (gain_s + cost_s))
        return self.stats.break_even

    def _judge(self) -> None:
        """Pause where the last steps lost; try again after a while, which doubles each time."""
        if not self.is_on:
            if self._step >= self._pause_until:
                self.is_on = True
                self._begin_window()
            return
        self._window.steps += 1
        if self._kind != "auto" or self._window.steps < _STEPS_TO_JUDGE:
            return
        if self.stats.issued == self._window.issued and self._window.steps < _STEPS_TO_LEARN:
            return  # it still learns how often it is right
        total = self._cache.counters.total()
        useful = total["useful"] - self._window.useful
        late = total["late"] - self._window.late
        wasted = total["wasted"] - self._window.wasted
        spent_s = self.stats.predictor_s - self._window.predictor_s
        gained_s = (useful + late / 2) * self._link.load_s
        given_up = self.stats.given_up - self._window.given_up
        lost_s = wasted * (self._link.chunk_s / 2 + self._link.load_s) + spent_s
        lost_s += given_up * self._link.chunk_s
        if gained_s < lost_s:
            self.is_on = False
            self.stats.paused += 1
            self._pause_until = self._step + self._pause_steps
            logger.info(
                "prefetch off for %d steps: in the last %d it saved %.1f ms and cost %.1f ms "
                "(%d useful, %d late, %d wasted)",
                self._pause_steps, self._window.steps, gained_s * 1e3, lost_s * 1e3, useful, late,
                wasted,
            )  # fmt: skip
            self._pause_steps = min(2 * self._pause_steps, _MOST_PAUSE_STEPS)
        else:
            self._pause_steps = _FIRST_PAUSE_STEPS
            self._begin_window()

    def _begin_window(self) -> None:
        total = self._cache.counters.total()
        self._window = _Window(
            0,
            self.stats.issued,
            self.stats.given_up,
            total["useful"],
            total["wasted"],
            total["late"],
            self.stats.predictor_s,
        )
