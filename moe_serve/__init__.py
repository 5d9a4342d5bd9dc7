"""Inference for mixture-of-experts language models: batched, paged, exact.

The names below are imported when they are first used, so that `import moe_serve` costs nothing.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

from moe_serve.openmp import wait_shortly

if TYPE_CHECKING:
    from moe_serve.async_llm import AsyncLLM
    from moe_serve.config import EngineConfig
    from moe_serve.llm import LLM
    from moe_serve.structured_outputs import StructuredOutputs
    from moe_serve.types import SamplingParams

    __version__: str

__all__ = [
    "LLM",
    "AsyncLLM",
    "EngineConfig",
    "SamplingParams",
    "StructuredOutputs",
    "__version__",
]

_MODULE_OF = {
    "LLM": "moe_serve.llm",
    "AsyncLLM": "moe_serve.async_llm",
    "EngineConfig": "moe_serve.config",
    "SamplingParams": "moe_serve.types",
    "StructuredOutputs": "moe_serve.structured_outputs",
}


def __getattr__(name: str) -> Any:
    if name == "__version__":
        return _version()
    if name not in _MODULE_OF:
        raise AttributeError(f"module 'moe_serve' has no attribute {name!r}")
    wait_shortly()
    return getattr(importlib.import_module(_MODULE_OF[name]), name)


def _version() -> str:
    """Return the version of a checkout, or of what is installed."""
    import tomllib  # only here: this module is part of every start
    from importlib import metadata
    from pathlib import Path

    project = Path(__file__).resolve().parents[1] / "pyproject.toml"
    if project.is_file():
        found = tomllib.loads(project.read_text(encoding="utf-8")).get("project", {})
        if found.get("name") == "moe-serve":
            return str(found["version"])
    return metadata.version("moe-serve")


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
