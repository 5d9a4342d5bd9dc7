"""Make random weights from a `ModelSpec` alone: benchmarks at real shapes without a download."""

from __future__ import annotations

import hashlib
from collections.abc import Collection, Mapping
from pathlib import Path

import torch
from torch import Tensor

from moe_serve.models.checkpoint import allocated, selected
from moe_serve.models.hf_config import CONFIG_FILE, require_folder
from moe_serve.models.spec import ModelSpec, WeightSpec
from moe_serve.models.strict_json import unreadable

# Drawn once for each tensor and repeated. A prime far from any power of two, so that no two
# experts, and no two rows that are near, begin at the same place of it or at neighbouring ones.
BLOCK_ELEMENTS = 200_003
BIAS_STD = 0.02
# of what is drawn: another number gives other weights
VERSION = 1


def dummy_weights(
    spec: ModelSpec,
    dtype: torch.dtype,
    seed: int = 0,
    device: str | torch.device = "cpu",
    into: Mapping[str, Tensor] | None = None,
    names: Collection[str] | None = None,
) -> dict[str, Tensor]:
    """Return random weights for every tensor of `spec`, by name.

    A tensor depends on its name and shape and on `seed` alone. Norms are ones; matrices are normal
    with standard deviation 1 / sqrt(their last dimension), so that activations neither vanish nor
    grow; embeddings and the output head have twice that, which gives logits a deviation near 2.
    into, names: as for `load_weights`.
    """
    weights = allocated(spec, dtype, device, into or {}, names)
    for weight in selected(spec, names):
        _fill(weight, spec, weights[weight.name], seed)
    return weights


def fill_dummy_rows(
    spec: ModelSpec, weights: Mapping[str, Tensor], rows: range, seed: int = 0
) -> None:
    """Fill `weights`, tensors by name that hold some rows of their first dimension alone.

    The values are those of `dummy_weights`; rows are experts, where the weights are experts'.
    """
    for weight in selected(spec, weights):
        _fill(weight, spec, weights[weight.name], seed, rows.start)


def dummy_hash(folder: Path, seed: int = 0) -> str:
    """Return an identity of the dummy weights of the model in `folder`, in hex, as `model_hash`."""
    require_folder(folder)
    try:
        config = (folder / CONFIG_FILE).read_bytes()
    except OSError as error:
        raise unreadable(folder / CONFIG_FILE, error) from error
    return hashlib.sha256(f"dummy {VERSION} {seed}\n".encode() + config).hexdigest()


def _fill(
    weight: WeightSpec, spec: ModelSpec, tensor: Tensor, seed: int, first_row: int = 0
) -> None:
    if _is_norm(weight):
        tensor.fill_(1.0)
        return
    digest = hashlib.sha256(f"{seed} {weight.name}".encode()).digest()
    generator = torch.Generator().manual_seed(int.from_bytes(digest[:8], "little", signed=True))
    block = torch.randn(min(BLOCK_ELEMENTS, weight.num_elements), generator=generator)
    block = block.mul_(_deviation(weight, spec)).to(tensor.device, tensor.dtype)
    parts = [tensor] if tensor.is_contiguous() else list(tensor)
    # in the block: a part goes on where the last one ended
    at = first_row * (weight.num_elements // weight.shape[0]) % block.numel()
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
