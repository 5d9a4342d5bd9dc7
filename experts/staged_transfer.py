"""`Transfers` from a store on disk into a device's slots: through pinned host memory."""

from __future__ import annotations

from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass

from torch import Tensor

from moe_serve.experts.device_transfer import CHUNK_BYTES, DeviceTransfers
from moe_serve.experts.native_transfer import open_transfers
from moe_serve.experts.transfer import StoreSource, Transfer, Transfers
from moe_serve.experts.transfer_books import TransferBooks
from moe_serve.kernels.gpu.streams import Streams


@dataclass(slots=True, eq=False)
class _Staged:
    """A record on its way from disk. place: in the staging memory, -1 as yet."""

    transfer: Transfer
    place: int = -1
    is_read: bool = False


class StagedTransfers(TransferBooks[_Staged]):
    """`Transfers` from a store: read into pinned memory and verified there, then copied up.

    What reads are the threads that serve a host's slots; half of the places are kept for what is
    needed.
    """

    def __init__(
        self,
        streams: Streams,
        records: Tensor,
        source: StoreSource,
        num_places: int,
        num_threads: int,
        chunk_bytes: int = CHUNK_BYTES,
    ) -> None:
        """records: uint8 [num_slots, record_bytes], on the device; num_places: at least 2.

        Raises CapacityError without memory or threads.
        """
        assert num_places >= 2, num_places
        super().__init__()
        record_bytes = records.shape[1]
        try:
            memory = streams.pinned(num_places * record_bytes)
        except BaseException:
            source.close()
            raise
        self.records = records
        self._staging = memory.view(num_places, record_bytes)
        self._source = source
        self._reads: Transfers = open_transfers(source, self._staging, num_places, num_threads)
        self._uploads = DeviceTransfers(streams, records, self._staged, chunk_bytes)
        self._places = list(range(num_places))
        self._num_kept = num_places // 2
        self._urgent: deque[_Staged] = deque()  # without a place
        self._guesses: deque[_Staged] = deque()

    def demand(self, layer: int, loads: Sequence[tuple[int, int]]) -> None:
        for expert, slot in loads:
            self._urgent.append(self._add(Transfer(layer, expert, slot, is_urgent=True)))
        self._move_on()

    def guess(self, layer: int, expert: int, slot: int) -> None:
        self._guesses.append(self._add(Transfer(layer, expert, slot, is_urgent=False)))
        self._move_on()

    def hurry(self, layer: int, expert: int) -> None:
        staged = self._needed(layer, expert)
        if staged is None:
            return
        if staged in self._guesses:
            self._guesses.remove(staged)
            self._urgent.append(staged)
        elif staged.place >= 0:
            (self._uploads if staged.is_read else self._reads).hurry(layer, expert)
        self._move_on()

    def give_up(self, layer: int, expert: int) -> bool:
        staged = self._to_give_up(layer, expert)
        if staged is None:
            return False
        if staged in self._guesses:
            self._guesses.remove(staged)
            self._end(staged)
        else:
            (self._uploads if staged.is_read else self._reads).give_up(layer, expert)
        return True

    def ended(self, wait: bool = False) -> list[Transfer]:
        self._move_on()
        while wait and not self._ended and self._of_expert:
            if self._uploads.is_busy:  # shorter than any read
                self._after_uploads(self._uploads.ended(wait=True))
            else:
                self._after_reads(self._reads.ended(wait=True))
            self._move_on()
        ended, self._ended = self._ended, []
        return [one.transfer for one in ended]

    def forget(self) -> None:
        self._reads.forget()
        self._uploads.forget()
        self._urgent.clear()
        self._guesses.clear()
        self._places = list(range(self._staging.shape[0]))
        self._forget_all()

    def close(self) -> None:
        self._is_open = False
        self._reads.close()
        self._uploads.close()
        for read in self._reads.ended():
            transfer = self._of_expert[read.layer, read.expert].transfer
            transfer.at, transfer.error = read.at, read.error
        for sent in self._uploads.ended():
            self._of_expert[sent.layer, sent.expert].transfer.is_whole = sent.is_whole
        for staged in list(self._of_expert.values()):
            self._end(staged)
        self._urgent.clear()
        self._guesses.clear()

    def _begin_again(self, one: _Staged) -> None:
        one.transfer.at, one.is_read = 0, False
        self._guesses.append(one)

    def _add(self, transfer: Transfer) -> _Staged:
        self._check_open()
        return self._keep(_Staged(transfer))

    def _staged(self, layer: int, expert: int) -> Tensor:
        place = self._of_expert[layer, expert].place
        return self._staging[place, : self._source.record_bytes(layer)]

    def _move_on(self) -> None:
        """Send what was read, and begin to read what there is a place for."""
        if not self._is_open:
            return
        self._after_reads(self._reads.ended())
        self._after_uploads(self._uploads.ended())
        while self._urgent and self._places:
            self._read(self._urgent.popleft())
        while self._guesses and len(self._places) > self._num_kept:
            self._read(self._guesses.popleft())

    def _read(self, staged: _Staged) -> None:
        transfer, staged.place = staged.transfer, self._places.pop()
        if transfer.is_urgent:
            self._reads.demand(transfer.layer, [(transfer.expert, staged.place)])
        else:
            self._reads.guess(transfer.layer, transfer.expert, staged.place)

    def _after_reads(self, ended: Sequence[Transfer]) -> None:
        for read in ended:
            staged = self._of_expert[read.layer, read.expert]
            transfer = staged.transfer
            transfer.at, transfer.error = read.at, read.error
            if transfer.is_given_up or transfer.error is not None:
                self._end(staged)
            elif not read.is_whole:  # given up just before it was needed
                self._reads.demand(transfer.layer, [(transfer.expert, staged.place)])
            else:
                staged.is_read = True
                if transfer.is_urgent:
                    self._uploads.demand(transfer.layer, [(transfer.expert, transfer.slot)])
                else:
                    self._uploads.guess(transfer.layer, transfer.expert, transfer.slot)

    def _after_uploads(self, ended: Sequence[Transfer]) -> None:
        for sent in ended:
            staged = self._of_expert[sent.layer, sent.expert]
            transfer = staged.transfer
            transfer.is_whole, transfer.error = sent.is_whole, sent.error
            self._end(staged)

    def _end(self, one: _Staged) -> None:
        if one.place >= 0:
            self._places.append(one.place)
            one.place = -1
        super()._end(one)
