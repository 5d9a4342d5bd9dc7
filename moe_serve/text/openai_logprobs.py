"""Logprobs in OpenAI's forms, and the prompt's in vLLM's: which token, how likely, and where.

A token that is a part of a character has no text of its own: it is named by its bytes.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

from moe_serve.text.detokenizer import decode_complete, token_bytes
from moe_serve.text.tokenizer import Tokenizer
from moe_serve.types import TokenLogprobs

# JSON has no infinity: OpenAI's value for a token that cannot be
LEAST_LOGPROB = -9999.0


class TokenNames:
    """What tokens are called in answers, remembered: at most as many as there are tokens."""

    def __init__(self, tokenizer: Tokenizer | None) -> None:
        self.tokenizer = tokenizer
        self._known: dict[int, tuple[str, list[int]]] = {}

    def of(self, token_id: int) -> tuple[str, list[int]]:
        """Return a token's name and its bytes."""
        found = self._known.get(token_id)
        if found is None:
            found = self._known[token_id] = self._made(token_id)
        return found

    def _made(self, token_id: int) -> tuple[str, list[int]]:
        if self.tokenizer is None:
            name = f"token_id:{token_id}"
            return name, list(name.encode())
        data = token_bytes(self.tokenizer, token_id)
        try:
            return data.decode(), list(data)
        except UnicodeDecodeError:
            return "bytes:" + "".join(f"\\x{byte:02x}" for byte in data), list(data)


class CompletionLogprobs:
    """One choice's logprobs of a text completion, as its tokens come.

    text_offset: the characters of the choice's text before each token; a token that is not shown,
    such as an end token, has none. num_top: how many likely tokens are told beside the chosen one.
    """

    def __init__(self, names: TokenNames, num_top: int, *, skips_special: bool) -> None:
        self._names = names
        self._num_top = num_top
        tokenizer = names.tokenizer
        is_hidden = skips_special and tokenizer is not None
        self._hidden = tokenizer.special_ids if is_hidden and tokenizer else frozenset()
        self._marks = tokenizer is not None and tokenizer.decoder_kind == "byte_fallback"
        self._offset = 0
        self._held = b""

    def of_prompt(
        self, token_ids: Sequence[int], entries: Sequence[TokenLogprobs | None]
    ) -> dict[str, list[Any]]:
        """Return the lists of an echoed prompt, of which nothing is known of the first token."""
        told = _no_logprobs()
        for token_id, entry in zip(token_ids, entries, strict=True):
            self._add(told, token_id, entry)
        return told

    def of_output(self, entries: Iterable[TokenLogprobs]) -> dict[str, list[Any]]:
        """Return the lists of an output's next tokens."""
        told = _no_logprobs()
        for entry in entries:
            self._add(told, entry.token_id, entry)
        return told

    def _add(self, told: dict[str, list[Any]], token_id: int, entry: TokenLogprobs | None) -> None:
        name, data = self._names.of(token_id)
        told["tokens"].append(name)
        told["text_offset"].append(self._offset)
        if entry is None:
            told["token_logprobs"].append(None)
            told["top_logprobs"].append(None)
        else:
            logprob = max(entry.logprob, LEAST_LOGPROB)
            top = {
                self._names.of(other)[0]: max(value, LEAST_LOGPROB)
                for other, value in entry.top[: self._num_top]
            }
            told["token_logprobs"].append(logprob)
            told["top_logprobs"].append({name: logprob, **top})
        if token_id not in self._hidden:
            text, self._held = decode_complete(
                self._held + bytes(data), marks_each_byte=self._marks
            )
            self._offset += len(text)


def joined(parts: Iterable[dict[str, list[Any]]]) -> dict[str, list[Any]]:
    """Put lists of completion logprobs that follow one another together."""
    whole = _no_logprobs()
    for part in parts:
        for name, values in part.items():
            whole[name] += values
    return whole


def chat_logprobs(
    entries: Iterable[TokenLogprobs], names: TokenNames, num_top: int
) -> list[dict[str, Any]]:
    """Return a chat completion's list for some tokens."""
    return [
        {
            **_named(names, entry.token_id, entry.logprob),
            "top_logprobs": [_named(names, *other) for other in entry.top[:num_top]],
        }
        for entry in entries
    ]


def prompt_logprobs(
    entries: Sequence[TokenLogprobs | None], names: TokenNames, num_top: int
) -> list[dict[str, Any] | None]:
    """Return vLLM's form: for each prompt token an object of token id to logprob, rank and text."""
    return [None if entry is None else _ranked(entry, names, num_top) for entry in entries]


def _ranked(entry: TokenLogprobs, names: TokenNames, num_top: int) -> dict[str, Any]:
    def told(token_id: int, logprob: float, rank: int) -> dict[str, Any]:
        value = max(logprob, LEAST_LOGPROB)
        return {"logprob": value, "rank": rank, "decoded_token": names.of(token_id)[0]}

    found = {str(entry.token_id): told(entry.token_id, entry.logprob, entry.rank)}
    for place, (token_id, logprob) in enumerate(entry.top[:num_top], 1):
        found.setdefault(str(token_id), told(token_id, logprob, place))
    return found


def _named(names: TokenNames, token_id: int, logprob: float) -> dict[str, Any]:
    name, data = names.of(token_id)
    return {"token": name, "logprob": max(logprob, LEAST_LOGPROB), "bytes": data}


def _no_logprobs() -> dict[str, list[Any]]:
    return {"tokens": [], "token_logprobs": [], "top_logprobs": [], "text_offset": []}
