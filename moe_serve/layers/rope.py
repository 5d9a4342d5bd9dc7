"""Cosines and sines of the rotary embedding, for every position at once."""

from __future__ import annotations

import math
from dataclasses import dataclass, field

import torch
from torch import Tensor

_TWO_PI = 2.0 * math.pi


@dataclass(frozen=True, kw_only=True, slots=True)
class RopeSpec:
    """Rotary embedding: what the inverse frequencies are made from.

    kind "default", "linear", "llama3", "yarn" or "dynamic", with the numbers of Hugging Face's
    rope_parameters in `options`. "dynamic" differs from "default" only beyond the model's own
    context length, which is where requests end.
    """

    theta: float
    kind: str = "default"
    options: dict[str, float] = field(default_factory=dict)


def rope_table(spec: RopeSpec, head_dim: int, num_positions: int) -> tuple[Tensor, Tensor]:
    """Return cos and sin, float32 [num_positions, head_dim / 2]."""
    frequencies, magnitude = inverse_frequencies(spec, head_dim)
    angles = torch.arange(num_positions, dtype=torch.float32)[:, None] * frequencies
    return torch.cos(angles) * magnitude, torch.sin(angles) * magnitude


def inverse_frequencies(spec: RopeSpec, head_dim: int) -> tuple[Tensor, float]:
    """Return radians per position, float32 [head_dim / 2], and a factor for cos and sin."""
    exponents = torch.arange(0, head_dim, 2, dtype=torch.int64).float() / head_dim
    plain = 1.0 / spec.theta**exponents
    match spec.kind:
        case "default" | "dynamic":
            return plain, 1.0
        case "linear":
            return plain / spec.options["factor"], 1.0
        case "llama3":
            return _llama3(plain, spec.options), 1.0
        case "yarn":
            return _yarn(plain, spec, head_dim), _yarn_magnitude(spec.options)
    raise AssertionError(f"rope kind {spec.kind!r} was let through")


def _llama3(plain: Tensor, options: dict[str, float]) -> Tensor:
    """Slow down the long waves, keep the short ones, blend between (Llama 3.1's scaling)."""
    factor, low, high = (
        options[name] for name in ("factor", "low_freq_factor", "high_freq_factor")
    )
    turns = options["original_max_position_embeddings"] * plain / _TWO_PI
    blend = ((turns - low) / (high - low)).clamp(0.0, 1.0)
    return (1.0 - blend) * plain / factor + blend * plain


def _yarn(plain: Tensor, spec: RopeSpec, head_dim: int) -> Tensor:
    """YaRN's NTK-by-parts interpolation (Peng et al. 2023, arXiv 2309.00071, section 3.2)."""
    options = spec.options

    def dimension(rotations: float) -> float:  # the dimension that turns so often in the context
        length = options["original_max_position_embeddings"]
        return head_dim * math.log(length / (rotations * _TWO_PI)) / (2 * math.log(spec.theta))

    low = dimension(options.get("beta_fast", 32.0))
    high = dimension(options.get("beta_slow", 1.0))
    if options.get("truncate", 1.0):
        low, high = math.floor(low), math.ceil(high)
    low, high = max(low, 0), min(high, head_dim - 1)
    width = (high - low) or 0.001
    ramp = ((torch.arange(head_dim // 2, dtype=torch.float32) - low) / width).clamp(0.0, 1.0)
    return plain / options["factor"] * ramp + plain * (1.0 - ramp)


def _yarn_magnitude(options: dict[str, float]) -> float:
    """Return the factor on cos and sin that stands for YaRN's attention temperature."""
    if "attention_factor" in options:
        return options["attention_factor"]

    def magnitude(weight: float) -> float:
        factor = options["factor"]
        return 1.0 if factor <= 1.0 else 0.1 * weight * math.log(factor) + 1.0

    mscale, mscale_all = options.get("mscale", 0.0), options.get("mscale_all_dim", 0.0)
    if mscale and mscale_all:
        return magnitude(mscale) / magnitude(mscale_all)
    return magnitude(1.0)
