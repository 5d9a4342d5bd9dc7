"""Qwen2 and Qwen2.5, dense: biases on query, key and value."""

from __future__ import annotations

from moe_serve.models import base
from moe_serve.models.hf_config import HFConfig
from moe_serve.models.spec import ModelSpec


def build(config: HFConfig) -> ModelSpec:
    """Return the spec of a config.json of this type."""
    attention = base.attention(config, has_qkv_bias=True, default_kv_heads=32)
    layers = base.dense_layers(config, base.windows_above(config))
    return base.decoder(config, "qwen2", attention, layers)
