"""Where an HTTP/1.1 answer begins and ends in the bytes of a connection. No I/O, no clock."""

from __future__ import annotations

from typing import Protocol

MAX_HEAD_BYTES = 65_536
_MAX_SIZE_LINE_BYTES = 1024
_WITHOUT_BODY = (204, 304)


class BadAnswer(Exception):
    """Bytes that are no answer of HTTP/1.1 or of the API."""


class AnswerSink(Protocol):
    """Who an answer is for."""

    def head(self, status: int, headers: dict[str, str]) -> None:
        """Take the status and the headers, whose names are in lower case."""

    def body(self, data: bytes) -> None:
        """Take the next bytes of the body; never empty."""


class AnswerFramer:
    """Takes one answer out of a connection's bytes, however they are split.

    is_complete: the answer has ended. keeps_open: the connection can then serve another request.
    """

    def __init__(self, sink: AnswerSink) -> None:
        self.is_complete = False
        self.keeps_open = True
        self._sink = sink
        self._held = b""
        self._has_head = False
        self._is_chunked = False
        self._num_left: int | None = 0  # of the body, or of a chunk; None: until the end
        self._is_after_chunk = False  # the line end of a chunk is still to come
        self._is_trailer = False

    def feed(self, data: bytes) -> None:
        """Take bytes. Raises BadAnswer, also for bytes after the end of the answer."""
        if self._held:
            data = self._held + data
            self._held = b""
        if not self._has_head:
            rest = self._read_head(data)
            if rest is None:
                return
            data = rest
        if self._is_chunked:
            self._read_chunks(data)
        else:
            self._read_plain(data)

    def end(self) -> bool:
        """Take the end of the connection; return whether the answer is whole."""
        if self._has_head and not self._is_chunked and self._num_left is None:
            self.is_complete = True
        self.keeps_open = False
        return self.is_complete

    def _read_head(self, data: bytes) -> bytes | None:
        """Take the head, also of interim answers (1xx); return what follows, None without one."""
        while True:
            head, found, rest = data.partition(b"\r\n\r\n")
            if len(head) > MAX_HEAD_BYTES:
                raise BadAnswer(f"the head of an answer is longer than {MAX_HEAD_BYTES} bytes")
            if not found:
                if not b"HTTP/1.".startswith(data[:7]):
                    raise BadAnswer(f"not HTTP/1: the answer begins with {data[:40]!r}")
                self._held = data
                return None
            status, headers = _parse_head(head, self)
            if status >= 200:
                break
            data = rest
        self._has_head = True
        self._set_body(status, headers)
        self._sink.head(status, headers)
        return rest

    def _set_body(self, status: int, headers: dict[str, str]) -> None:
        if headers.get("connection", "").lower() == "close":
            self.keeps_open = False
        coding = headers.get("transfer-encoding", "").lower()
        if status in _WITHOUT_BODY:
            self.is_complete = True
        elif coding == "chunked":
            self._is_chunked = True
        elif coding:
            raise BadAnswer(f"transfer-encoding {coding!r:.80} is not read here")
        elif "content-length" in headers:
            length = headers["content-length"]
            if not (length.isascii() and length.isdigit() and len(length) < 16):
                raise BadAnswer(f"content-length is {length!r:.80}")
            self._num_left = int(length)
            self.is_complete = self._num_left == 0
        else:
            self._num_left = None
            self.keeps_open = False

    def _read_plain(self, data: bytes) -> None:
        if self._num_left is None:
            if data:
                self._sink.body(data)
            return
        if len(data) > self._num_left:
            raise BadAnswer("bytes after the end of an answer")
        self._num_left -= len(data)
        self.is_complete = self._num_left == 0
        if data:
            self._sink.body(data)

    def _read_chunks(self, data: bytes) -> None:
        place, end = 0, len(data)
        while place < end:
            if self._num_left:
                piece = data[place : place + self._num_left]
                place += len(piece)
                self._num_left -= len(piece)
                self._is_after_chunk = not self._num_left
                self._sink.body(piece)
                continue
            if self.is_complete:
                raise BadAnswer("bytes after the end of an answer")
            line_end = data.find(b"\r\n", place)
            if line_end < 0:
                if end - place > _MAX_SIZE_LINE_BYTES:
                    raise BadAnswer(f"no chunk size in {_MAX_SIZE_LINE_BYTES} bytes")
                self._held = data[place:]
                return
            line = data[place:line_end]
            place = line_end + 2
            if self._is_after_chunk:
                if line:
                    raise BadAnswer(f"a chunk is longer than its size: {line[:40]!r} follows it")
                self._is_after_chunk = False
            elif self._is_trailer:
                self.is_complete = not line
            else:
                self._num_left = _chunk_size(line)
                self._is_trailer = self._num_left == 0


def _parse_head(head: bytes, framer: AnswerFramer) -> tuple[int, dict[str, str]]:
    first, *lines = head.decode("latin-1").split("\r\n")
    words = first.split(" ", 2)
    if (
        len(words) < 2
        or words[0] not in ("HTTP/1.1", "HTTP/1.0")
        or not (words[1].isascii() and words[1].isdigit() and len(words[1]) == 3)
    ):
        raise BadAnswer(f"not HTTP/1: the answer begins with {first[:40]!r}")
    if words[0] == "HTTP/1.0":
        framer.keeps_open = False
    headers = {}
    for line in lines:
        name, colon, value = line.partition(":")
        if not colon:
            raise BadAnswer(f"a header without a colon: {line[:40]!r}")
        headers[name.lower()] = value.strip(" \t")
    return int(words[1]), headers


def _chunk_size(line: bytes) -> int:
    digits = line.partition(b";")[0].strip()
    if not digits or len(digits) > 15 or digits.strip(b"0123456789abcdefABCDEF"):
        raise BadAnswer(f"chunk size is {line[:40]!r}")
    return int(digits, 16)
