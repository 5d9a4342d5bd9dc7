"""Transfers: what is needed comes first, every one ends, and no slot is written by two."""

from __future__ import annotations

import random
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch
from torch import Tensor

from moe_serve.errors import StoreError
from moe_serve.experts.store import ExpertStore
from moe_serve.experts.transfer import EmulatedLink, StoreSource, Transfer, TransferQueue
from moe_serve.kernels.moe.base import HEADER_BYTES
from moe_serve.kernels.native.memory import allocate
from tests.experts.stores import LAYOUT, weights_of, written

CHUNK = 4096
NUM_CHUNKS = 4
RECORD = NUM_CHUNKS * CHUNK
NUM_SLOTS = 6
LIMIT_S = 20.0
Read = tuple[int, int, int]  # expert, first and last chunk


def byte_of(layer: int, expert: int) -> int:
    return (31 * layer + expert) % 251 + 1


class FakeSource:
    """Records of one byte each; reads can be held back, fail, and are noted.

    errors: what the next reads of an expert raise. faults: what no source may ever see.
    """

    def __init__(self, is_held: bool = False, delay: Callable[[], float] | None = None) -> None:
        self.reads: list[Read] = []
        self.errors: dict[int, Exception] = {}
        self.faults: list[str] = []
        self.num_closed = 0
        self._is_held = is_held
        self._delay = delay
        self._permits = threading.Semaphore(0)
        self._begun = threading.Semaphore(0)
        self._lock = threading.Lock()
        self._slots: set[int] = set()
        self._experts: set[tuple[int, int]] = set()

    def let(self, num_chunks: int) -> None:
        """Let so many reads that are held back go on."""
        self._permits.release(num_chunks)

    def await_read(self) -> None:
        """Wait until one more read has begun."""
        assert self._begun.acquire(timeout=LIMIT_S), "no read began"

    def record_bytes(self, layer: int) -> int:
        return RECORD

    def read_chunk(self, layer: int, expert: int, into: Tensor, begin: int, end: int) -> None:
        slot, key = into.data_ptr(), (layer, expert)
        with self._lock:
            if slot in self._slots:
                self.faults.append(f"two write one slot, one of them {key}")
            if key in self._experts:
                self.faults.append(f"{key} is read twice at once")
            self._slots.add(slot)
            self._experts.add(key)
            self.reads.append((expert, begin // CHUNK, end // CHUNK))
        self._begun.release()
        if self._is_held:
            assert self._permits.acquire(timeout=LIMIT_S), "never let go on"
        if self._delay is not None:
            time.sleep(self._delay())
        into[begin:end] = byte_of(layer, expert)
        with self._lock:
            self._slots.remove(slot)
            self._experts.remove(key)
        if expert in self.errors:
            raise self.errors.pop(expert)

    def verify(self, layer: int, expert: int, record: Tensor) -> None:
        if not bool(record.eq(byte_of(layer, expert)).all()):
            self.faults.append(f"expert {expert} is verified before it is whole")

    def close(self) -> None:
        if self._slots:
            self.faults.append("closed while it is read")
        self.num_closed += 1


@pytest.fixture
def make() -> Iterator[Callable[..., TransferQueue]]:
    """Make queues that are closed at the end, whatever their sources hold back."""
    made: list[tuple[TransferQueue, FakeSource]] = []

    def one(source: FakeSource, num_threads: int = 1) -> TransferQueue:
        records = allocate(NUM_SLOTS * RECORD).view(NUM_SLOTS, RECORD)
        queue = TransferQueue(source, records, num_threads, CHUNK)
        made.append((queue, source))
        return queue

    yield one
    for queue, source in made:
        source.let(10_000)
        queue.close()
        assert source.faults == []


Make = Callable[..., TransferQueue]


def collect(queue: TransferQueue, count: int) -> list[Transfer]:
    """Wait until `count` transfers have ended, and return them in that order."""
    ended: list[Transfer] = []
    while len(ended) < count:
        found = within_limit(lambda: queue.ended(wait=True))
        assert found, f"only {len(ended)} of {count} ended"
        ended += found
    return ended


def within_limit(wait: Callable[[], list[Transfer]]) -> list[Transfer]:
    """Return what `wait` does; fail if it does not come back."""
    found: list[list[Transfer]] = []
    thread = threading.Thread(target=lambda: found.append(wait()), daemon=True)
    thread.start()
    thread.join(LIMIT_S / 4)
    assert found, "a wait does not end"
    return found[0]


def test_what_is_demanded_arrives_in_its_slot_in_one_read(make: Make) -> None:
    source = FakeSource()
    queue = make(source)
    queue.demand(3, [(7, 2)])
    (transfer,) = collect(queue, 1)
    assert (transfer.layer, transfer.expert, transfer.slot) == (3, 7, 2)
    assert transfer.is_whole
    assert bool(queue.records[2].eq(byte_of(3, 7)).all())
    assert not queue.records[[0, 1, 3, 4, 5]].any()
    assert source.reads == [(7, 0, NUM_CHUNKS)]
    assert queue.ended() == []
    assert queue.ended(wait=True) == [], "there is nothing to wait for"


def test_a_guess_comes_in_chunks_and_gives_way_between_two(make: Make) -> None:
    source = FakeSource(is_held=True)
    queue = make(source)
    queue.guess(0, 1, 0)
    source.await_read()
    queue.guess(0, 2, 1)
    queue.demand(0, [(3, 2)])
    assert queue.num_guesses == 2
    source.let(100)
    ended = collect(queue, 3)
    assert [transfer.expert for transfer in ended] == [3, 1, 2]
    assert all(transfer.is_whole for transfer in ended)
    assert source.reads[:2] == [(1, 0, 1), (3, 0, NUM_CHUNKS)]
    # it goes on where it was, before guesses that came after it
    assert source.reads[2:] == [(1, at, at + 1) for at in (1, 2, 3)] + [
        (2, at, at + 1) for at in range(NUM_CHUNKS)
    ]
    assert queue.num_guesses == 0


def test_demands_come_in_the_order_of_asking(make: Make) -> None:
    source = FakeSource(is_held=True)
    queue = make(source)
    for expert in (5, 1, 3):
        queue.demand(0, [(expert, expert)])
    source.let(100)
    assert [transfer.expert for transfer in collect(queue, 3)] == [5, 1, 3]


def test_a_waiting_guess_that_is_hurried_overtakes_guesses(make: Make) -> None:
    source = FakeSource(is_held=True)
    queue = make(source)
    for expert in (1, 2, 3):
        queue.guess(0, expert, expert)
    source.await_read()
    queue.hurry(0, 3)
    assert queue.num_guesses == 2
    source.let(100)
    assert [transfer.expert for transfer in collect(queue, 3)] == [3, 1, 2]
    assert source.reads[:2] == [(1, 0, 1), (3, 0, NUM_CHUNKS)]


def test_a_running_guess_that_is_hurried_gives_way_no_more(make: Make) -> None:
    source = FakeSource(is_held=True)
    queue = make(source)
    queue.guess(0, 1, 0)
    source.await_read()
    queue.hurry(0, 1)
    queue.demand(0, [(2, 1)])
    source.let(100)
    assert [transfer.expert for transfer in collect(queue, 2)] == [1, 2]
    assert source.reads == [(1, 0, 1), (1, 1, NUM_CHUNKS), (2, 0, NUM_CHUNKS)]


def test_to_hurry_what_has_ended_does_nothing(make: Make) -> None:
    queue = make(FakeSource())
    queue.guess(0, 1, 0)
    collect(queue, 1)
    queue.hurry(0, 1)
    assert queue.ended() == []
    queue.guess(0, 1, 0)  # it can be brought in again
    assert collect(queue, 1)[0].is_whole


def test_a_waiting_guess_is_given_up_without_a_read(make: Make) -> None:
    source = FakeSource(is_held=True)
    queue = make(source)
    queue.demand(0, [(1, 0)])
    source.await_read()
    queue.guess(0, 2, 1)
    assert queue.give_up(0, 2)
    (transfer,) = queue.ended()
    assert transfer.expert == 2
    assert transfer.is_given_up
    assert not transfer.is_whole
    source.let(100)
    collect(queue, 1)
    assert [expert for expert, _, _ in source.reads] == [1]


def test_a_running_guess_is_given_up_after_its_chunk(make: Make) -> None:
    source = FakeSource(is_held=True)
    queue = make(source)
    queue.guess(0, 1, 0)
    source.await_read()
    assert queue.give_up(0, 1)
    assert queue.ended() == [], "its slot is still written to"
    source.let(100)
    (transfer,) = collect(queue, 1)
    assert not transfer.is_whole
    assert source.reads == [(1, 0, 1)]


def test_what_is_needed_or_has_ended_is_not_given_up(make: Make) -> None:
    source = FakeSource(is_held=True)
    queue = make(source)
    queue.demand(0, [(1, 0)])
    queue.guess(0, 2, 1)
    queue.hurry(0, 2)
    assert not queue.give_up(0, 1)
    assert not queue.give_up(0, 2)
    source.let(100)
    assert all(transfer.is_whole for transfer in collect(queue, 2))
    assert not queue.give_up(0, 1)


@pytest.mark.parametrize("is_running", [True, False])
def test_a_guess_that_was_given_up_and_is_needed_after_all_arrives(
    make: Make, is_running: bool
) -> None:
    """Or has ended, so that it can be demanded; but whoever waits for it is not left alone."""
    source = FakeSource(is_held=True)
    queue = make(source)
    if not is_running:
        queue.demand(0, [(2, 1)])
    queue.guess(0, 1, 0)
    source.await_read()
    queue.give_up(0, 1)
    has_ended = any(transfer.expert == 1 for transfer in queue.ended())
    queue.hurry(0, 1)
    source.let(100)
    if not has_ended:
        transfers = {transfer.expert: transfer for transfer in collect(queue, 1)}
        assert transfers[1].is_whole
    assert has_ended != is_running


@pytest.mark.parametrize("kind", [OSError, StoreError, RuntimeError, MemoryError])
def test_a_source_that_fails_ends_that_transfer_only(make: Make, kind: type[Exception]) -> None:
    source = FakeSource()
    source.errors[1] = kind("no luck")
    queue = make(source)
    queue.guess(0, 1, 0)
    (failed,) = collect(queue, 1)
    assert isinstance(failed.error, kind)
    assert not failed.is_whole
    queue.demand(0, [(1, 0)])
    queue.demand(0, [(2, 1)])
    assert all(transfer.is_whole for transfer in collect(queue, 2))


@pytest.mark.parametrize("kind", [AssertionError, ValueError, KeyError])
def test_a_fault_of_a_source_leaves_nobody_waiting(make: Make, kind: type[Exception]) -> None:
    source = FakeSource()
    source.errors[1] = kind("a fault of ours")
    queue = make(source)
    queue.demand(0, [(1, 0)])
    (failed,) = collect(queue, 1)
    assert isinstance(failed.error, kind)


def test_closing_ends_threads_and_leaves_nobody_waiting(make: Make) -> None:
    source = FakeSource(is_held=True)
    before = set(threading.enumerate())
    queue = make(source, num_threads=2)
    threads = [t for t in set(threading.enumerate()) - before if "transfer" in t.name]
    assert len(threads) == 2
    for expert in range(3):
        queue.demand(0, [(expert, expert)])
    for expert in (3, 4, 5):
        queue.guess(0, expert, expert)
    source.await_read()
    source.await_read()
    closing = threading.Thread(target=queue.close)
    closing.start()
    closing.join(0.05)
    assert closing.is_alive(), "what is written to is still in use"
    source.let(100)
    closing.join(LIMIT_S)
    assert not any(thread.is_alive() for thread in (closing, *threads))
    assert len(source.reads) == 2, "what waited was still read"
    ended = collect(queue, 6)
    assert {transfer.expert for transfer in ended} == set(range(6))
    assert not any(transfer.is_whole for transfer in ended if transfer.expert > 1)
    queue.close()


class Model:
    """What a queue must do, beside which it is run."""

    def __init__(self, queue: TransferQueue, source: FakeSource, chance: random.Random) -> None:
        self._queue = queue
        self._source = source
        self._chance = chance
        self._free = list(range(NUM_SLOTS))
        self._under_way: dict[tuple[int, int], int] = {}
        self._urgent: set[tuple[int, int]] = set()
        self._given_up: set[tuple[int, int]] = set()
        self.num_ended = {"arrived": 0, "failed": 0, "given up": 0}

    def act(self) -> None:
        """Do something that an owner may do."""
        chance = self._chance
        action = chance.choice(("start", "start", "hurry", "give up", "collect", "wait"))
        if action == "start" and self._free:
            self._start()
        elif action == "hurry" and self._under_way:
            key = chance.choice(list(self._under_way))
            if key not in self._given_up:
                self._queue.hurry(*key)
                self._urgent.add(key)
        elif action == "give up" and self._under_way:
            key = chance.choice(list(self._under_way))
            was_stopped = self._queue.give_up(*key)
            assert not (was_stopped and key in self._urgent)
            if was_stopped:
                self._given_up.add(key)
        elif action in ("collect", "wait"):
            self.collect(is_waiting=action == "wait")
        guesses = self._under_way.keys() - self._urgent
        assert self._queue.num_guesses <= len(guesses)

    def _start(self) -> None:
        key = (self._chance.randrange(3), self._chance.randrange(40))
        if key in self._under_way:
            return
        slot = self._free.pop(self._chance.randrange(len(self._free)))
        self._queue.records[slot].zero_()
        if self._chance.random() < 0.1:
            self._source.errors[key[1]] = OSError("now and then")
        self._under_way[key] = slot
        if self._chance.random() < 0.5:
            self._urgent.add(key)
            self._queue.demand(key[0], [(key[1], slot)])
        else:
            self._queue.guess(*key, slot)

    def collect(self, is_waiting: bool) -> None:
        """Take what has ended, and check it."""
        ended = self._queue.ended(wait=is_waiting)
        assert ended or not (is_waiting and self._under_way)
        for transfer in ended:
            key = (transfer.layer, transfer.expert)
            assert self._under_way.pop(key) == transfer.slot, "lost, or ended twice"
            if transfer.is_whole:
                assert bool(self._queue.records[transfer.slot].eq(byte_of(*key)).all())
                self.num_ended["arrived"] += 1
            elif transfer.error is not None:
                assert str(transfer.error) == "now and then"
                self.num_ended["failed"] += 1
            else:
                assert key in self._given_up
                self.num_ended["given up"] += 1
            self._free.append(transfer.slot)
            self._urgent.discard(key)
            self._given_up.discard(key)

    def finish(self) -> None:
        """Wait until nothing is under way."""
        while self._under_way:
            self.collect(is_waiting=True)


@pytest.mark.parametrize(
    "num_steps", [3_000, pytest.param(100_000, marks=pytest.mark.slow)], ids=["ci", "long"]
)
@pytest.mark.parametrize("num_threads", [1, 4])
def test_any_run_of_calls(make: Make, num_threads: int, num_steps: int) -> None:
    chance = random.Random(num_threads)
    delays = random.Random(7)
    source = FakeSource(delay=lambda: delays.choice((0.0, 0.0, 0.0, 1e-6, 1e-4)))
    queue = make(source, num_threads)
    model = Model(queue, source, chance)
    for _ in range(num_steps):
        model.act()
        assert source.faults == []
    model.finish()
    assert min(model.num_ended.values()) > num_steps / 100, model.num_ended


def test_an_emulated_link_carries_so_many_bytes_a_second() -> None:
    host = torch.randint(256, (6, 2**16), dtype=torch.uint8)
    link = EmulatedLink(host, 3, bytes_per_s=2**16 / 0.05)
    assert link.record_bytes(1) == 2**16
    into = torch.zeros(2, 2**16, dtype=torch.uint8)
    start_s = time.perf_counter()
    threads = [
        threading.Thread(target=link.read_chunk, args=(1, expert, into[expert], 4096, 2**16))
        for expert in (0, 1)
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    # both together, over one link
    assert time.perf_counter() - start_s >= 2 * 0.05 * 15 / 16
    assert torch.equal(into[:, 4096:], host[3:5, 4096:])
    assert not into[:, :4096].any()


def test_a_store_is_read_by_the_number_among_moe_layers(tmp_path: Path) -> None:
    with ExpertStore.open(written(tmp_path), LAYOUT) as store:
        source = StoreSource(store, (2, 4))
        assert [source.record_bytes(layer) for layer in (0, 1)] == [8192, 12288]
        queue = TransferQueue(source, allocate(2 * 12288).view(2, 12288), 2, CHUNK)
        queue.demand(0, [(3, 0)])
        queue.guess(1, 2, 1)
        ended = collect(queue, 2)
        queue.close()
    assert all(transfer.is_whole for transfer in ended), [t.error for t in ended]
    assert torch.equal(queue.records[0, HEADER_BYTES:8192], weights_of(2, 3, 8192))
    assert torch.equal(queue.records[1, HEADER_BYTES:], weights_of(4, 2, 12288))
