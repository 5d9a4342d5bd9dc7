"""A front end's state and application on a fake host, as the tests of the server want them."""

from __future__ import annotations

import dataclasses
from functools import cache
from pathlib import Path
from typing import Any

from fastapi import FastAPI

from moe_serve.server.engine_client import EngineClient
from moe_serve.server.options import ServerConfig
from moe_serve.server.routes import build_app
from moe_serve.server.state import FrontState
from moe_serve.text.chat_template import ChatTemplate
from moe_serve.text.model_texts import ModelTexts
from tests.server.fake_host import FakeModel, InProcessClient

DEMO = Path(__file__).resolve().parents[2] / "moe_serve" / "assets" / "demo-moe"
VOCAB_SIZE = 6144
MODEL = "demo"
TEMPLATE = (
    "{% for m in messages %}{{ m.role }}: {{ m.content }}\n{% endfor %}"
    "{% if style is defined %}({{ style }}){% endif %}"
    "{% if add_generation_prompt %}assistant:{% endif %}"
)


@cache
def demo_texts() -> ModelTexts:
    """Return the embedded model's texts, with a template for chats."""
    return dataclasses.replace(
        ModelTexts.read(DEMO, VOCAB_SIZE), chat_template=ChatTemplate(TEMPLATE)
    )


def state_of(client: EngineClient, **options: Any) -> FrontState:
    """Return the state of a front end of the embedded model."""
    return FrontState(
        client=client,
        **{
            "texts": demo_texts(),
            "server": ServerConfig(),
            "model": MODEL,
            "created": 1,
            "version": "0",
            **options,
        },
    )


def front(fake: FakeModel | None = None, **options: Any) -> tuple[FastAPI, FrontState]:
    """Return an application whose engine is in the same event loop, and its state."""
    texts = options.get("texts") or demo_texts()
    state = state_of(InProcessClient(fake, texts.tokenizer), **options)
    return build_app(state), state
