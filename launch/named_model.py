"""The model that options name: found, and read as far as text goes, before anything is started."""

from __future__ import annotations

import dataclasses
import logging
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from moe_serve.config import EMBEDDED_MODEL, EngineConfig, resolve_options
from moe_serve.errors import ConfigError
from moe_serve.hub import resolve_model
from moe_serve.models.hf_config import HFConfig
from moe_serve.models.registry import read_spec
from moe_serve.text.model_texts import ModelTexts

logger = logging.getLogger(__name__)


@dataclasses.dataclass(frozen=True, kw_only=True)
class NamedModel:
    """Where a model is, and what an engine of it is made of.

    given: the options as they are; config: with names of the hub made folders of.
    """

    folder: Path
    texts: ModelTexts
    given: EngineConfig
    config: EngineConfig


def find_model(
    model: str | Path | None,
    config: EngineConfig | None,
    options: Mapping[str, Any],
    chat_template: str | Path | None = None,
) -> NamedModel:
    """Return the model that is named by `model`, by `options`, or by a whole `config`.

    It is downloaded if need be. Raises ConfigError, and CheckpointError for a folder that is none
    of a model that runs here.
    """
    if model is not None:
        options = {**options, "model": str(model)}
    if config is None:
        config = EngineConfig.from_options(resolve_options(options))
    elif options:
        raise ConfigError(
            f"config and {', '.join(sorted(options))} are both given; "
            "set it in config, or leave config out"
        )
    weights, given = config.weights, config
    folder = resolve_model(weights.model, weights.revision)
    if weights.revision is not None and _is_local(weights.model):
        logger.warning(
            "revision %s has no effect: %s is no name of the hub", weights.revision, weights.model
        )
    tokenizer_folder = None
    if weights.tokenizer is not None:
        tokenizer_folder = resolve_model(weights.tokenizer)
        # grammars are the engine's, which knows folders and no hub
        weights = dataclasses.replace(weights, tokenizer=str(tokenizer_folder))
        config = dataclasses.replace(config, weights=weights)
    spec = read_spec(HFConfig.read(folder))
    texts = ModelTexts.read(  # checked before the weights, which may take minutes
        folder,
        spec.vocab_size,
        tokenizer_folder=tokenizer_folder,
        chat_template=None if chat_template is None else Path(chat_template),
    )
    return NamedModel(folder=folder, texts=texts, given=given, config=config)


def _is_local(name: str) -> bool:
    return name == EMBEDDED_MODEL or os.path.lexists(os.path.expanduser(name))
