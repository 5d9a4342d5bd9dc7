"""Experts in slots: right bits whatever is missing, and books that agree after every step."""

from __future__ import annotations

import random
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from moe_serve.errors import CapacityError, StoreError
from moe_serve.experts.cache import ExpertCache
from moe_serve.experts.offload import HostTier, OffloadedExperts
from moe_serve.experts.policies import lru
from moe_serve.experts.policies.base import CacheShape
from moe_serve.experts.records import ExpertArena
from moe_serve.experts.slots import FixedSlots
from moe_serve.experts.split import MissPlanner
from moe_serve.experts.transfer import TransferQueue
from moe_serve.kernels.forward.base import Stopped, Stops
from moe_serve.kernels.moe.base import ExpertTable
from moe_serve.types import Routing
from tests.experts.arenas import random_experts
from tests.experts.offload_steps import (
    HIDDEN,
    LAYERS,
    NUM_EXPERTS,
    SIZE,
    TOP_K,
    batch_of,
    costs_of,
    ids_of,
    inbox_of,
)
from tests.kernels.implementations import EACH, IMPLEMENTATIONS, kernels
from tests.kernels.row_independence import same_bits


class HostSource:
    """Reads from records in memory. errors: what the next read of an expert raises."""

    def __init__(self, records: Tensor) -> None:
        self._records = records
        self.errors: dict[int, Exception] = {}
        self.num_reads = 0
        self.is_closed = False

    def record_bytes(self, layer: int) -> int:
        return int(self._records.shape[1])

    def read_chunk(self, layer: int, expert: int, into: Tensor, begin: int, end: int) -> None:
        self.num_reads += 1
        if expert in self.errors:
            raise self.errors.pop(expert)
        into[begin:end] = self._records[layer * NUM_EXPERTS + expert, begin:end]

    def verify(self, layer: int, expert: int, record: Tensor) -> None:
        assert torch.equal(record, self._records[layer * NUM_EXPERTS + expert])

    def close(self) -> None:
        self.is_closed = True


class Harness:
    """Offloaded experts of two layers, beside what all of them in memory give."""

    def __init__(
        self,
        name: str = IMPLEMENTATIONS[-1],
        num_slots: int = 3,
        in_place: bool | None = None,
        clock: Callable[[], float] | None = None,
    ) -> None:
        """in_place: None: there is no host tier."""
        chosen = kernels(name)
        total = num_slots * len(LAYERS)
        record_bytes = chosen.record_bytes(HIDDEN, SIZE, torch.float32)
        self.arena = ExpertArena(
            LAYERS, NUM_EXPERTS, HIDDEN, SIZE, torch.float32, record_bytes, total
        )
        weights = random_experts(len(LAYERS) * NUM_EXPERTS, HIDDEN, SIZE, torch.float32)
        for index, layer in enumerate(LAYERS):
            part = slice(index * NUM_EXPERTS, (index + 1) * NUM_EXPERTS)
            for plain, values in zip(self.arena.plain_weights(layer), weights, strict=True):
                plain.copy_(values[part])
        self.arena.pack(chosen.pack_records_, chosen.record_layout)
        shape = CacheShape(
            num_layers=len(LAYERS), num_experts=NUM_EXPERTS, slots_per_layer=num_slots,
            total_slots=total,
        )  # fmt: skip
        record_bytes = self.arena.record_bytes
        self.cache = ExpertCache(shape, lru.build(shape, None), TOP_K, record_bytes=record_bytes)
        self.source = HostSource(self.arena.records)
        self.queue = TransferQueue(self.source, self.arena.slots, num_threads=2)
        slots = torch.from_numpy(self.cache.slot_of_expert)
        tables = {
            layer: ExpertTable(
                self.arena.slots, slots[index], torch.zeros(NUM_EXPERTS, dtype=torch.int64),
                HIDDEN, SIZE, torch.float32,
            )
            for index, layer in enumerate(LAYERS)
        }  # fmt: skip
        host = None
        if in_place is not None:
            host = HostTier(total, NUM_EXPERTS, MissPlanner("split", costs_of(in_place)))
        given: dict[str, Any] = {} if clock is None else {"clock": clock}
        self._plain_moe = chosen.moe
        self.moe: Any = chosen.moe
        self.experts = OffloadedExperts(
            lambda *args: self.moe(*args), tables, self.cache, self.queue,
            FixedSlots(self.arena.slots, total), host, **given,
        )  # fmt: skip

    def step(self, routings: Mapping[int, Tensor]) -> None:
        """Run a step layer by layer, and compare all bits."""
        num_tokens = next(iter(routings.values())).shape[0]
        with self.experts.step(batch_of(num_tokens)):
            for layer in LAYERS:
                self.run(layer, routings[layer])

    def run(self, layer: int, ids: Tensor) -> None:
        hidden = torch.randn(ids.shape[0], HIDDEN)
        inbox = inbox_of(hidden, ids)
        routing = Routing(ids, torch.ones(ids.shape))
        got = self.experts.run(layer, inbox, routing, hidden)
        all_there = self.arena.table(layer)
        want = self._plain_moe(inbox.rows, inbox.row_of_pair, inbox.counts, all_there)
        assert same_bits(got, want)

    def check_books(self) -> None:
        """Between steps a kernel sees what the cache holds, and nothing else."""
        num_slots = self.cache.shape.total_slots
        for index in range(len(LAYERS)):
            slots = self.cache.slot_of_expert[index]
            assert np.flatnonzero(slots >= 0).tolist() == self.cache.residents(index)
            assert slots.max() < num_slots
        used = self.cache.slot_of_expert[self.cache.slot_of_expert >= 0].tolist()
        assert len(set(used)) == len(used)


@pytest.fixture
def make() -> Iterator[Callable[..., Harness]]:
    made: list[Harness] = []

    def one(*args: Any, **options: Any) -> Harness:
        made.append(Harness(*args, **options))
        return made[-1]

    yield one
    for harness in made:
        harness.experts.close()
        assert harness.source.is_closed


Make = Callable[..., Harness]


@EACH
@pytest.mark.parametrize("num_slots", [2, 3, 5, 8])
@pytest.mark.parametrize("in_place", [None, True, False])
def test_any_step_gives_the_bits_of_all_in_memory(
    make: Make, name: str, num_slots: int, in_place: bool | None
) -> None:
    harness = make(name, num_slots, in_place)
    chance = random.Random(num_slots)
    for _ in range(25):
        num_tokens = chance.choice((1, 1, 2, 5, 30))
        harness.step(
            {
                layer: torch.tensor(
                    [chance.sample(range(NUM_EXPERTS), TOP_K) for _ in range(num_tokens)]
                )
                for layer in LAYERS
            }
        )
        harness.check_books()
    total = harness.experts.report()["total"]
    assert total["hits"] + total["misses"] > 0
    assert (total["computed_on_cpu"] > 0) == (in_place is True)
    assert (total["fetched"] > 0) == (in_place is not True)


def test_each_expert_is_served_once_and_the_last_one_says_so(make: Make) -> None:
    harness = make(num_slots=3)
    for ids in (ids_of(0, 1), ids_of(0, 1), ids_of(0, 1, 2, 3, 4, 5, 6, 7), ids_of(5, 2)):
        with harness.experts.step(batch_of(ids.shape[0])):
            for layer in LAYERS:
                counts = ids.flatten().bincount(minlength=NUM_EXPERTS)
                stopped = Stopped(
                    layer=layer, expert_ids=ids.numpy(), weights=np.ones(ids.shape, np.float32),
                    counts=counts.numpy(), residual=torch.zeros(ids.shape[0], HIDDEN),
                )  # fmt: skip
                harness.experts._notes.ids[layer] = ids  # type: ignore[union-attr]
                served: list[int] = []
                lasts: list[bool] = []
                for run in harness.experts.serve(stopped):
                    only = run.only
                    here = counts.nonzero().flatten() if only is None else only.nonzero().flatten()
                    assert bool((harness.experts.layers[layer].slot_of_expert[here] >= 0).all())
                    served += here.tolist()
                    lasts.append(run.is_last)
                assert sorted(served) == counts.nonzero().flatten().tolist()
                assert lasts == [False] * (len(lasts) - 1) + [True]
        harness.check_books()


def test_a_load_that_fails_ends_the_step_and_the_next_one_is_whole(make: Make) -> None:
    harness = make(num_slots=3)
    harness.step(dict.fromkeys(LAYERS, ids_of(0, 1)))
    for error, kind, says in (
        (StoreError("the file is cut off"), StoreError, "^the file is cut off"),
        (OSError(5, "Input/output error"), StoreError, "could not be brought in: .*Input/output"),
        (MemoryError("none left"), StoreError, "could not be brought in: none left"),
    ):
        harness.source.errors[5] = error
        with pytest.raises(kind, match=says):
            harness.step(dict.fromkeys(LAYERS, ids_of(5, 6)))
        harness.check_books()
        harness.step(dict.fromkeys(LAYERS, ids_of(5, 6)))
        harness.step(dict.fromkeys(LAYERS, ids_of(0, 1)))
        harness.step(dict.fromkeys(LAYERS, ids_of(2, 3)))
        harness.check_books()


@pytest.mark.parametrize("in_place", [None, True, False])
@pytest.mark.parametrize("call", [1, 2])
def test_books_agree_after_a_step_that_was_cut_off(
    make: Make, in_place: bool | None, call: int
) -> None:
    """Also while the exception, and with it the step's frames, is still held by somebody."""
    harness = make(num_slots=4, in_place=in_place)
    harness.step(dict.fromkeys(LAYERS, ids_of(0, 1)))
    moe = harness.moe
    left = [call]

    def interrupted(*args: Any) -> Tensor:
        left[0] -= 1
        if left[0] == 0:
            raise KeyboardInterrupt
        out: Tensor = moe(*args)
        return out

    harness.moe = interrupted
    with pytest.raises(KeyboardInterrupt) as caught:
        harness.step(dict.fromkeys(LAYERS, ids_of(0, 5, 6, 7)))
    harness.moe = moe
    harness.check_books()
    harness.step(dict.fromkeys(LAYERS, ids_of(5, 6)))
    held = caught.value.__traceback__
    assert held is not None
    del caught, held
    harness.check_books()
    for ids in (ids_of(6, 7), ids_of(5, 0), ids_of(1, 2)):
        harness.step(dict.fromkeys(LAYERS, ids))
        harness.check_books()


def test_waits_are_counted_by_layer(make: Make) -> None:
    now = [0.0]

    def clock() -> float:
        now[0] += 1.0
        return now[0]

    harness = make(num_slots=8, clock=clock)
    harness.step({1: ids_of(0, 1), 3: ids_of(0, 1)})
    stalls = list(harness.experts.stats.stall_s)
    assert min(stalls) >= 1.0
    harness.step({1: ids_of(0, 1), 3: ids_of(0, 2)})
    assert harness.experts.stats.stall_s == [stalls[0], stalls[1] + 1.0]


def test_the_report_adds_up(make: Make) -> None:
    harness = make(num_slots=3)
    harness.step({1: ids_of(0, 1, 0, 1), 3: ids_of(0, 1, 2, 3)})
    harness.step({1: ids_of(0, 1), 3: ids_of(3, 4)})
    report = harness.experts.report()
    assert report["per_layer"]["hits"] == [2, 0]
    assert report["per_layer"]["misses"] == [2, 6]
    assert report["total"]["misses"] == report["total"]["fetched"] == 8
    assert report["resident"] == [2, 3]
    assert (report["slots"], report["slots_per_layer"], report["num_experts"]) == (6, 3, 8)
    assert (report["events"], report["streamed_events"]) == (4, 1)
    assert report["per_layer"]["evictions"] == [0, 3]
    size = harness.arena.record_bytes
    assert report["per_layer"]["bytes"] == report["per_layer"]["disk_bytes"] == [2 * size, 6 * size]
    assert report["total"]["link_bytes"] == report["total"]["host_bytes"] == 0
    assert harness.experts.resident() == [
        [int(expert in harness.cache.residents(index)) for expert in range(NUM_EXPERTS)]
        for index in range(len(LAYERS))
    ]
    assert [sum(layer) for layer in harness.experts.resident()] == [2, 3]
    assert report["union_over_capacity"] == pytest.approx((2 + 4 + 2 + 2) / 3 / 4)


def test_resize_keeps_what_is_worth_keeping_and_refuses_what_cannot_be(make: Make) -> None:
    harness = make(num_slots=4)
    harness.step(dict.fromkeys(LAYERS, ids_of(0, 1, 2, 3)))
    harness.step(dict.fromkeys(LAYERS, ids_of(1, 3)))
    shape = harness.cache.shape
    for per_layer, says in ((5, "there is room for 8"), (1, "a token uses 2 experts")):
        with pytest.raises(CapacityError, match=says):
            harness.experts.resize(shape.with_slots(per_layer))
        assert harness.cache.shape == shape
        assert harness.cache.residents(0) == [0, 1, 2, 3]
    harness.experts.resize(shape.with_slots(2))
    harness.check_books()
    assert [harness.cache.residents(index) for index in (0, 1)] == [[1, 3]] * 2
    reads = harness.source.num_reads
    harness.step(dict.fromkeys(LAYERS, ids_of(1, 3)))
    assert harness.source.num_reads == reads, "what was moved is whole where it is now"
    harness.experts.resize(shape)
    harness.step(dict.fromkeys(LAYERS, ids_of(1, 3, 5, 7)))
    harness.check_books()


def test_preloaded_experts_are_hits(make: Make) -> None:
    harness = make(num_slots=3)
    harness.experts.preload([(0, 4), (1, 4), (0, 5), (1, 6), (0, 1), (0, 2)])
    while harness.cache.num_loading:
        harness.experts._collect(harness.queue.ended(wait=True))
    assert harness.cache.residents(0) == [1, 4, 5], "as many as there are free slots"
    harness.step({1: ids_of(4, 5), 3: ids_of(4, 6)})
    assert harness.experts.report()["total"]["misses"] == 0


def test_a_fused_pass_is_stopped_where_something_is_missing(make: Make) -> None:
    harness = make()
    assert harness.experts.stops is Stops.MISSING
    assert not harness.experts.is_forced
    assert harness.experts.ids is None
    with harness.experts.step(batch_of(3)):
        assert harness.experts.ids is not None
        assert harness.experts.weights is not None
        assert harness.experts.ids.shape == harness.experts.weights.shape == (4, 3, TOP_K)
        harness.run(1, ids_of(0, 1, 0, 1, 0, 2))
        assert harness.experts.ids[1].tolist() == [[0, 1], [0, 1], [0, 2]]
        harness.run(3, ids_of(0, 1, 0, 1, 0, 2))
