"""Mistral: Llama's layout with a sliding window on every layer, unless the config says null."""

from __future__ import annotations

from moe_serve.models import base
from moe_serve.models.hf_config import HFConfig
from moe_serve.models.spec import ModelSpec


def build(config: HFConfig) -> ModelSpec:
    """Return the spec of a config.json of this type."""
    attention = base.attention(config, default_kv_heads=8)
    layers = base.dense_layers(config, base.windows_everywhere(config, base.DEFAULT_WINDOW))
    return base.decoder(config, "mistral", attention, layers)
