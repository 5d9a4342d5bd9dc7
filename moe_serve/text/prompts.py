"""What a caller sends, made into `Request`s: tokenised, checked, with every choice made.

All checks that need no engine are here, so that a bad prompt is refused before any work.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, NotRequired, TypedDict

from moe_serve.errors import RequestError, nearest
from moe_serve.text.chat_template import ChatTemplate
from moe_serve.text.tokenizer import Tokenizer
from moe_serve.types import Request, SamplingParams, checked_integer

# whose spellings are remembered
MOST_BAD_WORDS = 4096
# the end of a text in what a template makes of it: private characters, in no text that means them
_MARK = "\uf8f0\uf8f1\uf8f2"


class TextPrompt(TypedDict):
    """A prompt as text. Only prompts of the same cache_salt share a prefix cache."""

    prompt: str
    cache_salt: NotRequired[str]


class TokensPrompt(TypedDict):
    """A prompt as token ids. Only prompts of the same cache_salt share a prefix cache."""

    prompt_token_ids: Sequence[int]
    cache_salt: NotRequired[str]


Prompt = str | Sequence[int] | TextPrompt | TokensPrompt
Message = Mapping[str, Any]


@dataclass(frozen=True, kw_only=True, slots=True)
class PreparedRequest:
    """A request, and the text it was made of (None: it came as token ids)."""

    request: Request
    prompt: str | None


@dataclass(frozen=True, kw_only=True)
class RequestMaker:
    """Makes requests for one model.

    vocab_size and max_model_len are the model's; tokenizer and chat_template may be missing, which
    only refuses what needs them. base_seed: of requests that bring no seed.
    """

    vocab_size: int
    max_model_len: int
    tokenizer: Tokenizer | None
    eos_token_ids: frozenset[int] = frozenset()
    chat_template: ChatTemplate | None = None
    base_seed: int = 0
    _bad_words: dict[str, tuple[tuple[int, ...], ...]] = field(default_factory=dict, repr=False)

    def make(
        self,
        prompt: Prompt,
        sampling: SamplingParams,
        *,
        index: int,
        priority: int = 0,
        request_id: str | None = None,
        seed: int | None = None,
    ) -> PreparedRequest:
        """Check and tokenise one prompt; `index` is what its id and its seed are made of.

        request_id, seed: in place of those; seed also in place of the one in `sampling`. Its
        arrival is for whoever hands it to the engine to say.
        """
        text, token_ids = self._tokens(prompt)
        self._check_prompt(token_ids)
        self._check_sampling(sampling)
        if seed is None:
            seed = derived_seed(self.base_seed, index) if sampling.seed is None else sampling.seed
        request = Request(
            request_id=f"request-{index}" if request_id is None else request_id,
            prompt_ids=tuple(token_ids),
            sampling=sampling,
            seed=seed,
            eos_token_ids=self.eos_token_ids,
            bad_words_ids=self._bad_words_ids(sampling.bad_words),
            priority=checked_integer("priority", priority, -(2**63), 2**63 - 1),
            cache_salt=prompt.get("cache_salt", "") if isinstance(prompt, Mapping) else "",
        )
        return PreparedRequest(request=request, prompt=text)

    def chat_prompt(
        self,
        messages: Sequence[Message],
        *,
        cache_salt: str | None = None,
        add_generation_prompt: bool = True,
        continue_final_message: bool = False,
        variables: Mapping[str, Any] | None = None,
        add_special_tokens: bool = False,
    ) -> TokensPrompt:
        """Return the prompt that the model's chat template makes of a conversation.

        continue_final_message: end with the last message's text, for the model to go on with, in
        place of the start of an answer. variables: for the template, of those it reads.
        """
        conversation = read_messages(messages)
        if self.chat_template is None:
            raise RequestError(
                "the model has no chat template (chat_template in tokenizer_config.json, or "
                "chat_template.jinja): pass one as chat_template, or send plain text to generate"
            )
        self._check_variables(variables or {})
        text = self.chat_template.render(
            _marked(conversation) if continue_final_message else conversation,
            add_generation_prompt=add_generation_prompt and not continue_final_message,
            variables=variables,
        )
        if continue_final_message:
            text = _until_mark(text)
        prompt: TokensPrompt = {"prompt_token_ids": self.encode(text, add_special_tokens)}
        if cache_salt is not None:
            prompt["cache_salt"] = cache_salt
        return prompt

    def _check_variables(self, variables: Mapping[str, Any]) -> None:
        assert self.chat_template is not None
        known = self.chat_template.variables
        for name in variables:
            if name not in known:
                raise RequestError(
                    f"chat_template_kwargs has {name!r:.80}, which the chat template does not read"
                    f"{nearest(name, known)} (it reads: {', '.join(sorted(known)) or 'none'})"
                )

    def _tokens(self, prompt: Prompt) -> tuple[str | None, Sequence[int]]:
        if isinstance(prompt, Mapping):
            named = set(prompt) - {"cache_salt"}
            if len(named) != 1 or not named <= {"prompt", "prompt_token_ids"}:
                raise RequestError(
                    f"a prompt with the keys {sorted(map(str, prompt))}; it must have exactly one "
                    "of 'prompt' or 'prompt_token_ids', and may have 'cache_salt'"
                )
            (key,) = named
            _check_salt(prompt)
            value: object = prompt[key]  # type: ignore[literal-required]
            if isinstance(value, str) != (key == "prompt"):
                wanted = "text" if key == "prompt" else "a list of token ids"
                raise RequestError(f"{key} is of type {type(value).__name__}; it must be {wanted}")
        else:
            value = prompt
        if isinstance(value, str):
            return value, self.encode(value)
        if not isinstance(value, Sequence) or isinstance(value, bytes | bytearray):
            raise RequestError(
                f"a prompt of type {type(value).__name__}; it must be text or a list of token ids"
            )
        return None, value

    def encode(self, text: str, add_special_tokens: bool = True) -> list[int]:
        """Return the token ids of a prompt; RequestError for what can be no prompt."""
        if self.tokenizer is None:
            raise RequestError(_no_tokenizer("a prompt as text"))
        if not text:
            raise RequestError("the prompt is empty; give some text")
        _check_unicode("prompt", text)
        # no prompt of the context's length needs more characters than this: refused before work
        limit = 256 * self.max_model_len
        if len(text) > limit:
            raise RequestError(
                f"the prompt has {len(text)} characters; with a context of {self.max_model_len} "
                f"tokens at most {limit} are read: shorten it"
            )
        return self.tokenizer.encode(text, add_special_tokens)

    def _check_prompt(self, token_ids: Sequence[int]) -> None:
        """Refuse, in the words of the engine, what it would refuse: here before any prompt runs."""
        if len(token_ids) == 0:
            raise RequestError("the prompt is empty; give a token")
        if len(token_ids) >= self.max_model_len:
            raise RequestError(
                f"the prompt has {len(token_ids)} tokens, and prompt and output together may have "
                f"{self.max_model_len} (max_model_len); shorten the prompt to at most "
                f"{self.max_model_len - 1}"
            )
        for token_id in token_ids:
            self._check_id("prompt", token_id)

    def _check_sampling(self, sampling: SamplingParams) -> None:
        if not isinstance(sampling, SamplingParams):
            raise RequestError(
                f"sampling_params is of type {type(sampling).__name__}; it must be SamplingParams"
            )
        for name in ("stop_token_ids", "allowed_token_ids", "logit_bias"):
            for token_id in getattr(sampling, name) or ():
                self._check_id(name, token_id)
        if self.tokenizer is None:
            for name in ("stop", "bad_words"):
                if getattr(sampling, name):
                    raise RequestError(_no_tokenizer(name))

    def _check_id(self, name: str, token_id: object) -> None:
        if isinstance(token_id, bool) or not isinstance(token_id, int):
            raise RequestError(f"{name} holds {token_id!r}; token ids are integers")
        if not 0 <= token_id < self.vocab_size:
            raise RequestError(
                f"{name} holds token id {token_id}; the model has ids 0 to {self.vocab_size - 1}"
            )

    def _bad_words_ids(self, words: Iterable[str]) -> tuple[tuple[int, ...], ...]:
        found: list[tuple[int, ...]] = []
        for word in words:
            spellings = self._bad_words.get(word)
            if spellings is None:
                spellings = self._spellings(word)
                if len(self._bad_words) < MOST_BAD_WORDS:  # strangers choose them
                    self._bad_words[word] = spellings
            found.extend(spellings)
        return tuple(found)

    def _spellings(self, word: str) -> tuple[tuple[int, ...], ...]:
        """Return the token sequences of a word at the start of a text and after a space."""
        assert self.tokenizer is not None
        _check_unicode("bad_words", word)
        spellings = (
            self.tokenizer.encode(text, add_special_tokens=False) for text in (word, f" {word}")
        )
        return tuple(dict.fromkeys(tuple(ids) for ids in spellings if ids))


def _check_salt(prompt: Mapping[str, Any]) -> None:
    salt = prompt.get("cache_salt", "-")
    if not isinstance(salt, str) or not salt:
        raise RequestError(f"cache_salt is {salt!r:.80}; it must be text that is not empty")
    _check_unicode("cache_salt", salt)


def _check_unicode(name: str, text: str) -> None:
    """Refuse half a surrogate pair, which JSON and a command line can hold and UTF-8 cannot."""
    try:
        text.encode()
    except UnicodeEncodeError as error:
        raise RequestError(
            f"{name} has a lone surrogate {text[error.start]!r} at character {error.start}; "
            "it must be valid Unicode"
        ) from error


def read_messages(messages: object) -> list[dict[str, Any]]:
    """Return a conversation as chat templates take it: a role each, and content as one text.

    Content may be a list of {"type": "text", "text": ...}, which are joined with line breaks.
    """
    if not isinstance(messages, Sequence) or isinstance(messages, str | bytes) or not messages:
        raise RequestError(f"messages is {messages!r:.80}; it must be a list of messages")
    return [_read_message(index, message) for index, message in enumerate(messages)]


def _read_message(index: int, message: object) -> dict[str, Any]:
    if not isinstance(message, Mapping) or not isinstance(message.get("role"), str):
        raise RequestError(f"messages[{index}] has no role; write {{'role': ..., 'content': ...}}")
    content = message.get("content")
    if isinstance(content, list):
        parts = [part if isinstance(part, Mapping) else {} for part in content]
        for part in parts:
            if part.get("type") != "text" or not isinstance(part.get("text"), str):
                raise RequestError(
                    f"messages[{index}].content has a part of type {part.get('type')!r:.40}; "
                    "only text is read here"
                )
        content = "\n".join(part["text"] for part in parts)
    elif not isinstance(content, str) and not (content is None and "tool_calls" in message):
        raise RequestError(
            f"messages[{index}].content is of type {type(content).__name__}; it must be text"
        )
    return {**message, "content": content}


def _marked(conversation: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Return a conversation with a mark where its last message's text ends."""
    last = conversation[-1]
    if not last["content"]:
        raise RequestError("continue_final_message needs a last message with text to go on with")
    return [*conversation[:-1], {**last, "content": last["content"] + _MARK}]


def _until_mark(text: str) -> str:
    found = text.rfind(_MARK)
    if found < 0:
        raise RequestError(
            "continue_final_message cannot be done: the chat template leaves out the last message"
        )
    return text[:found]


def derived_seed(base_seed: int, index: int) -> int:
    """Return a request's seed, unrelated to its neighbours': output i of n uses seed + i."""
    digest = hashlib.blake2b(f"{base_seed}:{index}".encode(), digest_size=8).digest()
    return int.from_bytes(digest, "big") >> 2  # room for + i within 63 bits


def _no_tokenizer(what: str) -> str:
    return (
        f"{what} needs a tokenizer and the model's folder has none: "
        "name a folder with one as tokenizer, or send prompt_token_ids"
    )
