"""Llama (1 to 3.x) and models with its layout, such as SmolLM2."""

from __future__ import annotations

from moe_serve.models import base
from moe_serve.models.hf_config import HFConfig
from moe_serve.models.spec import ModelSpec


def build(config: HFConfig) -> ModelSpec:
    """Return the spec of a config.json of this type."""
    has_bias = config.boolean("attention_bias", default=False)
    attention = base.attention(config, has_qkv_bias=has_bias, has_output_bias=has_bias)
    layers = base.dense_layers(
        config,
        (None,) * base.num_layers(config),
        has_mlp_bias=config.boolean("mlp_bias", default=False),
    )
    return base.decoder(config, "llama", attention, layers)
