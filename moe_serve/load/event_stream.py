"""Server-sent events out of a body's bytes, however they are split. No I/O, no clock."""

from __future__ import annotations

from typing import NamedTuple

from moe_serve.load.framing import BadAnswer

MAX_EVENT_BYTES = 16 * 2**20


class Event(NamedTuple):
    """One event. name: "" unless the stream gave one."""

    name: str
    data: bytes


class EventReader:
    """Splits bytes into events; comments and other fields are passed over.

    Bytes are not decoded here, so that a character split over two reads stays whole.
    """

    def __init__(self) -> None:
        self._pieces: list[bytes] = []  # of a line whose end has not come
        self._num_held = 0
        self._lines: list[bytes] = []  # data lines of an event whose end has not come
        self._name = ""
        self._ended_in_return = False

    def feed(self, data: bytes) -> list[Event]:
        """Return the events that end in these bytes. Raises BadAnswer for one without bounds."""
        if self._ended_in_return or b"\r" in data:
            data = self._with_plain_line_ends(data)
        self._num_held += len(data)
        if self._num_held > MAX_EVENT_BYTES:
            raise BadAnswer(f"an event of more than {MAX_EVENT_BYTES} bytes")
        if b"\n" not in data:
            self._pieces.append(data)
            return []
        if self._pieces:
            data = b"".join((*self._pieces, data))
        *lines, rest = data.split(b"\n")
        self._pieces = [rest] if rest else []
        events = []
        for line in lines:
            if line.startswith(b"data:"):
                self._lines.append(line[6:] if line[5:6] == b" " else line[5:])
            elif not line:
                if self._lines:
                    events.append(Event(self._name, b"\n".join(self._lines)))
                    self._lines = []
                    self._num_held = len(rest)
                self._name = ""
            elif line.startswith(b"event:"):
                self._name = line[6:].strip().decode("utf-8", "replace")
            elif line == b"data":
                self._lines.append(b"")
        if not self._lines:
            self._num_held = len(rest)
        return events

    def _with_plain_line_ends(self, data: bytes) -> bytes:
        if self._ended_in_return and data.startswith(b"\n"):
            data = data[1:]
            self._ended_in_return = False
            if b"\r" not in data:
                return data
        self._ended_in_return = data.endswith(b"\r")
        return data.replace(b"\r\n", b"\n").replace(b"\r", b"\n")
