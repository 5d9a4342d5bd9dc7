"""Make random weights from a `ModelSpec` alone: benchmarks at real shapes without a download."""

from __future__ import annotations

import hashlib

import torch
from torch import Tensor

from moe_serve.models.checkpoint import empty_weight, weights_bytes
from moe_serve.models.spec import ModelSpec, WeightSpec

# Drawn once for each tensor and repeated. A prime far from any power of two, so that no two
# experts, and no two rows that are near, begin at the same place of it or at neighbouring ones.
BLOCK_ELEMENTS = 200_003
BIAS_STD = 0.02


def dummy_weights(
    spec: ModelSpec, dtype: torch.dtype, seed: int = 0, device: str | torch.device = "cpu"
) -> dict[str, Tensor]:
    """Return random weights for every tensor of `spec`, by name.

    A tensor depends on its name and shape and on `seed` alone. Norms are ones; matrices are normal
    with standard deviation 1 / sqrt(their last dimension), so that activations neither vanish nor
    grow; embeddings and the output head have twice that, which gives logits a deviation near 2.
    """
    total = weights_bytes(spec, dtype)
    return {
        w.name: _filled(w, spec, empty_weight(w, dtype, device, total), seed) for w in spec.weights
    }


def _filled(weight: WeightSpec, spec: ModelSpec, tensor: Tensor, seed: int) -> Tensor:
    if _is_norm(weight):
        return tensor.fill_(1.0)
    digest = hashlib.sha256(f"{seed} {weight.name}".encode()).digest()
    generator = torch.Generator().manual_seed(int.from_bytes(digest[:8], "little", signed=True))
    flat = tensor.view(-1)
    block = torch.randn(min(BLOCK_ELEMENTS, flat.numel()), generator=generator)
    block = block.mul_(_deviation(weight, spec)).to(tensor.device, tensor.dtype)
    for start in range(0, flat.numel(), BLOCK_ELEMENTS):
        piece = flat[start : start + BLOCK_ELEMENTS]
        piece.copy_(block[: piece.numel()])
    return tensor


def _is_norm(weight: WeightSpec) -> bool:
    """Return whether `weight` scales: of the vectors in a checkpoint, all that are no biases."""
    return len(weight.shape) == 1 and weight.layouts[0][0].source.endswith(".weight")


def _deviation(weight: WeightSpec, spec: ModelSpec) -> float:
    if len(weight.shape) == 1:
        return BIAS_STD
    gain = 2.0 if weight.shape == (spec.vocab_size, spec.hidden_size) else 1.0
    return float(gain / weight.shape[-1] ** 0.5)
