"""Answers that take long to write: how large they may be, and that other requests go on."""

from __future__ import annotations

import json
import threading
from dataclasses import replace
from typing import Any

import pytest

from moe_serve.text.openai_logprobs import TokenNames
from tests.server.fake_host import FakeModel
from tests.server.fronts import demo_texts, front
from tests.server.test_stream import COMPLETIONS, exchange

IDS = list(range(100, 200))


class WatchedNames(TokenNames):
    """Names of tokens, in which threads they were asked for, and how often."""

    num_asked = 0

    def __init__(self) -> None:
        super().__init__(demo_texts().tokenizer)
        self.threads: set[str] = set()

    def of(self, token_id: int) -> tuple[str, list[int]]:
        self.num_asked += 1
        self.threads.add(threading.current_thread().name.partition("_")[0])
        return super().of(token_id)


@pytest.mark.parametrize(
    ("extra", "param"),
    [
        ({"prompt_logprobs": 20}, "prompt_logprobs"),
        ({"echo": True, "logprobs": 20}, "logprobs"),
        ({"echo": True, "logprobs": 20, "stream": True}, "logprobs"),
    ],
)
def test_logprobs_of_prompts_have_a_limit(extra: dict[str, Any], param: str) -> None:
    model = FakeModel()
    app, state = front(model)
    state.limits = replace(state.limits, prompt_logprobs=2 * 3 * 100 * 21)
    body = {"prompt": [IDS, IDS], "n": 3, "max_tokens": 1, **extra}
    assert exchange(app, COMPLETIONS, body).status == 200
    model.started.clear()
    answer = exchange(app, COMPLETIONS, {**body, "n": 4})
    assert answer.status == 400
    error = json.loads(answer.text)["error"]
    assert (error["param"], error["code"]) == (param, "invalid_value")
    assert model.started == []


@pytest.mark.parametrize(
    "extra",
    [
        {"prompt_logprobs": 20},
        {"echo": True, "logprobs": 20},
        {"echo": True, "logprobs": 20, "stream": True},
    ],
)
def test_a_large_answer_is_written_beside_the_event_loop(extra: dict[str, Any]) -> None:
    app, state = front()
    names = state.names = WatchedNames()
    body = {"prompt": [IDS], "n": 2, "max_tokens": 1, **extra}
    assert exchange(app, COMPLETIONS, body).status == 200
    # in a stream the output's own tokens are written where they come
    assert "texts" in names.threads
    assert extra.get("stream") or names.threads == {"texts"}


def test_an_echo_in_a_stream_is_written_once() -> None:
    app, state = front()
    names = state.names = WatchedNames()
    body = {"prompt": [IDS], "max_tokens": 1, "echo": True, "logprobs": 0, "stream": True}
    exchange(app, COMPLETIONS, {**body, "n": 1})
    num_of_one, names.num_asked = names.num_asked, 0
    exchange(app, COMPLETIONS, {**body, "n": 8})
    assert 0 < names.num_asked < 2 * num_of_one
