"""Records reach a device whole, what is needed first, and no slot is written while it is read."""

from __future__ import annotations

import random
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from moe_serve.errors import StoreError
from moe_serve.experts import native_transfer
from moe_serve.experts.device_transfer import (
    CHUNK_BYTES,
    MOST_CHUNKS,
    DeviceTransfers,
)
from moe_serve.experts.staged_transfer import StagedTransfers
from moe_serve.experts.store import ExpertStore
from moe_serve.experts.transfer import StoreSource, Transfer, Transfers
from moe_serve.kernels.gpu.streams import HostStreams, Streams, streams
from moe_serve.kernels.moe.base import HEADER_BYTES
from moe_serve.kernels.native.loader import NotBuilt
from tests.experts.stores import LAYOUT, weights_of, written
from tests.experts.transfer_machine import STEPS, Machine, collect
from tests.kernels.gpu.late_streams import LateStreams

PAGE = 4096
RECORD = 8 * PAGE
LAYERS, EXPERTS, SLOTS = 3, 8, 6
SIZES = {0: 8192, 1: 12288}  # of LAYOUT's records, by the number among MoE layers
MODEL_LAYERS = (2, 4)
NAMES = [(layer, expert) for layer in range(LAYERS) for expert in range(EXPERTS)]
STORED = [(layer, expert) for layer, count in ((0, 5), (1, 3)) for expert in range(count)]
KINDS = ("host", "late", pytest.param("cuda", marks=pytest.mark.gpu))
EACH_KIND = pytest.mark.parametrize("kind", KINDS)


def made(kind: str, seed: int = 0) -> Streams:
    if kind == "late":
        return LateStreams(seed)
    return streams(torch.device("cuda" if kind == "cuda" else "cpu"))


def byte_of(layer: int, expert: int) -> int:
    return layer * EXPERTS + expert + 1


class Arena:
    """All records in pinned memory, each of one byte, and slots for some of them."""

    def __init__(self, given: Streams, chunk_bytes: int = PAGE) -> None:
        self.host = given.pinned(LAYERS * EXPERTS * RECORD).view(-1, RECORD)
        for layer, expert in NAMES:
            self.record(layer, expert).fill_(byte_of(layer, expert))
        self.slots = torch.zeros(SLOTS, RECORD, dtype=torch.uint8, device=given.device)
        self.transfers = DeviceTransfers(given, self.slots, self.record, chunk_bytes)

    def record(self, layer: int, expert: int) -> Tensor:
        return self.host[layer * EXPERTS + expert]

    def holds(self, slot: int, layer: int, expert: int) -> bool:
        return bool(self.slots[slot].eq(byte_of(layer, expert)).all())


@EACH_KIND
def test_what_is_demanded_is_whole_in_its_slot(kind: str) -> None:
    arena = Arena(made(kind))
    arena.transfers.demand(1, [(7, 2), (3, 0)])
    ended = collect(arena.transfers, 2)
    assert [(t.layer, t.expert, t.slot, t.at) for t in ended] == [
        (1, 7, 2, RECORD), (1, 3, 0, RECORD),
    ]  # fmt: skip
    assert all(transfer.is_whole and transfer.is_urgent for transfer in ended)
    assert arena.holds(2, 1, 7)
    assert arena.holds(0, 1, 3)
    assert not arena.slots[[1, 3, 4, 5]].any()
    assert arena.transfers.ended(wait=True) == [], "there is nothing to wait for"
    arena.transfers.close()


@EACH_KIND
def test_a_guess_arrives_too_if_nobody_hurries_it(kind: str) -> None:
    arena = Arena(made(kind))
    arena.transfers.guess(2, 5, 4)
    assert arena.transfers.num_guesses == 1
    assert arena.transfers.is_known(2, 5)
    (transfer,) = collect(arena.transfers, 1)
    assert transfer.is_whole
    assert not transfer.is_urgent
    assert arena.holds(4, 2, 5)
    assert not arena.transfers.is_known(2, 5)
    assert not arena.transfers.is_busy


def test_records_that_are_wanted_at_once_are_asked_for_at_once_each_in_one_copy() -> None:
    late = LateStreams()
    arena = Arena(late)
    arena.transfers.demand(0, [(1, 0), (2, 1), (3, 2)])
    assert late.copies == [("urgent", RECORD)] * 3
    assert late.num_waits == 0


def test_what_is_needed_waits_for_few_chunks_of_guesses() -> None:
    late = LateStreams(is_still=True)
    arena = Arena(late)
    for expert in range(4):
        arena.transfers.guess(0, expert, expert)
    assert late.copies == [("usual", PAGE)] * MOST_CHUNKS
    arena.transfers.demand(1, [(7, 4)])
    assert late.copies[MOST_CHUNKS:] == [("urgent", RECORD)]
    (first,) = arena.transfers.ended(wait=True)
    assert (first.layer, first.expert) == (1, 7)
    assert len(collect(arena.transfers, 4)) == 4
    # 100 us at 50 GB/s
    assert MOST_CHUNKS * CHUNK_BYTES <= 100e-6 * 50e9


def test_no_guess_is_asked_for_while_something_needed_is_on_its_way() -> None:
    late = LateStreams(is_still=True)
    arena = Arena(late)
    arena.transfers.demand(1, [(7, 4)])
    arena.transfers.guess(0, 1, 0)
    assert arena.transfers.ended() == []
    assert {name for name, _ in late.copies} == {"urgent"}
    collect(arena.transfers, 1)
    assert arena.transfers.is_busy
    assert [name for name, _ in late.copies] == ["urgent", "usual", "usual"]
    collect(arena.transfers, 1)


def test_a_guess_that_is_hurried_goes_on_where_it_was() -> None:
    late = LateStreams(is_still=True)
    arena = Arena(late)
    for expert in (1, 2):
        arena.transfers.guess(0, expert, expert)
    arena.transfers.hurry(0, 1)
    assert arena.transfers.num_guesses == 1
    assert late.copies == [("usual", PAGE)] * 2 + [("urgent", RECORD - 2 * PAGE)]
    arena.transfers.hurry(0, 2)
    assert late.copies[3:] == [("urgent", RECORD)]
    ended = collect(arena.transfers, 2)
    assert all(transfer.is_whole and transfer.is_urgent for transfer in ended)
    assert arena.holds(1, 0, 1)
    assert arena.holds(2, 0, 2)
    arena.transfers.hurry(0, 1)  # it has ended: nothing changes
    assert arena.transfers.ended() == []


def test_a_guess_is_given_up_once_its_slot_is_written_no_more() -> None:
    late = LateStreams(is_still=True)
    arena = Arena(late)
    arena.transfers.guess(0, 1, 0)
    arena.transfers.guess(0, 2, 1)
    assert arena.transfers.give_up(0, 2)
    (transfer,) = arena.transfers.ended()
    assert (transfer.expert, transfer.is_given_up, transfer.at) == (2, True, 0)
    assert arena.transfers.give_up(0, 1)
    assert not arena.transfers.give_up(0, 1)
    assert arena.transfers.ended() == [], "its slot is still written to"
    (transfer,) = collect(arena.transfers, 1)
    assert not transfer.is_whole
    assert transfer.at == MOST_CHUNKS * PAGE
    assert len(late.copies) == MOST_CHUNKS
    assert not arena.transfers.give_up(0, 1)


def test_a_guess_that_was_given_up_and_is_needed_after_all_arrives() -> None:
    arena = Arena(LateStreams())
    arena.transfers.guess(0, 1, 0)
    assert arena.transfers.give_up(0, 1)
    arena.transfers.hurry(0, 1)
    assert not arena.transfers.give_up(0, 1), "it is needed"
    (transfer,) = collect(arena.transfers, 1)
    assert transfer.is_whole
    assert arena.holds(0, 0, 1)


def test_a_guess_that_is_given_up_when_all_of_it_is_under_way_arrives() -> None:
    late = LateStreams(is_still=True)
    arena = Arena(late, chunk_bytes=RECORD)
    arena.transfers.guess(0, 1, 0)
    assert arena.transfers.give_up(0, 1)
    (transfer,) = collect(arena.transfers, 1)
    assert (transfer.is_whole, transfer.is_given_up) == (True, False)
    assert arena.holds(0, 0, 1)


@pytest.mark.parametrize("num_copies", [0, 1, 3])
@pytest.mark.parametrize("is_urgent", [True, False])
def test_a_copy_that_fails_ends_that_transfer_only(num_copies: int, is_urgent: bool) -> None:
    late = LateStreams()
    arena = Arena(late)
    if is_urgent:
        num_copies = 0
    left = [num_copies]

    def failing(into: Tensor, source: Tensor) -> None:
        left[0] -= 1
        if left[0] < 0:
            raise RuntimeError("no luck")
        copy(into, source)

    lane = arena.transfers._urgent if is_urgent else arena.transfers._usual
    copy = lane.stream.copy
    lane.stream.copy = failing  # type: ignore[method-assign]
    if is_urgent:
        arena.transfers.demand(0, [(1, 0)])
    else:
        arena.transfers.guess(0, 1, 0)
    (failed,) = collect(arena.transfers, 1)
    assert str(failed.error) == "no luck"
    assert not failed.is_whole
    assert failed.at == num_copies * PAGE
    lane.stream.copy = copy  # type: ignore[method-assign]
    arena.transfers.demand(0, [(1, 0)])
    assert collect(arena.transfers, 1)[0].is_whole
    assert arena.holds(0, 0, 1)


def test_closing_waits_for_what_is_written_and_gives_up_the_rest() -> None:
    late = LateStreams(is_still=True)
    arena = Arena(late)
    arena.transfers.demand(0, [(0, 0), (1, 1)])
    arena.transfers.guess(1, 2, 2)
    arena.transfers.guess(1, 3, 3)
    arena.transfers.close()
    before = arena.slots.clone()
    late.finish()
    assert torch.equal(arena.slots, before), "something was still written to"
    ended = arena.transfers.ended(wait=True)
    assert {(t.expert, t.is_whole, t.is_given_up) for t in ended} == {
        (0, True, False), (1, True, False), (2, False, True), (3, False, True),
    }  # fmt: skip
    assert not arena.transfers.is_busy
    arena.transfers.close()
    with pytest.raises(StoreError, match="after the end"):
        arena.transfers.demand(0, [(0, 0)])


# -- slots that kernels read -----------------------------------------------------------------------


@pytest.mark.parametrize("way", ["demand", "guess", "guess, then hurry"])
@pytest.mark.parametrize("seed", range(5))
def test_a_slot_is_not_written_before_the_kernels_that_read_it_have_run(
    way: str, seed: int
) -> None:
    late = LateStreams(seed)
    arena = Arena(late)
    arena.transfers.demand(0, [(1, 3)])
    collect(arena.transfers, 1)
    seen: list[Tensor] = []
    late.kernels.launch(lambda: seen.append(arena.slots[3].clone()))
    if way == "demand":
        arena.transfers.demand(1, [(2, 3)])
    else:
        arena.transfers.guess(1, 2, 3)
        if way != "guess":
            arena.transfers.hurry(1, 2)
    collect(arena.transfers, 1)
    assert arena.holds(3, 1, 2)
    late.finish()
    assert bool(seen[0].eq(byte_of(0, 1)).all())


class Kernels(Machine):
    """A machine on late streams: kernels read slots, and empty them, later than they were asked."""

    late: LateStreams
    num_reads = 0

    def empty(self, slot: int) -> None:
        self.late.kernels.launch(lambda: self.records[slot].zero_())

    def read(self, slot: int, wanted: Tensor) -> None:
        """Launch what reads a slot; by then what is wanted must still be there."""

        def kernel() -> None:
            assert torch.equal(self.records[slot, : len(wanted)], wanted)
            self.num_reads += 1

        self.late.kernels.launch(kernel)


def machine_of(kind: str, transfers: Transfers, slots: Tensor, given: Streams, names: Any) -> Any:
    chance = random.Random(len(names))
    if kind != "late":
        return Machine(transfers, slots, chance, names)
    machine = Kernels(transfers, slots, chance, names)
    assert isinstance(given, LateStreams)
    machine.late = given
    return machine


@STEPS
@pytest.mark.parametrize("kind", KINDS[:2])
def test_any_run_of_calls_from_memory(kind: str, num_steps: int) -> None:
    given = made(kind)
    arena = Arena(given)

    def check(transfer: Transfer) -> None:
        assert transfer.error is None
        if transfer.is_whole:
            assert arena.holds(transfer.slot, transfer.layer, transfer.expert)
            if isinstance(machine, Kernels):
                machine.read(transfer.slot, arena.record(transfer.layer, transfer.expert))

    machine = machine_of(kind, arena.transfers, arena.slots, given, NAMES)
    machine.run(num_steps, check)
    arena.transfers.close()
    assert machine.counts["whole"] > num_steps / 20
    assert machine.counts["given up"] > 0
    if isinstance(machine, Kernels):
        machine.late.finish()
        assert machine.num_reads == machine.counts["whole"]


# -- from disk -------------------------------------------------------------------------------------


@pytest.fixture
def make(tmp_path: Path) -> Iterator[Callable[..., tuple[StagedTransfers, Tensor]]]:
    """Make transfers of the store at tmp_path, which are closed at the end."""
    opened: list[StagedTransfers] = []
    before = threading.active_count()

    def one(
        given: Streams, num_places: int = 4, num_threads: int = 2
    ) -> tuple[StagedTransfers, Tensor]:
        path = tmp_path / "model.experts"
        store = ExpertStore.open(path if path.exists() else written(tmp_path), LAYOUT)
        slots = torch.zeros(SLOTS, max(SIZES.values()), dtype=torch.uint8, device=given.device)
        source = StoreSource(store, MODEL_LAYERS)
        opened.append(StagedTransfers(given, slots, source, num_places, num_threads, PAGE))
        return opened[-1], slots

    yield one
    for transfers in opened:
        transfers.close()
        assert transfers._source.store.descriptor == -1
    assert threading.active_count() == before


Make = Callable[..., tuple[StagedTransfers, Tensor]]


def stored(layer: int, expert: int) -> Tensor:
    return weights_of(MODEL_LAYERS[layer], expert, SIZES[layer])


def found(slots: Tensor, slot: int, layer: int) -> Tensor:
    return slots[slot, HEADER_BYTES : SIZES[layer]].cpu()


def without_a_library() -> Any:
    raise NotBuilt("none here")


def damage(path: Path, layer: int, expert: int, at: int) -> None:
    with path.open("r+b") as file:
        file.seek(LAYOUT.first_bytes()[MODEL_LAYERS[layer]] + expert * SIZES[layer] + at)
        byte = file.read(1)[0]
        file.seek(-1, 1)
        file.write(bytes([byte ^ 1]))


@EACH_KIND
@pytest.mark.parametrize("num_places", [2, 3, 8])
def test_records_of_a_store_arrive_whole(make: Make, kind: str, num_places: int) -> None:
    transfers, slots = make(made(kind), num_places)
    transfers.demand(0, [(3, 5), (0, 1), (2, 2)])
    transfers.guess(1, 2, 0)
    transfers.guess(1, 1, 3)
    ended = collect(transfers, 5)
    assert all(transfer.is_whole for transfer in ended), [t.error for t in ended]
    assert {(t.layer, t.expert, t.slot, t.at, t.is_urgent) for t in ended} == {
        (0, 3, 5, 8192, True), (0, 0, 1, 8192, True), (0, 2, 2, 8192, True),
        (1, 2, 0, 12288, False), (1, 1, 3, 12288, False),
    }  # fmt: skip
    for transfer in ended:
        got = found(slots, transfer.slot, transfer.layer)
        assert torch.equal(got, stored(transfer.layer, transfer.expert))
    assert not transfers.is_busy
    assert transfers.num_guesses == 0


@pytest.mark.parametrize("at", [10, 70, PAGE + 1])
def test_nothing_of_a_damaged_record_reaches_the_device(
    make: Make, tmp_path: Path, at: int
) -> None:
    damage(written(tmp_path), 1, 1, at)
    late = LateStreams()
    transfers, slots = make(late)
    transfers.demand(1, [(1, 1)])
    (failed,) = collect(transfers, 1)
    assert isinstance(failed.error, StoreError)
    assert "the record of layer 4, expert 1" in str(failed.error)
    assert not failed.is_whole
    late.finish()
    assert late.copies == []
    assert not slots.any()
    transfers.demand(1, [(2, 1)])
    assert collect(transfers, 1)[0].is_whole


def test_guesses_leave_places_to_what_is_needed(make: Make) -> None:
    late = LateStreams(is_still=True)
    transfers, _ = make(late, num_places=2)
    for expert in range(3):
        transfers.guess(0, expert, expert)
    assert sum(staged.place >= 0 for staged in transfers._of_expert.values()) == 1
    transfers.demand(1, [(2, 5)])
    assert transfers._of_expert[1, 2].place >= 0, "it waits for a guess"
    transfers.hurry(0, 2)
    ended = {transfer.expert: transfer for transfer in collect(transfers, 4) if not transfer.layer}
    assert [ended[expert].is_urgent for expert in range(3)] == [False, False, True]


def test_guesses_are_given_up_wherever_they_are(make: Make) -> None:
    transfers, slots = make(LateStreams(), num_places=2)
    for expert in range(4):
        transfers.guess(0, expert, expert)
    for expert in range(4):
        assert transfers.give_up(0, expert)
        assert not transfers.give_up(0, expert)
    transfers.hurry(0, 0)  # of which a read has begun
    ended = {transfer.expert: transfer for transfer in collect(transfers, 4)}
    assert [ended[expert].is_whole for expert in (1, 2, 3)] == [False] * 3
    assert [ended[expert].at for expert in (1, 2, 3)] == [0] * 3
    assert ended[0].is_whole
    assert torch.equal(found(slots, 0, 0), stored(0, 0))


def until_it_is_sent(transfers: StagedTransfers, late: LateStreams) -> None:
    """Wait until a record was read and is on its way up."""
    deadline_s = time.monotonic() + 10
    while not late.copies:
        assert transfers.ended() == []
        assert time.monotonic() < deadline_s


def test_a_guess_is_given_up_on_its_way_up(make: Make) -> None:
    late = LateStreams(is_still=True)
    transfers, _ = make(late)
    transfers.guess(1, 2, 0)
    until_it_is_sent(transfers, late)
    assert transfers.give_up(1, 2)
    (transfer,) = collect(transfers, 1)
    assert (transfer.is_whole, transfer.is_given_up) == (False, True)
    assert len(late.copies) == MOST_CHUNKS


def test_closing_waits_for_what_is_on_its_way_up(make: Make) -> None:
    late = LateStreams(is_still=True)
    transfers, slots = make(late)
    transfers.demand(1, [(2, 0)])
    until_it_is_sent(transfers, late)
    transfers.close()
    assert torch.equal(found(slots, 0, 1), stored(1, 2))
    (transfer,) = transfers.ended()
    assert transfer.is_whole


@pytest.mark.parametrize("num_collects", [0, 1, 2, 20])
def test_closing_leaves_nothing_under_way(make: Make, num_collects: int) -> None:
    late = LateStreams()
    transfers, slots = make(late, num_places=2)
    transfers.demand(0, [(expert, expert) for expert in range(4)])
    transfers.guess(1, 0, 4)
    ended = [transfer for _ in range(num_collects) for transfer in transfers.ended()]
    transfers.close()
    late.finish()
    ended += transfers.ended(wait=True)
    assert len(ended) == 5
    for transfer in ended:
        assert transfer.is_whole != transfer.is_given_up
        if transfer.is_whole:
            got = found(slots, transfer.slot, transfer.layer)
            assert torch.equal(got, stored(transfer.layer, transfer.expert))
    assert not transfers.is_busy
    with pytest.raises(StoreError, match="after the end"):
        transfers.guess(1, 1, 0)


@STEPS
@pytest.mark.parametrize(
    ("kind", "num_places", "is_native"),
    [("host", 3, True), ("late", 2, True), ("late", 5, True), ("late", 3, False)],
)
def test_any_run_of_calls_on_a_file_with_damaged_records(
    make: Make,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    kind: str,
    num_places: int,
    is_native: bool,
    num_steps: int,
) -> None:
    if not is_native:
        monkeypatch.setattr(native_transfer, "load", without_a_library)
    damaged = {(0, 4): 2 * PAGE - 2, (1, 1): PAGE + 5}
    path = written(tmp_path)
    for (layer, expert), at in damaged.items():
        damage(path, layer, expert, at)
    given = made(kind, seed=num_places)
    transfers, slots = make(given, num_places)

    def check(transfer: Transfer) -> None:
        key = (transfer.layer, transfer.expert)
        assert transfer.is_given_up or transfer.is_whole == (key not in damaged)
        assert transfer.is_given_up or (transfer.error is None) == transfer.is_whole
        if transfer.is_whole:
            assert torch.equal(found(slots, transfer.slot, transfer.layer), stored(*key))
            if isinstance(machine, Kernels):
                machine.read(transfer.slot, slots[transfer.slot, : SIZES[transfer.layer]].clone())

    machine = machine_of(kind, transfers, slots, given, STORED)
    machine.run(num_steps, check)
    assert machine.counts["whole"] > num_steps / 20
    assert machine.counts["failed"] > num_steps / 200
    if isinstance(machine, Kernels):
        machine.late.finish()
        assert machine.num_reads == machine.counts["whole"]


def test_without_a_device_the_same_runs_at_once(make: Make) -> None:
    given = made("host")
    assert isinstance(given, HostStreams)
    arena = Arena(given, CHUNK_BYTES)
    arena.transfers.demand(0, [(5, 1)])
    (transfer,) = arena.transfers.ended()
    assert transfer.is_whole
    assert arena.holds(1, 0, 5)
