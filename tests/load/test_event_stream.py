"""Events out of bytes, however they are split."""

from __future__ import annotations

import pytest

from moe_serve.load import event_stream
from moe_serve.load.event_stream import Event, EventReader
from moe_serve.load.framing import BadAnswer

STREAM = (
    b': ping\n\ndata: {"a": "\xc3\xa9"}\n\nevent: error\ndata:first\ndata: second\nid: 3\n\n'
    b"data: [DONE]\n\n"
)
EVENTS = [
    Event("", b'{"a": "\xc3\xa9"}'),
    Event("error", b"first\nsecond"),
    Event("", b"[DONE]"),
]


@pytest.mark.parametrize("line_end", [b"\n", b"\r\n", b"\r"])
@pytest.mark.parametrize("size", [1, 2, 3, 5, 8, 1000])
def test_any_split_gives_the_same_events(line_end: bytes, size: int) -> None:
    data = STREAM.replace(b"\n", line_end)
    reader = EventReader()
    found = []
    for place in range(0, len(data), size):
        found += reader.feed(data[place : place + size])
    assert found == EVENTS


def test_an_event_comes_with_its_last_byte_and_not_before() -> None:
    reader = EventReader()
    assert reader.feed(b"da") == []
    assert reader.feed(b"ta: \xc3") == []
    assert reader.feed(b"\xa9\n") == []
    assert reader.feed(b"\n") == [Event("", b"\xc3\xa9")]


def test_an_event_has_a_bound(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(event_stream, "MAX_EVENT_BYTES", 100)
    reader = EventReader()
    for _ in range(50):  # many small ones are no large one
        assert len(reader.feed(b"data: 0123456789\n\n: ping\n\n")) == 1
    reader.feed(b"data: " + b"x" * 80)
    with pytest.raises(BadAnswer, match="more than 100 bytes"):
        reader.feed(b"x" * 30)
