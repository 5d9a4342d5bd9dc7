"""Server-sent events of one streamed answer: all that is new of its choices in one send.

Nothing is queued for a client: while it takes nothing, tokens gather in the state of its request,
and the next chunk has them all. Of a chunk only its text is encoded; the rest is made once.
"""

from __future__ import annotations

import asyncio
import copy
import time
from collections.abc import Sequence
from typing import Any, Protocol

from starlette.types import Send

from moe_serve.server.answers import ApiError, encoded
from moe_serve.server.engine_client import Running
from moe_serve.server.state import FrontState
from moe_serve.text.openai_form import BodyRequest, ToldPrompt, told_prompt
from moe_serve.text.openai_logprobs import CompletionLogprobs, TokenNames, chat_logprobs
from moe_serve.text.request_output import OutputState, RequestState
from moe_serve.types import RequestOutput

HEADERS = [
    (b"content-type", b"text/event-stream; charset=utf-8"),
    (b"cache-control", b"no-cache"),
    (b"x-accel-buffering", b"no"),  # or a proxy in front would gather chunks
]
_DONE = b"data: [DONE]\n\n"
_PING = b": ping\n\n"
# of a prompt's tokens and their logprobs, to write so many about 3 ms
_INLINE_TOLD = 2048


class Streamed(Protocol):
    """The call that is streamed: what its answer is made of; see `generation.Call`."""

    state: FrontState
    response_id: str
    created: int
    seed: int
    runnings: list[Running]

    @property
    def headers(self) -> list[tuple[bytes, bytes]]: ...
    @property
    def is_over(self) -> bool: ...
    @property
    def fault(self) -> ApiError | None: ...
    async def changed(self) -> None: ...
    def wake(self) -> None: ...
    def usage(self) -> dict[str, Any]: ...


class EventStream:
    """The stream of one call. has_started: something was sent, so there is no other answer."""

    def __init__(self, call: Streamed, asked: BodyRequest, send: Send) -> None:
        self._call = call
        self._asked = asked
        self._send = send
        self.has_started = False
        self._is_ping_due = False
        self._sent_s = time.monotonic()
        self._ping: asyncio.TimerHandle | None = None
        self._prompts: list[_Prompt] = []
        self._choices: list[_Choice] = []
        self._is_first = True
        head: dict[str, Any] = {
            "id": call.response_id,
            "object": "text_completion" if asked.kind == "completion" else "chat.completion.chunk",
            "created": call.created,
            "model": call.state.model,
            "system_fingerprint": call.state.fingerprint,
        }
        self._head = b"data: " + encoded(head)[:-1] + b',"choices":['
        self._no_usage = b',"usage":null' if asked.has_usage_chunk else b""

    async def send_all(self) -> int:
        """Send the stream to its end; return its status.

        Raises ApiError before anything was sent, and what `changed` of its call raises.
        """
        call, state = self._call, self._call.state
        for running in call.runnings:
            first = len(self._choices)
            prompt = _Prompt(running.state, self._asked, state.names)
            self._prompts.append(prompt)
            self._choices += [
                _Choice(first + output.index, output, prompt, self._asked, state.names)
                for output in running.state.outputs
            ]
        self._set_ping(state.ping_s)
        try:
            while True:
                await call.changed()
                for prompt in self._prompts:
                    if prompt.is_large and prompt.is_due:
                        loop, output = asyncio.get_running_loop(), prompt.output()
                        await loop.run_in_executor(state.pool, prompt.make, output)
                fault = call.fault
                if fault is not None:
                    return await self.end_with(fault)
                is_over = call.is_over
                data = self._events()
                if is_over:
                    await self._write(data + self._end(), more=False)
                    return 200
                if data:
                    await self._write(data)
                elif self._is_ping_due:
                    self._is_ping_due = False
                    await self._write(_PING)
        finally:
            if self._ping is not None:
                self._ping.cancel()

    async def end_with(self, fault: ApiError) -> int:
        """Send an error as the last event; return its status. Raises it if it is the first."""
        if not self.has_started:
            raise fault
        await self._write(b"data: " + fault.body + b"\n\n", more=False)
        return fault.status

    async def _write(self, data: bytes, *, more: bool = True) -> None:
        if not self.has_started:
            self.has_started = True
            headers = [*HEADERS, *self._call.headers]
            await self._send({"type": "http.response.start", "status": 200, "headers": headers})
        await self._send({"type": "http.response.body", "body": data, "more_body": more})
        self._sent_s = time.monotonic()

    def _set_ping(self, after_s: float) -> None:
        self._ping = asyncio.get_running_loop().call_later(after_s, self._look_at_silence)

    def _look_at_silence(self) -> None:
        ping_s = self._call.state.ping_s
        silent_s = time.monotonic() - self._sent_s
        # timers may come a little early
        if silent_s >= 0.99 * ping_s:
            self._is_ping_due = True
            self._call.wake()
            silent_s = 0.0
        self._set_ping(ping_s - silent_s)

    def _events(self) -> bytes:
        """Return the chunks of what is new."""
        parts: list[bytes] = []
        open_ = [choice for choice in self._choices if not choice.is_over]
        # with what is new here the last of them is over, if the whole call is
        last = open_[-1] if open_ and self._call.is_over else None
        usage = b""
        for choice in open_:
            for body in choice.news():
                usage = usage or self._usage()
                parts += (self._head, body, b"]", usage, self._tail(choice is last), b"}\n\n")
        return b"".join(parts)

    def _usage(self) -> bytes:
        """Return the usage as the chunks of one send tell it, which counts through all choices."""
        if self._asked.has_usage_always:
            return b',"usage":' + encoded(self._call.usage())
        return self._no_usage

    def _tail(self, is_last: bool) -> bytes:
        """Return the fields of a chunk behind its choices and its usage."""
        tail = b""
        if self._is_first or (is_last and not self._asked.has_usage_chunk):
            tail += b',"seed":%d' % self._call.seed
        if self._is_first:
            self._is_first = False
            if self._asked.has_token_ids and self._asked.kind == "chat":
                ids = self._call.runnings[0].state.request.prompt_ids
                tail += b',"prompt_token_ids":' + encoded(ids)
        return tail

    def _end(self) -> bytes:
        if not self._asked.has_usage_chunk:
            return _DONE
        usage = encoded(self._call.usage())
        return b'%s],"usage":%s,"seed":%d}\n\n%s' % (self._head, usage, self._call.seed, _DONE)


class _Prompt:
    """What the first chunks of all choices of one prompt tell of it, written once.

    is_large: to write it takes so long that it is for a thread.
    """

    def __init__(self, state: RequestState, asked: BodyRequest, names: TokenNames) -> None:
        self._state = state
        self._asked = asked
        self._names = names
        self._told: ToldPrompt | None = None
        self._rest = b""
        has_ids = asked.kind == "completion" and (asked.echo or asked.has_token_ids)
        num_top = 1 + (asked.sampling.prompt_logprobs or 0)
        self.is_large = has_ids and num_top * len(state.request.prompt_ids) > _INLINE_TOLD

    @property
    def is_awaited(self) -> bool:
        """Whether its logprobs, which come with the first choice, are still to come."""
        is_asked = self._asked.sampling.prompt_logprobs is not None
        return is_asked and self._state.prompt_logprobs is None and not self._state.is_finished

    @property
    def is_due(self) -> bool:
        """Whether it can be written, was not, and a choice that tells it has something to say."""
        has_news = any(
            output.token_ids or output.finish_reason is not None for output in self._state.outputs
        )
        return self._told is None and has_news and not self.is_awaited

    def output(self) -> RequestOutput:
        """Return what `make` needs. For the event loop's thread."""
        return self._state.output()

    def make(self, output: RequestOutput) -> None:
        """Write what is told. For any thread: of a long prompt it takes time."""
        told = told_prompt(output, self._asked, self._names)
        found: dict[str, Any] = {"text": told.text, "logprobs": told.logprobs}
        found |= {"finish_reason": None, **told.fields}
        if self._asked.has_token_ids:
            found["token_ids"] = []
        self._rest = encoded(found)[1:]
        self._told = told

    def opening(self, index: int) -> tuple[bytes, CompletionLogprobs | None]:
        """Return the first chunk of choice `index`, and what writes the logprobs behind it."""
        if self._told is None:
            self.make(self.output())
        assert self._told is not None
        return b'{"index":%d,%s' % (index, self._rest), copy.copy(self._told.writer)


class _Choice:
    """What was sent of one choice."""

    __slots__ = (
        "_asked", "_ends", "_index", "_names", "_num_chars", "_num_tokens", "_output", "_prompt",
        "_start", "_text_start", "_writer", "is_over",
    )  # fmt: skip

    def __init__(
        self,
        index: int,
        output: OutputState,
        prompt: _Prompt,
        asked: BodyRequest,
        names: TokenNames,
    ) -> None:
        self.is_over = False
        self._asked = asked
        self._index = index
        self._names = names
        self._output = output
        self._prompt = prompt
        self._num_chars = 0
        self._num_tokens = 0
        # what must come first: a chat's role, or the echo of a prompt
        self._start = asked.kind == "chat" or asked.echo or asked.has_token_ids
        field = b'"delta":{"content":' if asked.kind == "chat" else b'"text":'
        self._text_start = b'{"index":%d,%s' % (index, field)
        self._ends = b"}" if asked.kind == "chat" else b""
        sampling = asked.sampling
        self._writer = (
            CompletionLogprobs(
                names, sampling.logprobs or 0, skips_special=sampling.skip_special_tokens
            )
            if asked.kind == "completion" and sampling.logprobs is not None
            else None
        )

    def news(self) -> Sequence[bytes]:
        """Return what is new as choices of chunks, [] if nothing is."""
        output = self._output
        reason = output.finish_reason
        num_tokens = len(output.token_ids)
        if self.is_over or (num_tokens == self._num_tokens and reason is None):
            return ()
        found = []
        if self._start:
            if self._prompt.is_awaited:
                return ()
            self._start = False
            found.append(self._opening())
        text = output.text[self._num_chars :]
        has_details = self._asked.sampling.logprobs is not None or self._asked.has_token_ids
        if text or reason is not None or has_details:
            found.append(self._chunk(text, reason))
            self._num_chars += len(text)
            self._num_tokens = num_tokens
            self.is_over = reason is not None
        return found

    def _chunk(self, text: str, reason: str | None) -> bytes:
        sampling, output = self._asked.sampling, self._output
        logprobs = b"null"
        if self._writer is not None:
            logprobs = encoded(self._writer.of_output(output.logprobs[self._num_tokens :]))
        elif sampling.logprobs is not None:
            new = output.logprobs[self._num_tokens :]
            told = chat_logprobs(new, self._names, sampling.logprobs)
            logprobs = encoded({"content": told, "refusal": None})
        end = b"}"
        if self._asked.has_token_ids:
            end = b',"token_ids":%s}' % encoded(output.token_ids[self._num_tokens :])
        finish = b"null" if reason is None else b'"%s"' % reason.encode()
        return b'%s%s%s,"logprobs":%s,"finish_reason":%s%s' % (
            self._text_start,
            encoded(text),
            self._ends,
            logprobs,
            finish,
            end,
        )

    def _opening(self) -> bytes:
        """Return the first chunk's choice: the role of a chat, or the prompt of an echo."""
        if self._asked.kind == "chat":
            delta = {"role": "assistant", "content": ""}
            return encoded(
                {"index": self._index, "delta": delta, "logprobs": None, "finish_reason": None}
            )
        data, self._writer = self._prompt.opening(self._index)
        return data
