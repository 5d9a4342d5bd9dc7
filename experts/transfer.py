"""Threads that bring records into slots: what is needed now first, guesses after it, in chunks.

Knows where records come from and where they go, not why. A guess gives way between two chunks as
soon as something is needed; every transfer that was begun ends as arrived, failed or given up.
"""

from __future__ import annotations

import threading
import time
from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

from torch import Tensor

from moe_serve.errors import CapacityError
from moe_serve.experts.store import ExpertStore
from moe_serve.kernels.forward.base import Arrivals

CHUNK_BYTES = 2**20  # less is slower on disks (docs/log.md), more makes what is needed wait


class Source(Protocol):
    """Where records are read from, by MoE layer and expert. Called by several threads at once."""

    def record_bytes(self, layer: int) -> int:
        """Return the size of a record of `layer`."""
        ...

    def read_chunk(self, layer: int, expert: int, into: Tensor, begin: int, end: int) -> None:
        """Fill bytes `begin` to `end`, multiples of 4,096, of a record, uint8 [record_bytes]."""
        ...

    def verify(self, layer: int, expert: int, record: Tensor) -> None:
        """Raise StoreError unless `record` is whole and that of this expert."""
        ...

    def close(self) -> None:
        """Let go of what it reads from; nobody reads any more."""
        ...


@dataclass(slots=True)
class Transfer:
    """One record on its way. at: bytes that have arrived; is_whole: all did, and were verified."""

    layer: int
    expert: int
    slot: int
    is_urgent: bool
    is_given_up: bool = False
    at: int = 0
    is_whole: bool = False
    error: Exception | None = None

    def is_of(self, layer: int, expert: int) -> bool:
        """Return whether it brings in this expert."""
        return (self.layer, self.expert) == (layer, expert)


class Awaited(Arrivals, Protocol):
    """What `Arrivals` says after the pass: how long there was nothing to run, and who was not."""

    @property
    def stall_s(self) -> float: ...

    def left(self) -> list[int]:
        """Return the experts that were not run: one of them has failed."""
        ...


class Transfers(Protocol):
    """Transfers under way, at most one for an expert.

    The owner starts and collects them; all methods are for one thread, its own.
    """

    def demand(self, layer: int, loads: Sequence[tuple[int, int]]) -> None:
        """Start to bring in what is needed now. loads: (expert, slot)."""
        ...

    def guess(self, layer: int, expert: int, slot: int) -> None:
        """Start to bring in what may be needed, once nothing else is to be done."""
        ...

    def hurry(self, layer: int, expert: int) -> None:
        """Say that a guess is needed now. One that has ended by then may stay as it has ended."""
        ...

    def give_up(self, layer: int, expert: int) -> bool:
        """Stop a guess that is of no use any more; it ends soon, as given up.

        Returns whether there was one to stop: not one that is needed by now, or that has ended.
        """
        ...

    def ended(self, wait: bool = False) -> list[Transfer]:
        """Return the transfers that have ended since the last call.

        wait: until there is one, where any is under way.
        """
        ...

    def is_known(self, layer: int, expert: int) -> bool:
        """Return whether a transfer of this expert waits, runs, or has ended uncollected."""
        ...

    def arrivals(self, layer: int, experts: Sequence[int]) -> Awaited | None:
        """Return experts of `layer` that are on their way, for a forward pass to wait for.

        None where only `ended` can be waited for.
        """
        ...

    @property
    def is_busy(self) -> bool:
        """Whether any transfer waits or runs."""
        ...

    @property
    def num_guesses(self) -> int:
        """Return how many transfers wait or run on a guess."""
        ...

    def forget(self) -> None:
        """Wait until nothing is written to a slot any more, and know of no transfer then.

        For when an interrupt may have come between any two of the owner's lines, and its own.
        """
        ...

    def close(self) -> None:
        """Give up what waits, and wait for what runs."""
        ...


class TransferQueue:
    """`Transfers` by threads that read from a source."""

    def __init__(
        self, source: Source, records: Tensor, num_threads: int, chunk_bytes: int = CHUNK_BYTES
    ) -> None:
        """records: uint8 [num_slots, record_bytes]; chunk_bytes: a multiple of 4,096."""
        self._source = source
        self.records = records
        self._chunk_bytes = chunk_bytes
        self._lock = threading.Lock()
        self._work = threading.Condition(self._lock)
        self._change = threading.Condition(self._lock)
        self._urgent: deque[Transfer] = deque()
        self._guesses: deque[Transfer] = deque()
        self._ended: list[Transfer] = []
        self._of_expert: dict[tuple[int, int], Transfer] = {}
        self._is_closing = False
        self._threads = [
            threading.Thread(target=self._run, name=f"expert-transfer-{index}", daemon=True)
            for index in range(num_threads)
        ]
        try:
            for thread in self._threads:
                thread.start()
        except RuntimeError as error:  # a limit of memory, or of threads
            self._threads = [thread for thread in self._threads if thread.ident is not None]
            self.close()
            raise CapacityError(
                f"no thread could be started to bring experts in ({error}); raise the limits "
                "of the process (ulimit -v, -u)"
            ) from error

    def demand(self, layer: int, loads: Sequence[tuple[int, int]]) -> None:
        for expert, slot in loads:
            self._add(Transfer(layer, expert, slot, is_urgent=True), self._urgent)

    def guess(self, layer: int, expert: int, slot: int) -> None:
        self._add(Transfer(layer, expert, slot, is_urgent=False), self._guesses)

    def hurry(self, layer: int, expert: int) -> None:
        with self._lock:
            transfer = self._of_expert.get((layer, expert))
            if transfer is None:
                return  # it has ended just now
            transfer.is_urgent = True
            transfer.is_given_up = False
            if transfer in self._guesses:
                self._guesses.remove(transfer)
                self._urgent.append(transfer)
                self._work.notify()

    def give_up(self, layer: int, expert: int) -> bool:
        with self._lock:
            transfer = self._of_expert.get((layer, expert))
            if transfer is None or transfer.is_urgent or transfer.is_given_up:
                return False
            transfer.is_given_up = True
            if transfer in self._guesses:
                self._guesses.remove(transfer)
                self._end(transfer)
            return True

    def ended(self, wait: bool = False) -> list[Transfer]:
        with self._lock:
            while wait and not self._ended and self._of_expert:
                self._change.wait()
            ended, self._ended = self._ended, []
        return ended

    def is_known(self, layer: int, expert: int) -> bool:
        with self._lock:
            return (layer, expert) in self._of_expert or any(
                transfer.is_of(layer, expert) for transfer in self._ended
            )

    def arrivals(self, layer: int, experts: Sequence[int]) -> Awaited | None:
        return None

    @property
    def is_busy(self) -> bool:
        return bool(self._of_expert)

    @property
    def num_guesses(self) -> int:
        with self._lock:
            return sum(not transfer.is_urgent for transfer in self._of_expert.values())

    def forget(self) -> None:
        while self.is_busy:
            self.ended(wait=True)
        self.ended()

    def close(self) -> None:
        with self._lock:
            self._is_closing = True
            for transfer in (*self._urgent, *self._guesses):
                transfer.is_given_up = True
                self._end(transfer)
            self._urgent.clear()
            self._guesses.clear()
            self._work.notify_all()
        for thread in self._threads:
            thread.join()
        self._source.close()

    def _add(self, transfer: Transfer, queue: deque[Transfer]) -> None:
        key = (transfer.layer, transfer.expert)
        with self._lock:
            assert key not in self._of_expert, key
            assert not self._is_closing
            self._of_expert[key] = transfer
            queue.append(transfer)
            self._work.notify()

    def _end(self, transfer: Transfer) -> None:
        """Hand a transfer back; the lock is held."""
        del self._of_expert[transfer.layer, transfer.expert]
        self._ended.append(transfer)
        self._change.notify_all()

    def _run(self) -> None:
        while True:
            with self._lock:
                while not (self._urgent or self._guesses or self._is_closing):
                    self._work.wait()
                if self._is_closing:
                    return
                transfer = (self._urgent or self._guesses).popleft()
            self._move(transfer)
            with self._lock:
                has_ended = transfer.is_whole or transfer.error is not None
                if has_ended or self._is_closing or transfer.is_given_up:
                    self._end(transfer)
                elif transfer.is_urgent:  # hurried just now
                    self._urgent.appendleft(transfer)
                else:
                    self._guesses.appendleft(transfer)

    def _move(self, transfer: Transfer) -> None:
        """Read on, to the end or until something else comes first."""
        layer, expert = transfer.layer, transfer.expert
        try:
            size = self._source.record_bytes(layer)
            record = self.records[transfer.slot, :size]
            while transfer.at < size:
                if transfer.is_given_up or self._is_closing:
                    return
                if not transfer.is_urgent and self._urgent:
                    return
                end = size if transfer.is_urgent else min(size, transfer.at + self._chunk_bytes)
                self._source.read_chunk(layer, expert, record, transfer.at, end)
                transfer.at = end
            self._source.verify(layer, expert, record)
            transfer.is_whole = True
        except Exception as error:  # whatever it is, it belongs to the step that waits
            transfer.error = error


@dataclass(frozen=True, kw_only=True, slots=True)
class Place:
    """Where a source's records are, for threads that are not Python's.

    descriptor: an open file, or -1; host: the address of records in memory, layer by layer, or 0;
    bytes_per_s: of the link before it. first_bytes: where each layer's first record begins in the
    file; headers: of each layer's expert 0, 64 bytes each, without the crc. is_shared: whether one
    record comes faster by several threads.
    """

    num_layers: int
    num_experts: int
    descriptor: int = -1
    host: int = 0
    bytes_per_s: float = 0.0
    first_bytes: Sequence[int] = ()
    headers: bytes = b""
    is_shared: bool = False


class StoreSource:
    """A store's records, by the number among the MoE layers. model_layers: the model's numbers."""

    def __init__(self, store: ExpertStore, model_layers: Sequence[int]) -> None:
        self.store = store
        self._model_layers = tuple(model_layers)

    @property
    def place(self) -> Place:
        stored = [self.store.layer(number) for number in self._model_layers]
        first_bytes = self.store.layout.first_bytes()
        return Place(
            num_layers=len(stored),
            num_experts=max(layer.num_experts for layer in stored),
            descriptor=self.store.descriptor,
            first_bytes=[first_bytes[layer.layer] for layer in stored],
            headers=b"".join(
                self.store.layout.record_header(layer, 0, 0).pack() for layer in stored
            ),
            is_shared=True,
        )

    def record_bytes(self, layer: int) -> int:
        return self.store.record_bytes(self._model_layers[layer])

    def read_chunk(self, layer: int, expert: int, into: Tensor, begin: int, end: int) -> None:
        self.store.read_chunk(self._model_layers[layer], expert, into, begin, end)

    def verify(self, layer: int, expert: int, record: Tensor) -> None:
        self.store.verify(self._model_layers[layer], expert, record)

    def close(self) -> None:
        self.store.close()


class EmulatedLink:
    """A source in host memory behind a link of so many bytes a second, in place of PCIe.

    host: uint8 [num_layers * num_experts, record_bytes], layer by layer. What is read takes at
    least as long as the link would, and the copy itself counts.
    """

    def __init__(self, host: Tensor, num_experts: int, bytes_per_s: float) -> None:
        self._host = host
        self._num_experts = num_experts
        self._bytes_per_s = bytes_per_s
        self._lock = threading.Lock()
        self._free_at_s = 0.0  # when the link has carried all that was asked so far

    @property
    def place(self) -> Place:
        return Place(
            num_layers=self._host.shape[0] // self._num_experts,
            num_experts=self._num_experts,
            host=self._host.data_ptr(),
            bytes_per_s=self._bytes_per_s,
            first_bytes=[0] * (self._host.shape[0] // self._num_experts),
        )

    def record_bytes(self, layer: int) -> int:
        return int(self._host.shape[1])

    def read_chunk(self, layer: int, expert: int, into: Tensor, begin: int, end: int) -> None:
        with self._lock:
            start_s = max(time.perf_counter(), self._free_at_s)
            self._free_at_s = start_s + (end - begin) / self._bytes_per_s
            due_s = self._free_at_s
        into[begin:end].copy_(self._host[layer * self._num_experts + expert, begin:end])
        left_s = due_s - time.perf_counter()
        if left_s > 0:
            time.sleep(left_s)

    def verify(self, layer: int, expert: int, record: Tensor) -> None:
        """Memory that was verified when it was filled is trusted."""

    def close(self) -> None:
        """Memory goes when nobody holds it."""
