"""`Transfers` into a device's slots, by streams, from pinned host memory.

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

from moe_serve.experts.read_ahead import Place, ReadAhead
from moe_serve.experts.transfer import Transfer
from moe_serve.experts.transfer_books import TransferBooks
from moe_serve.kernels.gpu.streams import Event, Stream, Streams

# Of guesses at most 4 MiB are asked for and not there: 84 us, at 50 GB/s, that something needed
# waits. Two, so that the link need not wait for the host between them; less than 2 MiB is slower.
CHUNK_BYTES = 2**21
MOST_CHUNKS = 2


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


class DeviceTransfers(TransferBooks[_Upload]):
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
        super().__init__()
        self.records = records
        self._streams = streams
        self._record_of = record_of
        self._chunk_bytes = chunk_bytes
        self._ahead = ahead
        self._urgent = _Lane(streams.stream(is_urgent=True))
        self._usual = _Lane(streams.stream())
        self._guesses: deque[_Upload] = deque()  # of which not all was asked for

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
        upload = self._needed(layer, expert)
        if upload is None:
            return
        if upload in self._guesses:
            self._guesses.remove(upload)
        if upload.num_asked < upload.num_bytes and upload.transfer.error is None:
            self._urgent.stream.after(upload.fence)
            self._ask(upload, self._urgent, upload.num_bytes)

    def give_up(self, layer: int, expert: int) -> bool:
        upload = self._to_give_up(layer, expert)
        if upload is None:
            return False
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

    def forget(self) -> None:
        for lane in (self._urgent, self._usual):
            lane.stream.record().wait()
            lane.parts.clear()
        if self._ahead is not None:
            self._ahead.forget()
        self._guesses.clear()
        self._forget_all()

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

    def _begin_again(self, one: _Upload) -> None:
        """It goes on where it was."""

    def _fence(self) -> Event:
        """Return the event of the kernels so far: later ones do not read a slot that is given."""
        self._check_open()
        return self._streams.current().record()

    def _add(self, transfer: Transfer, fence: Event) -> _Upload:
        layer, expert = transfer.layer, transfer.expert
        place = None if self._ahead is None else self._ahead.take(layer, expert)
        source = self._record_of(layer, expert) if place is None else place.record
        return self._keep(_Upload(transfer, source, fence, place))

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
        self._end(upload)
