"""Mistral: Llama's layout with a sliding window on every layer, where the config sets one."""

from __future__ import annotations

from moe_serve.models import base
from moe_serve.models.hf_config import HFConfig
from moe_serve.models.spec import ModelSpec


def build(config: HFConfig) -> ModelSpec:
    """Return the spec of a config.json of this type."""
    layers = base.dense_layers(config, base.windows_everywhere(config))
    return base.decoder(config, "mistral", base.attention(config), layers)
