"""Text to token ids and back, for whole texts; `detokenizer.py` does it token by token.

A tokenizer.json is read by the `tokenizers` package. Other forms (tokenizer.model, vocab.json and
merges.txt) go through transformers, which takes seconds to import and is therefore imported only
then. Code that comes with a checkpoint is never run. Nothing here knows what a request is.
"""

from __future__ import annotations

import json
import os
from collections.abc import Sequence
from functools import cached_property
from pathlib import Path
from typing import Any, Literal, Protocol

import tokenizers

from moe_serve.errors import CheckpointError
from moe_serve.models import strict_json

# texts come one by one: threads for several would have nothing to do, and complain of each fork
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")

TOKENIZER_FILE = "tokenizer.json"
SETTINGS_FILE = "tokenizer_config.json"
SPECIAL_TOKENS_FILE = "special_tokens_map.json"
OTHER_FILES = ("tokenizer.model", "vocab.json", "vocab.txt", "spiece.model", "tekken.json")

DecoderKind = Literal["byte_level", "byte_fallback", "window"]


class Backend(Protocol):
    """What turns text into ids: the `tokenizers` package, or a tokenizer of transformers."""

    special_ids: frozenset[int]
    num_ids: int
    decoder: dict[str, Any] | None

    def encode(self, text: str, add_special_tokens: bool) -> list[int]: ...
    def decode(self, token_ids: Sequence[int]) -> str: ...
    def token(self, token_id: int) -> str | None: ...
    def token_id(self, token: str) -> int | None: ...


class FastBackend:
    """A tokenizer.json. decoder is that file's field of this name; num_ids the highest id + 1."""

    def __init__(self, tokenizer: tokenizers.Tokenizer) -> None:
        tokenizer.no_truncation()
        tokenizer.no_padding()
        self._tokenizer = tokenizer
        added = tokenizer.get_added_tokens_decoder()
        self.special_ids = frozenset(token_id for token_id, token in added.items() if token.special)
        self.num_ids = max(tokenizer.get_vocab(with_added_tokens=True).values(), default=-1) + 1
        self.decoder: dict[str, Any] | None = json.loads(tokenizer.to_str()).get("decoder")

    def encode(self, text: str, add_special_tokens: bool) -> list[int]:
        # `encode` would keep the interpreter's lock, for a long text for tenths of a second
        encoded = self._tokenizer.encode_batch_fast([text], add_special_tokens=add_special_tokens)
        return list(encoded[0].ids)

    def decode(self, token_ids: Sequence[int]) -> str:
        return str(self._tokenizer.decode(list(token_ids), skip_special_tokens=False))

    def token(self, token_id: int) -> str | None:
        return self._tokenizer.id_to_token(token_id)

    def token_id(self, token: str) -> int | None:
        return self._tokenizer.token_to_id(token)


class SlowBackend:
    """A tokenizer of transformers that is written in Python: its decoding has no known form."""

    decoder: dict[str, Any] | None = None

    def __init__(self, tokenizer: Any) -> None:
        self._tokenizer = tokenizer
        self.special_ids = frozenset(tokenizer.all_special_ids)
        self.num_ids = max(tokenizer.get_vocab().values(), default=-1) + 1

    def encode(self, text: str, add_special_tokens: bool) -> list[int]:
        return list(self._tokenizer.encode(text, add_special_tokens=add_special_tokens))

    def decode(self, token_ids: Sequence[int]) -> str:
        return str(
            self._tokenizer.decode(
                list(token_ids), skip_special_tokens=False, clean_up_tokenization_spaces=False
            )
        )

    def token(self, token_id: int) -> str | None:
        token = self._tokenizer.convert_ids_to_tokens(token_id)
        return token if isinstance(token, str) else None

    def token_id(self, token: str) -> int | None:
        found = self._tokenizer.get_vocab().get(token)
        return found if isinstance(found, int) else None


class Tokenizer:
    """Encode and decode, with the settings of tokenizer_config.json.

    special_tokens: "bos_token", "eos_token" and their like to their text, as chat templates want
    them. bos_id and eos_id are None where the folder names none. num_ids is the highest id + 1.
    known_bytes: what tokens stand for, as far as detokenizers have met them.
    """

    def __init__(self, backend: Backend, settings: dict[str, Any] | None = None) -> None:
        settings = settings or {}
        self._backend = backend
        self.num_ids = backend.num_ids
        self.special_ids = backend.special_ids
        self.known_bytes: dict[int, bytes] = {}
        self.special_tokens = _special_tokens(settings)
        self.bos_id = self._id_of("bos_token")
        self.eos_id = self._id_of("eos_token")
        self._add_bos: bool | None = settings.get("add_bos_token")
        self._add_eos: bool | None = settings.get("add_eos_token")

    def _id_of(self, name: str) -> int | None:
        text = self.special_tokens.get(name)
        return None if text is None else self._backend.token_id(text)

    def encode(self, text: str, add_special_tokens: bool = True) -> list[int]:
        """Return the ids of `text`, with the model's own start and end tokens if asked.

        Where tokenizer_config.json says add_bos_token or add_eos_token, it decides.
        """
        token_ids = self._backend.encode(text, add_special_tokens)
        if not add_special_tokens:
            return token_ids
        if self._add_bos is not None and self.bos_id is not None:
            begins = token_ids[:1] == [self.bos_id]
            if self._add_bos and not begins:
                token_ids = [self.bos_id, *token_ids]
            elif not self._add_bos and begins:
                token_ids = token_ids[1:]
        if self._add_eos and self.eos_id is not None and token_ids[-1:] != [self.eos_id]:
            token_ids = [*token_ids, self.eos_id]
        return token_ids

    def decode(self, token_ids: Sequence[int], skip_special_tokens: bool = True) -> str:
        """Return the text of `token_ids`; ids that are no token give nothing."""
        kept = self.visible(token_ids) if skip_special_tokens else token_ids
        return self._backend.decode(kept)

    def visible(self, token_ids: Sequence[int]) -> list[int]:
        """Return `token_ids` without the special ones."""
        return [token_id for token_id in token_ids if token_id not in self.special_ids]

    def token(self, token_id: int) -> str | None:
        """Return the vocabulary's own spelling of a token, or None for an id that has none."""
        return self._backend.token(token_id)

    @cached_property
    def decoder_kind(self) -> DecoderKind:
        """How tokens become text: bytes in disguise, pieces with byte tokens, or unknown."""
        decoder = self._backend.decoder
        if decoder is None:
            return "window"
        if decoder["type"] == "ByteLevel":
            return "byte_level"
        return "window" if _byte_fallback_form(decoder) is None else "byte_fallback"

    @cached_property
    def strips_first_space(self) -> bool:
        """Whether a byte_fallback decoder drops one space at the start of a text."""
        return self._backend.decoder is not None and bool(
            _byte_fallback_form(self._backend.decoder)
        )

    def check_fits(self, vocab_size: int) -> None:
        """Raise CheckpointError if there are ids that a model of `vocab_size` rows lacks."""
        if self.num_ids > vocab_size:
            raise CheckpointError(
                f"the tokenizer has ids up to {self.num_ids - 1}, but the model's vocab_size is "
                f"{vocab_size}: it belongs to another model; name the right one with tokenizer"
            )


def load_tokenizer(folder: Path) -> Tokenizer | None:
    """Read the tokenizer in `folder`; None if there is none. A broken one is a CheckpointError."""
    settings = _read_settings(folder)
    path = folder / TOKENIZER_FILE
    for name in (TOKENIZER_FILE, *OTHER_FILES):
        # reading a pipe would wait for ever; a link that leads nowhere is told of below
        if (folder / name).exists() and not (folder / name).is_file():
            raise CheckpointError(f"{folder / name}: not a regular file")
    if os.path.lexists(path):
        try:
            return Tokenizer(FastBackend(tokenizers.Tokenizer.from_file(str(path))), settings)
        except Exception as error:  # the package raises bare Exception, whatever is wrong
            raise CheckpointError(f"{path}: not a tokenizer ({error})") from error
    if any(os.path.lexists(folder / name) for name in OTHER_FILES):
        return Tokenizer(_transformers_backend(folder), settings)
    return None


def _transformers_backend(folder: Path) -> Backend:
    from transformers import AutoTokenizer  # takes seconds, and few checkpoints need it

    try:
        found: Any = AutoTokenizer.from_pretrained(  # type: ignore[no-untyped-call,unused-ignore]
            str(folder), trust_remote_code=False, local_files_only=True
        )
    except (OSError, ValueError, ImportError, KeyError, TypeError, AttributeError) as error:
        raise CheckpointError(
            f"{folder}: transformers cannot read this tokenizer ({error}); "
            f"a {TOKENIZER_FILE} in the folder is read without it"
        ) from error
    fast = getattr(found, "backend_tokenizer", None)
    return SlowBackend(found) if fast is None else FastBackend(fast)


def _read_settings(folder: Path) -> dict[str, Any]:
    settings: dict[str, Any] = {}
    for name in (SPECIAL_TOKENS_FILE, SETTINGS_FILE):
        if os.path.lexists(folder / name):
            settings.update(strict_json.read_object(folder / name))
    for name in ("add_bos_token", "add_eos_token"):
        if not isinstance(settings.get(name), bool | None):
            raise CheckpointError(
                f"{folder / SETTINGS_FILE}: {name} is {strict_json.shown(settings[name])}; "
                "it must be true or false"
            )
    return settings


def _special_tokens(settings: dict[str, Any]) -> dict[str, str]:
    """Return the named special tokens; each is a string, or in older files {"content": string}."""
    found = {}
    for name, value in settings.items():
        text = value.get("content") if isinstance(value, dict) else value
        if name.endswith("_token") and isinstance(text, str):
            found[name] = text
    return found


def _byte_fallback_form(decoder: dict[str, Any]) -> bool | None:
    """Return whether a sentencepiece decoder strips the first space; None if it is no such one."""
    parts = decoder.get("decoders", [])
    types = [part["type"] for part in parts]
    if types not in (
        ["Replace", "ByteFallback", "Fuse"],
        ["Replace", "ByteFallback", "Fuse", "Strip"],
    ):
        return None
    if parts[0]["pattern"] != {"String": "\u2581"} or parts[0]["content"] != " ":
        return None
    if len(parts) == 3:
        return False
    strip = parts[3]
    return True if (strip["content"], strip["start"], strip["stop"]) == (" ", 1, 0) else None
