"""The application that is served, with the guard around it: every route of it, and who may ask."""

from __future__ import annotations

import pytest
from starlette.routing import Route
from starlette.testclient import TestClient

from moe_serve.server.dashboard import dashboard_routes
from moe_serve.server.guard import ROUTES, Guard
from moe_serve.server.limits import Limits
from moe_serve.server.metrics import Metrics
from moe_serve.server.routes import build_app
from tests.server.fake_host import InProcessClient
from tests.server.fronts import demo_texts, state_of

KEY = "sk-whole"
OPEN = {"/live", "/ready", "/health"}
STATE = state_of(InProcessClient(None, demo_texts().tokenizer))
METRICS = Metrics(STATE.client, STATE)
APP = build_app(STATE)
APP.router.routes.extend(dashboard_routes(METRICS.snapshot))
OPERATIONS = sorted(
    {
        *((r.path, m) for r in APP.routes if isinstance(r, Route) for m in r.methods or ()),
        *((path, m.upper()) for path, told in APP.openapi()["paths"].items() for m in told),
    }
)
CLIENT = TestClient(
    Guard(APP, Limits(), listens_on="127.0.0.1", keys=(KEY,)), base_url="http://localhost"
)


def address(path: str) -> str:
    return path.replace("{model:path}", "a/b").replace("{model}", "a")


def test_the_guard_knows_every_route_and_no_other() -> None:
    assert all(isinstance(route, Route) for route in APP.routes)
    assert {route.path for route in APP.routes if isinstance(route, Route)} == set(ROUTES)
    assert {path for path, route in ROUTES.items() if route.access == "open"} == OPEN
    generating = {path for path, route in ROUTES.items() if route.generates}
    assert generating == {"/v1/completions", "/v1/chat/completions", "/tokenize", "/detokenize"}


@pytest.mark.parametrize(("path", "method"), OPERATIONS)
def test_without_a_key_there_is_a_401_but_for_probes(path: str, method: str) -> None:
    answer = CLIENT.request(method, address(path))
    if path in OPEN:
        assert answer.status_code == 200
        return
    assert answer.status_code == 401
    if method != "HEAD":
        assert answer.json()["error"]["type"] == "authentication_error"
    with_key = CLIENT.request(method, address(path), headers={"Authorization": f"Bearer {KEY}"})
    assert with_key.status_code != 401


@pytest.mark.parametrize("prompt", ["a", ""])
@pytest.mark.parametrize("is_streamed", [False, True])
def test_an_answer_has_one_request_id(prompt: str, is_streamed: bool) -> None:
    answer = CLIENT.post(
        "/v1/completions",
        json={"prompt": prompt, "max_tokens": 1, "stream": is_streamed},
        headers={"Authorization": f"Bearer {KEY}", "X-Request-Id": "mine"},
    )
    name = "cmpl-mine" if answer.status_code == 200 else "mine"
    assert answer.headers.get_list("x-request-id") == [name]


def test_a_route_that_nobody_thought_of_is_closed() -> None:
    APP.router.routes.append(Route("/new", lambda request: None))
    try:
        assert CLIENT.get("/new").status_code == 401
    finally:
        del APP.router.routes[-1]
