"""Bad bodies are 400s that name the field, in few words; nothing in a body is without bounds."""

from __future__ import annotations

import json
import time
from collections.abc import Iterator
from typing import Any

import pytest
from starlette.testclient import TestClient

from moe_serve.server.answers import ApiError
from moe_serve.server.bodies import BODIES, ChatBody, CompletionBody, parse_body
from moe_serve.server.limits import DEFAULT_LIMITS as L
from tests.server.fake_host import FakeModel
from tests.server.fronts import front

MODEL = FakeModel()
APP, STATE = front(MODEL)
CLIENT = TestClient(APP)
COMPLETIONS, CHAT = "/v1/completions", "/v1/chat/completions"
JSON = {"content-type": "application/json"}
HI: list[dict[str, Any]] = [{"role": "user", "content": "Hi"}]
BIG = 10**18

# (field, its bad values): each is sent in an otherwise good body to both routes
BAD_FIELDS: tuple[tuple[str, tuple[Any, ...]], ...] = (
    ("model", (5, "", [], {}, "x" * 257)),
    ("n", (0, -1, 17, BIG, 1.5, "1", True, [1])),
    ("max_tokens", (0, -1, BIG, 2**31, 0.5, "5", False)),
    ("temperature", (-0.1, 10001, "hot", True, [], {})),
    ("top_p", (0, -1, 1.1, "x", True)),
    ("presence_penalty", (-2.1, 2.1, "0", True)),
    ("frequency_penalty", (-2.1, 2.1, "0", True)),
    ("seed", (2**63, -(2**63) - 1, 1.5, "1", True)),
    ("stop", ("", [""], ["a"] * 17, "x" * 257, ["x" * 257], 5, [5], {}, [["a"]])),
    ("logit_bias", ([], {"x": 1}, {"5": "1"}, {"5": 101}, {"5": -101}, {"-1": 1}, {"5 ": 1},
                    {"05": 1}, {"99999999999": 1}, {str(i): 1 for i in range(1025)})),
    ("stream", (1, "true", [], 0)),
    ("stream_options", (True, [], {"include_usage": 1}, {"unknown": True})),
    ("user", (5, "x" * 257)),
    ("top_k", (-2, BIG, 1.5, "1")),
    ("min_p", (-0.1, 1.1, "0")),
    ("repetition_penalty", (0, -1, 10001, "1")),
    ("min_tokens", (-1, BIG, "1")),
    ("ignore_eos", (1, "yes")),
    ("stop_token_ids", (5, [-1], [2**31], ["5"], [1.5], [True], [1] * 129)),
    ("include_stop_str_in_output", (1, "no")),
    ("skip_special_tokens", (1, "no")),
    ("bad_words", (5, [""], ["x"] * 129, ["x" * 257], "x", [5])),
    ("allowed_token_ids", ([], [-1], [2**31], 5, ["x"])),
    ("prompt_logprobs", (-1, 21, "1", True)),
    ("truncate_prompt_tokens", (0, -1, BIG, "1")),
    ("add_special_tokens", (1, "no")),
    ("return_token_ids", (1, "no")),
    ("cache_salt", ("", 5, "x" * 257)),
    ("priority", (BIG, -BIG, 1.5, "high")),
    ("request_id", ("", "a b", "x" * 129, "a\n", "../x", 5)),
    ("response_format", ("json", {"type": "yaml"}, {}, {"type": "text", "x": 1})),
    ("structured_outputs", ("json", {"regexp": "a"}, {"regex": ""}, {"choice": []},
                            {"regex": "x" * (L.grammar_bytes + 1)})),
    ("return_routed_experts", (1, "yes")),
    ("functions", ([], [{"name": "f"}])),
    ("audio", ({"voice": "x"},)),
    ("images", (["x"],)),
    ("chat_template", ("{{ 1 }}",)),
    ("tokenize", (True,)),
    ("use_beam_search", (True,)),
    ("temprature", (1,)),
    ("custom_logit_processor", ("gASV",)),
    ("prompt_embeds", ("AAAA",)),
)  # fmt: skip

BAD_COMPLETIONS: tuple[tuple[dict[str, Any], str], ...] = (
    ({}, "prompt"), ({"prompt": None}, "prompt"), ({"prompt": 5}, "prompt"),
    ({"prompt": ""}, "prompt"), ({"prompt": []}, "prompt"), ({"prompt": [[]]}, "prompt"),
    ({"prompt": [""]}, "prompt"), ({"prompt": ["a", 5]}, "prompt"),
    ({"prompt": [1, "a"]}, "prompt"),
    ({"prompt": [-1]}, "prompt"), ({"prompt": [6144]}, "prompt"), ({"prompt": [2**63]}, "prompt"),
    ({"prompt": [1.5]}, "prompt"), ({"prompt": [True]}, "prompt"), ({"prompt": {"a": 1}}, "prompt"),
    ({"prompt": ["a"] * 65}, "prompt"), ({"prompt": [[1]] * 65}, "prompt"),
    ({"prompt": [5] * 256}, "prompt"), ({"prompt": "word " * 300}, "prompt"),
    ({"prompt": "x" * 70_000}, "prompt"), ({"prompt": [[1], "a"]}, "prompt"),
    ({"prompt": "a", "best_of": 2}, "best_of"), ({"prompt": "a", "best_of": True}, "best_of"),
    ({"prompt": "a", "suffix": "b"}, "suffix"), ({"prompt": "a", "echo": 1}, "echo"),
    ({"prompt": "a", "logprobs": 21}, "logprobs"), ({"prompt": "a", "logprobs": True}, "logprobs"),
    ({"prompt": "a", "logprobs": -1}, "logprobs"), ({"prompt": "a", "messages": HI}, "messages"),
    ({"prompt": "a", "min_tokens": 9, "max_tokens": 8}, "min_tokens"),
    ({"prompt": "a", "stop_token_ids": [6144]}, "stop_token_ids"),
    ({"prompt": "a", "allowed_token_ids": [6144]}, "allowed_token_ids"),
    ({"prompt": "a", "logit_bias": {"6144": 1}}, "logit_bias"),
    ({"prompt": "a", "stream_options": {"include_usage": True}}, "stream_options"),
    ({"prompt": "a", "stream": True, "prompt_logprobs": 1}, "prompt_logprobs"),
    ({"prompt": "a", "temperature": 1e-31}, "temperature"),
    ({"prompt": "a", "max_completion_tokens": 5}, "max_completion_tokens"),
    ({"prompt": "a", "top_logprobs": 5}, "top_logprobs"), ({"prompt": "a", "tools": []}, "tools"),
)  # fmt: skip


def chat(**options: Any) -> dict[str, Any]:
    return {"messages": HI, **options}


def says(**message: Any) -> dict[str, Any]:
    return {"messages": [{"role": "user", **message}]}


BAD_CHATS: tuple[tuple[dict[str, Any], str], ...] = (
    ({}, "messages"), ({"messages": None}, "messages"), ({"messages": []}, "messages"),
    ({"messages": "Hi"}, "messages"), ({"messages": {}}, "messages"),
    ({"messages": ["Hi"]}, "messages"), ({"messages": [{}]}, "messages"),
    ({"messages": [{"content": "a"}]}, "messages"), ({"messages": HI * 4097}, "messages"),
    (says(), "messages"), (says(content=None), "messages"), (says(content=5), "messages"),
    (says(content={}), "messages"), (says(content="a", role=5), "messages"),
    (says(content="a", role=""), "messages"), (says(content="a", unknown=1), "messages"),
    (says(content="a", audio={"id": "x"}), "messages"), (says(content=[5]), "messages"),
    (says(content=[{"type": "image_url", "image_url": {"url": "http://x/y"}}]), "messages"),
    (says(content=[{"type": "input_audio"}]), "messages"),
    (says(content=[{"type": "text"}]), "messages"),
    (says(content=[{"type": "text", "text": "a", "url": "file:///etc/passwd"}]), "messages"),
    (says(content="a", tool_calls=[]), "messages"), (says(content="word " * 300), "messages"),
    (chat(prompt="a"), "prompt"), (chat(echo=True), "echo"), (chat(best_of=1), "best_of"),
    (chat(logprobs=3), "logprobs"), (chat(top_logprobs=3), "top_logprobs"),
    (chat(logprobs=True, top_logprobs=21), "top_logprobs"),
    (chat(max_tokens=1, max_completion_tokens=1), "max_tokens"),
    (chat(tools=[{"type": "function", "function": {"name": "f"}}]), "tools"),
    (chat(tool_choice="required"), "tool_choice"), (chat(store=True), "store"),
    (chat(parallel_tool_calls=1), "parallel_tool_calls"), (chat(metadata={"a": 1}), "metadata"),
    (chat(service_tier="flex"), "service_tier"), (chat(prompt_cache_key=5), "prompt_cache_key"),
    (chat(modalities=["text", "audio"]), "modalities"), (chat(modalities=[]), "modalities"),
    (chat(reasoning_effort="high"), "reasoning_effort"), (chat(suffix=""), "suffix"),
    (chat(chat_template_kwargs={"tokenize": True}), "chat_template_kwargs"),
    (chat(chat_template_kwargs={"messages": "x"}), "chat_template_kwargs"),
    (chat(chat_template_kwargs={"chat_template": "x"}), "chat_template_kwargs"),
    (chat(chat_template_kwargs={"style": ["x"]}), "chat_template_kwargs"),
    (chat(chat_template_kwargs={"styel": "x"}), "chat_template_kwargs"),
    (chat(chat_template_kwargs=[]), "chat_template_kwargs"),
    (chat(continue_final_message=True, add_generation_prompt=True), "continue_final_message"),
)  # fmt: skip

# (name, bytes that are no body, the field where there is one)
BAD_BYTES: tuple[tuple[str, bytes, str | None], ...] = (
    ("nothing", b"", None), ("space", b"   ", None), ("half", b'{"prompt"', None),
    ("a list", b"[]", None), ("a number", b"5", None), ("null", b"null", None),
    ("text", b'"prompt"', None), ("two objects", b'{"prompt":"a"}{}', None),
    ("a comma too many", b'{"prompt":"a",}', None), ("single quotes", b"{'prompt':'a'}", None),
    ("a comment", b'{"prompt":"a"/**/}', None),
    ("a byte order mark",
     b'\xef\xbb\xbf{"prompt":"a"}', None),
    ("not UTF-8", b'{"prompt":"\xff\xfe"}', None), ("overlong", b'{"prompt":"\xc0\x80"}', None),
    ("UTF-16", '{"prompt":"a"}'.encode("utf-16"), None), ("a NUL", b'{"prompt":"a\x00b"}', None),
    ("half a pair", b'{"prompt":"\\ud800"}', None),
    ("the other half",
     b'{"prompt":"\\udc00a"}', None),
    ("a bad escape", b'{"prompt":"\\x41"}', None), ("a line break", b'{"prompt":"a\nb"}', None),
    ("NaN", b'{"prompt":"a","temperature":NaN}', "temperature"),
    ("infinite", b'{"prompt":"a","temperature":Infinity}', "temperature"),
    ("too large a float", b'{"prompt":"a","temperature":1e999}', "temperature"),
    ("minus that", b'{"prompt":"a","presence_penalty":-1e999}', "presence_penalty"),
    ("an int as 1e999", b'{"prompt":"a","n":1e999}', "n"),
    ("5,000 digits", b'{"prompt":"a","n":' + b"9" * 5000 + b"}", None),
    ("400 digits", b'{"prompt":"a","n":' + b"9" * 400 + b"}", "n"),
    ("400 digits of a float", b'{"prompt":"a","top_p":' + b"9" * 400 + b".5}", "top_p"),
    ("a leading zero", b'{"prompt":"a","n":01}', None), ("a plus", b'{"prompt":"a","n":+1}', None),
    ("twice", b'{"prompt":"a","prompt":"b"}', "prompt"),
    ("twice, escaped", b'{"prompt":"a","p\\u0072ompt":"b"}', "prompt"),
    ("twice, with null", b'{"prompt":"a","n":2,"n":null}', "n"),
    ("twice within", b'{"prompt":"a","logit_bias":{"5":1,"5":2}}', "5"),
    ("100,000 deep", b'{"prompt":' + b"[" * 100_000, None),
    ("100,000 deep objects",
     b'{"prompt":"a","structured_outputs":{"json":' + b'{"a":' * 100_000, None),
    ("65 deep", b'{"prompt":"a","structured_outputs":{"json":' + b'{"a":' * 63 + b"1" + b"}" * 65,
     "structured_outputs"),
    ("100 deep",
     b'{"prompt":"a","structured_outputs":{"json":{"a":' + b"[" * 100 + b"]" * 100 + b"}}}",
     "structured_outputs"),
    ("100,000 names", b"{" + b",".join(b'"k%d":1' % i for i in range(100_000)) + b"}", None),
    ("a long name", b'{"prompt":"a","' + b"k" * 100_000 + b'":1}', "k" * 80),
    ("4,000 unknown names",
     b'{"prompt":"a",' + b",".join(b'"k%d":1' % i for i in range(4000)) + b"}", "k0"),
    ("4,000 faults in a list", b'{"prompt":[1' + b',"x"' * 4000 + b"]}", "prompt"),
    ("4,000 bad biases", b'{"prompt":"a","logit_bias":{'
     + b",".join(b'"k%d":"x"' % i for i in range(4000)) + b"}}", "logit_bias"),
    ("4,000 bad messages", b'{"messages":[' + b",".join([b'{"a":1}'] * 4000) + b"]}", "prompt"),
    ("a message in 6-byte characters", b'{"' + b"\\u0001" * 5000 + b'":1}', "prompt"),
)  # fmt: skip


def cases() -> Iterator[Any]:
    for field, values in BAD_FIELDS:
        for place, value in enumerate(values):
            for path, good in ((COMPLETIONS, {"prompt": "a"}), (CHAT, {"messages": HI})):
                yield pytest.param(
                    path, {**good, field: value}, field, id=f"{path}-{field}-{place}"
                )
    for path, bad in ((COMPLETIONS, BAD_COMPLETIONS), (CHAT, BAD_CHATS)):
        for place, (body, field) in enumerate(bad):
            yield pytest.param(path, body, field, id=f"{path}-{place}-{field}")


def check_refusal(data: bytes, answer: Any, param: str | None) -> None:
    assert answer.status_code == 400, answer.text
    assert answer.headers["content-type"] == "application/json"
    assert len(answer.content) <= max(L.error_bytes, len(data))
    assert len(answer.content) <= L.error_bytes
    error = answer.json()["error"]
    assert set(error) == {"message", "type", "param", "code"}
    assert error["type"] == "invalid_request_error"
    assert error["param"] == param, error
    assert "/moe_serve/" not in error["message"]


@pytest.mark.parametrize(("path", "body", "param"), list(cases()))
def test_a_bad_field_is_named(path: str, body: dict[str, Any], param: str) -> None:
    data = json.dumps(body).encode()
    before = list(MODEL.started)
    answer = CLIENT.post(path, content=data, headers=JSON)
    check_refusal(data, answer, param)
    assert param.split("_")[0] in answer.json()["error"]["message"].replace(
        "the prompt", "messages prompt"
    )
    assert MODEL.started == before


@pytest.mark.parametrize(("data", "param"), [pytest.param(*c[1:], id=c[0]) for c in BAD_BYTES])
def test_bytes_that_are_no_body(data: bytes, param: str | None) -> None:
    begun_s = time.monotonic()
    check_refusal(data, CLIENT.post(COMPLETIONS, content=data, headers=JSON), param)
    assert time.monotonic() - begun_s < 2


def wide(start: bytes, part: bytes, end: bytes) -> bytes:
    """Return a body of about the most bytes, of one part over again."""
    return start + part * ((L.body_bytes - 100) // len(part)) + end


@pytest.mark.parametrize(
    "data",
    [
        wide(b'{"prompt":[', b"[],", b"[]]}"),
        wide(b'{"prompt":"a","structured_outputs":{"json":{"a":[', b"[],", b"[]]}}}"),
        wide(b'{"prompt":"a","unknown":[', b"{},", b"{}]}"),
        wide(b'{"prompt":"a"', b',"b":1', b"}"),
        wide(b'{"prompt":[', b"1,", b"1]}"),
        wide(b'{"prompt":"', b'\\":', b"\\"),
        b"{" + b",".join(b'"k%d":1' % i for i in range(L.json_parts - 1)) + b"}",
    ],
    ids=["lists", "lists in a schema", "objects", "names", "integers", "half a text", "names"],
)
def test_large_bodies_are_refused_soon(data: bytes) -> None:
    begun_s = time.monotonic()
    with pytest.raises(ApiError) as found:
        parse_body(data, CompletionBody)
    assert found.value.status == 400
    assert time.monotonic() - begun_s < 2  # without the limit of parts, three times this


def test_there_are_enough_of_them() -> None:
    assert len(list(cases())) + len(BAD_BYTES) >= 150


@pytest.mark.parametrize(
    "sent", ["", "text/plain", "application/x-www-form-urlencoded", "multipart/form-data", "json"]
)
@pytest.mark.parametrize("path", [COMPLETIONS, CHAT, "/tokenize", "/detokenize", "/v1/abort"])
def test_another_content_type(path: str, sent: str) -> None:
    answer = CLIENT.post(path, content=b'{"prompt":"a"}', headers={"content-type": sent})
    assert answer.status_code == 415
    assert len(answer.content) <= L.error_bytes


def test_a_content_type_with_a_charset() -> None:
    kind = {"content-type": "Application/JSON; charset=utf-8"}
    assert CLIENT.post("/tokenize", content=b'{"prompt":"a"}', headers=kind).status_code == 200


def test_too_large_a_body() -> None:
    data = b'{"prompt":"' + b"x" * L.body_bytes + b'"}'
    answer = CLIENT.post(COMPLETIONS, content=data, headers=JSON)
    assert answer.status_code == 413


def integers(schema: Any, path: str = "") -> Iterator[tuple[str, dict[str, Any]]]:
    """Yield all parts of a schema that have a type, with where they are."""
    if isinstance(schema, list):
        for place, part in enumerate(schema):
            yield from integers(part, f"{path}/{place}")
    elif isinstance(schema, dict):
        if isinstance(schema.get("type"), str):
            yield path, schema
        for name, part in schema.items():
            if name != "default":
                yield from integers(part, f"{path}/{name}")


def test_everything_has_bounds() -> None:
    """Text, lists and integers: but JSON schemas, whose size is the grammar's to say."""
    num_integers = 0
    for body in BODIES:
        for path, part in integers(body.model_json_schema(), body.__name__):
            kind = part["type"]
            if kind == "integer":
                num_integers += 1
                assert {"minimum", "maximum"} <= part.keys() or "const" in part, path
            elif kind == "string":
                is_bound = "maxLength" in part or "const" in part or "enum" in part
                assert is_bound or "{" in part.get("pattern", ""), path
            elif kind == "array":
                assert "maxItems" in part, path
            elif kind == "number":
                assert {"minimum", "maximum"} <= part.keys(), path
            elif kind == "object" and part.get("additionalProperties") is not False:
                is_bound = "maxProperties" in part
                assert is_bound or path.endswith(("/json/anyOf/0", "/schema/anyOf/0")), path
    assert num_integers > 25


def test_a_body_is_what_was_sent() -> None:
    data = b'{"prompt":[1,2.0],"n":2.0,"seed":null,"temperature":1,"logit_bias":{"5":-100}}'
    given = parse_body(data, CompletionBody).given()
    assert given == {
        "prompt": [1, 2], "n": 2, "seed": None, "temperature": 1.0, "logit_bias": {"5": -100.0},
    }  # fmt: skip
    assert [type(given["n"]), type(given["temperature"])] == [int, float]


def test_messages_are_plain_data() -> None:
    messages = [
        {"role": "user", "content": [{"type": "text", "text": "a: {b}"}], "name": None},
        {"role": "assistant", "content": None, "tool_calls": [
            {"id": "1", "type": "function", "function": {"name": "f", "arguments": "{}"}}]},
        {"role": "tool", "tool_call_id": "1", "content": "5"},
        {"role": "assistant", "content": "five", "refusal": None, "annotations": [], "audio": None,
         "function_call": None, "tool_calls": None},
    ]  # fmt: skip
    body = parse_body(json.dumps({"messages": messages}).encode(), ChatBody)
    assert body.given() == {"messages": messages}


def test_text_may_look_like_anything() -> None:
    for text in ('{"a":"b","a":"c"}', "[" * 100, "\\", '"', "\u0000\u2028\U0001f600", ":" * 50_000):
        data = json.dumps({"prompt": text}).encode()
        assert parse_body(data, CompletionBody).given() == {"prompt": text}


def test_64_deep_is_not_too_deep() -> None:
    deep: Any = 1
    for _ in range(L.json_depth - 2):
        deep = {"a": deep}
    data = json.dumps({"prompt": "a", "structured_outputs": {"json": deep}}).encode()
    assert parse_body(data, CompletionBody).given()["structured_outputs"] == {"json": deep}
    data = json.dumps({"prompt": "a", "structured_outputs": {"json": {"a": deep}}}).encode()
    with pytest.raises(ApiError, match="structured_outputs is nested more than 64 deep"):
        parse_body(data, CompletionBody)


def test_several_faults_are_told_and_the_rest_counted() -> None:
    data = b'{"prompt":"a","n":0,"top_p":2,"x":1,"y":1,"z":1}'
    with pytest.raises(ApiError) as found:
        parse_body(data, CompletionBody)
    message = str(found.value)
    assert message.startswith("n: must be an integer from 1 to 16; top_p: ")
    assert message.endswith("and 2 more")


def test_every_bound_comes_from_the_limits() -> None:
    schema = CompletionBody.model_json_schema()["properties"]
    assert schema["n"]["anyOf"][0]["maximum"] == L.n
    assert schema["logprobs"]["anyOf"][0]["maximum"] == L.logprobs
    assert schema["seed"]["anyOf"][0]["maximum"] == L.seed
    assert schema["logit_bias"]["anyOf"][0]["maxProperties"] == L.logit_bias


def test_tools_are_named_as_what_is_not_there() -> None:
    body = chat(tools=[{"type": "function", "function": {"name": "f"}}])
    with pytest.raises(ApiError, match="tools are not supported") as found:
        parse_body(json.dumps(body).encode(), ChatBody, L)
    assert (found.value.status, found.value.param) == (400, "tools")
    assert parse_body(json.dumps(chat(tools=[])).encode(), ChatBody, L)
