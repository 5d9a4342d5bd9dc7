"""Guesses: of absent experts only, above the price, within bounds, and off where they lose."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from typing import Any

import numpy as np
import pytest
import torch

from moe_serve.experts import prefetch
from moe_serve.experts.cache import ExpertCache
from moe_serve.experts.calibration import Calibration
from moe_serve.experts.policies import lru
from moe_serve.experts.policies.base import CacheShape
from moe_serve.experts.prefetch import MAX_DISTANCE, LinkTimes, Prefetcher
from moe_serve.experts.transfer import Transfer
from moe_serve.kernels.forward.base import Stopped
from moe_serve.predictors.base import START, Observation, Predictor
from moe_serve.types import ForwardBatch

NUM_LAYERS, NUM_EXPERTS, TOP_K = 5, 8, 2
Array = np.ndarray[Any, Any]


class Told(Predictor):
    """A predictor that says what it was told to, and keeps what it was shown."""

    def __init__(self) -> None:
        self.says: dict[int, dict[int, float]] = {}
        self.seen: list[Observation] = []
        self.asked: list[tuple[int, list[int]]] = []

    def observe(self, observation: Observation) -> None:
        self.seen.append(observation)

    def predict(self, layer: int, sequence_ids: Sequence[int]) -> Array:
        self.asked.append((layer, list(sequence_ids)))
        probabilities = np.full(NUM_EXPERTS, 0.01, np.float32)
        for expert, probability in self.says.get(layer, {}).items():
            probabilities[expert] = probability
        return probabilities


class Hidden(Told):
    needs = frozenset({"hidden"})


class Queue:
    """Transfers that arrive when they are told to."""

    def __init__(self) -> None:
        self.guesses: list[tuple[int, int, int]] = []
        self.given_up: list[tuple[int, int]] = []

    def demand(self, layer: int, loads: Sequence[tuple[int, int]]) -> None:
        raise AssertionError("a guess is no demand")

    def guess(self, layer: int, expert: int, slot: int) -> None:
        self.guesses.append((layer, expert, slot))

    def hurry(self, layer: int, expert: int) -> None:
        raise AssertionError("that is not for the prefetcher")

    def give_up(self, layer: int, expert: int) -> bool:
        self.given_up.append((layer, expert))
        return True

    def ended(self, wait: bool = False) -> list[Transfer]:
        raise AssertionError("that is not for the prefetcher")

    def is_known(self, layer: int, expert: int) -> bool:
        raise AssertionError("not asked by a prefetcher")

    def arrivals(self, layer: int, experts: Sequence[int]) -> None:
        raise AssertionError("not asked by a prefetcher")

    @property
    def is_busy(self) -> bool:
        raise AssertionError("not asked by a prefetcher")

    @property
    def num_guesses(self) -> int:
        return len(self.guesses)

    def forget(self) -> None:
        raise AssertionError("that is not for the prefetcher")

    def close(self) -> None:
        raise AssertionError("that is not for the prefetcher")


class Sure(Calibration):
    """A calibration that takes predictions for what they say; keeps what was recorded."""

    def __init__(self) -> None:
        super().__init__(MAX_DISTANCE)
        self.recorded: list[tuple[set[int], list[float], list[bool]]] = []

    def record(self, distances: Array | int, probabilities: Array, was_used: Array) -> None:
        distance = set(np.broadcast_to(distances, probabilities.shape).tolist())
        self.recorded.append((distance, probabilities.tolist(), was_used.tolist()))

    def threshold(self, distance: int, precision: float) -> float | None:
        return precision


class Parts:
    """A prefetcher and what it was given."""

    def __init__(self, num_slots: int = 6, kind: str = "on", **options: Any) -> None:
        shape = CacheShape(
            num_layers=NUM_LAYERS, num_experts=NUM_EXPERTS, slots_per_layer=num_slots,
            total_slots=num_slots * NUM_LAYERS,
        )  # fmt: skip
        self.cache = ExpertCache(shape, lru.build(shape, None), TOP_K)
        self.predictor = options.pop("predictor", Told())
        self.queue = Queue()
        self.calibration = options.pop("calibration", Sure())
        link = options.pop("link", LinkTimes(load_s=1e-3, chunk_s=1e-4))
        self.prefetcher = Prefetcher(
            self.predictor, self.cache, self.queue, self.calibration, link, kind, **options
        )
        self.step = -1

    def start(self, sequences: Sequence[int] = (4,)) -> None:
        self.step += 1
        rows = torch.arange(len(sequences))
        batch = ForwardBatch(
            token_ids=rows + 50, positions=rows, sequence_ids=torch.tensor(sequences),
            query_lens=(1,) * len(sequences), context_lens=(1,) * len(sequences),
            prompt_lens=(1,) * len(sequences), slot_mapping=(), block_tables=(), block_size=16,
            sample_rows=rows,
        )  # fmt: skip
        self.prefetcher.start_step(self.step, batch)

    def event(self, layer: int, *experts: int) -> None:
        """Have a layer reached, and its event served."""
        counts = np.zeros(NUM_EXPERTS, np.int64)
        counts[list(experts)] = 1
        stopped = Stopped(
            layer=layer, expert_ids=np.array([experts]),
            weights=np.full((1, len(experts)), 0.5, np.float32), counts=counts,
            residual=torch.full((1, 4), 2.0, dtype=torch.bfloat16),
        )  # fmt: skip
        event = self.cache.begin(self.step, layer, sorted(experts))
        self.prefetcher.give_up(layer)
        for expert in event.arriving:
            self.cache.loaded(layer, expert)
        self.queue.guesses = [guess for guess in self.queue.guesses if guess[0] != layer]
        for number, wave in enumerate(self.cache.waves(event)):
            if number == 0:
                self.prefetcher.look_ahead(layer, stopped)
            for expert, _ in wave.loads:
                self.cache.loaded(layer, expert)
        self.cache.end(event)

    def arrive(self) -> None:
        """Have all guesses arrive."""
        for layer, expert, _ in self.queue.guesses:
            self.cache.loaded(layer, expert)
        self.queue.guesses.clear()


def guessed(parts: Parts) -> list[tuple[int, int]]:
    return [(layer, expert) for layer, expert, _ in parts.queue.guesses]


def test_the_surest_that_are_absent_are_guessed_in_order() -> None:
    parts = Parts()
    parts.start()
    parts.event(0, 0, 1)
    parts.predictor.says = {1: {2: 0.9, 3: 0.99, 4: 0.5, 5: 0.95}}
    parts.event(0, 0, 1)
    assert guessed(parts) == [(1, 3), (1, 5), (1, 2)], "what is below the price is not"
    assert all(slot >= 0 for _, _, slot in parts.queue.guesses)
    assert parts.cache.guesses(1) == [2, 3, 5]
    parts.arrive()
    parts.event(0, 0, 1)
    assert guessed(parts) == [], "what is there is no candidate"
    assert parts.prefetcher.report()["issued"] == 3


def test_what_is_known_before_layer_0_is_guessed_at_the_start() -> None:
    parts = Parts(distances=(1, 2))
    parts.predictor.says = {0: {6: 0.9}, 1: {7: 0.9}}
    parts.start()
    assert guessed(parts) == [(0, 6), (1, 7)]
    seen = parts.predictor.seen[0]
    assert seen.layer == START
    assert seen.expert_ids.shape == (1, 0)
    assert seen.token_ids is not None
    assert seen.token_ids.tolist() == [50]


def test_layers_at_the_distances_are_foretold_for_the_step_s_sequences() -> None:
    parts = Parts(distances=(1, 2, 4))
    parts.start([9, 3, 9, 3])
    parts.predictor.asked.clear()
    parts.event(2, 0, 1)
    assert parts.predictor.asked == [(3, [9, 3]), (4, [9, 3])], "there is no layer 6"


def test_no_more_are_under_way_than_may_be() -> None:
    parts = Parts(num_slots=8, max_guesses=3, distances=(1, 2))
    everything = dict.fromkeys(range(NUM_EXPERTS), 0.9)
    parts.predictor.says = dict.fromkeys(range(NUM_LAYERS), everything)
    parts.start()
    assert len(guessed(parts)) == 3
    parts.event(0, 0, 1)
    assert len(guessed(parts)) == 3
    parts.arrive()
    parts.event(1, 0, 1)
    assert len(guessed(parts)) == 3


def test_a_guess_displaces_nothing_that_is_as_likely() -> None:
    parts = Parts(num_slots=2)
    parts.start()
    parts.event(1, 0, 1)
    parts.predictor.says = {1: {0: 0.95, 1: 0.01, 2: 0.9, 3: 0.89}}
    parts.event(0, 0, 1)
    assert guessed(parts) == [(1, 2)]
    assert parts.cache.residents(1) == [0], "the less likely one left"
    assert parts.cache.guesses(1) == [2]


def test_guesses_for_a_layer_that_was_reached_are_given_up() -> None:
    parts = Parts()
    parts.predictor.says = {1: {2: 0.9, 3: 0.9}}
    parts.start()
    parts.event(0, 0, 1)
    assert guessed(parts) == [(1, 2), (1, 3)]
    parts.prefetcher.give_up(1)
    assert sorted(parts.queue.given_up) == [(1, 2), (1, 3)]
    assert parts.prefetcher.report()["given_up"] == 2


def test_what_was_foretold_is_settled_for_those_that_were_candidates() -> None:
    calibration = Sure()
    parts = Parts(calibration=calibration, distances=(1,))
    parts.start()
    parts.event(1, 0, 1)  # 0 and 1 are there from now on
    calibration.recorded.clear()
    parts.predictor.says = {1: {2: 0.5}}
    parts.event(0, 4, 5)
    parts.event(1, 0, 2)
    (distance, probabilities, outcomes) = calibration.recorded[-1]
    assert distance == {1}
    assert probabilities == pytest.approx([0.5] + [0.01] * 5)
    assert outcomes == [True] + [False] * 5


def test_hidden_states_are_shown_to_who_needs_them() -> None:
    for kind, is_shown in ((Told, False), (Hidden, True)):
        parts = Parts(predictor=kind())
        parts.start()
        parts.event(0, 3, 1)
        seen = parts.predictor.seen[-1]
        assert (seen.hidden is not None) == is_shown
        if is_shown:
            assert seen.hidden.dtype == np.float32
            assert seen.hidden.tolist() == [[2.0] * 4]
        assert seen.expert_ids.tolist() == [[3, 1]]
        assert seen.sequence_ids.tolist() == [4]


@pytest.mark.parametrize(
    ("load_s", "chunk_s", "least"), [(1e-3, 1e-3, 0.6), (1e-3, 1e-6, 0.6), (1e-3, 4e-3, 0.74)]
)
def test_the_price_follows_from_measured_times(load_s: float, chunk_s: float, least: float) -> None:
    parts = Parts(link=LinkTimes(load_s=load_s, chunk_s=chunk_s))
    parts.start()
    price = parts.prefetcher.report()["break_even_precision"]
    assert price >= least
    assert price == pytest.approx(max(0.6, (chunk_s / 2 + load_s) / (chunk_s / 2 + 2 * load_s)))


def lose(parts: Parts, num_steps: int) -> None:
    """Have guesses arrive that are not used, and leave."""
    for _ in range(num_steps):
        parts.start()
        if parts.prefetcher.is_on:
            parts.predictor.says = {1: {2 + parts.step % 6: 0.9}}
        parts.event(0, 0, 1)
        parts.arrive()
        parts.event(1, 0, 1)


def test_where_it_loses_it_pauses_says_so_and_tries_again(
    caplog: pytest.LogCaptureFixture,
) -> None:
    caplog.set_level(logging.INFO)
    parts = Parts(num_slots=3, kind="auto", distances=(1,))
    lose(parts, 70)
    assert not parts.prefetcher.is_on
    assert "prefetch off for 256 steps" in caplog.text
    asked, issued = len(parts.predictor.asked), parts.prefetcher.report()["issued"]
    lose(parts, 180)
    assert not parts.prefetcher.is_on
    assert len(parts.predictor.asked) == asked, "while it is off it costs nothing"
    assert parts.prefetcher.report()["issued"] == issued
    lose(parts, 80)
    assert parts.prefetcher.is_on, "it is tried again"
    lose(parts, 80)
    assert not parts.prefetcher.is_on
    assert "prefetch off for 512 steps" in caplog.text, "for longer each time"
    assert parts.prefetcher.report()["paused"] == 2


def test_told_to_be_on_it_never_pauses() -> None:
    parts = Parts(num_slots=3, kind="on", distances=(1,))
    lose(parts, 200)
    assert parts.prefetcher.is_on
    assert parts.prefetcher.report()["paused"] == 0


def test_where_it_gains_it_stays_on() -> None:
    parts = Parts(num_slots=3, kind="auto", distances=(1,), link=LinkTimes(load_s=1.0, chunk_s=0.1))
    for _ in range(200):
        parts.start()
        experts = (2 * (parts.step % 4), 2 * (parts.step % 4) + 1)
        parts.predictor.says = {1: dict.fromkeys(experts, 0.9)}
        parts.event(0, 0, 1)
        parts.arrive()
        parts.event(1, *experts)
    assert parts.prefetcher.is_on
    total = parts.cache.counters.total()
    assert total["useful"] > 300
    assert total["wasted"] == 0


def test_once_much_is_known_guesses_are_counted_in_one_step_of_four(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(prefetch, "_COUNTED_TO_SETTLE", 1)
    calibration = Calibration(MAX_DISTANCE)
    parts = Parts(calibration=calibration, distances=(1,))
    counted = []
    for _ in range(12):
        parts.start()
        before = calibration.num_recorded
        parts.event(0, 0, 1)
        parts.event(1, 2, 3)
        counted.append(calibration.num_recorded > before)
    assert counted[0], "at first in each"
    assert 3 <= sum(counted) <= 4
