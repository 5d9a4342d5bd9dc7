"""Token by token to text: never half a character, and never a character twice.

The pieces of an output joined are the text of all its tokens, read as a continuation of the prompt:
a sentencepiece model's first word keeps its space. Each token costs the same, however long the
output. Nothing here knows of stop strings (`stop_strings.py`).
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import cache
from typing import Protocol

from moe_serve.text.tokenizer import Tokenizer

REPLACEMENT = "\ufffd"
MAX_HELD_TOKENS = 8  # of a decoder of unknown form: a character has at most 4 bytes
CONTEXT_TOKENS = 8  # of the prompt, that may change how an output's first tokens read


class Detokenizer(Protocol):
    """Turns one output's tokens into text."""

    def push(self, token_ids: Sequence[int]) -> str:
        """Return the text that is certain after these: "" while a character is not complete."""

    def finish(self) -> str:
        """Return what was held back: U+FFFD for bytes that never became a character."""


def make_detokenizer(
    tokenizer: Tokenizer, prompt_ids: Sequence[int] = (), skip_special_tokens: bool = True
) -> Detokenizer:
    """Return a detokenizer for an output that continues `prompt_ids`."""
    if tokenizer.decoder_kind == "byte_level":
        return ByteLevelDetokenizer(tokenizer, prompt_ids, skip_special_tokens)
    if tokenizer.decoder_kind == "byte_fallback":
        return ByteFallbackDetokenizer(tokenizer, prompt_ids, skip_special_tokens)
    return WindowDetokenizer(tokenizer, prompt_ids, skip_special_tokens)


class ByteLevelDetokenizer:
    """For vocabularies whose every character stands for a byte (GPT-2, Llama 3, Qwen).

    The text equals the whole decoded at once, also where the bytes are not UTF-8.
    """

    def __init__(
        self, tokenizer: Tokenizer, prompt_ids: Sequence[int], skip_special_tokens: bool
    ) -> None:
        self._tokenizer = tokenizer
        self._skipped = tokenizer.special_ids if skip_special_tokens else frozenset()
        self._known = tokenizer.known_bytes
        self._held = b""
        self.push(prompt_ids[-CONTEXT_TOKENS:])

    def _bytes(self, token_id: int) -> bytes:
        data = self._known.get(token_id)
        if data is None:
            data = _byte_level_bytes(self._tokenizer.token(token_id) or "")
            if 0 <= token_id < self._tokenizer.num_ids:
                self._known[token_id] = data
        return data

    def push(self, token_ids: Sequence[int]) -> str:
        skipped, bytes_of = self._skipped, self._bytes
        new = [bytes_of(token_id) for token_id in token_ids if token_id not in skipped]
        text, self._held = decode_complete(self._held + b"".join(new), marks_each_byte=False)
        return text

    def finish(self) -> str:
        held, self._held = self._held, b""
        return held.decode(errors="replace")


class ByteFallbackDetokenizer:
    """For sentencepiece vocabularies, with tokens <0x00> to <0xFF> for what has no piece.

    A character made of such tokens is given as soon as it is complete. Where a run of them is not
    UTF-8 each wrong byte gives one U+FFFD; decoding the whole at once would give up the right ones
    of that run as well.
    """

    def __init__(
        self, tokenizer: Tokenizer, prompt_ids: Sequence[int], skip_special_tokens: bool
    ) -> None:
        self._tokenizer = tokenizer
        self._skipped = tokenizer.special_ids if skip_special_tokens else frozenset()
        self._held = b""
        # the whole prompt may be special tokens, after which the text still begins
        self._is_start = tokenizer.strips_first_space and all(
            token_id in self._skipped for token_id in prompt_ids
        )
        is_start = self._is_start
        self.push(prompt_ids[-CONTEXT_TOKENS:])
        self._is_start = is_start

    def push(self, token_ids: Sequence[int]) -> str:
        return "".join([self._push(token_id) for token_id in token_ids])

    def _push(self, token_id: int) -> str:
        token = None if token_id in self._skipped else self._tokenizer.token(token_id)
        if token is None:
            return ""
        byte = _byte_token(token)
        if byte is not None:
            text, self._held = decode_complete(self._held + byte, marks_each_byte=True)
        else:
            text = self.finish() + token.replace("\u2581", " ")
        if self._is_start and text:
            self._is_start = False
            return text.removeprefix(" ")
        return text

    def finish(self) -> str:
        held, self._held = self._held, b""
        return REPLACEMENT * len(held)


class WindowDetokenizer:
    """For decoders of unknown form: decode the last few tokens, give what they add.

    Exact where what a token reads as depends only on its neighbours.
    """

    def __init__(
        self, tokenizer: Tokenizer, prompt_ids: Sequence[int], skip_special_tokens: bool
    ) -> None:
        self._tokenizer = tokenizer
        self._skipped = tokenizer.special_ids if skip_special_tokens else frozenset()
        context = [t for t in prompt_ids[-CONTEXT_TOKENS:] if t not in self._skipped]
        self._window = context  # tokens whose text was given, then those that are held back
        self._num_given = len(context)

    def push(self, token_ids: Sequence[int]) -> str:
        return "".join([self._push(token_id) for token_id in token_ids])

    def _push(self, token_id: int) -> str:
        if token_id in self._skipped:
            return ""
        self._window.append(token_id)
        given, text = self._texts()
        num_held = len(self._window) - self._num_given
        if text.endswith(REPLACEMENT) and num_held < MAX_HELD_TOKENS:
            return ""
        if len(text) > len(given):  # tokens without text stay: the next one may need them before it
            self._window = self._window[self._num_given :]
        self._num_given = len(self._window)
        return text[len(given) :]

    def finish(self) -> str:
        given, text = self._texts()
        self._num_given = len(self._window)
        return text[len(given) :]

    def _texts(self) -> tuple[str, str]:
        decode = self._tokenizer.decode
        given = self._window[: self._num_given]
        return decode(given, skip_special_tokens=False), decode(
            self._window, skip_special_tokens=False
        )


def token_bytes(tokenizer: Tokenizer, token_id: int) -> bytes:
    """Return what one token stands for, maybe a part of a character; b"" for an id without one.

    A sentencepiece token keeps its space, as within a text.
    """
    token = tokenizer.token(token_id) or ""
    if tokenizer.decoder_kind == "byte_level":
        return _byte_level_bytes(token)
    if tokenizer.decoder_kind == "byte_fallback":
        byte = _byte_token(token)
        return token.replace("\u2581", " ").encode() if byte is None else byte
    return tokenizer.decode([token_id], skip_special_tokens=False).encode()


def decode_complete(data: bytes, *, marks_each_byte: bool) -> tuple[str, bytes]:
    """Return the text of `data` and the bytes at its end that may begin a character.

    Bytes that cannot be UTF-8 become U+FFFD: one for each, or one for each longest wrong start of
    a character (as Unicode recommends and `bytes.decode` does).
    """
    pieces = []
    while True:
        try:
            pieces.append(data.decode())
            return "".join(pieces), b""
        except UnicodeDecodeError as error:
            pieces.append(data[: error.start].decode())
            if error.reason == "unexpected end of data":
                return "".join(pieces), data[error.start :]
            pieces.append(REPLACEMENT * (error.end - error.start if marks_each_byte else 1))
            data = data[error.end :]


def _byte_level_bytes(token: str) -> bytes:
    byte_of = _byte_of_character()
    try:
        return bytes([byte_of[character] for character in token])
    except KeyError:  # an added token stands for itself when a character of it is no byte
        return token.encode()


def _byte_token(token: str) -> bytes | None:
    if len(token) != 6 or not token.startswith("<0x") or token[5] != ">":
        return None
    try:
        return bytes([int(token[3:5], 16)])
    except ValueError:
        return None


@cache
def _byte_of_character() -> dict[str, int]:
    """Return which byte each character of a byte-level vocabulary stands for.

    Printable characters of Latin-1 stand for themselves; the other bytes, in order, for the
    characters from U+0100.
    """
    printable = {*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)}
    others = [byte for byte in range(256) if byte not in printable]
    table = {chr(byte): byte for byte in printable}
    table.update({chr(0x100 + index): byte for index, byte in enumerate(others)})
    return table
