"""Qwen3-MoE (Qwen3-30B-A3B, Qwen3-235B-A22B): Qwen3's attention, no shared expert."""

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
        qk_norm="head",
        default_kv_heads=4,
    )
    moe = MoeSpec(
        router=base.recipe(config, renormalise=config.boolean("norm_topk_prob", default=False)),
        intermediate_size=config.integer("moe_intermediate_size", low=1, high=2**24),
    )
    slides = config.boolean("use_sliding_window", default=False)
    windows: tuple[int | None, ...] = (None,) * base.num_layers(config)
    if slides:
        windows = base.windows_everywhere(config, base.DEFAULT_WINDOW)
        if None in windows:
            raise config.error("sliding_window", "is not set, but use_sliding_window is true")
    layers = base.sparse_layers(config, windows, moe)
    return base.decoder(config, "qwen3_moe", attention, layers, base.MoeNames())
