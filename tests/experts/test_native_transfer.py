"""The native threads do what the queue's do: what is needed first, every transfer ends, checked."""

from __future__ import annotations

import os
import random
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from moe_serve.errors import CapacityError, StoreError
from moe_serve.experts import native_transfer
from moe_serve.experts.native_transfer import NativeTransfers, open_transfers
from moe_serve.experts.store import ExpertStore
from moe_serve.experts.transfer import EmulatedLink, StoreSource, Transfer, TransferQueue
from moe_serve.kernels.moe.base import HEADER_BYTES
from moe_serve.kernels.native.loader import NotBuilt, load
from moe_serve.kernels.native.memory import allocate
from tests.experts.stores import LAYOUT, weights_of, written
from tests.experts.transfer_machine import STEPS, Machine, collect
from tests.offloaded import transfer_threads

PAGE = 4096
RECORD = 8 * PAGE
LAYERS, EXPERTS, SLOTS = 3, 8, 6
SIZES = {0: 8192, 1: 12288}  # of LAYOUT's records, by the number among MoE layers
NUM_STORED = (5, 3)

Make = Callable[..., NativeTransfers]


@pytest.fixture
def host() -> torch.Tensor:
    records = allocate(LAYERS * EXPERTS * RECORD).view(-1, RECORD)
    for index in range(LAYERS * EXPERTS):
        records[index] = index + 1
    return records


@pytest.fixture
def make() -> Iterator[Make]:
    """Make transfers that are closed at the end, and have left no thread then."""
    made: list[NativeTransfers] = []
    before = transfer_threads()

    def one(source: Any, num_threads: int = 2, chunk_bytes: int = PAGE) -> NativeTransfers:
        size = RECORD if isinstance(source, EmulatedLink) else max(SIZES.values())
        records = allocate(SLOTS * size).view(SLOTS, size)
        made.append(NativeTransfers(load(), source, records, SLOTS, num_threads, chunk_bytes))
        return made[-1]

    yield one
    for transfers in made:
        transfers.close()
    assert transfer_threads() == before


def linked(make: Make, host: torch.Tensor, chunks_per_s: float, **options: Any) -> NativeTransfers:
    return make(EmulatedLink(host, EXPERTS, chunks_per_s * PAGE), **options)


@pytest.mark.parametrize("num_threads", [1, 2, 5])
@pytest.mark.parametrize("chunk_bytes", [PAGE, 2 * PAGE, 16 * PAGE])
def test_records_of_a_store_arrive_whole_in_any_pieces(
    make: Make, tmp_path: Path, num_threads: int, chunk_bytes: int
) -> None:
    with ExpertStore.open(written(tmp_path), LAYOUT) as store:
        transfers = make(StoreSource(store, (2, 4)), num_threads, chunk_bytes)
        transfers.demand(0, [(3, 5), (0, 1)])
        transfers.guess(1, 2, 0)
        ended = collect(transfers, 3)
        assert all(transfer.is_whole for transfer in ended), [t.error for t in ended]
        assert {(t.layer, t.expert, t.slot, t.at) for t in ended} == {
            (0, 3, 5, 8192), (0, 0, 1, 8192), (1, 2, 0, 12288),
        }  # fmt: skip
        for slot, layer, expert, size in ((5, 2, 3, 8192), (1, 2, 0, 8192), (0, 4, 2, 12288)):
            found = transfers.records[slot, HEADER_BYTES:size]
            assert torch.equal(found, weights_of(layer, expert, size))
        assert not transfers.is_busy
        transfers.close()


@pytest.mark.parametrize("at", [10, 70, PAGE + 1, 3 * PAGE - 1])
def test_a_byte_that_changed_anywhere_is_found(make: Make, tmp_path: Path, at: int) -> None:
    path = written(tmp_path)
    place = LAYOUT.first_bytes()[4] + 12288 + at
    with path.open("r+b") as file:
        file.seek(place)
        byte = file.read(1)[0]
        file.seek(place)
        file.write(bytes([byte ^ 1]))
    with ExpertStore.open(path, LAYOUT) as store:
        transfers = make(StoreSource(store, (2, 4)))
        transfers.demand(1, [(0, 0), (1, 1), (2, 2)])
        ended = {transfer.expert: transfer for transfer in collect(transfers, 3)}
        assert ended[0].is_whole
        assert ended[2].is_whole
        assert isinstance(ended[1].error, StoreError)
        assert "the record of layer 4, expert 1" in str(ended[1].error)
        transfers.close()


def test_a_file_that_is_cut_off_says_so_and_one_that_is_mended_serves(
    make: Make, tmp_path: Path
) -> None:
    path = written(tmp_path)
    data = path.read_bytes()
    with ExpertStore.open(path, LAYOUT) as store:
        transfers = make(StoreSource(store, (2, 4)))
        os.truncate(path, LAYOUT.first_bytes()[4] + 5000)
        transfers.demand(1, [(0, 0), (2, 2)])
        for transfer in collect(transfers, 2):
            assert isinstance(transfer.error, StoreError)
            assert "is cut off" in str(transfer.error)
        path.write_bytes(data)
        transfers.demand(1, [(0, 0), (2, 2)])
        assert all(transfer.is_whole for transfer in collect(transfers, 2))
        transfers.close()


def test_what_a_thread_could_not_read_is_tried_again(
    make: Make, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As where a file system refuses direct reads: Python's read turns them off."""
    with ExpertStore.open(written(tmp_path), LAYOUT) as store:
        source = StoreSource(store, (2, 4))
        place = source.place
        monkeypatch.setattr(
            type(source), "place", property(lambda _: place.__class__(
                num_layers=2, num_experts=5, descriptor=10**6, first_bytes=place.first_bytes,
                headers=place.headers, is_shared=True,
            )),
        )  # fmt: skip
        transfers = make(source)
        transfers.demand(0, [(1, 0)])
        assert [transfer.is_whole for transfer in collect(transfers, 1)] == [True]
        assert torch.equal(transfers.records[0, HEADER_BYTES:8192], weights_of(2, 1, 8192))
        transfers.close()


@pytest.mark.parametrize("num_threads", [1, 2])
def test_what_is_needed_passes_a_guess(make: Make, host: torch.Tensor, num_threads: int) -> None:
    transfers = linked(make, host, chunks_per_s=100, num_threads=num_threads)
    for expert in range(3):
        transfers.guess(0, expert, expert)
    time.sleep(0.02)
    transfers.demand(1, [(5, 3)])
    assert transfers.num_guesses == 3
    (first,) = collect(transfers, 1)
    assert (first.layer, first.expert, first.is_urgent) == (1, 5, True)
    assert bool(transfers.records[3].eq(1 * EXPERTS + 5 + 1).all())


def test_a_guess_that_is_hurried_comes_first(make: Make, host: torch.Tensor) -> None:
    transfers = linked(make, host, chunks_per_s=200, num_threads=1)
    for expert in range(3):
        transfers.guess(0, expert, expert)
    transfers.hurry(0, 2)
    assert transfers.num_guesses == 2
    (first,) = collect(transfers, 1)
    assert first.expert == 2
    assert first.is_urgent
    transfers.hurry(0, 2)  # it has ended: nothing changes


def test_a_guess_that_is_given_up_ends_soon_and_goes_on_if_it_is_needed_after_all(
    make: Make, host: torch.Tensor
) -> None:
    transfers = linked(make, host, chunks_per_s=100, num_threads=1)
    transfers.guess(2, 4, 0)
    transfers.guess(2, 5, 1)
    assert transfers.give_up(2, 5)
    assert not transfers.give_up(2, 5)
    assert transfers.is_known(2, 5)
    transfers.hurry(2, 5)
    assert not transfers.give_up(2, 5), "it is needed"
    assert transfers.give_up(2, 4)
    ended = {transfer.expert: transfer for transfer in collect(transfers, 2)}
    assert ended[4].is_given_up
    assert ended[4].at < RECORD
    assert ended[5].is_whole
    assert bool(transfers.records[1].eq(2 * EXPERTS + 5 + 1).all())
    assert not transfers.is_known(2, 5)
    assert not transfers.give_up(0, 0)


def test_a_link_carries_so_many_bytes_a_second(make: Make, host: torch.Tensor) -> None:
    transfers = linked(make, host, chunks_per_s=400)
    start_s = time.perf_counter()
    transfers.demand(0, [(expert, expert) for expert in range(5)])
    collect(transfers, 5)
    assert time.perf_counter() - start_s >= 5 * 8 / 400


def test_closing_gives_up_what_waits(make: Make, host: torch.Tensor) -> None:
    transfers = linked(make, host, chunks_per_s=50)
    transfers.demand(0, [(0, 0), (1, 1), (2, 2)])
    for expert in range(3):
        transfers.guess(1, expert, 3 + expert)
    time.sleep(0.02)
    start_s = time.perf_counter()
    transfers.close()
    assert time.perf_counter() - start_s < 1, "more than what ran was waited for"
    ended = transfers.ended(wait=True)
    assert len(ended) == 6
    assert sum(transfer.is_whole for transfer in ended) <= 2
    assert transfers.ended(wait=True) == []
    transfers.close()


@STEPS
@pytest.mark.parametrize("num_threads", [1, 4])
def test_any_run_of_calls_on_a_link(
    make: Make, host: torch.Tensor, num_threads: int, num_steps: int
) -> None:
    transfers = linked(make, host, chunks_per_s=200_000, num_threads=num_threads)

    def check(transfer: Transfer) -> None:
        record = transfers.records[transfer.slot]
        wanted = transfer.layer * EXPERTS + transfer.expert + 1
        assert not transfer.is_whole or bool(record.eq(wanted).all())
        assert transfer.error is None

    names = [(layer, expert) for layer in range(LAYERS) for expert in range(EXPERTS)]
    machine = Machine(transfers, transfers.records, random.Random(num_threads), names)
    machine.run(num_steps, check)
    assert machine.counts["whole"] > num_steps / 20
    assert machine.counts["given up"] > 0


@STEPS
@pytest.mark.parametrize("num_threads", [1, 4])
def test_any_run_of_calls_on_a_file_with_damaged_records(
    make: Make, tmp_path: Path, num_threads: int, num_steps: int
) -> None:
    path = written(tmp_path)
    damaged = {(0, 4): 2 * PAGE - 2, (1, 1): PAGE + 5}
    first = LAYOUT.first_bytes()
    with path.open("r+b") as file:
        for (layer, expert), at in damaged.items():
            file.seek(first[(2, 4)[layer]] + expert * SIZES[layer] + at)
            file.write(b"\xaa\xab")
    with ExpertStore.open(path, LAYOUT) as store:
        transfers = make(StoreSource(store, (2, 4)), num_threads)

        def check(transfer: Transfer) -> None:
            key = (transfer.layer, transfer.expert)
            assert transfer.is_given_up or transfer.is_whole == (key not in damaged)
            if transfer.is_whole:
                size = SIZES[transfer.layer]
                wanted = weights_of((2, 4)[transfer.layer], transfer.expert, size)
                found = transfers.records[transfer.slot, HEADER_BYTES:size]
                assert torch.equal(found, wanted)

        names = [(layer, expert) for layer in (0, 1) for expert in range(NUM_STORED[layer])]
        machine = Machine(transfers, transfers.records, random.Random(num_threads), names)
        machine.run(num_steps, check)
        assert machine.counts["whole"] > num_steps / 20
        assert machine.counts["failed"] > num_steps / 200
        transfers.close()


def test_no_thread_is_an_error_and_closes_the_file(tmp_path: Path) -> None:
    with ExpertStore.open(written(tmp_path), LAYOUT) as store:
        records = allocate(SLOTS * 12288).view(SLOTS, 12288)
        with pytest.raises(CapacityError, match="raise the limits of the process"):
            NativeTransfers(load(), StoreSource(store, (2, 4)), records, SLOTS, 10**6)
        assert store.descriptor == -1


def test_without_a_library_the_queue_serves(
    host: torch.Tensor, monkeypatch: pytest.MonkeyPatch
) -> None:
    def none(*_: object) -> Any:
        raise NotBuilt("none here")

    records = allocate(SLOTS * RECORD).view(SLOTS, RECORD)
    link = EmulatedLink(host, EXPERTS, 1e9)
    here = open_transfers(link, records, SLOTS, 1)
    assert isinstance(here, NativeTransfers)
    here.close()
    monkeypatch.setattr(native_transfer, "load", none)
    queue = open_transfers(link, records, SLOTS, 1)
    assert isinstance(queue, TransferQueue)
    queue.demand(1, [(5, 3)])
    (transfer,) = queue.ended(wait=True)
    assert transfer.is_whole
    assert bool(records[3].eq(1 * EXPERTS + 5 + 1).all())
    queue.close()


def test_what_is_asked_for_after_the_end_is_refused(make: Make, host: torch.Tensor) -> None:
    transfers = linked(make, host, chunks_per_s=1e6)
    transfers.close()
    with pytest.raises(StoreError, match="after the end"):
        transfers.demand(0, [(0, 0)])
    assert transfers.ended(wait=True) == []


def test_all_that_ended_is_given_however_much(host: torch.Tensor) -> None:
    page = 4096
    records = allocate(600 * page).view(600, page)
    many = allocate(600 * page).view(600, page)
    transfers = NativeTransfers(load(), EmulatedLink(many, 600, 1e12), records, 600, 1)
    for expert in range(600):
        transfers.guess(0, expert, expert)
    while transfers.is_busy:
        time.sleep(1e-3)
    assert len(transfers.ended()) == 600
    transfers.close()
