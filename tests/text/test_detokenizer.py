"""Pieces joined are the whole text, for both kinds of vocabulary and any tokens."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import AddedToken
from tokenizers import Tokenizer as RawTokenizer

from moe_serve.text.detokenizer import (
    ByteFallbackDetokenizer,
    ByteLevelDetokenizer,
    WindowDetokenizer,
    decode_complete,
    make_detokenizer,
)
from moe_serve.text.tokenizer import FastBackend, Tokenizer, load_tokenizer

ROOT = Path(__file__).resolve().parents[2]
EMBEDDED = ROOT / "moe_serve" / "assets" / "demo-moe"
TEXTS = (
    "Hello there, world!  Two  spaces,\n\ttabs and 12,345.67",
    "\N{GRINNING FACE}\N{ZERO WIDTH JOINER}\U0001f468\u200d\U0001f469\u200d\U0001f467 family",
    "\u4f60\u597d\uff0c\u4e16\u754c\u3002\u65e5\u672c\u8a9e",
    "e\u0301 o\u0308 combining, \u05e9\u05dc\u05d5\u05dd",
    " leading space",
)


def joined(
    tokenizer: Tokenizer, token_ids: Sequence[int], prompt: Sequence[int] = (), skip: bool = True
) -> str:
    detokenizer = make_detokenizer(tokenizer, prompt, skip)
    return "".join(
        [detokenizer.push([token_id]) for token_id in token_ids] + [detokenizer.finish()]
    )


@pytest.fixture(scope="module")
def byte_level() -> Tokenizer:
    """The embedded model's, with added tokens that spell bytes, spaces and neither."""
    raw = RawTokenizer.from_file(str(EMBEDDED / "tokenizer.json"))
    raw.add_tokens([AddedToken("<t x>"), AddedToken("\u00fcn\u00ef"), AddedToken("\u4f60")])
    raw.add_special_tokens(["<|im_start|>"])
    return Tokenizer(FastBackend(raw))


@pytest.fixture(scope="module")
def byte_fallback(shared_data: Path) -> Tokenizer:
    tokenizer = load_tokenizer(shared_data / "models" / "stories260k")
    assert tokenizer is not None
    return tokenizer


def test_each_vocabulary_gets_its_detokenizer(
    byte_level: Tokenizer, byte_fallback: Tokenizer
) -> None:
    assert isinstance(make_detokenizer(byte_level), ByteLevelDetokenizer)
    assert isinstance(make_detokenizer(byte_fallback), ByteFallbackDetokenizer)


@given(data=st.data(), skip=st.booleans())
@settings(max_examples=200, deadline=None)
def test_any_byte_level_tokens_read_as_when_decoded_at_once(
    byte_level: Tokenizer, data: st.DataObject, skip: bool
) -> None:
    some = st.one_of(
        st.integers(0, byte_level.num_ids - 1),  # any token
        st.integers(0, 300),  # single bytes
        st.integers(byte_level.num_ids - 4, byte_level.num_ids + 3),  # added ones, and none at all
    )
    token_ids = data.draw(st.lists(some, max_size=40))
    assert joined(byte_level, token_ids, skip=skip) == byte_level.decode(token_ids, skip)


@given(text=st.text(max_size=60))
@settings(max_examples=150, deadline=None)
def test_any_text_survives_both_vocabularies(
    byte_level: Tokenizer, byte_fallback: Tokenizer, text: str
) -> None:
    for tokenizer in (byte_level, byte_fallback):
        token_ids = tokenizer.encode(text)
        assert joined(tokenizer, token_ids) == tokenizer.decode(token_ids)


@given(first=st.sampled_from(TEXTS), cut=st.integers(1, 60))
@settings(max_examples=100, deadline=None)
def test_prompt_and_output_join_to_the_whole_text(
    byte_level: Tokenizer, byte_fallback: Tokenizer, first: str, cut: int
) -> None:
    """Wherever a text's tokens are cut in prompt and output, no space or byte is lost."""
    for tokenizer in (byte_level, byte_fallback):
        token_ids = tokenizer.encode(first)
        prompt, output = token_ids[:cut], token_ids[cut:]
        shown = make_detokenizer(tokenizer)
        prompt_text = "".join(shown.push([token_id]) for token_id in prompt)
        assert prompt_text + joined(tokenizer, output, prompt) == tokenizer.decode(token_ids)


@given(data=st.data())
@settings(max_examples=100, deadline=None)
def test_a_character_is_never_split(byte_level: Tokenizer, data: st.DataObject) -> None:
    text = data.draw(
        st.text(st.characters(codec="utf-8", exclude_characters="\ufffd"), max_size=20)
    )
    detokenizer = make_detokenizer(byte_level)
    for token_id in byte_level.encode(text):
        assert "\ufffd" not in detokenizer.push([token_id])
    assert detokenizer.finish() == ""


def test_a_character_of_byte_tokens_comes_when_it_is_complete(byte_fallback: Tokenizer) -> None:
    detokenizer = make_detokenizer(byte_fallback, byte_fallback.encode("x"))
    token_ids = byte_fallback.encode("\n\N{GRINNING FACE}", add_special_tokens=False)[1:]
    pieces = [detokenizer.push([token_id]) for token_id in token_ids]
    assert pieces == ["\n", "", "", "", "\N{GRINNING FACE}"]


def test_a_torn_byte_run_keeps_its_good_characters(byte_fallback: Tokenizer) -> None:
    ids = byte_fallback.encode("\u4f60\u597d", add_special_tokens=False)[1:-1]  # one byte lost
    assert joined(byte_fallback, ids) == "\u4f60\ufffd\ufffd"


def test_first_word_keeps_its_space_after_a_prompt(byte_fallback: Tokenizer) -> None:
    prompt = byte_fallback.encode("Once upon")
    output = byte_fallback.encode("a time", add_special_tokens=False)
    assert joined(byte_fallback, output, prompt) == " a time"
    assert joined(byte_fallback, output, prompt[:1]) == "a time"  # only <s> came before


@pytest.mark.parametrize("text", TEXTS)
def test_window_detokenizer_gives_the_same(
    byte_level: Tokenizer, byte_fallback: Tokenizer, text: str
) -> None:
    for tokenizer in (byte_level, byte_fallback):
        token_ids = tokenizer.encode(text)
        window = WindowDetokenizer(tokenizer, (), True)
        pieces = [window.push([token_id]) for token_id in token_ids]
        assert "".join([*pieces, window.finish()]) == tokenizer.decode(token_ids)


def test_window_stays_small_on_bytes_that_are_no_text(byte_level: Tokenizer) -> None:
    window = WindowDetokenizer(byte_level, (), True)
    for _ in range(200):
        window.push([174])  # a lone lead byte
    assert len(window._window) < 20


@pytest.mark.parametrize(
    ("data", "each", "text", "held"),
    [
        (b"ab", False, "ab", b""),
        (b"a\xf0\x9f", False, "a", b"\xf0\x9f"),
        (b"\xf0\x9fa", False, "\ufffda", b""),
        (b"\xf0\x9fa", True, "\ufffd\ufffda", b""),
        (b"\xff\xe4\xbd", False, "\ufffd", b"\xe4\xbd"),
    ],
)
def test_decode_complete(data: bytes, each: bool, text: str, held: bytes) -> None:
    assert decode_complete(data, marks_each_byte=each) == (text, held)
