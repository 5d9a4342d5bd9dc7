"""`Transfers` into a device's slots, by streams: from pinned host memory, or through it from disk.

A copy engine serves all streams in the order of asking, so what comes later waits for all that was
asked before. What is needed is asked for at once, all of it; of guesses a few chunks at a time, and
none while something needed is on its way. No thread asks a device for anything: the owner's calls
move things on.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

from torch import Tensor

from moe_serve.errors import StoreError
from moe_serve.experts.native_transfer import open_transfers
from moe_serve.experts.read_ahead import Place, ReadAhead
from moe_serve.experts.transfer import Awaited, StoreSource, Transfer, Transfers
from moe_serve.kernels.gpu.streams import Event, Stream, Streams

# Of guesses at most 4 MiB are asked for and not there: 84 us, at 50 GB/s, that something needed
# waits. Two, so that the link need not wait for the host between them; less than 2 MiB is slower.
CHUNK_BYTES = 2**21
MOST_CHUNKS = 2

_Key = tuple[int, int]


@dataclass(slots=True, eq=False)
class _Upload:
    """A record on its way up. fence: done when no kernel reads what was in its slot.

    place: where it is on the device already, if it is, or will be soon.
    num_asked: bytes that were asked for; num_parts: copies that are not known to be done.
    """

    transfer: Transfer
    source: Tensor
    fence: Event
    place: Place | None
    num_asked: int = 0
    num_parts: int = 0

    @property
    def num_bytes(self) -> int:
        return self.source.shape[0]

    @property
    def has_ended(self) -> bool:
        if self.num_parts:
            return False  # its slot, or where it comes from, is still in use
        transfer = self.transfer
        is_stopped = transfer.is_given_up or transfer.error is not None
        return is_stopped or transfer.at == self.num_bytes


@dataclass(slots=True)
class _Lane:
    """A stream, and what it was asked for in order: each copy's event, record and bytes."""

    stream: Stream
    parts: deque[tuple[Event, _Upload, int]] = field(default_factory=deque)


class DeviceTransfers:
    """`Transfers` from host memory that is pinned, and holds records that were verified."""

    def __init__(
        self,
        streams: Streams,
        records: Tensor,
        record_of: Callable[[int, int], Tensor],
        chunk_bytes: int = CHUNK_BYTES,
        ahead: ReadAhead | None = None,
    ) -> None:
        """records: uint8 [num_slots, record_bytes], on the streams' device.

        record_of(layer, expert): uint8, pinned; it stays as it is until its transfer has ended.
        ahead: what may be on the device, or on its way there, before it has a slot.
        """
        self.records = records
        self._streams = streams
        self._record_of = record_of
        self._chunk_bytes = chunk_bytes
        self._ahead = ahead
        self._urgent = _Lane(streams.stream(is_urgent=True))
        self._usual = _Lane(streams.stream())
        self._guesses: deque[_Upload] = deque()  # of which not all was asked for
        self._of_expert: dict[_Key, _Upload] = {}
        self._ended: list[_Upload] = []
        self._num_guesses = 0
        self._is_open = True

    def demand(self, layer: int, loads: Sequence[tuple[int, int]]) -> None:
        fence = self._fence()
        self._urgent.stream.after(fence)
        for expert, slot in loads:
            upload = self._add(Transfer(layer, expert, slot, is_urgent=True), fence)
            self._ask(upload, self._urgent, upload.num_bytes)

    def guess(self, layer: int, expert: int, slot: int) -> None:
        self._guesses.append(
            self._add(Transfer(layer, expert, slot, is_urgent=False), self._fence())
        )
        self._move_on()

    def hurry(self, layer: int, expert: int) -> None:
        upload = self._of_expert.get((layer, expert)) or self._stopped(layer, expert)
        if upload is None:
            return
        self._num_guesses -= not upload.transfer.is_urgent
        upload.transfer.is_urgent = True
        upload.transfer.is_given_up = False
        if upload in self._guesses:
            self._guesses.remove(upload)
        if upload.num_asked < upload.num_bytes and upload.transfer.error is None:
            self._urgent.stream.after(upload.fence)
            self._ask(upload, self._urgent, upload.num_bytes)

    def give_up(self, layer: int, expert: int) -> bool:
        upload = self._of_expert.get((layer, expert))
        if upload is None or upload.transfer.is_urgent or upload.transfer.is_given_up:
            return False
        upload.transfer.is_given_up = True
        if upload in self._guesses:
            self._guesses.remove(upload)
        self._end_if_over(upload)
        return True

    def ended(self, wait: bool = False) -> list[Transfer]:
        self._move_on()
        while wait and not self._ended and self._of_expert:
            event, _, _ = (self._urgent.parts or self._usual.parts)[0]
            event.wait()
            self._move_on()
        ended, self._ended = self._ended, []
        return [one.transfer for one in ended]

    def is_known(self, layer: int, expert: int) -> bool:
        return (layer, expert) in self._of_expert or any(
            one.transfer.is_of(layer, expert) for one in self._ended
        )

    def arrivals(self, layer: int, experts: Sequence[int]) -> Awaited | None:
        return None

    @property
    def is_busy(self) -> bool:
        self._move_on()
        return bool(self._of_expert)

    @property
    def num_guesses(self) -> int:
        return self._num_guesses

    def close(self) -> None:
        self._is_open = False
        while self._guesses:
            upload = self._guesses.popleft()
            upload.transfer.is_given_up = True
            self._end_if_over(upload)
        for lane in (self._urgent, self._usual):
            for event, _, _ in lane.parts:
                event.wait()
        if self._ahead is not None:
            self._ahead.close()
        self._collect()

    def _stopped(self, layer: int, expert: int) -> _Upload | None:
        """Let one that was given up, and has ended uncollected, be under way again."""
        for upload in self._ended:
            transfer = upload.transfer
            if transfer.is_given_up and transfer.is_of(layer, expert) and self._is_open:
                self._ended.remove(upload)
                self._of_expert[layer, expert] = upload
                self._num_guesses += not transfer.is_urgent
                return upload
        return None

    def _fence(self) -> Event:
        """Return the event of the kernels so far: later ones do not read a slot that is given."""
        if not self._is_open:
            raise StoreError("experts are asked for after the end; the engine was closed")
        return self._streams.current().record()

    def _add(self, transfer: Transfer, fence: Event) -> _Upload:
        key = (transfer.layer, transfer.expert)
        assert key not in self._of_expert, key
        place = None if self._ahead is None else self._ahead.take(*key)
        source = self._record_of(*key) if place is None else place.record
        upload = _Upload(transfer, source, fence, place)
        self._of_expert[key] = upload
        self._num_guesses += not transfer.is_urgent
        return upload

    def _ask(self, upload: _Upload, lane: _Lane, end: int) -> None:
        """Ask for a record's bytes up to `end`."""
        begin, transfer, place = upload.num_asked, upload.transfer, upload.place
        try:
            if place is not None:
                lane.stream.after(place.event)
            lane.stream.copy(self.records[transfer.slot, begin:end], upload.source[begin:end])
            lane.parts.append((lane.stream.record(), upload, end - begin))
        except Exception as error:  # whatever it is, it belongs to the step that waits
            transfer.error = error
            self._end_if_over(upload)
            return
        upload.num_asked = end
        upload.num_parts += 1
        if place is not None and end - begin == upload.num_bytes:  # nothing else reads it there
            self._give_back(upload, lane.parts[-1][0])

    def _give_back(self, upload: _Upload, event: Event) -> None:
        """Free the place of a record: it will not be read there after `event`."""
        assert self._ahead is not None
        assert upload.place is not None
        self._ahead.give_back(upload.place, event)
        upload.place = None
        if upload.num_asked < upload.num_bytes:  # somebody may want the rest after all
            upload.source = self._record_of(upload.transfer.layer, upload.transfer.expert)

    def _move_on(self) -> None:
        """Take note of what is done, and ask for more of the guesses."""
        self._collect()
        usual = self._usual
        while self._guesses and not self._urgent.parts and len(usual.parts) < MOST_CHUNKS:
            upload = self._guesses[0]
            if not upload.num_asked:
                usual.stream.after(upload.fence)
            self._ask(upload, usual, min(upload.num_bytes, upload.num_asked + self._chunk_bytes))
            if upload.num_asked == upload.num_bytes or upload.transfer.error is not None:
                self._guesses.popleft()

    def _collect(self) -> None:
        for lane in (self._urgent, self._usual):
            while lane.parts and lane.parts[0][0].is_done():
                _, upload, num_bytes = lane.parts.popleft()
                upload.num_parts -= 1
                upload.transfer.at += num_bytes
                self._end_if_over(upload)

    def _end_if_over(self, upload: _Upload) -> None:
        if not upload.has_ended:
            return
        transfer = upload.transfer
        if upload.place is not None:
            self._give_back(upload, upload.place.event)
        transfer.is_whole = transfer.at == upload.num_bytes
        transfer.is_given_up = not transfer.is_whole and transfer.error is None
        self._num_guesses -= not transfer.is_urgent
        del self._of_expert[transfer.layer, transfer.expert]
        self._ended.append(upload)


@dataclass(slots=True, eq=False)
class _Staged:
    """A record on its way from disk. place: in the staging memory, -1 as yet."""

    transfer: Transfer
    place: int = -1
    is_read: bool = False


class StagedTransfers:
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
        self._of_expert: dict[_Key, _Staged] = {}
        self._ended: list[_Staged] = []
        self._num_guesses = 0
        self._is_open = True

    def demand(self, layer: int, loads: Sequence[tuple[int, int]]) -> None:
        for expert, slot in loads:
            self._urgent.append(self._add(Transfer(layer, expert, slot, is_urgent=True)))
        self._move_on()

    def guess(self, layer: int, expert: int, slot: int) -> None:
        self._guesses.append(self._add(Transfer(layer, expert, slot, is_urgent=False)))
        self._move_on()

    def hurry(self, layer: int, expert: int) -> None:
        staged = self._of_expert.get((layer, expert)) or self._stopped(layer, expert)
        if staged is None:
            return
        self._num_guesses -= not staged.transfer.is_urgent
        staged.transfer.is_urgent = True
        staged.transfer.is_given_up = False
        if staged in self._guesses:
            self._guesses.remove(staged)
            self._urgent.append(staged)
        elif staged.place >= 0:
            (self._uploads if staged.is_read else self._reads).hurry(layer, expert)
        self._move_on()

    def give_up(self, layer: int, expert: int) -> bool:
        staged = self._of_expert.get((layer, expert))
        if staged is None or staged.transfer.is_urgent or staged.transfer.is_given_up:
            return False
        staged.transfer.is_given_up = True
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

    def is_known(self, layer: int, expert: int) -> bool:
        return (layer, expert) in self._of_expert or any(
            one.transfer.is_of(layer, expert) for one in self._ended
        )

    def arrivals(self, layer: int, experts: Sequence[int]) -> Awaited | None:
        return None

    @property
    def is_busy(self) -> bool:
        self._move_on()
        return bool(self._of_expert)

    @property
    def num_guesses(self) -> int:
        return self._num_guesses

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

    def _stopped(self, layer: int, expert: int) -> _Staged | None:
        """Let one that was given up, and has ended uncollected, begin again."""
        for staged in self._ended:
            transfer = staged.transfer
            if transfer.is_given_up and transfer.is_of(layer, expert) and self._is_open:
                self._ended.remove(staged)
                transfer.at, staged.is_read = 0, False
                self._of_expert[layer, expert] = staged
                self._num_guesses += not transfer.is_urgent
                self._guesses.append(staged)
                return staged
        return None

    def _add(self, transfer: Transfer) -> _Staged:
        if not self._is_open:
            raise StoreError("experts are asked for after the end; the engine was closed")
        key = (transfer.layer, transfer.expert)
        assert key not in self._of_expert, key
        self._of_expert[key] = staged = _Staged(transfer)
        self._num_guesses += not transfer.is_urgent
        return staged

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

    def _end(self, staged: _Staged) -> None:
        transfer = staged.transfer
        transfer.is_given_up = not transfer.is_whole and transfer.error is None
        if staged.place >= 0:
            self._places.append(staged.place)
            staged.place = -1
        self._num_guesses -= not transfer.is_urgent
        del self._of_expert[transfer.layer, transfer.expert]
        self._ended.append(staged)
