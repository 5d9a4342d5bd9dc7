"""What a request's caller sees of its steps: stop strings, end tokens, times, errors."""

from __future__ import annotations

import itertools
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from moe_serve.text.request_output import RequestState
from moe_serve.text.tokenizer import Tokenizer, load_tokenizer
from moe_serve.types import FinishReason, Request, RoutedExperts, SamplingParams, StepOutput

ROOT = Path(__file__).resolve().parents[2]
END = 41  # of the requests here; "H"
EOS = 0


@pytest.fixture(scope="module")
def tokenizer() -> Tokenizer:
    found = load_tokenizer(ROOT / "moe_serve" / "assets" / "demo-moe")
    assert found is not None
    return found


def play(
    tokenizer: Tokenizer | None,
    token_ids: list[int],
    reason: FinishReason | None = "length",
    *,
    at_once: int = 1,
    **sampling: Any,
) -> tuple[RequestState, list[str], bool]:
    """Feed tokens to one request; return it, its text after each step, and whether it was cut."""
    request = Request(
        request_id="r",
        prompt_ids=(41,),
        sampling=SamplingParams(**sampling),
        eos_token_ids=frozenset({END}),
        arrival_s=10.0,
    )
    state = RequestState(request, None, tokenizer)
    texts = []
    for start in range(0, len(token_ids), at_once):
        new = tuple(token_ids[start : start + at_once])
        is_last = start + at_once >= len(token_ids)
        step = StepOutput("r", 0, new, finish_reason=reason if is_last else None)
        cut = state.update(step, 11.0 + start)
        texts.append(state.outputs[0].text)
        if state.is_finished:
            return state, texts, cut
    return state, texts, False


def test_text_never_shrinks_and_holds_back_what_may_be_a_stop(tokenizer: Tokenizer) -> None:
    ids = tokenizer.encode("one END two STOP three")
    state, texts, cut = play(tokenizer, ids, stop=["STOP"])
    assert cut
    assert state.outputs[0].text == "one END two "
    assert state.outputs[0].finish_reason == "stop"
    for earlier, later in itertools.pairwise(texts):
        assert later.startswith(earlier)
    assert all("S" not in text for text in texts)


def test_stop_string_across_token_borders_keeps_tokens_up_to_its_last(
    tokenizer: Tokenizer,
) -> None:
    ids = tokenizer.encode("a dog and a cat and")
    texts = [tokenizer.decode(ids[:k]) for k in range(len(ids) + 1)]
    wanted = next(k for k, text in enumerate(texts) if "d a c" in text)
    state, _, _ = play(tokenizer, ids, stop="d a c")
    output = state.output().outputs[0]
    assert output.text == "a dog an"
    assert output.token_ids == tuple(ids[:wanted])


@pytest.mark.parametrize("at_once", [1, 2, 7])
def test_the_cut_does_not_depend_on_how_many_tokens_a_step_gives(
    tokenizer: Tokenizer, at_once: int
) -> None:
    ids = tokenizer.encode("a dog and a cat and")
    alone, _, _ = play(tokenizer, ids, stop=["cat", "at"])
    state, _, _ = play(tokenizer, ids, at_once=at_once, stop=["cat", "at"])
    assert state.output().outputs[0].text == alone.output().outputs[0].text == "a dog and a "
    assert state.output().outputs[0].token_ids == alone.output().outputs[0].token_ids


def test_include_stop_str_in_output(tokenizer: Tokenizer) -> None:
    ids = tokenizer.encode("one STOP two")
    state, _, _ = play(tokenizer, ids, stop=["TO"], include_stop_str_in_output=True)
    assert state.outputs[0].text == "one STO"


def test_stop_strings_wait_for_min_tokens(tokenizer: Tokenizer) -> None:
    ids = tokenizer.encode("stop it, stop it, stop it")
    first = tokenizer.encode("stop it, s")
    state, _, _ = play(tokenizer, ids, stop=["stop"], min_tokens=len(first) - 2)
    assert state.outputs[0].text == "stop it, "
    state, _, _ = play(tokenizer, ids, stop=["stop it"], min_tokens=len(ids), max_tokens=99)
    assert state.outputs[0].text == "stop it, stop it, stop it"
    assert state.outputs[0].finish_reason == "length"


def test_what_was_held_back_comes_at_the_end(tokenizer: Tokenizer) -> None:
    ids = tokenizer.encode("never STO")
    state, _, cut = play(tokenizer, ids, stop=["STOP"])
    assert not cut
    assert state.outputs[0].text == "never STO"
    assert state.outputs[0].finish_reason == "length"


def test_half_a_character_at_the_end_is_marked(tokenizer: Tokenizer) -> None:
    ids = tokenizer.encode("ok \N{GRINNING FACE}")[:-1]
    state, texts, _ = play(tokenizer, ids)
    assert all("\ufffd" not in text for text in texts[:-1])
    assert state.outputs[0].text == "ok \ufffd"


@pytest.mark.parametrize("shown", [False, True])
def test_an_end_token_is_in_the_tokens_and_not_in_the_text(
    tokenizer: Tokenizer, shown: bool
) -> None:
    ids = [*tokenizer.encode("the end"), END]
    state, _, _ = play(tokenizer, ids, "stop", include_stop_str_in_output=shown)
    assert state.outputs[0].text == ("the endH" if shown else "the end")
    assert state.outputs[0].token_ids == ids
    ids[-1] = 42
    state, _, _ = play(tokenizer, ids, "stop", stop_token_ids=[42])
    assert state.outputs[0].text == "the end"


def test_an_output_that_stops_at_no_end_token_shows_its_last_one(tokenizer: Tokenizer) -> None:
    for ids, params in (
        (tokenizer.encode("{}"), {}),
        ([*tokenizer.encode("the end"), END], {"ignore_eos": True}),
    ):
        state, _, _ = play(tokenizer, ids, "stop", **params)
        assert state.outputs[0].text == tokenizer.decode(ids)
        assert state.outputs[0].finish_reason == "stop"


def test_special_tokens_show_when_asked(tokenizer: Tokenizer) -> None:
    ids = [*tokenizer.encode("a"), EOS, *tokenizer.encode("b")]
    assert play(tokenizer, ids)[0].outputs[0].text == "ab"
    shown, _, _ = play(tokenizer, ids, skip_special_tokens=False)
    assert shown.outputs[0].text == "a<|endoftext|>b"


def test_times_are_since_arrival(tokenizer: Tokenizer) -> None:
    metrics = play(tokenizer, [41, 42, 43])[0].output().metrics
    assert (metrics.ttft_s, metrics.e2e_s) == (1.0, 3.0)


def test_experts_of_tokens_are_put_together_and_may_come_again() -> None:
    ids = np.arange(7 * 6, dtype=np.int16).reshape(7, 3, 2)
    request = Request(request_id="r", prompt_ids=(41, 42, 43), sampling=SamplingParams(n=2))
    state = RequestState(request)

    def update(index: int, token: int | None, first: int, rows: list[int]) -> None:
        routed = RoutedExperts.of(first, ids[rows])
        tokens = () if token is None else (token,)
        state.update(StepOutput("r", index, tokens, routed_experts=routed), 1.0)

    def found() -> list[RoutedExperts | None]:
        return [output.routed_experts for output in state.output().outputs]

    update(0, None, 0, [0, 1])
    assert found() == [None, None], "no token yet"
    update(0, 5, 2, [2])
    state.update(StepOutput("r", 1, (9,)), 1.0)
    assert found() == [RoutedExperts.of(0, ids[:3])] * 2
    update(0, 6, 3, [3])
    update(1, 6, 3, [5])
    assert found() == [RoutedExperts.of(0, ids[:4]), RoutedExperts.of(0, ids[[0, 1, 2, 5]])]
    update(1, None, 0, [0, 1])  # it goes on elsewhere, and all is told anew
    assert found()[0] == RoutedExperts.of(0, ids[:4])
    update(1, 7, 2, [2, 5, 6])
    assert found() == [RoutedExperts.of(0, ids[:4]), RoutedExperts.of(0, ids[[0, 1, 2, 5, 6]])]
    with pytest.raises(AssertionError, match="missing"):
        update(0, 8, 6, [6])


def test_an_error_is_told_and_ends_the_request(tokenizer: Tokenizer) -> None:
    request = Request(request_id="r", prompt_ids=(41,), sampling=SamplingParams(n=2))
    state = RequestState(request, "H", tokenizer)
    state.update(StepOutput("r", 0, (), finish_reason="error", error="a NaN", is_refused=True), 1.0)
    assert not state.is_finished
    state.update(StepOutput("r", 1, (41,), finish_reason="length"), 1.0)
    first, second = state.output().outputs
    assert (first.finish_reason, first.error, first.text) == ("error", "a NaN", "")
    assert (first.is_refused, second.is_refused) == (True, False)
    assert (second.finish_reason, second.text) == ("length", "H")
    assert state.output().finished


def test_without_a_tokenizer_there_are_tokens_and_no_text() -> None:
    state, _, _ = play(None, [41, 42])
    assert (state.outputs[0].text, state.outputs[0].token_ids) == ("", [41, 42])
