"""Tokens are named by their text, or their bytes; offsets are characters of the text shown."""

from __future__ import annotations

import math
from pathlib import Path

from moe_serve.text.openai_logprobs import (
    LEAST_LOGPROB,
    CompletionLogprobs,
    TokenNames,
    chat_logprobs,
)
from moe_serve.text.tokenizer import load_tokenizer
from moe_serve.types import TokenLogprobs

DEMO = Path(__file__).resolve().parents[2] / "moe_serve" / "assets" / "demo-moe"
TOKENIZER = load_tokenizer(DEMO)
NAMES = TokenNames(TOKENIZER)
TEXT = "na\u00efve \U0001f600\u4f60 end"


def entries(ids: list[int]) -> list[TokenLogprobs]:
    return [TokenLogprobs(token_id, -1.0, 1, ((token_id, -1.0), (5, -2.0))) for token_id in ids]


def test_bytes_joined_are_the_text() -> None:
    assert TOKENIZER is not None
    ids = TOKENIZER.encode(TEXT)
    told = chat_logprobs(entries(ids), NAMES, 2)
    assert bytes(byte for one in told for byte in one["bytes"]).decode() == TEXT
    parts = [one for one in told if one["token"].startswith("bytes:")]
    assert parts  # a character of several tokens
    for one in parts:
        assert one["token"] == "bytes:" + "".join(f"\\x{byte:02x}" for byte in one["bytes"])
    names = {one["token"] for one in told}
    assert len(names) == len({tuple(one["bytes"]) for one in told})


def test_offsets_are_where_a_token_begins() -> None:
    assert TOKENIZER is not None
    ids = TOKENIZER.encode(TEXT)
    writer = CompletionLogprobs(NAMES, 1, skips_special=True)
    told = writer.of_output(entries(ids))
    for place, offset in enumerate(told["text_offset"]):
        before = TOKENIZER.decode(ids[:place]).rstrip("\ufffd")
        assert TEXT[:offset] == before


def test_pieces_give_what_the_whole_gives() -> None:
    assert TOKENIZER is not None
    found = entries(TOKENIZER.encode(TEXT))
    whole = CompletionLogprobs(NAMES, 2, skips_special=True).of_output(found)
    writer = CompletionLogprobs(NAMES, 2, skips_special=True)
    pieces = [writer.of_output([entry]) for entry in found]
    for name, values in whole.items():
        assert [value for piece in pieces for value in piece[name]] == values


def test_a_hidden_end_token_takes_no_place() -> None:
    assert TOKENIZER is not None
    assert TOKENIZER.eos_id is not None
    ids = [41, TOKENIZER.eos_id, 74]
    hidden = CompletionLogprobs(NAMES, 0, skips_special=True).of_output(entries(ids))
    assert hidden["text_offset"] == [0, 1, 1]
    shown = CompletionLogprobs(NAMES, 0, skips_special=False).of_output(entries(ids))
    assert shown["text_offset"] == [0, 1, 1 + len(shown["tokens"][1])]


def test_no_infinity_is_told() -> None:
    entry = TokenLogprobs(41, -math.inf, 1, ((41, -math.inf), (74, -math.inf)))
    (told,) = chat_logprobs([entry], NAMES, 2)
    assert told["logprob"] == LEAST_LOGPROB
    assert [one["logprob"] for one in told["top_logprobs"]] == [LEAST_LOGPROB] * 2


def test_without_a_tokenizer_ids_are_names() -> None:
    assert TokenNames(None).of(7) == ("token_id:7", list(b"token_id:7"))
