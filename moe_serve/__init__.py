"""Inference for mixture-of-experts language models: batched, paged, exact.

The names below are imported when they are first used, so that `import moe_serve` costs nothing.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from moe_serve.config import EngineConfig
    from moe_serve.llm import LLM
    from moe_serve.types import SamplingParams

__all__ = ["LLM", "EngineConfig", "SamplingParams"]

_MODULE_OF = {
    "LLM": "moe_serve.llm",
    "EngineConfig": "moe_serve.config",
    "SamplingParams": "moe_serve.types",
}


def __getattr__(name: str) -> Any:
    if name not in _MODULE_OF:
        raise AttributeError(f"module 'moe_serve' has no attribute {name!r}")
    return getattr(importlib.import_module(_MODULE_OF[name]), name)


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
