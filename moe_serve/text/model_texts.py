"""What a model's folder says of text: its tokenizer, chat template, end tokens and sampling."""

from __future__ import annotations

import logging
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Self

from moe_serve.errors import CheckpointError, RequestError
from moe_serve.models.hf_config import (
    GENERATION_FILE,
    GenerationDefaults,
    read_generation_defaults,
)
from moe_serve.text.chat_template import ChatTemplate, load_chat_template, read_chat_template
from moe_serve.text.prompts import RequestMaker
from moe_serve.text.tokenizer import Tokenizer, load_tokenizer
from moe_serve.types import SamplingParams

logger = logging.getLogger(__name__)


@dataclass(frozen=True, kw_only=True)
class ModelTexts:
    """Text to requests of one model, of `vocab_size` ids. What its folder lacks is None."""

    vocab_size: int
    tokenizer: Tokenizer | None = None
    chat_template: ChatTemplate | None = None
    defaults: GenerationDefaults = field(default_factory=GenerationDefaults)

    def __post_init__(self) -> None:
        if self.tokenizer is not None:
            self.tokenizer.check_fits(self.vocab_size)

    @classmethod
    def read(
        cls,
        folder: Path,
        vocab_size: int,
        *,
        tokenizer_folder: Path | None = None,
        chat_template: Path | None = None,
    ) -> Self:
        """Read the model's folder. Raises CheckpointError for what is broken there.

        tokenizer_folder: in place of the model's own; chat_template: a file in place of its own.
        """
        texts = tokenizer_folder or folder
        tokenizer = load_tokenizer(texts)
        special_tokens = {} if tokenizer is None else tokenizer.special_tokens
        if chat_template is not None:
            template: ChatTemplate | None = read_chat_template(chat_template, special_tokens)
        else:
            template = load_chat_template(texts, special_tokens)
        defaults = read_generation_defaults(folder)
        try:
            _sampling_of(defaults)
        except RequestError as error:
            raise CheckpointError(f"{folder / GENERATION_FILE}: {error}") from error
        return cls(
            vocab_size=vocab_size, tokenizer=tokenizer, chat_template=template, defaults=defaults
        )

    @cached_property
    def eos_token_ids(self) -> frozenset[int]:
        """The tokens that end an output; a warning where the vocabulary has none of them."""
        found = self.defaults.eos_token_ids
        if not found and self.tokenizer is not None and self.tokenizer.eos_id is not None:
            found = frozenset({self.tokenizer.eos_id})
        if found and min(found) >= self.vocab_size:
            logger.warning(
                "no end token of the model (%s) is in its vocabulary of %d: outputs end at "
                "max_tokens",
                ", ".join(map(str, sorted(found)[:8])),
                self.vocab_size,
            )
        return found

    def default_sampling_params(self) -> SamplingParams:
        """Return what the model's generation_config suggests; else the defaults of the class."""
        return _sampling_of(self.defaults)

    def maker(self, max_model_len: int, base_seed: int = 0) -> RequestMaker:
        """Return what makes requests of texts. base_seed: of requests that bring no seed."""
        return RequestMaker(
            vocab_size=self.vocab_size,
            max_model_len=max_model_len,
            tokenizer=self.tokenizer,
            eos_token_ids=self.eos_token_ids,
            chat_template=self.chat_template,
            base_seed=base_seed,
        )


def _sampling_of(defaults: GenerationDefaults) -> SamplingParams:
    named = {
        "temperature": defaults.temperature,
        "top_p": defaults.top_p,
        "top_k": defaults.top_k,
        "min_p": defaults.min_p,
        "repetition_penalty": defaults.repetition_penalty,
        "max_tokens": defaults.max_new_tokens,
    }
    return SamplingParams.from_mapping({k: v for k, v in named.items() if v is not None})
