"""Make random weights from a `ModelSpec` alone: benchmarks at real shapes without a download."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping

import torch
from torch import Tensor

from moe_serve.models.checkpoint import allocated
from moe_serve.models.spec import ModelSpec, WeightSpec

# Drawn once for each tensor and repeated. A prime far from any power of two, so that no two
# experts, and no two rows that are near, begin at the same place of it or at neighbouring ones.
BLOCK_ELEMENTS = 200_003
BIAS_STD = 0.02


def dummy_weights(
    spec: ModelSpec,
    dtype: torch.dtype,
    seed: int = 0,
    device: str | torch.device = "cpu",
    into: Mapping[str, Tensor] | None = None,
) -> dict[str, Tensor]:
    """Return random weights for every tensor of `spec`, by name.

    A tensor depends on its name and shape and on `seed` alone. Norms are ones; matrices are normal
    with standard deviation 1 / sqrt(their last dimension), so that activations neither vanish nor
    grow; embeddings and the output head have twice that, which gives logits a deviation near 2.
    into: as for `load_weights`.
    """
    weights = allocated(spec, dtype, device, into or {})
    for weight in spec.weights:
        _fill(weight, spec, weights[weight.name], seed)
    return weights


def _fill(weight: WeightSpec, spec: ModelSpec, tensor: Tensor, seed: int) -> None:
    if _is_norm(weight):
        tensor.fill_(1.0)
        return
    digest = hashlib.sha256(f"{seed} {weight.name}".encode()).digest()
    generator = torch.Generator().manual_seed(int.from_bytes(digest[:8], "little", signed=True))
    block = torch.randn(min(BLOCK_ELEMENTS, tensor.numel()), generator=generator)
    block = block.mul_(_deviation(weight, spec)).to(tensor.device, tensor.dtype)
    parts = [tensor] if tensor.is_contiguous() else list(tensor)
    at = 0  # in the block: a part goes on where the last one ended
    for part in parts:
        flat = part.view(-1)
        start = 0
        while start < flat.numel():
            piece = flat[start : start + block.numel() - at]
            piece.copy_(block[at : at + piece.numel()])
            start += piece.numel()
            at = (at + piece.numel()) % block.numel()


def _is_norm(weight: WeightSpec) -> bool:
    """Return whether `weight` scales: of the vectors in a checkpoint, all that are no biases."""
    return len(weight.shape) == 1 and weight.layouts[0][0].source.endswith(".weight")


def _deviation(weight: WeightSpec, spec: ModelSpec) -> float:
    if len(weight.shape) == 1:
        return BIAS_STD
    gain = 2.0 if weight.shape == (spec.vocab_size, spec.hidden_size) else 1.0
    return float(gain / weight.shape[-1] ** 0.5)
