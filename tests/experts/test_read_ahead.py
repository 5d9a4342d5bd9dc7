"""Records on their way before they have a slot: no idle link, and the same books."""

from __future__ import annotations

import random
from functools import partial

import pytest
import torch

from moe_serve.experts.device_transfer import DeviceTransfers
from moe_serve.experts.policies.base import CacheShape
from moe_serve.experts.read_ahead import ReadAhead, default_places
from tests.experts.offload_steps import LAYERS, NUM_EXPERTS, TOP_K, batch_of, ids_of
from tests.experts.test_device_offload import Harness
from tests.kernels.gpu.late_streams import LateStreams

ALL = torch.tensor([[e, (e + 1) % NUM_EXPERTS] for e in range(NUM_EXPERTS)])
RECORD_BYTES, NUM_PLACES = 8192, 3


def ahead_of(streams: LateStreams) -> tuple[ReadAhead, torch.Tensor]:
    """Return places before two layers of 8 records, and the records: each of its own number."""
    records = torch.arange(16, dtype=torch.uint8).view(16, 1).repeat(1, RECORD_BYTES)
    places = torch.zeros(NUM_PLACES, RECORD_BYTES, dtype=torch.uint8)
    return ReadAhead(streams, places, lambda layer, e: records[8 * layer + e], 2), records


def test_what_comes_next_comes_in_its_order_and_what_nobody_wants_makes_room() -> None:
    ahead, _ = ahead_of(LateStreams())
    ahead.move_on(0, [5, 2], [7, 6, 1])
    assert (ahead.held(0), ahead.held(1)) == ({5, 2}, {7})
    ahead.move_on(0, [2], [7, 6, 1])
    assert (ahead.held(0), ahead.held(1)) == ({2}, {7, 6})
    assert ahead.unused.tolist() == [1, 0]
    ahead.move_on(1, [6, 3, 1], [])
    assert (ahead.held(0), ahead.held(1)) == (set(), {6, 3, 1})
    assert ahead.unused.tolist() == [2, 1]
    assert ahead.report() == {"places": 3, "copied": 6, "used": 0, "unused": 3}


@pytest.mark.parametrize("seed", range(20))
def test_a_place_is_not_written_while_it_is_read_nor_read_before_it_is_whole(seed: int) -> None:
    streams = LateStreams(seed)
    chance = random.Random(seed)
    ahead, records = ahead_of(streams)
    slots = torch.zeros(4, RECORD_BYTES, dtype=torch.uint8)
    queue = DeviceTransfers(streams, slots, lambda layer, e: records[8 * layer + e], 512, ahead)
    free, held = [0, 1, 2, 3], {}
    seen = []
    for _ in range(60):
        wanted = [e for e in chance.sample(range(8), 5) if (0, e) not in held]
        ahead.move_on(0, wanted, [])
        if free and wanted:
            expert = wanted[0]
            slot = held[0, expert] = free.pop()
            is_guess = chance.random() < 0.5
            if is_guess:
                queue.guess(0, expert, slot)
                if chance.random() < 0.5:
                    queue.give_up(0, expert)
                if chance.random() < 0.5:
                    queue.hurry(0, expert)
            else:
                queue.demand(0, [(expert, slot)])
        for one in queue.ended(wait=chance.random() < 0.4):
            if one.is_whole:
                copy = torch.zeros(RECORD_BYTES, dtype=torch.uint8)
                slot = one.slot
                streams.kernels.launch(partial(copy.copy_, slots[slot]))
                seen.append((one.expert, copy))
            free.append(held.pop((0, one.expert)))
    while held:
        for one in queue.ended(wait=True):
            held.pop((0, one.expert))
    queue.close()
    streams.finish()
    assert len(seen) > 20
    assert ahead.num_used > 5
    for expert, copy in seen:
        assert set(copy.tolist()) == {expert}


def test_what_cannot_be_read_ahead_is_read_when_it_is_needed(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    harness = Harness("host", num_slots=4, in_place=None, num_places=3)
    assert harness.ahead is not None

    def fail(*_: object) -> None:
        raise RuntimeError("no luck")

    monkeypatch.setattr(harness.ahead._stream, "copy", fail)
    harness.step(dict.fromkeys(LAYERS, ALL))
    assert "was not read ahead: no luck" in caplog.text
    assert harness.ahead.report() == {"places": 3, "copied": 0, "used": 0, "unused": 0}
    assert harness.num_over_link >= 2 * NUM_EXPERTS
    monkeypatch.undo()
    harness.step(dict.fromkeys(LAYERS, ALL))
    assert harness.ahead.num_used > 0
    harness.compare()


def test_after_the_end_nothing_is_read_any_more() -> None:
    streams = LateStreams(is_still=True)
    ahead, records = ahead_of(streams)
    queue = DeviceTransfers(streams, records[:2].clone(), lambda _, e: records[e], ahead=ahead)
    ahead.move_on(0, [1, 2, 3], [])
    queue.close()
    there = [set(place.record.tolist()) for place in ahead._held.values()]
    assert there == [{1}, {2}, {3}]


def test_the_next_layer_s_experts_are_on_their_way_before_its_attention() -> None:
    harness = Harness("late", num_slots=4, in_place=None, num_places=3)
    assert harness.ahead is not None
    with harness.experts.step(batch_of(NUM_EXPERTS)):
        harness.run(LAYERS[0], ALL)
        assert len(harness.ahead.held(1)) == 3
        before = harness.num_over_link
        assert before == NUM_EXPERTS + 3
        harness.run(LAYERS[1], ALL)
    assert harness.num_over_link == 2 * NUM_EXPERTS, "each came over the link once"
    assert harness.ahead.report()["unused"] == 0
    harness.compare()


def test_a_layer_that_needs_few_does_not_ask_for_the_next_one() -> None:
    harness = Harness("late", num_slots=4, in_place=None, num_places=3)
    assert harness.ahead is not None
    with harness.experts.step(batch_of(2)):
        harness.run(LAYERS[0], ids_of(0, 1, 2, 3))
        assert harness.ahead.num_copied == 0
        harness.run(LAYERS[1], ids_of(0, 1, 2, 3))
    harness.compare()


def test_what_came_for_nothing_is_told() -> None:
    harness = Harness("host", num_slots=4, in_place=None, num_places=4)
    with harness.experts.step(batch_of(NUM_EXPERTS)):
        harness.run(LAYERS[0], ALL)
        harness.run(LAYERS[1], ids_of(7, 6))
    harness.step(dict.fromkeys(LAYERS, ids_of(0, 1)))
    report = harness.experts.report()
    told = report["read_ahead"]
    assert told["copied"] == told["used"] + told["unused"]
    assert told["unused"] > 0
    assert report["total"]["link_bytes"] == harness.num_over_link * harness.experts.slot_bytes
    assert report["total"]["link_bytes"] > report["total"]["bytes"]


def test_hits_misses_and_who_leaves_are_what_they_are_without() -> None:
    books = []
    for num_places in (0, 3):
        harness = Harness("host", num_slots=5, in_place=None, num_places=num_places)
        chance = random.Random(1)
        for _ in range(30):
            num_tokens = chance.choice((1, 2, 30))
            routings = {
                layer: torch.tensor(
                    [chance.sample(range(NUM_EXPERTS), TOP_K) for _ in range(num_tokens)]
                )
                for layer in LAYERS
            }
            harness.step(routings)
        books.append((harness.cache.counters.per_layer(), harness.cache.slot_of_expert.tolist()))
        assert (harness.ahead is not None) == (num_places > 0)
        if harness.ahead is not None:
            assert harness.ahead.num_used > 20
    assert books[0] == books[1]


def test_what_is_on_the_device_is_not_run_on_the_host() -> None:
    harness = Harness("host", num_slots=2, in_place=True, num_places=4)
    assert harness.ahead is not None
    harness.ahead.move_on(0, [1], [])
    with harness.experts.step(batch_of(1)):
        harness.run(LAYERS[0], ids_of(0, 1))
        harness.run(LAYERS[1], ids_of(0, 1))
    counters = harness.cache.counters
    assert counters.computed_on_cpu.tolist() == [1, 2]
    assert counters.fetched.tolist() == [1, 0]
    harness.compare()


def test_places_are_a_small_share_of_the_slots() -> None:
    qwen = CacheShape(num_layers=48, num_experts=128, slots_per_layer=32, total_slots=48 * 32)
    record = 3 * 2048 * 768 * 2
    assert default_places(qwen, record) == 2**29 // record
    assert default_places(qwen.with_slots(13), record) == 13 * 48 // 16
    few = CacheShape(num_layers=2, num_experts=8, slots_per_layer=4, total_slots=8)
    assert default_places(few, record) == 0
    most = CacheShape(num_layers=48, num_experts=128, slots_per_layer=127, total_slots=48 * 127)
    assert default_places(most, record) == 2
