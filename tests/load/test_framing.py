"""Answers out of bytes, however they are split."""

from __future__ import annotations

import pytest

from moe_serve.load.framing import MAX_HEAD_BYTES, AnswerFramer, BadAnswer


class Kept:
    def __init__(self) -> None:
        self.status = 0
        self.headers: dict[str, str] = {}
        self.data = b""

    def head(self, status: int, headers: dict[str, str]) -> None:
        self.status, self.headers = status, headers

    def body(self, data: bytes) -> None:
        assert data
        self.data += data


CHUNKED = (
    b"HTTP/1.1 100 Continue\r\n\r\n"
    b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\nX-A:  b \r\n\r\n"
    b"5;ext=1\r\nhello\r\nA\r\n, \r\nworld\n\r\n1\r\n!\r\n0\r\nTrailer: t\r\n\r\n"
)
PLAIN = b"HTTP/1.1 503 Busy\r\ncontent-length: 4\r\nRetry-After: 3\r\n\r\nbusy"


@pytest.mark.parametrize("size", [1, 2, 3, 7, 1000])
def test_a_chunked_answer_in_pieces(size: int) -> None:
    kept = Kept()
    framer = AnswerFramer(kept)
    for place in range(0, len(CHUNKED), size):
        assert not framer.is_complete
        framer.feed(CHUNKED[place : place + size])
    assert framer.is_complete
    assert framer.keeps_open
    assert (kept.status, kept.headers["x-a"], kept.data) == (200, "b", b"hello, \r\nworld\n!")


@pytest.mark.parametrize("size", [1, 5, 1000])
def test_an_answer_with_a_length_in_pieces(size: int) -> None:
    kept = Kept()
    framer = AnswerFramer(kept)
    for place in range(0, len(PLAIN), size):
        assert not framer.is_complete
        framer.feed(PLAIN[place : place + size])
    assert framer.is_complete
    assert (kept.status, kept.data, kept.headers["retry-after"]) == (503, b"busy", "3")


def test_an_answer_until_the_end_of_its_connection() -> None:
    kept = Kept()
    framer = AnswerFramer(kept)
    framer.feed(b"HTTP/1.1 200 OK\r\n\r\nsome")
    framer.feed(b" more")
    assert not framer.is_complete
    assert framer.end()
    assert kept.data == b"some more"
    assert not framer.keeps_open


@pytest.mark.parametrize("whole", [CHUNKED, PLAIN])
def test_a_cut_answer_is_not_whole(whole: bytes) -> None:
    for length in range(1, len(whole)):
        framer = AnswerFramer(Kept())
        framer.feed(whole[:length])
        assert not framer.end()


@pytest.mark.parametrize(
    ("head", "keeps_open"),
    [
        (b"HTTP/1.1 204 None\r\n\r\n", True),
        (b"HTTP/1.1 200 OK\r\ncontent-length: 0\r\nConnection: Close\r\n\r\n", False),
        (b"HTTP/1.0 200 OK\r\ncontent-length: 0\r\n\r\n", False),
    ],
)
def test_whether_the_connection_serves_on(head: bytes, keeps_open: bool) -> None:
    framer = AnswerFramer(Kept())
    framer.feed(head)
    assert framer.is_complete
    assert framer.keeps_open == keeps_open


@pytest.mark.parametrize(
    ("data", "says"),
    [
        (b"SSH-2.0-x\r\n", "not HTTP/1"),
        (b"HTTP/1.1 abc\r\n\r\n", "not HTTP/1"),
        (b"HTTP/2 200\r\n\r\n", "not HTTP/1"),
        (b"HTTP/1.1 200 OK\r\nno colon\r\n\r\n", "without a colon"),
        (b"HTTP/1.1 200 OK\r\ncontent-length: -1\r\n\r\n", "content-length"),
        (b"HTTP/1.1 200 OK\r\ntransfer-encoding: gzip, chunked\r\n\r\n", "transfer-encoding"),
        (b"HTTP/1.1 200 OK\r\ntransfer-encoding: chunked\r\n\r\nxy\r\n", "chunk size"),
        (b"HTTP/1.1 200 OK\r\ntransfer-encoding: chunked\r\n\r\n2\r\nabc\r\n", "longer than"),
        (b"HTTP/1.1 200 OK\r\ntransfer-encoding: chunked\r\n\r\n" + b"1" * 2000, "chunk size"),
        (b"HTTP/1.1 200 OK\r\ncontent-length: 1\r\n\r\nab", "after the end"),
        (CHUNKED + b"x", "after the end"),
        (b"HTTP/1.1 200 OK\r\nx: " + b"a" * MAX_HEAD_BYTES, "head of an answer"),
    ],
)
def test_what_is_no_answer(data: bytes, says: str) -> None:
    with pytest.raises(BadAnswer, match=says):
        AnswerFramer(Kept()).feed(data)
