"""One HTTP request for text: its body to the engine's requests, and their outputs to its answer.

A list of prompts is a request of the engine for each; they are waited for, and dropped, together.
A client that goes away is noticed while it waits, streamed or not, and its requests are dropped.
"""

from __future__ import annotations

import asyncio
import logging
import time
import uuid
from collections.abc import Callable, Mapping, Sequence
from typing import Any, TypeVar

import msgspec
from starlette.types import Receive, Scope, Send

from moe_serve.errors import RequestError
from moe_serve.server.answers import (
    ApiError,
    encoded,
    engine_fault,
    send_error,
    send_json,
    without_folders,
)
from moe_serve.server.bodies import ChatBody, CompletionBody, parse_body
from moe_serve.server.engine_client import Running, Unavailable
from moe_serve.server.event_stream import EventStream
from moe_serve.server.limits import Limits
from moe_serve.server.messages import Refused
from moe_serve.server.state import Finished, FrontState
from moe_serve.text.openai_form import (
    KIND_OF_URL,
    BodyRequest,
    Kind,
    named_field,
    read_body,
    response_object,
    usage_object,
)
from moe_serve.text.prompts import PreparedRequest

logger = logging.getLogger(__name__)

# To hand work to a thread takes about 0.06 ms, to tokenise so much text about 0.4 ms.
INLINE_BYTES = 2048
# of tokens and logprobs, to write an answer of so many about 3 ms
_INLINE_TOLD = 2048
_URL_OF_KIND = {kind: url for url, kind in KIND_OF_URL.items()}
_BODY_OF_KIND: dict[Kind, type[CompletionBody] | type[ChatBody]] = {
    "completion": CompletionBody,
    "chat": ChatBody,
}
_ID_CHARACTERS = frozenset("0123456789abcdefghijklmnopqrstuvwxyzABCDEFGHIJKLMNOPQRSTUVWXYZ._:-")

Result = TypeVar("Result")


class ClientGone(Exception):
    """The client closed its connection before its answer was whole."""


class TextEndpoint:
    """POST /v1/completions or /v1/chat/completions, as an ASGI application."""

    def __init__(self, state: FrontState, kind: Kind) -> None:
        self._state = state
        self._kind: Kind = kind

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        call = Call(self._state, self._kind, scope)
        self._state.on_started(self._kind)
        try:
            await call.serve(receive, send)
        finally:
            call.close()


class Call:
    """One HTTP request for text, from its body to the last byte of its answer.

    seed: of its first choice; choice i has seed + i. runnings: its requests of the engine.
    """

    def __init__(self, state: FrontState, kind: Kind, scope: Scope) -> None:
        self.state = state
        self.kind: Kind = kind
        self.key_id: str = scope.get("state", {}).get("key_id") or ""
        self.begun_s = time.monotonic()
        self.created = int(time.time())
        self.response_id = ""
        self.seed = 0
        self.runnings: list[Running] = []
        self.asked: BodyRequest | None = None
        self.is_late = False
        self._scope = scope
        self._is_gone = False
        self._status = 500
        self._news = asyncio.Event()
        self._stream: EventStream | None = None
        self._watcher: asyncio.Task[None] | None = None
        self._timer: asyncio.TimerHandle | None = None

    async def serve(self, receive: Receive, send: Send) -> None:
        """Answer the request, whatever it is."""
        try:
            await self._begin(receive)
            assert self.asked is not None
            if self.asked.is_streamed:
                self._stream = EventStream(self, self.asked, send)
                self._status = await self._stream.send_all()
            else:
                answer = await self._whole_answer()
                self._status = 200
                await send_json(send, 200, answer, self.headers)
        except ApiError as error:
            self._status = error.status
            await send_error(send, error, self.headers)
        except ClientGone:
            self._status = 499
        except Exception:  # a fault of ours ends one request, not the connection's task
            logger.exception("a fault in serving %s", self.response_id)
            fault = ApiError(500, "a fault of the server")
            if self._stream is not None and self._stream.has_started:
                self._status = await self._stream.end_with(fault)
            elif self._status != 200:
                await send_error(send, fault, self.headers)

    def close(self) -> None:
        """Drop what is not over, and tell of the request."""
        for running in self.runnings:
            if not running.is_over:
                self.state.client.cancel(running)
        if self._watcher is not None:
            self._watcher.cancel()
        if self._timer is not None:
            self._timer.cancel()
        if self.response_id:
            self.state.unregister(self.response_id, self)
        self.state.on_finished(self._finished())

    def abort(self) -> int:
        """End what is not over with finish_reason "abort"; return how many requests it were."""
        open_ = [running for running in self.runnings if not running.is_over]
        return sum(self.state.client.cancel(running) for running in open_)

    @property
    def headers(self) -> list[tuple[bytes, bytes]]:
        return [(b"x-request-id", self.response_id.encode())] if self.response_id else []

    @property
    def is_over(self) -> bool:
        return all(running.is_over for running in self.runnings)

    @property
    def fault(self) -> ApiError | None:
        """Why there can be no answer, or no more of it; None while there can."""
        if self.is_late and not self.is_over:
            return self._lateness()
        for running in self.runnings:
            if running.failure is not None:
                failure = running.failure
                if isinstance(failure, Refused) and failure.kind != "engine":
                    return self._refused(failure.message)
                return _failure(failure)
            for output in running.state.outputs:
                if output.finish_reason == "error":
                    message = output.error or "the engine could not go on with it"
                    return self._refused(message) if output.is_refused else engine_fault(message)
        return None

    def _refused(self, message: str) -> ApiError:
        """Return the answer to what the engine refuses: the request's own fault."""
        assert self.asked is not None
        message = without_folders(self.asked.as_sent(message))
        field = named_field(message, self.kind)
        return ApiError(400, message, param=field, code="invalid_value")

    def wake(self) -> None:
        """Make `changed` return."""
        self._news.set()

    async def changed(self) -> None:
        """Return when something came, or the time is over. Raises ClientGone."""
        await self._news.wait()
        self._news.clear()
        if self._is_gone:
            raise ClientGone

    def usage(self) -> dict[str, Any]:
        """Return the usage of what there is so far."""
        states = [running.state for running in self.runnings]
        num_prompt = sum(len(state.request.prompt_ids) for state in states)
        num_output = sum(len(one.token_ids) for state in states for one in state.outputs)
        num_cached = sum(state.num_cached_tokens for state in states)
        cached = {"prompt_tokens_details": {"cached_tokens": num_cached}}
        return usage_object(num_prompt, num_output) | cached

    async def _begin(self, receive: Receive) -> None:
        """Read the body and give its requests to the engine."""
        state = self.state
        check_content_type(self._scope)
        data = await read_all(receive, state.limits.body_bytes)
        loop = asyncio.get_running_loop()
        self._watcher = loop.create_task(self._watch(receive))
        spent_s = time.monotonic() - self.begun_s
        self._timer = loop.call_later(max(0.0, state.limits.request_s - spent_s), self._end_time)
        try:
            if state.client.welcome is not None:
                state.client.check()  # who is asked for too much must not work to refuse it
            prepared = await self._prepared(data)
            num_tokens = sum(len(one.request.prompt_ids) for one in prepared)
            # all or none: what is begun and dropped has cost the engine for nothing
            state.client.check(num_tokens, len(prepared))
            state.register(self.response_id, self)
            for one in prepared:
                self.runnings.append(state.client.start_checked(one, self._news))
        except Unavailable as error:
            raise _failure(error) from error

    async def _prepared(self, data: bytes) -> list[PreparedRequest]:
        """Make the engine's requests of a body. Raises ClientGone, and ApiError 504 when late."""
        # a template is a program of strangers, that may take its time: never here
        if self.kind == "completion" and len(data) <= INLINE_BYTES:
            return self._prepare(data)
        work = asyncio.ensure_future(in_thread(self.state, self._prepare, data))
        work.add_done_callback(self._worked)
        try:
            while not work.done():
                await self.changed()
                if self.is_late:
                    raise self._lateness()
        finally:
            work.cancel()
        return work.result()

    def _prepare(self, data: bytes) -> list[PreparedRequest]:
        """Make the engine's requests of a body. For any thread: it takes time."""
        state, maker = self.state, self.state.maker
        body = parse_body(data, _BODY_OF_KIND[self.kind], state.limits).given()
        check_model(body, state.model)
        self._choose_id(body)
        if self.key_id:
            body["cache_salt"] = f"{self.key_id}:{body.get('cache_salt') or ''}"
        try:
            asked = read_body(
                _URL_OF_KIND[self.kind],
                body,
                maker,
                state.defaults,
                is_served=True,
                most_prompts=state.limits.prompts,
            )
            self.asked = asked
            given = asked.sampling.seed
            self.seed = state.draw_seed() if given is None else given
            prepared = [
                maker.make(
                    prompt,
                    asked.sampling,
                    index=index,
                    priority=asked.priority,
                    request_id=f"{self.response_id}-{index}",
                    seed=self.seed + index * asked.sampling.n,
                )
                for index, prompt in enumerate(asked.prompts)
            ]
        except RequestError as error:
            field = named_field(str(error), self.kind)
            raise ApiError(400, str(error), param=field, code="invalid_value") from error
        check_prompt_logprobs(prepared, asked, state.limits.prompt_logprobs)
        check_num_prompts(prepared, state.limits)
        return prepared

    def _choose_id(self, body: Mapping[str, Any]) -> None:
        wanted = body.get("request_id") or _header(self._scope, b"x-request-id")
        if not wanted or len(wanted) > 128 or not _ID_CHARACTERS.issuperset(wanted):
            wanted = uuid.uuid4().hex
        prefix = "cmpl" if self.kind == "completion" else "chatcmpl"
        self.response_id = f"{prefix}-{wanted}"

    def _worked(self, work: asyncio.Future[Any]) -> None:
        if not work.cancelled():
            work.exception()  # asyncio logs what nobody has looked at
        self.wake()

    def _lateness(self) -> ApiError:
        message = f"the request took more than {self.state.limits.request_s:g} s"
        return ApiError(504, message, code="request_timeout", retry_after_s=1)

    async def _watch(self, receive: Receive) -> None:
        while (await receive())["type"] != "http.disconnect":
            pass
        self._is_gone = True
        self.wake()

    def _end_time(self) -> None:
        """Let the request end with an error; if its client does not take that in time, cut it."""
        self.is_late = True
        self.wake()
        cut = self._scope.get("state", {}).get("cut_connection")
        if cut is not None:
            loop = asyncio.get_running_loop()
            self._timer = loop.call_later(self.state.limits.write_s, cut)

    async def _whole_answer(self) -> bytes:
        """Wait for all outputs; return the answer's object."""
        fault = None
        while not self.is_over and fault is None:
            await self.changed()
            fault = self.fault
        fault = fault or self.fault
        if fault is not None:
            raise fault
        if self._num_told() <= _INLINE_TOLD:
            return self._answer()
        return await asyncio.get_running_loop().run_in_executor(self.state.pool, self._answer)

    def _num_told(self) -> int:
        """Return about how many tokens and logprobs the answer has: what it takes to write it."""
        assert self.asked is not None
        sampling = self.asked.sampling
        num_top = 1 + (sampling.logprobs or 0)
        num_told = num_top * sum(
            len(output.token_ids) for running in self.runnings for output in running.state.outputs
        )
        if self.asked.echo or self.asked.has_token_ids or sampling.prompt_logprobs is not None:
            num_ids = sum(len(running.state.request.prompt_ids) for running in self.runnings)
            num_told += sampling.n * num_ids * (1 + (sampling.prompt_logprobs or 0))
        return num_told

    def _answer(self) -> bytes:
        """Return the answer's object. For any thread: it takes time."""
        assert self.asked is not None
        found = response_object(
            [running.state.output() for running in self.runnings],
            self.asked,
            model=self.state.model,
            response_id=self.response_id,
            created=self.created,
            names=self.state.names,
        )
        # one by one: while a value is encoded no other thread runs, the event loop's neither
        found["choices"] = [msgspec.Raw(encoded(choice)) for choice in found["choices"]]
        found["usage"] = self.usage()
        found["system_fingerprint"] = self.state.fingerprint
        found["seed"] = self.seed
        return encoded(found)

    def _finished(self) -> Finished:
        states = [running.state for running in self.runnings]
        firsts = [state.first_token_s for state in states if state.first_token_s is not None]
        outputs = [output for state in states for output in state.outputs]
        has_started = self._stream is not None and self._stream.has_started
        return Finished(
            kind=self.kind,
            status=self._status,
            is_streamed=self.asked is not None and self.asked.is_streamed,
            is_event=has_started and self._status not in (200, 499),
            num_prompt_tokens=sum(len(state.request.prompt_ids) for state in states),
            num_output_tokens=sum(len(output.token_ids) for output in outputs),
            num_cached_tokens=sum(state.num_cached_tokens for state in states),
            first_token_s=min(firsts) - self.begun_s if firsts else None,
            total_s=time.monotonic() - self.begun_s,
            finish_reasons=tuple(output.finish_reason or "abort" for output in outputs),
            key_id=self.key_id,
        )


def _failure(failure: Refused | Unavailable) -> ApiError:
    if isinstance(failure, Unavailable):
        return ApiError(
            failure.status, str(failure), code="unavailable", retry_after_s=failure.retry_after_s
        )
    return engine_fault(failure.message)


async def in_thread(state: FrontState, work: Callable[[bytes], Result], data: bytes) -> Result:
    """Do what takes time with a body in a thread, when it is its turn.

    Cancelled before, it holds the body no more; a thread that has begun goes on by itself.
    """
    await state.turns.acquire()
    done = asyncio.get_running_loop().run_in_executor(state.pool, work, data)
    done.add_done_callback(lambda done: state.turns.release())
    return await asyncio.shield(done)


async def read_all(receive: Receive, most_bytes: int) -> bytes:
    """Return a request's body. Raises ApiError 413, ClientGone."""
    message = await receive()
    data: bytes = message.get("body", b"")
    if message.get("more_body"):
        parts = bytearray(data)
        while message.get("more_body"):
            message = await receive()
            parts += message.get("body", b"")
            if len(parts) > most_bytes:
                break
        data = bytes(parts)
    if message["type"] == "http.disconnect":
        raise ClientGone
    if len(data) > most_bytes:
        raise ApiError(413, f"the body has more than {most_bytes} bytes", code="body_too_large")
    return data


def check_model(body: Mapping[str, Any], model: str) -> None:
    """Refuse another model than the one that is served."""
    asked = body.get("model")
    if asked is not None and asked != model:
        raise ApiError(
            404,
            f"the model {asked!r:.200} is not served here; {model!r:.200} is",
            param="model",
            code="model_not_found",
        )


def check_prompt_logprobs(
    prepared: Sequence[PreparedRequest], asked: BodyRequest, most: int
) -> None:
    """Refuse to tell more logprobs of prompts than `most`: each choice of an answer has them."""
    num_top = asked.sampling.prompt_logprobs
    if num_top is None:
        return
    num_ids = sum(len(one.request.prompt_ids) for one in prepared)
    num_told = asked.sampling.n * num_ids * (num_top + 1)
    if num_told > most:
        name = "logprobs" if asked.num_prompt_logprobs is None else "prompt_logprobs"
        raise ApiError(
            400,
            f"{name}: the answer would tell {num_told} logprobs of prompts (n times {num_ids} "
            f"tokens times {num_top + 1}); at most {most} are told",
            param=name,
            code="invalid_value",
        )


def check_num_prompts(prepared: Sequence[PreparedRequest], limits: Limits) -> None:
    """Refuse a list of prompts that could not wait for its turn even where nobody else does."""
    num_tokens = sum(len(one.request.prompt_ids) for one in prepared)
    for count, what, most in (
        (len(prepared), "prompts", limits.queue_requests),
        (num_tokens, "tokens in its prompts", limits.queue_tokens),
    ):
        if len(prepared) > 1 and count > most:
            message = f"prompt has {count} {what}; at most {most} may wait for their turn here"
            raise ApiError(400, message, param="prompt", code="invalid_value")


def check_content_type(scope: Scope) -> None:
    sent = _header(scope, b"content-type") or ""
    if sent.partition(";")[0].strip().lower() != "application/json":
        raise ApiError(
            415,
            f"content-type is {sent!r:.80}; it must be application/json",
            code="unsupported_media_type",
        )


def _header(scope: Scope, name: bytes) -> str | None:
    for key, value in scope["headers"]:
        if key == name:
            text: str = value.decode("latin-1")
            return text
    return None
