"""OLMoE (OLMoE-1B-7B): query and key are normed over their full width, and may be clipped."""

from __future__ import annotations

from moe_serve.models import base
from moe_serve.models.hf_config import HFConfig
from moe_serve.models.spec import ModelSpec, MoeSpec


def build(config: HFConfig) -> ModelSpec:
    """Return the spec of a config.json of this type."""
    has_bias = config.boolean("attention_bias", default=False)
    attention = base.attention(
        config,
        has_qkv_bias=has_bias,
        has_output_bias=has_bias,
        qk_norm="full",
        qkv_clip=config.optional_number("clip_qkv", low=0.0),
    )
    moe = MoeSpec(
        router=base.recipe(config, renormalise=config.boolean("norm_topk_prob", default=False)),
        intermediate_size=config.integer("intermediate_size", low=1, high=2**24),
    )
    layers = base.sparse_layers(config, (None,) * base.num_layers(config), moe)
    return base.decoder(config, "olmoe", attention, layers, base.MoeNames(), default_norm_eps=1e-5)
