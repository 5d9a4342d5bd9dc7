"""OpenAI's bodies become requests, all of them or none."""

from __future__ import annotations

import dataclasses
import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from moe_serve.errors import RequestError
from moe_serve.text.chat_template import ChatTemplate
from moe_serve.text.openai_form import KIND_OF_URL, named_field, read_body, response_object
from moe_serve.text.openai_logprobs import TokenNames
from moe_serve.text.prompts import RequestMaker
from moe_serve.text.tokenizer import load_tokenizer
from moe_serve.types import (
    CompletionOutput,
    RequestOutput,
    RoutedExperts,
    SamplingParams,
    StructuredOutputs,
    TokenLogprobs,
)

ROOT = Path(__file__).resolve().parents[2]
TOKENIZER = load_tokenizer(ROOT / "moe_serve" / "assets" / "demo-moe")
MAKER = RequestMaker(
    vocab_size=6144,
    max_model_len=256,
    tokenizer=TOKENIZER,
    chat_template=ChatTemplate("{{ messages[0].content }}"),
)
DEFAULTS = SamplingParams(temperature=0.7, top_p=0.9)
COMPLETIONS, CHAT = "/v1/completions", "/v1/chat/completions"
HI = [{"role": "user", "content": "Hi"}]


def test_a_completion_takes_the_models_defaults() -> None:
    found = read_body(COMPLETIONS, {"prompt": "Hi", "top_p": 0.5, "user": None}, MAKER, DEFAULTS)
    assert found.prompt == {"prompt": "Hi"}
    assert found.sampling == SamplingParams(temperature=0.7, top_p=0.5, max_tokens=16)


def test_every_sampling_field_of_a_completion() -> None:
    body = {
        "model": "m", "prompt": [1, 2], "n": 2, "max_tokens": 5, "min_tokens": 1, "seed": 3,
        "stop": ["a"], "logprobs": 2, "logit_bias": {"5": -100}, "top_k": 4, "ignore_eos": True,
        "echo": False, "stream": False, "best_of": 1, "suffix": "",
    }  # fmt: skip
    found = read_body(COMPLETIONS, body, MAKER, SamplingParams())
    assert found.prompt == {"prompt_token_ids": [1, 2]}
    assert found.sampling == SamplingParams(
        n=2, max_tokens=5, min_tokens=1, seed=3, stop=["a"], logprobs=2,
        logit_bias={5: -100}, top_k=4, ignore_eos=True,
    )  # fmt: skip


def test_priority_and_salt() -> None:
    own = {"priority": -3, "cache_salt": "s"}
    found = read_body(COMPLETIONS, {"prompt": "Hi", **own}, MAKER, DEFAULTS)
    assert (found.prompt, found.priority) == ({"prompt": "Hi", "cache_salt": "s"}, -3)
    found = read_body(CHAT, {"messages": HI, **own}, MAKER, DEFAULTS)
    assert found.priority == -3
    request = MAKER.make(found.prompt, found.sampling, index=0, priority=found.priority).request
    assert (request.priority, request.cache_salt) == (-3, "s")


def test_a_chat_completion() -> None:
    body = {"messages": HI, "max_completion_tokens": 9, "logprobs": True, "top_logprobs": 3}
    found = read_body(CHAT, body, MAKER, SamplingParams())
    assert found.sampling == SamplingParams(max_tokens=9, logprobs=3)
    assert read_body(CHAT, {"messages": HI}, MAKER, DEFAULTS).sampling.max_tokens is None


def schema_format(schema: object, **more: object) -> dict[str, Any]:
    return {"type": "json_schema", "json_schema": {"schema": schema, **more}}


@pytest.mark.parametrize("url", [COMPLETIONS, CHAT])
def test_structured_outputs_in_either_form(url: str) -> None:
    def asked(**fields: object) -> StructuredOutputs | None:
        own = {"prompt": "Hi"} if url == COMPLETIONS else {"messages": HI}
        return read_body(url, {**own, **fields}, MAKER, DEFAULTS).sampling.structured_outputs

    schema = {"type": "object", "properties": {"a": {"type": "integer"}}}
    named = {"name": "answer", "strict": True, "description": "what it is", "schema": schema}
    assert asked() is None
    assert asked(response_format={"type": "text"}) is None
    assert asked(response_format=None, structured_outputs=None) is None
    assert asked(response_format={"type": "json_object"}) == StructuredOutputs(json_object=True)
    nothing = {"type": "json_object", "json_schema": None}
    assert asked(response_format=nothing) == StructuredOutputs(json_object=True)
    assert asked(response_format={"type": "text", "json_schema": None}) is None
    sparse = {"type": "json_schema", "json_schema": {"schema": schema, "strict": None}}
    assert asked(response_format=sparse) == StructuredOutputs(json=schema)
    with_nulls = {"choice": ["a"], "json_object": None, "regex": None}
    assert asked(structured_outputs=with_nulls) == StructuredOutputs(choice=["a"])
    described = {"type": "json_schema", "json_schema": named}
    assert asked(response_format=described) == StructuredOutputs(json=schema)
    for given in (
        {"json": schema}, {"regex": "a+"}, {"choice": ["a", "b"]}, {"grammar": 'start: "a"'},
        {"json_object": True},
    ):  # fmt: skip
        assert asked(structured_outputs=given) == StructuredOutputs(**given)
        both = {"type": "text"}
        assert asked(response_format=both, structured_outputs=given) == StructuredOutputs(**given)


@pytest.mark.parametrize(
    ("fields", "says"),
    [
        ({"response_format": "json_object"}, "response_format is 'json_object'"),
        ({"response_format": {}}, r"response_format\.type is None \(there are: text"),
        ({"response_format": {"type": "json_shema"}}, "did you mean 'json_schema'"),
        (
            {"response_format": {"type": "json_object", "schema": {}}},
            "response_format has 'schema'",
        ),
        ({"response_format": {"type": "json_schema"}}, "json_schema is None; .* with a schema"),
        ({"response_format": schema_format("{}")}, "must be an object with a schema"),
        ({"response_format": schema_format({}, name=5)}, r"json_schema\.name is 5"),
        ({"response_format": schema_format({}, strict="yes")}, r"json_schema\.strict is 'yes'"),
        ({"response_format": schema_format({}, scheme=1)}, "has 'scheme'; did you mean 'schema'"),
        (
            {"response_format": schema_format({"enum": ["x" * 70_000]})},
            r"response_format\.json_schema\.schema has 700\d\d bytes; at most 65536",
        ),
        (
            {"response_format": {"type": "json_object"}, "structured_outputs": {"regex": "a"}},
            "both given",
        ),
        ({"structured_outputs": 5}, "structured_outputs is 5"),
        ({"structured_outputs": {}}, "structured_outputs has nothing; .* exactly one of json"),
        ({"structured_outputs": {"rejex": "a"}}, "did you mean 'regex'"),
        ({"structured_outputs": {"regex": "a", "choice": ["a"]}}, "has regex and choice"),
    ],
)
def test_bad_structured_outputs(fields: dict[str, Any], says: str) -> None:
    for url, own in ((COMPLETIONS, {"prompt": "Hi"}), (CHAT, {"messages": HI})):
        with pytest.raises(RequestError, match=says):
            read_body(url, {**own, **fields}, MAKER, DEFAULTS)


@pytest.mark.parametrize(
    ("url", "body", "says"),
    [
        ("/v1/complete", {}, r"url is '/v1/complete'; did you mean '/v1/completions'"),
        (COMPLETIONS, {}, "prompt is missing"),
        (COMPLETIONS, {"prompt": "a", "temprature": 1}, "'temprature' is not supported; did you"),
        (COMPLETIONS, {"prompt": "a", "tools": []}, "'tools' is not supported"),
        (COMPLETIONS, {"prompt": "a", "stream": True}, "stream is True; only False"),
        (COMPLETIONS, {"prompt": "a", "best_of": 3}, "best_of is 3; only 1"),
        (COMPLETIONS, {"prompt": "a", "temperature": "hot"}, "temperature is 'hot'"),
        (COMPLETIONS, {"prompt": "a", "stop": 5}, "stop is 5"),
        (COMPLETIONS, {"prompt": "a", "stop_token_ids": 5}, "stop_token_ids is 5"),
        (COMPLETIONS, {"prompt": "a", "ignore_eos": "no"}, "ignore_eos is 'no'"),
        (COMPLETIONS, {"prompt": "a", "logit_bias": [1]}, r"logit_bias is \[1\]"),
        (COMPLETIONS, {"prompt": "a", "logit_bias": {"x": 1}}, "logit_bias has the name 'x'"),
        (COMPLETIONS, {"prompt": "a", "model": 5}, "model is 5"),
        (COMPLETIONS, {"prompt": 5}, "prompt is 5"),
        (COMPLETIONS, {"prompt": ["a", "b"]}, "a list of 2 prompts"),
        (CHAT, {"prompt": "a"}, "'prompt' is not supported"),
        (CHAT, {"messages": []}, "list of messages"),
        (CHAT, {"messages": HI, "logprobs": 3}, "logprobs is 3"),
        (CHAT, {"messages": HI, "top_logprobs": 3}, "needs logprobs"),
        (CHAT, {"messages": HI, "max_tokens": 1, "max_completion_tokens": 2}, "both given"),
    ],
)
def test_bad_bodies(url: str, body: dict[str, Any], says: str) -> None:
    with pytest.raises(RequestError, match=says):
        read_body(url, body, MAKER, DEFAULTS)


def answer() -> RequestOutput:
    logprobs = (
        TokenLogprobs(41, -0.1, 1, ((41, -0.1), (74, -2.0))),
        TokenLogprobs(74, -0.2, 1, ((74, -0.2),)),
    )
    completion = CompletionOutput(0, "Hi", (41, 74), logprobs, "length")
    return RequestOutput("r", "x", (1, 2, 3), (completion,), True)


def test_completion_object() -> None:
    asked = read_body(COMPLETIONS, {"prompt": "x", "logprobs": 2}, MAKER, DEFAULTS)
    found = response_object(
        [answer()], asked, model="m", response_id="c", created=5, names=TokenNames(TOKENIZER)
    )
    assert found["object"] == "text_completion"
    assert found["usage"]["total_tokens"] == 5
    assert found["choices"] == [
        {
            "text": "Hi",
            "index": 0,
            "finish_reason": "length",
            "logprobs": {
                "tokens": ["H", "i"],
                "token_logprobs": [-0.1, -0.2],
                "top_logprobs": [{"H": -0.1, "i": -2.0}, {"i": -0.2}],
                "text_offset": [0, 1],
            },
        }
    ]


def test_chat_object() -> None:
    asked = read_body(CHAT, {"messages": HI, "logprobs": True, "top_logprobs": 2}, MAKER, DEFAULTS)
    found = response_object(
        [answer()], asked, model="m", response_id="c", created=5, names=TokenNames(TOKENIZER)
    )
    (choice,) = found["choices"]
    assert found["object"] == "chat.completion"
    assert choice["message"] == {"role": "assistant", "content": "Hi", "refusal": None}
    first = choice["logprobs"]["content"][0]
    assert (first["token"], first["bytes"], first["logprob"]) == ("H", [72], -0.1)
    assert [entry["token"] for entry in first["top_logprobs"]] == ["H", "i"]


def test_a_chat_without_a_template_says_what_to_do() -> None:
    plain = RequestMaker(vocab_size=6144, max_model_len=256, tokenizer=TOKENIZER)
    with pytest.raises(RequestError, match=r"pass --chat-template, or use /v1/completions"):
        read_body(CHAT, {"messages": HI}, plain, DEFAULTS)


def served(url: str, body: dict[str, Any]) -> Any:
    return read_body(url, body, MAKER, SamplingParams(), is_served=True, most_prompts=3)


def test_several_prompts_are_for_a_server() -> None:
    found = served(COMPLETIONS, {"prompt": ["a", "b"], "cache_salt": "s"})
    assert found.prompts == (
        {"prompt": "a", "cache_salt": "s"},
        {"prompt": "b", "cache_salt": "s"},
    )
    found = served(COMPLETIONS, {"prompt": [[1], [2, 3]]})
    assert found.prompts == ({"prompt_token_ids": [1]}, {"prompt_token_ids": [2, 3]})
    with pytest.raises(RequestError, match="a list of 4 prompts; give at most 3"):
        served(COMPLETIONS, {"prompt": ["a"] * 4})


def test_what_is_for_a_server_alone() -> None:
    body = {"messages": HI, "stream": True, "stream_options": {"include_usage": True}}
    found = served(CHAT, {**body, "request_id": "r"})
    assert (found.is_streamed, found.has_usage_chunk, found.request_id) == (True, True, "r")
    assert not found.has_usage_always
    for name in ("stream_options", "request_id"):
        with pytest.raises(RequestError, match=f"'{name}' is not supported"):
            read_body(COMPLETIONS, {"prompt": "a", name: "x"}, MAKER, DEFAULTS)


@pytest.mark.parametrize(
    ("url", "body", "says", "field"),
    [
        (COMPLETIONS, {"stream_options": {"include_usage": True}}, "needs", "stream_options"),
        (COMPLETIONS, {"stream": True, "prompt_logprobs": 1}, "be streamed", "prompt_logprobs"),
        (COMPLETIONS, {"stream": True, "stream_options": {"x": 1}}, "may have", "stream_options"),
        (CHAT, {"stream": True, "return_routed_experts": True}, "be str", "return_routed_experts"),
        (COMPLETIONS, {"echo": 1}, "true or false", "echo"),
        (COMPLETIONS, {"best_of": True}, "only 1", "best_of"),
        (COMPLETIONS, {"truncate_prompt_tokens": 0}, "from 1", "truncate_prompt_tokens"),
        (COMPLETIONS, {"priority": "x"}, "an integer", "priority"),
        (COMPLETIONS, {"x": 1}, "not supported", "x"),
        (CHAT, {"tool_choice": "required"}, "only 'none' or 'auto'", "tool_choice"),
        (CHAT, {"parallel_tool_calls": 1}, "only True or False", "parallel_tool_calls"),
        (COMPLETIONS, {"metadata": 5}, "an object", "metadata"),
        (CHAT, {"chat_template_kwargs": 5}, "an object", "chat_template_kwargs"),
        (CHAT, {"chat_template_kwargs": {"stile": 5}}, "mean 'style'", "chat_template_kwargs"),
        (CHAT, {"chat_template_kwargs": {"messages": []}}, "not read", "chat_template_kwargs"),
        (CHAT, {"continue_final_message": True, "add_generation_prompt": True}, "needs",
         "continue_final_message"),
    ],
)  # fmt: skip
def test_faults_name_their_field(url: str, body: dict[str, Any], says: str, field: str) -> None:
    own = {"prompt": "a"} if url == COMPLETIONS else {"messages": HI}
    maker = dataclasses.replace(
        MAKER, chat_template=ChatTemplate("{{ messages[0].content }}{{ style }}")
    )
    with pytest.raises(RequestError, match=says) as found:
        read_body(url, {**own, **body}, maker, DEFAULTS, is_served=True)
    assert named_field(str(found.value), KIND_OF_URL[url]) == field


def test_the_prompt_is_the_field_of_what_is_wrong_with_it() -> None:
    for message in ("the prompt is empty; give a token", "prompt holds token id 7"):
        assert named_field(message, "completion") == "prompt"
        assert named_field(message, "chat") == "messages"
    assert named_field("the model has no chat template: pass one", "chat") == "messages"
    assert named_field("chat template was stopped: too long", "chat") == "messages"
    assert named_field("something else", "chat") is None


def test_a_prompt_may_be_cut_from_its_start() -> None:
    assert TOKENIZER is not None
    ids = TOKENIZER.encode("One two three four")
    found = served(COMPLETIONS, {"prompt": "One two three four", "truncate_prompt_tokens": 2})
    assert found.prompt == {"prompt_token_ids": ids[-2:]}
    found = served(COMPLETIONS, {"prompt": "One", "add_special_tokens": False})
    assert found.prompt == {"prompt_token_ids": TOKENIZER.encode("One", add_special_tokens=False)}


def test_a_chat_may_go_on_with_its_last_message() -> None:
    template = ChatTemplate(
        "{% for m in messages %}<{{ m.role }}>{{ m.content | trim }}<end>{% endfor %}"
        "{% if add_generation_prompt %}<assistant>{% endif %}"
    )
    maker = dataclasses.replace(MAKER, chat_template=template)
    messages = [*HI, {"role": "assistant", "content": "The end"}]

    def text(**options: Any) -> str:
        prompt: Any = read_body(CHAT, {"messages": messages, **options}, maker, DEFAULTS).prompt
        assert TOKENIZER is not None
        return TOKENIZER.decode(prompt["prompt_token_ids"])

    assert text() == "<user>Hi<end><assistant>The end<end><assistant>"
    assert text(add_generation_prompt=False) == "<user>Hi<end><assistant>The end<end>"
    assert text(continue_final_message=True) == "<user>Hi<end><assistant>The end"
    messages[1]["content"] = ""
    with pytest.raises(RequestError, match="a last message with text"):
        text(continue_final_message=True)


def test_an_echo_has_the_prompt_and_its_logprobs() -> None:
    asked = read_body(
        COMPLETIONS, {"prompt": "Hi", "echo": True, "logprobs": 1, "prompt_logprobs": 2}, MAKER,
        DEFAULTS,
    )  # fmt: skip
    assert asked.sampling.prompt_logprobs == 2
    entry = TokenLogprobs(74, -math.inf, 9, ((41, -0.5), (42, -1.0)))
    output = dataclasses.replace(
        answer(), prompt="Hi", prompt_token_ids=(41, 74), prompt_logprobs=(None, entry)
    )
    found = response_object(
        [output], asked, model="m", response_id="c", created=5, names=TokenNames(TOKENIZER)
    )
    (choice,) = found["choices"]
    assert choice["text"] == "HiHi"
    assert choice["logprobs"]["tokens"] == ["H", "i", "H", "i"]
    assert choice["logprobs"]["token_logprobs"] == [None, -9999.0, -0.1, -0.2]
    assert choice["logprobs"]["top_logprobs"][:2] == [None, {"i": -9999.0, "H": -0.5}]
    assert choice["logprobs"]["text_offset"] == [0, 1, 2, 3]
    first, second = choice["prompt_logprobs"]
    assert first is None
    assert second["74"] == {"logprob": -9999.0, "rank": 9, "decoded_token": "i"}
    assert [second[name]["rank"] for name in ("41", "42")] == [1, 2]


def test_token_ids_where_they_are_asked_for() -> None:
    for url, own in ((COMPLETIONS, {"prompt": "x"}), (CHAT, {"messages": HI})):
        asked = read_body(url, {**own, "return_token_ids": True}, MAKER, DEFAULTS)
        found = response_object(
            [answer()], asked, model="m", response_id="c", created=5, names=TokenNames(TOKENIZER)
        )
        (choice,) = found["choices"]
        assert choice["token_ids"] == [41, 74]
        assert (choice if url == COMPLETIONS else found)["prompt_token_ids"] == [1, 2, 3]


def test_choices_of_several_prompts_count_on() -> None:
    asked = served(COMPLETIONS, {"prompt": ["a", "b"]})
    found = response_object(
        [answer(), answer()], asked, model="m", response_id="c", created=5,
        names=TokenNames(TOKENIZER),
    )  # fmt: skip
    assert [choice["index"] for choice in found["choices"]] == [0, 1]
    assert found["usage"] == {"prompt_tokens": 6, "completion_tokens": 4, "total_tokens": 10}


def test_routed_experts_are_of_a_choice() -> None:
    asked = read_body(CHAT, {"messages": HI, "return_routed_experts": True}, MAKER, DEFAULTS)
    assert asked.sampling.return_routed_experts
    ids = np.arange(8, dtype=np.int16).reshape(2, 2, 2)
    (one,) = answer().outputs
    one = dataclasses.replace(one, routed_experts=RoutedExperts.of(0, ids))
    found = response_object(
        [dataclasses.replace(answer(), outputs=(one,))],
        asked,
        model="m",
        response_id="c",
        created=5,
        names=TokenNames(TOKENIZER),
    )
    assert found["choices"][0]["routed_experts"] == [[[0, 1], [2, 3]], [[4, 5], [6, 7]]]


def test_what_choices_tell_of_their_prompt_is_made_once() -> None:
    entry = TokenLogprobs(5, -1.0, 1, ((5, -1.0), (6, -2.0)))
    outputs = tuple(
        CompletionOutput(index=index, text="a", token_ids=(5,), logprobs=(entry,),
                         finish_reason="length") for index in range(3)
    )  # fmt: skip
    body = {"prompt": [5, 6], "n": 3, "echo": True, "logprobs": 1, "prompt_logprobs": 1}
    asked = read_body(COMPLETIONS, {**body, "return_token_ids": True}, MAKER, DEFAULTS)
    names = CountingNames(TOKENIZER)
    found = response_object(
        [RequestOutput("r", None, (5, 6), outputs, True, prompt_logprobs=(None, entry))],
        asked, model="m", response_id="i", created=1, names=names,
    )  # fmt: skip
    first, *others = found["choices"]
    assert len(others) == 2
    for other in others:
        for name in ("prompt_logprobs", "prompt_token_ids"):
            assert other[name] is first[name]
        assert other["logprobs"] == first["logprobs"]
    assert first["logprobs"]["text_offset"][-1] > 0
    # of the echo 3, of the prompt's list 2, of each choice 2
    assert names.num_asked == 3 + 2 + 3 * 2


class CountingNames(TokenNames):
    """Names of tokens, and how often one was asked for."""

    num_asked = 0

    def of(self, token_id: int) -> tuple[str, list[int]]:
        self.num_asked += 1
        return super().of(token_id)
