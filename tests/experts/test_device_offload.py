"""Experts in a device's slots: right bits though kernels and copies run late, and true books."""

from __future__ import annotations

import random
import sys
from collections.abc import Mapping
from types import FrameType
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from moe_serve.experts.cache import ExpertCache
from moe_serve.experts.device_transfer import DeviceTransfers
from moe_serve.experts.host_experts import HostExperts
from moe_serve.experts.offload import OffloadedExperts
from moe_serve.experts.policies import lru
from moe_serve.experts.policies.base import CacheShape
from moe_serve.experts.read_ahead import ReadAhead
from moe_serve.experts.records import ExpertArena
from moe_serve.experts.slots import DeviceSlots
from moe_serve.experts.split import MissPlanner
from moe_serve.kernels.forward.base import Stopped
from moe_serve.kernels.gpu.streams import Streams, streams
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
from tests.kernels.gpu.late_streams import LateStreams
from tests.kernels.implementations import kernels
from tests.kernels.row_independence import same_bits

KINDS = ("host", "late", pytest.param("cuda", marks=pytest.mark.gpu))
# of another order of sums than the host's
MOST_APART = 2e-5


class Harness:
    """Offloaded experts of two layers in a device's slots, beside all of them in host memory."""

    def __init__(
        self,
        kind: str,
        num_slots: int,
        in_place: bool | None,
        seed: int = 0,
        num_places: int = 0,
    ) -> None:
        """in_place: None: nothing runs on the host; num_places: for what is read ahead."""
        self.late = LateStreams(seed) if kind == "late" else None
        device = torch.device("cuda" if kind == "cuda" else "cpu")
        self.streams: Streams = self.late or streams(device)
        self.is_exact = device.type == "cpu"
        plain = kernels("reference")
        self._plain_moe = plain.moe
        self._moe = plain.moe if self.is_exact else kernels("triton-exact").moe
        total = num_slots * len(LAYERS)
        record_bytes = plain.record_bytes(HIDDEN, SIZE, torch.float32)
        self.arena = ExpertArena(LAYERS, NUM_EXPERTS, HIDDEN, SIZE, torch.float32, record_bytes)
        weights = random_experts(len(LAYERS) * NUM_EXPERTS, HIDDEN, SIZE, torch.float32)
        for index, layer in enumerate(LAYERS):
            part = slice(index * NUM_EXPERTS, (index + 1) * NUM_EXPERTS)
            for own, values in zip(self.arena.plain_weights(layer), weights, strict=True):
                own.copy_(values[part])
        self.arena.pack(plain.pack_records_, plain.record_layout)
        pinned = self.streams.pin(self.arena.records)
        self.slots = DeviceSlots(total, self.arena.record_bytes, device)

        def record_of(layer: int, expert: int) -> Tensor:
            self.num_over_link += 1
            return pinned[layer * NUM_EXPERTS + expert]

        self.num_over_link = 0
        self.ahead: ReadAhead | None = None
        if num_places:
            places = DeviceSlots(num_places, self.arena.record_bytes, device).records
            self.ahead = ReadAhead(self.streams, places, record_of, len(LAYERS))
        self.queue = DeviceTransfers(self.streams, self.slots.records, record_of, 4096, self.ahead)
        shape = CacheShape(
            num_layers=len(LAYERS), num_experts=NUM_EXPERTS, slots_per_layer=num_slots,
            total_slots=total,
        )  # fmt: skip
        self.cache = ExpertCache(
            shape, lru.build(shape, None), TOP_K, record_bytes=self.arena.record_bytes
        )
        slot_of_expert = torch.from_numpy(self.cache.slot_of_expert)
        self.tables = {
            layer: ExpertTable(
                self.slots.records, slot_of_expert[index],
                torch.zeros(NUM_EXPERTS, dtype=torch.int64, device=device),
                HIDDEN, SIZE, torch.float32,
            )
            for index, layer in enumerate(LAYERS)
        }  # fmt: skip
        planner = None if in_place is None else MissPlanner("split", costs_of(in_place))
        host_tables = {index: self.arena.table(layer) for index, layer in enumerate(LAYERS)}
        self.host = HostExperts(host_tables, planner, self.streams)
        self.experts = OffloadedExperts(
            self._launch, self.tables, self.cache, self.queue, self.slots, self.host,
            ahead=self.ahead,
        )  # fmt: skip
        self.launches: list[list[int]] = []
        self._results: list[tuple[Tensor, Tensor]] = []

    def _launch(
        self, rows: Tensor, row_of_pair: Tensor, counts: Tensor, table: ExpertTable,
        only: Tensor | None, out: Tensor,
    ) -> Tensor:  # fmt: skip
        """Launch the kernel: what it reads of the host's was copied by then."""
        chosen = counts if only is None else only
        self.launches.append(chosen.cpu().nonzero().flatten().tolist())
        arguments = (rows, row_of_pair, counts, table, only, out)
        if self.late is None:
            self._moe(*arguments)
        else:
            self.late.copies.append(("moe", 0))
            self.late.kernels.launch(lambda: self._moe(*arguments))
        return out

    def step(self, routings: Mapping[int, Tensor]) -> None:
        num_tokens = next(iter(routings.values())).shape[0]
        with self.experts.step(batch_of(num_tokens)):
            for layer in LAYERS:
                self.run(layer, routings[layer])

    def run(self, layer: int, ids: Tensor) -> None:
        hidden = torch.randn(ids.shape[0], HIDDEN)
        inbox = inbox_of(hidden, ids)
        want = self._plain_moe(inbox.rows, inbox.row_of_pair, inbox.counts, self.arena.table(layer))
        device = self.streams.device
        routing = Routing(ids.to(device), torch.ones(ids.shape, device=device))
        got = self.experts.run(layer, _moved(inbox, device), routing, hidden.to(device))
        self._results.append((got, want))

    def guess(self, layer: int, expert: int) -> None:
        slot = self.cache.guess(layer, expert)
        if slot is not None:
            self.queue.guess(layer, expert, slot)

    def compare(self) -> None:
        """Let all that was launched run, and compare."""
        if self.late is not None:
            self.late.finish()
        for got, want in self._results:
            if self.is_exact:
                assert same_bits(got, want)
            else:
                assert (got.cpu() - want).abs().max() <= MOST_APART
        self._results.clear()


def _moved(inbox: Any, device: torch.device) -> Any:
    parts = (inbox.rows, inbox.row_of_pair, inbox.counts)
    return type(inbox)(*(part.to(device) for part in parts))


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("num_slots", [2, 3, 5, 8])
@pytest.mark.parametrize("in_place", [None, True, False])
@pytest.mark.parametrize("num_places", [0, 1, 3, 9])
def test_any_step_gives_the_bits_of_all_in_memory(
    kind: str, num_slots: int, in_place: bool | None, num_places: int
) -> None:
    harness = Harness(kind, num_slots, in_place, num_slots, num_places)
    chance = random.Random(num_slots)
    used = np.zeros((len(LAYERS), NUM_EXPERTS), np.int64)
    for _ in range(40):
        for _ in range(chance.randrange(4)):
            harness.guess(chance.randrange(len(LAYERS)), chance.randrange(NUM_EXPERTS))
        num_tokens = chance.choice((1, 1, 2, 5, 30))
        routings = {
            layer: torch.tensor(
                [chance.sample(range(NUM_EXPERTS), TOP_K) for _ in range(num_tokens)]
            )
            for layer in LAYERS
        }
        harness.step(routings)
        for index, layer in enumerate(LAYERS):
            used[index] += np.bincount(routings[layer].flatten(), minlength=NUM_EXPERTS)
            there = np.flatnonzero(harness.cache.slot_of_expert[index] >= 0).tolist()
            assert there == harness.cache.residents(index)
        if chance.random() < 0.3:
            harness.compare()
    harness.compare()
    total = harness.experts.report()["total"]
    assert (total["computed_on_cpu"] > 0) == (in_place is True and total["misses"] > total["late"])
    assert total["misses"] <= total["fetched"] + total["computed_on_cpu"]
    assert total["disk_bytes"] == 0
    assert [harness.tables[layer].uses.tolist() for layer in LAYERS] == used.tolist()
    harness.experts.close()


def test_the_host_works_while_what_is_there_runs() -> None:
    harness = Harness("late", num_slots=4, in_place=True)
    late = harness.late
    assert late is not None
    harness.step(dict.fromkeys(LAYERS, ids_of(0, 1)))  # on the host: nothing is resident then
    assert harness.launches == []
    assert harness.experts.report()["total"]["computed_on_cpu"] == 4
    for layer in range(len(LAYERS)):
        harness.guess(layer, 0)
    harness.experts.finish_loading()
    late.copies.clear()
    waits = late.num_waits
    harness.step(dict.fromkeys(LAYERS, ids_of(0, 1, 0, 2)))
    assert harness.launches == [[0], [0]]
    row = ("kernels", HIDDEN * 4)
    assert late.copies == [("moe", 0), row, row] * 2
    assert late.num_waits - waits <= len(LAYERS), "only for memory that holds earlier results"
    harness.compare()


@pytest.mark.parametrize("is_warm", [False, True])
def test_a_prompt_streams_with_the_next_copy_always_asked_for(is_warm: bool) -> None:
    harness = Harness("late", num_slots=4, in_place=None)
    late = harness.late
    assert late is not None
    all_experts = torch.tensor([[e, (e + 1) % NUM_EXPERTS] for e in range(NUM_EXPERTS)])
    if is_warm:
        harness.step(dict.fromkeys(LAYERS, ids_of(0, 1, 2, 3)))
        late.copies.clear()
        harness.launches.clear()
    with harness.experts.step(batch_of(NUM_EXPERTS)):
        harness.run(LAYERS[0], all_experts)
        asked = launched = 0
        num_misses = 4 if is_warm else NUM_EXPERTS
        launches = iter(harness.launches)
        for name, _ in late.copies:
            if name == "urgent":
                asked += 1
                continue
            launch = next(launches)
            if is_warm and set(launch) <= {0, 1, 2, 3}:
                continue
            assert asked >= min(num_misses, launched + len(launch) + 1), "the link is idle"
            launched += len(launch)
        assert launched == num_misses
        harness.run(LAYERS[1], all_experts)
    harness.compare()


class InterruptedAt:
    """Raises KeyboardInterrupt before one of the lines that transfers run, counted from here."""

    FILES = ("device_transfer.py", "read_ahead.py", "transfer_books.py")

    def __init__(self, line: int) -> None:
        self._left = line

    def __enter__(self) -> None:
        sys.settrace(self._trace)

    def __exit__(self, *_: object) -> None:
        sys.settrace(None)

    def _trace(self, frame: FrameType, event: str, _: object) -> Any:
        if not frame.f_code.co_filename.endswith(self.FILES):
            return None
        if event == "line":
            self._left -= 1
            if self._left < 0:
                raise KeyboardInterrupt
        return self._trace


@pytest.mark.parametrize("kind", ["host", "late"])
def test_an_interrupt_of_the_transfers_costs_misses_and_nothing_else(kind: str) -> None:
    chance = random.Random(3)
    num_interrupts = 0
    for number in range(150):
        harness = Harness(kind, 3, None, number, num_places=3)
        assert harness.ahead is not None
        for is_interrupted in (False, True, False, True, False, False):
            num_tokens = chance.choice((1, 5, 30))
            routings = {
                layer: torch.tensor(
                    [chance.sample(range(NUM_EXPERTS), TOP_K) for _ in range(num_tokens)]
                )
                for layer in LAYERS
            }
            for _ in range(2):
                harness.guess(chance.randrange(len(LAYERS)), chance.randrange(NUM_EXPERTS))
            if not is_interrupted:
                harness.step(routings)
                continue
            try:
                with InterruptedAt(chance.randrange(400)):
                    harness.step(routings)
            except KeyboardInterrupt:
                num_interrupts += 1
        harness.compare()
        harness.experts.finish_loading()
        ahead = harness.ahead
        places = [place.memory.data_ptr() for place in (*ahead._free, *ahead._held.values())]
        assert len(set(places)) == len(places) == ahead.num_places
        harness.experts.close()
    assert num_interrupts > 100


def test_a_kernel_without_memory_leaves_the_cache_as_it_is(monkeypatch: pytest.MonkeyPatch) -> None:
    harness = Harness("host", num_slots=4, in_place=None)
    harness.step(dict.fromkeys(LAYERS, ids_of(0, 1, 2, 3)))

    def fail(*_: object) -> Tensor:
        raise torch.OutOfMemoryError("no luck")

    with monkeypatch.context() as patch:
        patch.setattr(harness.experts, "_moe", fail)
        with pytest.raises(torch.OutOfMemoryError):
            harness.step(dict.fromkeys(LAYERS, ids_of(0, 1, 2, 5)))
    misses = harness.cache.counters.misses.copy()
    harness.step(dict.fromkeys(LAYERS, ids_of(0, 1)))
    assert harness.cache.counters.misses.tolist() == misses.tolist()
    harness.compare()


def test_who_gives_no_pairs_runs_all_of_them_itself() -> None:
    harness = Harness("host", num_slots=4, in_place=True)
    ids = ids_of(0, 1)
    with harness.experts.step(batch_of(1)):
        for layer in LAYERS:
            harness.experts._notes.ids[layer] = ids  # type: ignore[union-attr]
            stopped = Stopped(
                layer=layer, expert_ids=ids.numpy(), weights=np.ones(ids.shape, np.float32),
                counts=np.bincount(ids.flatten(), minlength=NUM_EXPERTS),
                residual=torch.zeros(1, HIDDEN),
            )  # fmt: skip
            runs = list(harness.experts.serve(stopped))
            assert runs[-1].is_last
            chosen = [run.only for run in runs if run.only is not None]
            assert len(chosen) == len(runs)
            assert torch.stack(chosen).sum(0).tolist() == [1, 1] + [0] * (NUM_EXPERTS - 2)
    assert harness.experts.report()["total"]["computed_on_cpu"] == 0


@pytest.mark.parametrize("kind", [KINDS[0], KINDS[2]])  # torch's copies are never late
def test_slots_are_moved_in_the_order_of_the_kernels(kind: str) -> None:
    harness = Harness(kind, num_slots=4, in_place=None)
    harness.step(dict.fromkeys(LAYERS, ids_of(0, 1, 2, 3)))
    harness.step(dict.fromkeys(LAYERS, ids_of(1, 3)))
    harness.experts.resize(harness.cache.shape.with_slots(2))
    assert [harness.cache.residents(index) for index in (0, 1)] == [[1, 3]] * 2
    harness.step(dict.fromkeys(LAYERS, ids_of(1, 3)))
    harness.experts.resize(harness.cache.shape.with_slots(4))
    harness.step(dict.fromkeys(LAYERS, ids_of(1, 3, 5, 7)))
    harness.compare()
