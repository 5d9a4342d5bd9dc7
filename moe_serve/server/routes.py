"""The routes of the OpenAI API, and of who watches a server: an ASGI application on FastAPI.

Who may ask, and how large and slow a request may be, is for the layers around it.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Coroutine, Mapping
from http import HTTPStatus
from typing import Any, TypeVar

from fastapi import FastAPI
from pydantic import BaseModel
from starlette.exceptions import HTTPException
from starlette.requests import Request
from starlette.responses import Response
from starlette.routing import BaseRoute, Route
from starlette.types import ASGIApp, Receive, Scope, Send

from moe_serve.errors import RequestError
from moe_serve.server.answers import ApiError, encoded, send_error, send_json
from moe_serve.server.bodies import (
    AbortBody,
    DetokenizeBody,
    TokenizeBody,
    invalid,
    parse_body,
)
from moe_serve.server.document import document
from moe_serve.server.generation import (
    INLINE_BYTES,
    ClientGone,
    TextEndpoint,
    check_content_type,
    check_model,
    in_thread,
    read_all,
)
from moe_serve.server.messages import SILENT_AFTER_S
from moe_serve.server.state import FrontState
from moe_serve.text.openai_form import named_field
from moe_serve.text.prompts import RequestMaker

BodyModel = TypeVar("BodyModel", bound=BaseModel)
Result = TypeVar("Result")
Answer = dict[str, Any]
_RETRY_AFTER_S = 5


def build_app(state: FrontState) -> FastAPI:
    """Return the application that serves `state`."""
    texts = state.texts
    described = document(
        state.version,
        state.model,
        vocab_size=texts.vocab_size,
        variables=() if texts.chat_template is None else texts.chat_template.variables,
    )
    app = _App(
        title="moe-serve",
        version=state.version,
        openapi_url=None,
        docs_url=None,
        redoc_url=None,
        redirect_slashes=False,
    )
    app.router.routes.extend(_routes(state, encoded(described)))
    app.direct = {
        route.path: route.endpoint
        for route in app.routes
        if isinstance(route, Route) and isinstance(route.endpoint, TextEndpoint)
    }
    app.openapi = lambda: described  # type: ignore[method-assign]
    app.add_exception_handler(HTTPException, _other)
    app.add_exception_handler(ApiError, _refused)
    app.add_exception_handler(Exception, _fault)
    return app


class _App(FastAPI):
    """FastAPI, but requests for text go to their routes directly: its layers cost a tenth of one.

    They have nothing to do there: bodies and errors are the routes' own.
    """

    direct: dict[str, ASGIApp]

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        route = self.direct.get(scope.get("path", ""))
        if route is not None and scope["type"] == "http" and scope["method"] == "POST":
            await route(scope, receive, send)
        else:
            await super().__call__(scope, receive, send)


def _routes(state: FrontState, described: bytes) -> list[BaseRoute]:
    tokenize = BodyEndpoint(state, TokenizeBody, _tokenize, takes_time=True)
    detokenize = BodyEndpoint(state, DetokenizeBody, _detokenize, takes_time=True)
    abort = BodyEndpoint(state, AbortBody, _abort, takes_time=False)
    routes: list[BaseRoute] = [
        Route("/v1/completions", TextEndpoint(state, "completion"), methods=["POST"]),
        Route("/v1/chat/completions", TextEndpoint(state, "chat"), methods=["POST"]),
        Route("/tokenize", tokenize, methods=["POST"]),
        Route("/detokenize", detokenize, methods=["POST"]),
        Route("/v1/abort", abort, methods=["POST"]),
    ]
    watching = Watching(state, described)
    for path, handler in {
        "/v1/models": watching.models,
        "/v1/models/{model:path}": watching.model,
        "/live": watching.live,
        "/ready": watching.ready,
        "/health": watching.health,
        "/version": watching.version,
        "/openapi.json": watching.openapi,
    }.items():
        routes.append(Route(path, handler, methods=["GET"]))
    if state.metrics is not None:
        routes.append(Route("/metrics", watching.metrics, methods=["GET"]))
    return routes


class BodyEndpoint:
    """A route of one body and one answer, both JSON.

    takes_time: `answer` may, and is for a thread where a body is large or has a template rendered.
    Else it is for the event loop's.
    """

    def __init__(
        self,
        state: FrontState,
        model: type[BodyModel],
        answer: Callable[[FrontState, BodyModel, str], Answer],
        *,
        takes_time: bool,
    ) -> None:
        self._state = state
        self._model: type[BaseModel] = model
        self._answer: Callable[[FrontState, Any, str], Answer] = answer
        self._takes_time = takes_time

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        state = self._state
        key_id: str = scope.get("state", {}).get("key_id") or ""
        limit_s = state.limits.request_s

        def read(data: bytes) -> BaseModel:
            return parse_body(data, self._model, state.limits)

        def work(body: BaseModel) -> bytes:
            try:
                return encoded(self._answer(state, body, key_id))
            except RequestError as error:
                raise ApiError(
                    400, str(error), param=_param(str(error), body), code="invalid_value"
                ) from error

        try:
            check_content_type(scope)
            data = await read_all(receive, state.limits.body_bytes)
            # a name may be written with backslashes, so that it is not seen here
            is_plain = b'"messages"' not in data and b"\\" not in data
            if len(data) <= INLINE_BYTES and (is_plain or not self._takes_time):
                answer = work(read(data))
            elif self._takes_time:
                working = in_thread(state, lambda data: work(read(data)), data)
                answer = await _while_waited_for(working, receive, limit_s)
            else:
                reading = in_thread(state, read, data)
                answer = work(await _while_waited_for(reading, receive, limit_s))
        except ApiError as error:
            await send_error(send, error)
        except ClientGone:
            return
        else:
            await send_json(send, 200, answer)


async def _while_waited_for(
    work: Coroutine[Any, Any, Result], receive: Receive, limit_s: float
) -> Result:
    """Return what comes of work. Raises ClientGone, and ApiError 504 after limit_s seconds."""

    async def gone() -> None:
        while (await receive())["type"] != "http.disconnect":
            pass

    tasks = working, watching = asyncio.create_task(work), asyncio.create_task(gone())
    try:
        await asyncio.wait(tasks, timeout=limit_s, return_when=asyncio.FIRST_COMPLETED)
        if working.done():
            return working.result()
        if watching.done():
            raise ClientGone
        message = f"the request took more than {limit_s:g} s"
        raise ApiError(504, message, code="request_timeout", retry_after_s=1)
    finally:
        for task in tasks:
            task.cancel()


def _param(message: str, body: BaseModel) -> str | None:
    found = named_field(message, "chat" if "messages" in body.model_fields_set else "completion")
    return found if found in type(body).model_fields else None


def _tokenize(state: FrontState, body: TokenizeBody, key_id: str) -> Answer:
    given = body.given()
    check_model(given, state.model)
    maker = state.maker
    if ("messages" in given) == ("prompt" in given):
        raise invalid("give one of prompt and messages", "prompt")
    if "messages" in given:
        ids = _chat_ids(maker, given)
    else:
        for name in ("add_generation_prompt", "continue_final_message", "chat_template_kwargs"):
            if given.get(name) is not None:
                raise invalid(f"{name} is for messages", name, "invalid_value")
        adds = given.get("add_special_tokens")
        ids = maker.encode(given["prompt"], adds is None or adds) if given["prompt"] else []
    strings = None
    if given.get("return_token_strs"):
        strings = [state.names.of(token_id)[0] for token_id in ids]
    return {
        "count": len(ids),
        "max_model_len": maker.max_model_len,
        "tokens": ids,
        "token_strs": strings,
    }


def _chat_ids(maker: RequestMaker, given: Mapping[str, Any]) -> list[int]:
    adds_prompt = given.get("add_generation_prompt")
    continues = bool(given.get("continue_final_message"))
    if continues and adds_prompt:
        raise RequestError("continue_final_message needs add_generation_prompt: false")
    prompt = maker.chat_prompt(
        given["messages"],
        add_generation_prompt=adds_prompt is None or adds_prompt,
        continue_final_message=continues,
        variables=given.get("chat_template_kwargs"),
        add_special_tokens=bool(given.get("add_special_tokens")),
    )
    return list(prompt["prompt_token_ids"])


def _detokenize(state: FrontState, body: DetokenizeBody, key_id: str) -> Answer:
    check_model(body.given(), state.model)
    tokenizer, vocab_size = state.texts.tokenizer, state.texts.vocab_size
    if tokenizer is None:
        raise ApiError(400, "the model's folder has no tokenizer", code="invalid_value")
    for token_id in body.tokens:
        if token_id >= vocab_size:
            raise ApiError(
                400,
                f"tokens holds token id {token_id}; the model has ids 0 to {vocab_size - 1}",
                param="tokens",
                code="invalid_value",
            )
    return {"prompt": tokenizer.decode(body.tokens, skip_special_tokens=False)}


def _abort(state: FrontState, body: AbortBody, key_id: str) -> Answer:
    return {"request_id": body.request_id, "num_aborted": state.abort(body.request_id, key_id)}


class Watching:
    """What is told of the server itself."""

    def __init__(self, state: FrontState, described: bytes) -> None:
        self._state = state
        self._described = described

    def _one(self) -> Answer:
        state = self._state
        welcome = state.client.welcome
        return {
            "id": state.model,
            "object": "model",
            "created": state.created,
            "owned_by": "moe-serve",
            "root": state.model,
            "parent": None,
            "max_model_len": None if welcome is None else welcome.max_model_len,
        }

    async def models(self, request: Request) -> Response:
        return _json({"object": "list", "data": [self._one()]})

    async def model(self, request: Request) -> Response:
        check_model({"model": request.path_params["model"]}, self._state.model)
        return _json(self._one())

    async def live(self, request: Request) -> Response:
        """Always 200: who can answer lives."""
        return _json({"status": "live"})

    async def ready(self, request: Request) -> Response:
        """Give 200 where a request would run now, else 503 with the reason."""
        client = self._state.client
        why = client.why_not_ready
        if why is not None or client.state != "serving":
            raise ApiError(503, why or "not ready", code="not_ready", retry_after_s=_RETRY_AFTER_S)
        return _json({"status": "ready"})

    async def health(self, request: Request) -> Response:
        """Give 503 only where the engine has failed or is silent: then a restart may help.

        While it is loaded, formed anew after a loss, or drained, that would do harm.
        """
        client = self._state.client
        is_silent = client.beat is not None and client.silent_s > SILENT_AFTER_S
        if client.state == "failed" or is_silent:
            why = client.why_not_ready or "the engine has failed"
            raise ApiError(503, why, code="unhealthy", retry_after_s=_RETRY_AFTER_S)
        return _json({"status": client.state})

    async def version(self, request: Request) -> Response:
        welcome = self._state.client.welcome
        numerics_id = None if welcome is None else welcome.numerics_id
        return _json({"version": self._state.version, "numerics_id": numerics_id})

    async def openapi(self, request: Request) -> Response:
        return Response(self._described, media_type="application/json")

    async def metrics(self, request: Request) -> Response:
        assert self._state.metrics is not None
        body, content_type = self._state.metrics()
        return Response(body, headers={"content-type": content_type})


def _json(value: Answer) -> Response:
    return Response(encoded(value), media_type="application/json")


def _error_response(error: ApiError, headers: Mapping[str, str] | None = None) -> Response:
    own = {name.decode(): value.decode() for name, value in error.headers}
    return Response(
        error.body,
        status_code=error.status,
        headers={**own, **(headers or {})},
        media_type="application/json",
    )


async def _refused(request: Request, error: Exception) -> Response:
    assert isinstance(error, ApiError)
    return _error_response(error)


async def _other(request: Request, error: Exception) -> Response:
    """Answer what no route is for; the status is Starlette's."""
    assert isinstance(error, HTTPException)
    path, status = request.url.path, error.status_code
    told = {
        404: f"there is no route {path!r:.200}",
        405: f"{path!r:.200} has no method {request.method!r:.20}",
    }.get(status, HTTPStatus(status).phrase)
    return _error_response(ApiError(status, told, code="no_such_route"), error.headers)


async def _fault(request: Request, error: Exception) -> Response:
    return _error_response(ApiError(500, "a fault of the server"))
