"""The document of the API is true: what it allows is taken, what it does not is a 4xx, all answers
are as it says; and nothing that can be sent is a fault of the server.

MOE_SERVE_FUZZ_EXAMPLES sets how many requests of each kind the long version sends to each route.
"""

from __future__ import annotations

import os
from collections import Counter
from typing import Any

import pytest
import schemathesis
from hypothesis import HealthCheck, Phase, given, settings
from schemathesis import GenerationMode
from schemathesis.checks import not_a_server_error
from schemathesis.specs.openapi.checks import (
    content_type_conformance,
    negative_data_rejection,
    response_schema_conformance,
    status_code_conformance,
)

from moe_serve.server.limits import DEFAULT_LIMITS
from tests.server.fronts import front

APP, _ = front()
# What is imported late is compiled within a test, where Python 3.11 may count its depth wrongly.
APP_SCHEMA = schemathesis.openapi.from_asgi("/openapi.json", APP)
APP_SCHEMA["/live"]["GET"].as_strategy()
CHECKS = (
    not_a_server_error,
    content_type_conformance,
    response_schema_conformance,
    status_code_conformance,
)
ROUTES = (
    "POST /v1/completions", "POST /v1/chat/completions", "POST /tokenize", "POST /detokenize",
    "POST /v1/abort", "GET /v1/models", "GET /v1/models/{model}", "GET /live", "GET /ready",
    "GET /health", "GET /version",
)  # fmt: skip
LONG_EXAMPLES = int(os.environ.get("MOE_SERVE_FUZZ_EXAMPLES", "300"))
# what the schema cannot say: ids of the vocabulary, fields that exclude one another
ABOUT_MEANING = {"invalid_value", "model_not_found"}


def schema_for(mode: GenerationMode) -> Any:
    schema = schemathesis.openapi.from_asgi("/openapi.json", APP)
    schema.config.generation.update(modes=[mode], allow_x00=True)
    return schema


def check(route: str, mode: GenerationMode, num_examples: int) -> None:
    method, path = route.split(" ")
    operation = schema_for(mode)[path][method]
    found = []

    @settings(
        max_examples=num_examples,
        deadline=None,
        phases=[Phase.explicit, Phase.generate],
        suppress_health_check=list(HealthCheck),
        database=None,
        derandomize=num_examples < 100,
    )
    @given(case=operation.as_strategy(generation_mode=mode))
    def send(case: Any) -> None:
        response = case.call()
        found.append(response.status_code)
        own = (negative_data_rejection,) if mode is GenerationMode.NEGATIVE else ()
        case.validate_response(response, checks=[*CHECKS, *own])
        if response.status_code >= 400:
            assert len(response.content) <= DEFAULT_LIMITS.error_bytes
        if mode is GenerationMode.POSITIVE and response.status_code not in (200, 404):
            assert response.status_code == 400, response.content
            assert response.json()["error"]["code"] in ABOUT_MEANING, response.content

    send()
    print(f"{route}, {mode}: {sorted(Counter(found).items())}")
    if mode is GenerationMode.POSITIVE and method == "POST":
        assert found.count(200) > len(found) / 3  # else hardly anything was tried


def operations(mode: GenerationMode) -> list[str]:
    """Return the routes that have anything to be sent wrongly, or all."""
    if mode is GenerationMode.POSITIVE:
        return list(ROUTES)
    return [route for route in ROUTES if route.startswith("POST")]


def test_all_routes_are_tried() -> None:
    document = APP.openapi()
    told = {
        f"{m.upper()} {p}"
        for p, ops in document["paths"].items()
        for m in ops
        if m in ("get", "post")
    }
    assert told == set(ROUTES)


@pytest.mark.parametrize("route", ROUTES)
def test_what_the_document_allows_is_taken(route: str) -> None:
    check(route, GenerationMode.POSITIVE, 15)


@pytest.mark.parametrize("route", operations(GenerationMode.NEGATIVE))
def test_what_the_document_does_not_allow_is_refused(route: str) -> None:
    check(route, GenerationMode.NEGATIVE, 15)


@pytest.mark.slow
@pytest.mark.parametrize("route", ROUTES)
def test_much_of_what_the_document_allows_is_taken(route: str) -> None:
    check(route, GenerationMode.POSITIVE, LONG_EXAMPLES)


@pytest.mark.slow
@pytest.mark.parametrize("route", operations(GenerationMode.NEGATIVE))
def test_much_of_what_the_document_does_not_allow_is_refused(route: str) -> None:
    check(route, GenerationMode.NEGATIVE, LONG_EXAMPLES)
