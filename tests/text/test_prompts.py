"""What callers send becomes requests, or a clear error."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest

from moe_serve.errors import RequestError
from moe_serve.text.chat_template import ChatTemplate
from moe_serve.text.prompts import RequestMaker, derived_seed, read_messages
from moe_serve.text.tokenizer import load_tokenizer
from moe_serve.types import SamplingParams
from tests.bad_requests import BAD_PROMPTS, BAD_SAMPLING

ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture(scope="module")
def maker() -> RequestMaker:
    tokenizer = load_tokenizer(ROOT / "moe_serve" / "assets" / "demo-moe")
    return RequestMaker(
        vocab_size=6144, max_model_len=256, tokenizer=tokenizer, eos_token_ids=frozenset({0})
    )


@pytest.mark.parametrize(
    ("options", "says"), [b[1:] for b in BAD_SAMPLING], ids=[b[0] for b in BAD_SAMPLING]
)
def test_bad_sampling(options: dict[str, Any], says: tuple[str, ...]) -> None:
    with pytest.raises(RequestError) as caught:
        SamplingParams.from_mapping(options)
    assert all(part in str(caught.value) for part in says), str(caught.value)


@pytest.mark.parametrize(
    ("prompt", "options", "says"), [b[1:] for b in BAD_PROMPTS], ids=[b[0] for b in BAD_PROMPTS]
)
def test_bad_prompts(
    maker: RequestMaker, prompt: Any, options: dict[str, Any], says: tuple[str, ...]
) -> None:
    with pytest.raises(RequestError) as caught:
        maker.make(prompt, SamplingParams(**options), index=0)
    assert all(part in str(caught.value) for part in says), str(caught.value)


def test_the_longest_prompt_leaves_room_for_one_token(maker: RequestMaker) -> None:
    assert len(maker.make([5] * 255, SamplingParams(), index=0).request.prompt_ids) == 255


def test_numbers_of_numpy_become_pythons_own() -> None:
    found = SamplingParams(
        n=np.int64(2),  # type: ignore[arg-type]
        temperature=np.float32(0.5),  # type: ignore[arg-type]
        top_p=1,
        stop_token_ids=np.array([3, 4]),  # type: ignore[arg-type]
        logit_bias={np.int32(5): np.float64(1.5)},  # type: ignore[dict-item]
    )
    assert found == SamplingParams(
        n=2, temperature=0.5, top_p=1.0, stop_token_ids=(3, 4), logit_bias={5: 1.5}
    )
    assert {type(found.n), type(found.stop_token_ids[0])} == {int}
    assert {type(found.temperature), type(found.top_p)} == {float}


def test_one_bad_word_is_a_list_of_one() -> None:
    assert SamplingParams(bad_words="abc", stop="end") == SamplingParams(
        bad_words=["abc"], stop=["end"]
    )
    assert SamplingParams(bad_words=None, stop=None) == SamplingParams()  # type: ignore[arg-type]


def test_priority_and_salt_of_a_prompt(maker: RequestMaker) -> None:
    sampling = SamplingParams()
    request = maker.make({"prompt": "a", "cache_salt": "s"}, sampling, index=0, priority=-2).request
    assert (request.priority, request.cache_salt) == (-2, "s")
    request = maker.make("a", sampling, index=0).request
    assert (request.priority, request.cache_salt) == (0, "")
    for wrong in ("1", 1.5, None, 2**63):
        with pytest.raises(RequestError, match="priority is "):
            maker.make("a", sampling, index=0, priority=wrong)  # type: ignore[arg-type]


def test_text_and_ids_give_the_same_request(maker: RequestMaker) -> None:
    sampling = SamplingParams()
    text = maker.make("Hi you", sampling, index=3)
    ids = maker.make(list(text.request.prompt_ids), sampling, index=3)
    assert text.request == ids.request
    assert (text.prompt, ids.prompt) == ("Hi you", None)
    assert text.request.eos_token_ids == {0}


def test_seeds(maker: RequestMaker) -> None:
    own = maker.make("a", SamplingParams(seed=7), index=0).request.seed
    first, again, other = (
        maker.make("a", SamplingParams(), index=i).request.seed for i in (0, 0, 1)
    )
    assert own == 7
    assert first == again == derived_seed(0, 0)
    assert abs(first - other) > 1024  # the n outputs of neighbours share no seed
    assert derived_seed(1, 0) != first


def test_bad_words_are_tokenised_as_they_may_appear(maker: RequestMaker) -> None:
    assert maker.tokenizer is not None
    ids = maker.make("a", SamplingParams(bad_words=["dog"]), index=0).request.bad_words_ids
    texts = {maker.tokenizer.decode(word) for word in ids}
    assert texts == {"dog", " dog"}


@pytest.mark.parametrize(
    "prompt_or_options",
    ["text", {"stop": "x"}, {"bad_words": ["x"]}],
    ids=["text", "stop", "words"],
)
def test_without_a_tokenizer_only_ids_are_served(prompt_or_options: Any) -> None:
    maker = RequestMaker(vocab_size=10, max_model_len=8, tokenizer=None)
    assert maker.make([1, 2], SamplingParams(), index=0).request.prompt_ids == (1, 2)
    is_text = isinstance(prompt_or_options, str)
    prompt = prompt_or_options if is_text else [1]
    sampling = SamplingParams() if is_text else SamplingParams(**prompt_or_options)
    with pytest.raises(RequestError, match="needs a tokenizer"):
        maker.make(prompt, sampling, index=0)


def test_chat_prompt_adds_no_second_start_token(shared_data: Path) -> None:
    tokenizer = load_tokenizer(shared_data / "models" / "stories260k")
    assert tokenizer is not None
    template = ChatTemplate("{{ bos_token }}{{ messages[0].content }}", tokenizer.special_tokens)
    maker = RequestMaker(
        vocab_size=512, max_model_len=99, tokenizer=tokenizer, chat_template=template
    )
    prompt = maker.chat_prompt([{"role": "user", "content": "Once"}])
    assert list(prompt["prompt_token_ids"]).count(1) == 1


def test_chat_without_a_template_says_how_to_pass_one(maker: RequestMaker) -> None:
    with pytest.raises(RequestError, match=r"no chat template .*pass one as chat_template"):
        maker.chat_prompt([{"role": "user", "content": "Hi"}])


def test_content_parts_are_joined() -> None:
    parts = [{"type": "text", "text": "a"}, {"type": "text", "text": "b"}]
    assert read_messages([{"role": "user", "content": parts}])[0]["content"] == "a\nb"


@pytest.mark.parametrize(
    ("messages", "says"),
    [
        ([], "list of messages"),
        ("hi", "list of messages"),
        ([{"content": "x"}], r"messages\[0\] has no role"),
        ([{"role": "user"}], r"messages\[0\].content is of type NoneType"),
        ([{"role": "user", "content": 5}], r"messages\[0\].content is of type int"),
        (
            [{"role": "user", "content": [{"type": "image_url", "image_url": {}}]}],
            "part of type 'image_url'",
        ),
    ],
)
def test_bad_messages(messages: Any, says: str) -> None:
    with pytest.raises(RequestError, match=says):
        read_messages(messages)
