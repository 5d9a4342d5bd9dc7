"""What may be asked of an output's text: what is read, what is refused and why, and its travels."""

from __future__ import annotations

from typing import Any

import msgspec
import pytest

from moe_serve.channel import encoded
from moe_serve.errors import RequestError
from moe_serve.launch.messages import Add, Call
from moe_serve.server.limits import DEFAULT_LIMITS
from moe_serve.structured_outputs import MAX_GRAMMAR_BYTES, MAX_GRAMMAR_S, MAX_JSON_DEPTH
from moe_serve.types import Request, SamplingParams, StructuredOutputs

SCHEMA = {"type": "object", "properties": {"a": {"enum": ["\N{SNOWMAN}", "[{"]}}}

SOUND: list[tuple[dict[str, Any], str]] = [
    ({"json": SCHEMA}, "json"),
    ({"json": '{"type": "object"}'}, "json"),
    ({"json_object": True}, "json"),
    ({"regex": "[a-z]+"}, "regex"),
    ({"choice": ["yes", "no"]}, "choice"),
    ({"choice": iter(["one"])}, "choice"),
    ({"grammar": 'start: "a"'}, "grammar"),
]


@pytest.mark.parametrize(("given", "kind"), SOUND)
def test_it_travels_as_it_is(given: dict[str, Any], kind: str) -> None:
    asked = StructuredOutputs(**given)
    assert asked.kind == kind
    assert asked.text
    sampling = SamplingParams(structured_outputs=asked)
    message = Add(Request(request_id="r", prompt_ids=(1,), sampling=sampling))
    assert msgspec.msgpack.Decoder(Call).decode(encoded(message)) == message


def test_a_mapping_is_read_too() -> None:
    params = SamplingParams.from_mapping({"structured_outputs": {"json": SCHEMA}})
    assert params.structured_outputs == StructuredOutputs(json=SCHEMA)
    assert isinstance(StructuredOutputs(json=SCHEMA).json, str)


def nested(depth: int) -> str:
    return '{"items": ' * depth + "{}" + "}" * depth


@pytest.mark.parametrize(
    ("given", "says"),
    [
        ({}, "has nothing; it must have exactly one of json, regex, choice, grammar, json_object"),
        ({"json_object": False}, "has nothing"),
        ({"json_object": 1}, "json_object is 1; it must be true or false"),
        ({"json": "{}", "regex": "a"}, "has json and regex"),
        ({"json": ""}, "json is empty"),
        ({"json": 5}, "json is 5; it must be text"),
        ({"json": "{"}, "json is not JSON"),
        ({"json": "[]"}, "a schema is an object"),
        ({"json": '{"minimum": NaN}'}, "NaN is no number"),
        ({"json": {"minimum": float("inf")}}, "cannot be written as JSON"),
        ({"json": {"a": object()}}, "cannot be written as JSON"),
        ({"json": '{"const": ' + "9" * 5000 + "}"}, "json is not JSON"),
        ({"json": nested(MAX_JSON_DEPTH)}, "65 brackets deep; at most 64"),
        ({"json": nested(4000)}, "4001 brackets deep"),
        ({"regex": ""}, "regex is empty"),
        ({"regex": "a" * (MAX_GRAMMAR_BYTES + 1)}, "regex has 65537 bytes; at most 65536"),
        ({"regex": "\N{SNOWMAN}" * 30_000}, "regex has 90000 bytes"),
        ({"regex": "\ud800"}, "lone surrogate"),
        ({"grammar": ["start"]}, "grammar is .*it must be text"),
        ({"choice": "yes"}, "choice is 'yes'; it must be a list"),
        ({"choice": []}, "choice is empty"),
        ({"choice": ["a", ""]}, "choice holds ''"),
        ({"choice": ["a", 5]}, "choice holds 5"),
        ({"choice": ["x" * 1000] * 70}, "choice has 70280 bytes"),
    ],
)
def test_what_is_refused(given: dict[str, Any], says: str) -> None:
    with pytest.raises(RequestError, match=f"structured_outputs.*{says}"):
        StructuredOutputs(**given)


@pytest.mark.parametrize(
    ("given", "says"),
    [
        ("json", "structured_outputs is 'json'; it must be"),
        ({"jsn": "{}"}, "has 'jsn'; did you mean 'json'"),
        ({5: "{}"}, "has 5"),
    ],
)
def test_what_is_no_such_mapping(given: Any, says: str) -> None:
    with pytest.raises(RequestError, match=says):
        SamplingParams(structured_outputs=given)


def test_brackets_in_strings_are_not_deep() -> None:
    deep = '{"const": "' + r"\"[" * 100 + '"}'
    assert StructuredOutputs(json=deep).text == deep
    assert StructuredOutputs(json=nested(MAX_JSON_DEPTH - 1)).kind == "json"


def test_a_server_has_the_same_limits() -> None:
    assert DEFAULT_LIMITS.grammar_bytes == MAX_GRAMMAR_BYTES
    assert DEFAULT_LIMITS.json_depth == MAX_JSON_DEPTH
    assert DEFAULT_LIMITS.grammar_s == MAX_GRAMMAR_S
