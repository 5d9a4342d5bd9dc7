"""Bodies of requests."""

from __future__ import annotations

import itertools
import json
from typing import Any

import pytest

from moe_serve.errors import ConfigError, RequestError
from moe_serve.load.trace_file import TraceRow
from moe_serve.load.workload import (
    Asked,
    Endpoint,
    Template,
    TokenRange,
    clipped,
    file_requests,
    random_requests,
    trace_requests,
)
from moe_serve.text.prompt_lines import PromptLine

COMPLETIONS = Template(endpoint="completions", model="m")
IDS = TokenRange(first=5, end=50)


def bodies(asked: list[Asked]) -> list[dict[str, Any]]:
    return [json.loads(entry.body) for entry in asked]


def random_ones(number: int, seed: int = 0, **more: Any) -> list[Asked]:
    sizes = {"input_len": 20, "output_len": 10, "range_ratio": 0.0} | more
    return list(itertools.islice(random_requests(COMPLETIONS, IDS, seed=seed, **sizes), number))


def test_random_prompts_have_their_lengths_and_ids() -> None:
    asked = random_ones(200)
    found = bodies(asked)
    assert {entry["max_tokens"] for entry in found} == {10}
    assert {len(entry["prompt"]) for entry in found} == {20}
    assert {token_id for entry in found for token_id in entry["prompt"]} == set(range(5, 50))
    assert len({tuple(entry["prompt"]) for entry in found}) == 200
    assert asked == random_ones(200) != random_ones(200, seed=1)
    assert all((entry.input_len, entry.output_len) == (20, 10) for entry in asked)
    assert found[0]["stream"] is True
    assert found[0]["stream_options"] == {"include_usage": True}


def test_lengths_vary_by_their_ratio() -> None:
    asked = random_ones(2000, range_ratio=0.5)
    assert {entry.input_len for entry in asked} == set(range(10, 31))
    assert {entry.output_len for entry in asked} == set(range(5, 16))
    assert all(
        len(body["prompt"]) == entry.input_len
        for body, entry in zip(bodies(asked), asked, strict=True)
    )


def test_what_all_bodies_share() -> None:
    template = Template(
        endpoint="completions", model="m", temperature=0.0, ignore_eos=True, extra={"top_k": 5}
    )
    body = json.loads(template.body({"prompt": "x"}, 3))
    assert body == {
        "model": "m", "prompt": "x", "max_tokens": 3, "temperature": 0.0, "ignore_eos": True,
        "stream": True, "stream_options": {"include_usage": True}, "top_k": 5,
    }  # fmt: skip
    assert "temperature" not in json.loads(COMPLETIONS.body({}, 1))


@pytest.mark.parametrize("name", ["n", "stream", "max_tokens", "prompt", "temperature"])
def test_an_extra_that_is_set_already(name: str) -> None:
    with pytest.raises(ConfigError, match=f"'{name}', which is set"):
        Template(endpoint="completions", model="m", temperature=1.0, extra={name: 1})


def test_a_trace_is_asked_row_by_row() -> None:
    rows = [TraceRow(0.0, 30, 10), TraceRow(1.0, 0, 0), TraceRow(2.0, 500, 5)]
    asked = list(trace_requests(COMPLETIONS, IDS, rows, max_len=100, seed=0))
    assert [(entry.input_len, entry.output_len) for entry in asked] == [(30, 10), (1, 1), (95, 5)]
    assert [len(body["prompt"]) for body in bodies(asked)] == [30, 1, 95]


@pytest.mark.parametrize(
    ("lengths", "fits"),
    [
        ((60, 40), (60, 40)),
        ((60, 41), (59, 41)),
        ((30, 90), (30, 70)),
        ((95, 90), (50, 50)),
        ((500, 5), (95, 5)),
        ((5, 500), (5, 95)),
    ],
)
def test_lengths_are_clipped(lengths: tuple[int, int], fits: tuple[int, int]) -> None:
    assert clipped(*lengths, 100) == fits


def line(**entry: Any) -> PromptLine:
    return PromptLine("p.jsonl:4", entry)


def from_file(endpoint: Endpoint, *lines: PromptLine) -> list[dict[str, Any]]:
    template = Template(endpoint=endpoint, model="m")
    found = file_requests(template, lines, output_len=9)
    return bodies(list(itertools.islice(found, len(lines) + 1)))


def test_a_file_s_prompts_come_again_after_the_last() -> None:
    found = from_file("completions", line(prompt="a", cache_salt="s"), line(prompt_token_ids=[3]))
    assert [body["prompt"] for body in found] == ["a", [3], "a"]
    assert found[0]["cache_salt"] == "s"
    assert found[0]["max_tokens"] == 9


def test_a_conversation_is_asked_up_to_its_first_open_turn() -> None:
    one, two = {"role": "user", "content": "one"}, {"role": "user", "content": "two"}
    found = from_file("chat", line(messages=[one, two]), line(prompt="hi"))
    assert found[0]["messages"] == [one]
    assert found[1]["messages"] == [{"role": "user", "content": "hi"}]


@pytest.mark.parametrize(
    ("endpoint", "entry", "error", "says"),
    [
        ("completions", {"messages": []}, ConfigError, "p.jsonl:4: messages need --endpoint chat"),
        ("chat", {"prompt_token_ids": [1]}, ConfigError, "need --endpoint completions"),
        ("chat", {"messages": [{"content": "x"}]}, RequestError, "objects with a role"),
        ("completions", {"prompt": ["a"]}, RequestError, "prompt must be text"),
        ("completions", {"prompt_token_ids": [True]}, RequestError, "list of whole numbers"),
    ],
)
def test_lines_that_an_endpoint_cannot_take(
    endpoint: Endpoint, entry: dict[str, Any], error: type[Exception], says: str
) -> None:
    with pytest.raises(error, match=says):
        from_file(endpoint, line(**entry))


def test_bad_sizes() -> None:
    for given, says in (
        ({"input_len": 0}, "--input-len is 0"),
        ({"output_len": -1}, "--output-len is -1"),
        ({"range_ratio": 1.0}, "--range-ratio is 1.0"),
    ):
        with pytest.raises(ConfigError, match=says):
            random_ones(1, **given)
    with pytest.raises(ConfigError, match="must be below"):
        TokenRange(first=10, end=10)
    with pytest.raises(ConfigError, match="--max-len is 1"):
        trace_requests(COMPLETIONS, IDS, [], max_len=1, seed=0)
    with pytest.raises(ConfigError, match="need --endpoint completions"):
        trace_requests(Template(endpoint="chat", model="m"), IDS, [], max_len=None, seed=0)
