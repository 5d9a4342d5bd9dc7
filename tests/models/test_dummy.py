"""Random weights: fixed by the name, different for every tensor and expert, of good size."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

from moe_serve.models.dummy import dummy_weights
from moe_serve.models.expert_weights import ExpertWeights
from moe_serve.models.hf_config import HFConfig
from moe_serve.models.registry import read_spec
from moe_serve.models.spec import ModelSpec
from tests.kernels.implementations import FOR_MODELS, kernels
from tests.models.bad_checkpoints import CONFIG


@pytest.fixture
def spec(tmp_path: Path) -> ModelSpec:
    sizes = {"hidden_size": 128, "moe_intermediate_size": 96, "vocab_size": 2000, "num_experts": 24}
    (tmp_path / "config.json").write_text(json.dumps({**CONFIG, **sizes}))
    return read_spec(HFConfig.read(tmp_path))


def test_all_weights_are_made_in_their_shape_and_dtype(spec: ModelSpec) -> None:
    weights = dummy_weights(spec, torch.bfloat16)
    assert {name: tuple(tensor.shape) for name, tensor in weights.items()} == {
        weight.name: weight.shape for weight in spec.weights
    }
    for weight in spec.weights:
        expected = torch.float32 if weight.is_fp32 else torch.bfloat16
        assert weights[weight.name].dtype == expected


def test_tensors_that_are_given_are_filled(spec: ModelSpec) -> None:
    plain = dummy_weights(spec, torch.bfloat16)
    for name in FOR_MODELS:
        into = ExpertWeights(spec, torch.bfloat16, kernels(name)).plain()
        assert len(into) == 2 * sum(layer.moe is not None for layer in spec.layers) > 0
        assert not any(tensor.is_contiguous() for tensor in into.values())
        weights = dummy_weights(spec, torch.bfloat16, into=into)
        for weight in spec.weights:
            assert (weights[weight.name] is into.get(weight.name)) == (weight.name in into)
            assert torch.equal(weights[weight.name], plain[weight.name])


def test_depends_on_name_and_seed_alone(spec: ModelSpec) -> None:
    first, other = dummy_weights(spec, torch.float32), dummy_weights(spec, torch.float32, seed=1)
    shuffled = ModelSpec(
        **{
            name: getattr(spec, name)
            for name in ModelSpec.__dataclass_fields__
            if name != "weights"
        },
        weights=spec.weights[::-1],
    )
    again = dummy_weights(shuffled, torch.float32)
    for name, tensor in first.items():
        assert torch.equal(tensor, again[name])
        assert torch.equal(tensor, other[name]) == ("norm" in name)


def test_no_two_matrices_or_experts_are_alike(spec: ModelSpec) -> None:
    weights = dummy_weights(spec, torch.float32)
    rows = [
        row
        for tensor in weights.values()
        if tensor.ndim > 1
        for row in tensor.reshape(-1, tensor.shape[-1])[:, :16]
    ]
    unique = {tuple(row.tolist()) for row in rows}
    assert len(unique) == len(rows)


def test_deviations(spec: ModelSpec) -> None:
    weights = dummy_weights(spec, torch.float32)
    assert torch.equal(weights["norm"], torch.ones(128))
    assert weights["layers.0.experts.down"].std().item() == pytest.approx(96**-0.5, rel=0.02)
    logits = torch.randn(64, 128, generator=torch.Generator().manual_seed(0)) @ weights["head"].T
    assert logits.std().item() == pytest.approx(2.0, rel=0.05)
