"""Qwen3, dense: a norm over each query and key head."""

from __future__ import annotations

from moe_serve.models import base
from moe_serve.models.hf_config import HFConfig
from moe_serve.models.spec import ModelSpec


def build(config: HFConfig) -> ModelSpec:
    """Return the spec of a config.json of this type."""
    has_bias = config.boolean("attention_bias", default=False)
    attention = base.attention(
        config,
        has_qkv_bias=has_bias,
        has_output_bias=has_bias,
        qk_norm="head",
        default_kv_heads=32,
        default_head_dim=128,
    )
    layers = base.dense_layers(config, base.windows_above(config))
    return base.decoder(config, "qwen3", attention, layers)
