"""What is known of one request: when each part of its answer came, and how it ended.

All times are seconds of `time.perf_counter`, on the clock of the run.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Annotated, Any

import msgspec

from moe_serve.load.event_stream import EventReader
from moe_serve.load.framing import BadAnswer

MAX_ERROR_BYTES = 65_536
_MAX_SHOWN = 300


class _Delta(msgspec.Struct):
    role: str | None = None
    content: str | None = None
    reasoning: str | None = None
    reasoning_content: str | None = None
    tool_calls: list[Any] | None = None


class _Choice(msgspec.Struct):
    text: str | None = None
    delta: _Delta | None = None
    finish_reason: str | None = None


_Tokens = Annotated[int, msgspec.Meta(ge=0, le=2**31 - 1)]


class _Usage(msgspec.Struct):
    prompt_tokens: _Tokens = 0
    completion_tokens: _Tokens = 0


class _Chunk(msgspec.Struct):
    choices: list[_Choice] = []
    usage: _Usage | None = None
    error: Any = None


# what is raised for bytes that are no JSON, or too deep
UNREADABLE = (msgspec.DecodeError, UnicodeDecodeError, RecursionError)
_read_chunk = msgspec.json.Decoder(_Chunk).decode


@dataclass(slots=True)
class RequestRecord:
    """One request of a run.

    intended_s: when it should have been sent; sent_s: when it was, or None. chunk_s: when each
    chunk with tokens came. end_s: when the answer ended, or the request failed. output_tokens: as
    the server counted them, or else the chunks (then is_counted is false). failure: None, or its
    kind: "http 503", "connection", "timeout", "error event", "bad answer", or "unfinished" for what
    ran when the run was interrupted. retry_after: that header, as it came.
    """

    index: int
    intended_s: float
    asked_input_tokens: int | None = None
    asked_output_tokens: int | None = None
    sent_s: float | None = None
    end_s: float | None = None
    chunk_s: list[float] = field(default_factory=list)
    input_tokens: int | None = None
    output_tokens: int = 0
    is_counted: bool = False
    finish_reason: str | None = None
    failure: str | None = None
    message: str = ""
    retry_after: str | None = None

    @property
    def is_ok(self) -> bool:
        return self.failure is None and self.end_s is not None

    def ttft_s(self, from_sending: bool = False) -> float | None:
        """Return the time to the first token; None where none came."""
        return self.chunk_s[0] - self._begin_s(from_sending) if self.chunk_s else None

    def e2e_s(self, from_sending: bool = False) -> float | None:
        """Return the time to the answer's end."""
        return None if self.end_s is None else self.end_s - self._begin_s(from_sending)

    @property
    def tpot_s(self) -> float | None:
        """The mean time of a token after the first; None with fewer than two tokens or chunks."""
        if self.output_tokens < 2 or len(self.chunk_s) < 2:
            return None
        return (self.chunk_s[-1] - self.chunk_s[0]) / (self.output_tokens - 1)

    @property
    def itl_s(self) -> list[float]:
        """The gaps between chunks, each of which may hold several tokens."""
        return [b - a for a, b in zip(self.chunk_s, self.chunk_s[1:], strict=False)]

    def _begin_s(self, from_sending: bool) -> float:
        if from_sending and self.sent_s is not None:
            return self.sent_s
        return self.intended_s

    def to_json(self, start_s: float) -> dict[str, Any]:
        """Return it with times since the start of the run."""

        def since(value: float | None) -> float | None:
            return None if value is None else round(value - start_s, 6)

        return {
            "index": self.index,
            "intended_s": since(self.intended_s),
            "sent_s": since(self.sent_s),
            "end_s": since(self.end_s),
            "ttft_s": self.ttft_s(),
            "ttft_from_send_s": self.ttft_s(from_sending=True),
            "tpot_s": self.tpot_s,
            "e2e_s": self.e2e_s(),
            "e2e_from_send_s": self.e2e_s(from_sending=True),
            "chunk_s": [since(value) for value in self.chunk_s],
            "asked_input_tokens": self.asked_input_tokens,
            "asked_output_tokens": self.asked_output_tokens,
            "input_tokens": self.input_tokens,
            "output_tokens": self.output_tokens,
            "is_counted_by_server": self.is_counted,
            "finish_reason": self.finish_reason,
            "failure": self.failure,
            "message": self.message,
            "retry_after": self.retry_after,
        }


class StreamedAnswer:
    """Writes a streamed answer of the API into a record, as it comes.

    A chunk counts when it has text, reasoning or a tool call; the role at the beginning of a chat
    and the finish reason at its end are no tokens. Of an answer without any text (all its tokens
    were special) the chunk with the finish reason counts, so that it has a first token.
    """

    def __init__(
        self, record: RequestRecord, clock: Callable[[], float] = time.perf_counter
    ) -> None:
        self._record = record
        self._clock = clock
        self._events = EventReader()
        self._error_body = bytearray()
        self._is_stream = False
        self._is_done = False
        self._finish_s: float | None = None

    def head(self, status: int, headers: dict[str, str]) -> None:
        record = self._record
        if status != 200:
            record.failure = f"http {status}"
            record.retry_after = headers.get("retry-after")
        elif headers.get("content-type", "").partition(";")[0].strip() != "text/event-stream":
            kind = headers.get("content-type", "none")
            raise BadAnswer(f"a streamed answer was asked for; its content-type is {kind!r:.80}")
        else:
            self._is_stream = True

    def body(self, data: bytes) -> None:
        now = self._clock()
        if not self._is_stream:
            self._error_body += data[: MAX_ERROR_BYTES - len(self._error_body)]
            return
        for event in self._events.feed(data):
            if self._is_done:
                break
            if event.data == b"[DONE]":
                self._is_done = True
                self._record.end_s = now
            else:
                self._take(event.data, event.name, now)

    def finish(self) -> None:
        """Settle what the whole answer says, at its end or where the connection was lost.

        Raises BadAnswer for a stream that ended without an end.
        """
        record = self._record
        if record.failure is not None:
            if self._error_body:
                record.message = error_message(bytes(self._error_body))
            return
        if not record.chunk_s and self._finish_s is not None:
            record.chunk_s.append(self._finish_s)
        if not record.is_counted:
            record.output_tokens = len(record.chunk_s)
        if not self._is_done and self._finish_s is None:
            raise BadAnswer("the stream ended without [DONE] and without a finish_reason")

    @property
    def is_done(self) -> bool:
        """Whether [DONE] was seen: what happens to the connection then is no failure."""
        return self._is_done

    def _take(self, data: bytes, name: str, now: float) -> None:
        record = self._record
        try:
            chunk = _read_chunk(data)
        except UNREADABLE as error:
            raise BadAnswer(f"an event that is no chunk of an answer: {error}") from error
        if chunk.error is not None or name == "error":
            record.failure = "error event"
            record.message = error_message(data)
            return
        for choice in chunk.choices:
            if choice.finish_reason is not None:
                record.finish_reason = choice.finish_reason
                self._finish_s = now
        if any(map(_has_token, chunk.choices)):
            record.chunk_s.append(now)
        if chunk.usage is not None:
            record.input_tokens = chunk.usage.prompt_tokens
            record.output_tokens = chunk.usage.completion_tokens
            record.is_counted = True


def _has_token(choice: _Choice) -> bool:
    if choice.text:
        return True
    delta = choice.delta
    return delta is not None and bool(
        delta.content or delta.reasoning or delta.reasoning_content or delta.tool_calls
    )


def error_message(body: bytes) -> str:
    """Return what the body of an error says, in the API's form or in any other, on 300 letters."""
    text = body.decode("utf-8", "replace")
    try:
        found = msgspec.json.decode(body)
    except UNREADABLE:
        return text[:_MAX_SHOWN]
    error = found.get("error", found) if isinstance(found, dict) else found
    if isinstance(error, dict):
        error = error.get("message") or error.get("detail") or text
    return str(error)[:_MAX_SHOWN]
