"""What a streamed answer leaves in its record, on a clock of the test's own."""

from __future__ import annotations

import pytest

from moe_serve.load.framing import BadAnswer
from moe_serve.load.records import RequestRecord, StreamedAnswer, error_message
from tests.load.scripted_server import DONE, event, token, usage

HEADERS = {"content-type": "text/event-stream; charset=utf-8"}


class Answer:
    """An answer whose parts come at times that the test says."""

    def __init__(self, status: int = 200, headers: dict[str, str] = HEADERS) -> None:
        self.now = 0.0
        self.record = RequestRecord(index=0, intended_s=10.0, sent_s=12.0)
        self.streamed = StreamedAnswer(self.record, clock=lambda: self.now)
        self.streamed.head(status, headers)

    def at(self, now: float, *data: bytes) -> Answer:
        self.now = now
        for part in data:
            self.streamed.body(part)
        return self


def test_latencies_of_a_completion() -> None:
    answer = Answer().at(13.0, token()).at(13.5, token("yz")).at(15.0, token())
    answer.at(15.5, token("", "length")).at(15.75, usage(7, 5)).at(16.0, DONE)
    answer.streamed.finish()
    record = answer.record
    assert record.is_ok
    assert (record.ttft_s(), record.ttft_s(from_sending=True)) == (3.0, 1.0)
    assert (record.e2e_s(), record.e2e_s(from_sending=True)) == (6.0, 4.0)
    assert record.tpot_s == (15.0 - 13.0) / 4  # five tokens, in three chunks
    assert record.itl_s == [0.5, 1.5]
    assert (record.input_tokens, record.output_tokens, record.is_counted) == (7, 5, True)
    assert record.finish_reason == "length"
    assert record.to_json(10.0)["chunk_s"] == [3.0, 3.5, 5.0]


def test_the_role_of_a_chat_is_no_token() -> None:
    def delta(**fields: object) -> bytes:
        return event(choices=[{"index": 0, "delta": fields}])

    answer = Answer().at(13.0, delta(role="assistant", content=""))
    answer.at(14.0, delta(reasoning_content="hm")).at(15.0, delta(content="a"))
    answer.at(16.0, event(choices=[{"index": 0, "delta": {}, "finish_reason": "stop"}]), DONE)
    answer.streamed.finish()
    assert answer.record.chunk_s == [14.0, 15.0]
    assert (answer.record.output_tokens, answer.record.is_counted) == (2, False)


def test_several_events_in_one_read_share_its_time_and_a_split_one_has_its_end_s() -> None:
    two = token("\u00e9")
    place = two.index("\u00e9".encode()) + 1  # in the middle of the character
    answer = Answer().at(13.0, token() + token() + two[:place]).at(14.0, two[place:])
    answer.at(15.0, token("", "stop") + DONE)
    answer.streamed.finish()
    assert answer.record.chunk_s == [13.0, 13.0, 14.0]


def test_an_answer_without_text_has_the_time_of_its_finish() -> None:
    answer = Answer().at(13.0, token("", "stop")).at(14.0, usage(3, 1), DONE)
    answer.streamed.finish()
    assert answer.record.ttft_s() == 3.0
    assert answer.record.tpot_s is None
    assert answer.record.output_tokens == 1


def test_an_error_event_after_tokens() -> None:
    answer = Answer().at(13.0, token(), event(error={"message": "rank 1 is gone", "code": 503}))
    answer.streamed.finish()
    assert (answer.record.failure, answer.record.message) == ("error event", "rank 1 is gone")


def test_an_error_status_keeps_message_and_retry_after() -> None:
    answer = Answer(503, {"retry-after": "7", "content-type": "application/json"})
    answer.at(13.0, b'{"error": {"mess', b'age": "queue full", "type": "x"}}')
    answer.streamed.finish()
    record = answer.record
    assert (record.failure, record.message, record.retry_after) == ("http 503", "queue full", "7")


def test_what_is_no_stream_of_the_api() -> None:
    with pytest.raises(BadAnswer, match="content-type is 'application/json'"):
        Answer(200, {"content-type": "application/json"})
    deep = b'data: {"x": ' + b"[" * 100_000 + b"\n\n"
    wrong = [b'data: {"usage": {"completion_tokens": %d}}\n\n' % n for n in (-7, 2**63, 10**400)]
    for data in (b"data: {oops\n\n", b'data: {"choices": 3}\n\n', b"data: \xff\n\n", deep, *wrong):
        with pytest.raises(BadAnswer, match="no chunk"):
            Answer().at(13.0, data)
    answer = Answer().at(13.0, token())
    with pytest.raises(BadAnswer, match="without \\[DONE\\]"):
        answer.streamed.finish()


def test_messages_of_errors_in_other_forms() -> None:
    assert error_message(b'{"detail": "no"}') == "no"
    assert error_message(b'{"error": "text"}') == "text"
    assert error_message(b"<html>") == "<html>"
    assert error_message(b"[1, 2]") == "[1, 2]"
    assert len(error_message(b"x" * 10_000)) == 300
    assert "\ufffd" in error_message(b"\xff")
    assert error_message(b"[" * 100_000) == "[" * 300
