"""Routes of the API beside those for text, and what is said of a server that cannot serve."""

from __future__ import annotations

import asyncio
import dataclasses
import json
from typing import Any

import pytest
from fastapi import FastAPI
from starlette.testclient import TestClient

from moe_serve.server.limits import DEFAULT_LIMITS
from moe_serve.server.messages import SILENT_AFTER_S, Beat, EngineState
from moe_serve.server.routes import build_app
from moe_serve.server.state import FrontState
from tests.server.fake_host import FakeModel, InProcessClient, Script
from tests.server.fronts import MODEL, demo_texts, front, state_of
from tests.server.test_stream import Exchange

HI = [{"role": "user", "content": "Hello there"}]
ERROR_FIELDS = {"message", "type", "param", "code"}


def client_of(**options: Any) -> TestClient:
    return TestClient(front(**options)[0])


def error_of(answer: Any) -> dict[str, Any]:
    error: dict[str, Any] = answer.json()["error"]
    assert set(error) == ERROR_FIELDS
    return error


def test_models() -> None:
    client = client_of()
    (model,) = client.get("/v1/models").json()["data"]
    assert (model["id"], model["object"], model["max_model_len"]) == (MODEL, "model", 256)
    assert client.get(f"/v1/models/{MODEL}").json() == model
    assert error_of(client.get("/v1/models/a/b"))["code"] == "model_not_found"


def test_a_model_may_have_a_path_for_a_name() -> None:
    client = client_of(model="org/name")
    assert client.get("/v1/models/org/name").json()["id"] == "org/name"


@pytest.mark.parametrize("path", ["/v1/completions", "/v1/chat/completions", "/tokenize"])
def test_another_model_is_a_404(path: str) -> None:
    body = {"model": "other", **({"messages": HI} if "chat" in path else {"prompt": "a"})}
    answer = client_of().post(path, json=body)
    assert answer.status_code == 404
    assert error_of(answer)["param"] == "model"


@pytest.mark.parametrize(
    ("method", "path", "status"),
    [
        ("GET", "/", 404), ("GET", "/docs", 404), ("GET", "/redoc", 404), ("POST", "/nope", 404),
        ("GET", "/metrics", 404), ("GET", "/v1/models/", 404), ("POST", "/v1/completions/", 404),
        ("GET", "/v1/completions", 405), ("PUT", "/v1/chat/completions", 405),
        ("DELETE", "/v1/models", 405), ("POST", "/ready", 405), ("PATCH", "/tokenize", 405),
    ],
)  # fmt: skip
def test_what_is_no_route(method: str, path: str, status: int) -> None:
    answer = client_of().request(method, path, follow_redirects=False)
    assert answer.status_code == status
    assert answer.headers["content-type"] == "application/json"
    error_of(answer)
    assert ("allow" in answer.headers) == (status == 405)


def test_tokenize_and_back() -> None:
    client = client_of()
    text = "Once upon a time, na\u00efve \U0001f600"
    found = client.post("/tokenize", json={"prompt": text, "return_token_strs": True}).json()
    assert found["count"] == len(found["tokens"]) == len(found["token_strs"])
    assert found["max_model_len"] == 256
    assert client.post("/detokenize", json={"tokens": found["tokens"]}).json() == {"prompt": text}


def test_tokenize_a_chat() -> None:
    client = client_of()
    for options, text in (
        ({}, "user: Hello there\nassistant:"),
        ({"add_generation_prompt": False}, "user: Hello there\n"),
        ({"continue_final_message": True}, "user: Hello there"),
        ({"chat_template_kwargs": {"style": "brief"}}, "user: Hello there\n(brief)assistant:"),
    ):
        ids = client.post("/tokenize", json={"messages": HI, **options}).json()["tokens"]
        assert client.post("/detokenize", json={"tokens": ids}).json()["prompt"] == text


@pytest.mark.parametrize(
    ("path", "body", "param"),
    [
        ("/tokenize", {}, "prompt"),
        ("/tokenize", {"prompt": "a", "messages": HI}, "prompt"),
        ("/tokenize", {"prompt": "a", "add_generation_prompt": True}, "add_generation_prompt"),
        ("/tokenize", {"messages": HI, "chat_template_kwargs": {"x": 1}}, "chat_template_kwargs"),
        ("/tokenize", {"prompt": "x" * 70_000}, "prompt"),
        ("/tokenize", {"prompt": "a", "n": 1}, "n"),
        ("/detokenize", {"tokens": [6144]}, "tokens"),
        ("/detokenize", {"tokens": [-1]}, "tokens"),
        ("/detokenize", {}, "tokens"),
        ("/v1/abort", {}, "request_id"),
        ("/v1/abort", {"request_id": "a b"}, "request_id"),
    ],
)
def test_bad_bodies_of_other_routes(path: str, body: dict[str, Any], param: str) -> None:
    answer = client_of().post(path, json=body)
    assert answer.status_code == 400
    assert error_of(answer)["param"] == param


@pytest.mark.parametrize(
    ("state", "ready", "health"),
    [
        ("serving", 200, 200), ("loading", 503, 200), ("reforming", 503, 200),
        ("draining", 503, 200), ("failed", 503, 503),
    ],
)  # fmt: skip
def test_what_is_said_of_a_server(state: EngineState, ready: int, health: int) -> None:
    app, front_state = front()
    front_state.client.beat = Beat(state, 1, 0)
    client = TestClient(app)
    assert client.get("/live").status_code == 200
    answers = [client.get("/ready"), client.get("/health")]
    assert [answer.status_code for answer in answers] == [ready, health]
    for answer in answers:
        if answer.status_code == 503:
            assert int(answer.headers["retry-after"]) > 0
            assert error_of(answer)["type"] == "service_unavailable"


class SilentClient(InProcessClient):
    @property
    def silent_s(self) -> float:
        return SILENT_AFTER_S + 1


def test_a_silent_engine_is_not_healthy() -> None:
    client = TestClient(build_app(state_of(SilentClient(FakeModel(), demo_texts().tokenizer))))
    assert [client.get(path).status_code for path in ("/live", "/ready", "/health")] == [
        200,
        503,
        503,
    ]
    answer = client.post("/v1/completions", json={"prompt": "a"})
    assert answer.status_code == 503
    assert answer.headers["retry-after"] == "5"


def test_before_the_model_is_there() -> None:
    app, state = front()
    state.client.welcome = None
    client = TestClient(app)
    for path, body in (
        ("/v1/completions", {"prompt": "a"}),
        ("/v1/chat/completions", {"messages": HI}),
        ("/tokenize", {"prompt": "a"}),
    ):
        answer = client.post(path, json=body)
        assert answer.status_code == 503
        assert error_of(answer)["code"] == "not_ready"
    assert client.get("/v1/models").json()["data"][0]["max_model_len"] is None
    assert client.get("/version").json() == {"version": "0", "numerics_id": None}


def small_queue(**limits: Any) -> tuple[FastAPI, FrontState, FakeModel]:
    """Return an application with such a queue, whose first tokens take a while."""
    model = FakeModel(lambda request: Script(reply=request.prompt_ids, first_s=0.05))
    client = InProcessClient(
        model, demo_texts().tokenizer, limits=dataclasses.replace(DEFAULT_LIMITS, **limits)
    )
    state = state_of(client)
    state.limits = client._limits
    return build_app(state), state, model


def test_a_full_queue_is_a_503_and_begins_nothing() -> None:
    app, state, model = small_queue(queue_requests=2)

    async def go() -> list[Exchange]:
        both = [
            Exchange(app, "/v1/completions", {"prompt": prompt, "max_tokens": 1})
            for prompt in ("a", ["b", "c"])
        ]
        await asyncio.gather(*(one.run() for one in both))
        return both

    first, second = asyncio.run(go())
    assert first.status == 200
    assert second.status == 503
    assert b"retry-after" in dict(second.messages[0]["headers"])
    assert len(model.started) == 1
    assert model.cancelled == []
    assert state.client.num_running == state.client.num_queued == 0
    body = {"prompt": ["a", "b"]}
    assert TestClient(app).post("/v1/completions", json=body).status_code == 200


@pytest.mark.parametrize(
    ("limits", "prompt"),
    [({"queue_requests": 2}, ["a", "b", "c"]), ({"queue_tokens": 5}, [[5, 6, 7], [5, 6, 7]])],
)
def test_prompts_that_no_queue_could_hold_are_a_400(limits: Any, prompt: Any) -> None:
    app, _, model = small_queue(**limits)
    answer = TestClient(app).post("/v1/completions", json={"prompt": prompt})
    assert answer.status_code == 400
    assert error_of(answer)["param"] == "prompt"
    assert model.started == []
    alone = {"prompt": [5, 6, 7, 8, 9, 10], "max_tokens": 1}
    assert TestClient(app).post("/v1/completions", json=alone).status_code == 200


def test_metrics_are_what_they_are() -> None:
    client = client_of(metrics=lambda: (b"a 1\n", "text/plain; version=0.0.4"))
    answer = client.get("/metrics")
    assert (answer.text, answer.headers["content-type"]) == ("a 1\n", "text/plain; version=0.0.4")


def test_a_fault_of_ours_is_a_plain_500(caplog: pytest.LogCaptureFixture) -> None:
    def broken() -> tuple[bytes, str]:
        raise ZeroDivisionError("secret")

    client = TestClient(front(metrics=broken)[0], raise_server_exceptions=False)
    answer = client.get("/metrics")
    assert answer.status_code == 500
    assert "secret" not in answer.text

    def script(request: Any) -> Script:
        return Script(reply=request.prompt_ids)

    app, state = front(FakeModel(script))
    object.__setattr__(state, "names", None)
    answer = TestClient(app).post("/v1/completions", json={"prompt": "a", "logprobs": 1})
    assert answer.status_code == 500
    assert error_of(answer)["type"] == "internal_error"
    assert "a fault in serving" in caplog.text


def test_a_model_without_texts_takes_token_ids() -> None:
    texts = dataclasses.replace(demo_texts(), tokenizer=None, chat_template=None)
    client = client_of(texts=texts)
    body = {"prompt": [5, 6], "max_tokens": 2, "return_token_ids": True, "logprobs": 1}
    (choice,) = client.post("/v1/completions", json=body).json()["choices"]
    assert choice["token_ids"] == [5, 6]
    assert choice["logprobs"]["tokens"] == ["token_id:5", "token_id:6"]
    for path, asked, param in (
        ("/v1/completions", {"prompt": "a"}, None),
        ("/v1/chat/completions", {"messages": HI}, "messages"),
        ("/tokenize", {"prompt": "a"}, None),
        ("/detokenize", {"tokens": [5]}, None),
    ):
        answer = client.post(path, json=asked)
        assert answer.status_code == 400
        assert error_of(answer)["param"] == param


def test_the_document_is_served() -> None:
    client = client_of()
    document = client.get("/openapi.json").json()
    schemas = document["components"]["schemas"]
    assert schemas["CompletionBody"]["properties"]["model"] == {"enum": [MODEL, None]}
    assert document == json.loads(json.dumps(document))
    references = json.dumps(document).split('"$ref": "#/components/schemas/')[1:]
    assert {reference.partition('"')[0] for reference in references} <= set(schemas)


def test_errors_are_short_whatever_they_quote() -> None:
    client = client_of()
    for name in ("x" * 5000, "\u0001" * 5000, "\U0001f600" * 5000):
        answer = client.post("/v1/completions", content=json.dumps({name: 1}).encode(),
                             headers={"content-type": "application/json"})  # fmt: skip
        assert answer.status_code == 400
        assert len(answer.content) <= 4096
    assert len(client.get("/" + "x" * 5000).content) <= 4096
