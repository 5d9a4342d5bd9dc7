"""Every model type: logits and routers' choices are transformers', the cache loses nothing."""

from __future__ import annotations

import random
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from moe_serve.layers.moe import MoeLayer
from moe_serve.layers.router import Router
from moe_serve.models.registry import model_types
from moe_serve.types import Routing
from tests.kernels.implementations import DTYPES, EACH_FOR_MODELS, EACH_NATIVE, FOR_MODELS, kernels
from tests.models import tiny

TOLERANCE = 1e-4
LENGTH = 150
MODEL_TYPES = pytest.mark.parametrize("model_type", model_types())


def _token_ids(seed: int = 0) -> list[int]:
    chance = random.Random(seed)
    return [chance.randrange(tiny.VOCAB_SIZE) for _ in range(LENGTH)]


def test_every_type_has_a_tiny_config() -> None:
    assert set(model_types()) == set(tiny.CONFIGS)


@MODEL_TYPES
def test_logits_and_routing_equal_transformers(model_type: str, tmp_path: Path) -> None:
    """In every implementation: they share the checkpoint and transformers' run of it."""
    theirs = tiny.save_checkpoint(tmp_path, model_type)
    token_ids = _token_ids()
    their_choices: list[Tensor] = []

    def keep(module: Any, inputs: Any, output: tuple[Tensor, Tensor, Tensor]) -> None:
        their_choices.append(output[2].sort(-1).values)

    for name, module in theirs.named_modules():
        if name.endswith("mlp.gate"):
            module.register_forward_hook(keep)
    with torch.no_grad():
        want = theirs(torch.tensor([token_ids])).logits[0]

    for name in FOR_MODELS:
        decoder = tiny.load_decoder(tmp_path, kernels=kernels(name))
        our_choices: list[Tensor] = []
        _watch_routers(decoder, our_choices)
        got = tiny.logits_in_chunks(decoder, token_ids, [LENGTH])
        assert float((got - want).abs().max()) < TOLERANCE, name
        num_moe = sum(layer.moe is not None for layer in decoder.spec.layers)
        assert len(our_choices) == len(their_choices) == num_moe
        for ours, other in zip(our_choices, their_choices, strict=True):
            assert torch.equal(ours, other), name


def _watch_routers(decoder: Any, choices: list[Tensor]) -> None:
    """Record each router's experts, sorted by id."""

    def watched(router: Router) -> Any:
        def route(hidden: Tensor) -> Routing:
            routing = router(hidden)
            choices.append(routing.expert_ids.sort(-1).values)
            return routing

        return route

    for layer in decoder.layers:
        if isinstance(layer.mlp, MoeLayer):
            layer.mlp.router = watched(layer.mlp.router)


@EACH_FOR_MODELS
@DTYPES
@MODEL_TYPES
def test_prefill_and_decode_are_the_bits_of_one_pass(
    name: str, dtype: torch.dtype, model_type: str, tmp_path: Path
) -> None:
    tiny.save_checkpoint(tmp_path, model_type)
    decoder = tiny.load_decoder(tmp_path, dtype, kernels(name))
    token_ids = _token_ids(1)
    whole = tiny.logits_in_chunks(decoder, token_ids, [LENGTH])
    for chunks in ([1] * LENGTH, [7, 64, 1, 1, 40, 37], [149, 1]):
        assert torch.equal(tiny.logits_in_chunks(decoder, token_ids, chunks), whole)


@pytest.mark.parametrize("model_type", ["qwen3_moe", "mixtral"])
def test_a_fused_file_gives_the_same_model(model_type: str, tmp_path: Path) -> None:
    from safetensors.torch import load_file, save_file

    (tmp_path / "split").mkdir()
    (tmp_path / "fused").mkdir()
    theirs = tiny.save_checkpoint(tmp_path / "split", model_type)
    tensors = load_file(tmp_path / "split" / "model.safetensors")
    kept = {name: tensor for name, tensor in tensors.items() if ".experts." not in name}
    assert len(kept) < len(tensors)
    for name, parameter in theirs.named_parameters():
        if ".experts." in name:  # fused, as transformers holds them
            kept[name] = parameter.detach().contiguous()
    save_file(kept, tmp_path / "fused" / "model.safetensors")
    (tmp_path / "fused" / "config.json").write_bytes(
        (tmp_path / "split" / "config.json").read_bytes()
    )
    split, fused = (
        tiny.logits_in_chunks(tiny.load_decoder(tmp_path / name), _token_ids(), [LENGTH])
        for name in ("split", "fused")
    )
    assert torch.equal(split, fused)


def test_many_files_give_the_same_model(tmp_path: Path) -> None:
    tiny.save_checkpoint(tmp_path / "one", "qwen2_moe")
    tiny.save_checkpoint(tmp_path / "many", "qwen2_moe", max_shard_size="60KB")
    assert len(list((tmp_path / "many").glob("*.safetensors"))) > 3
    one, many = (
        tiny.logits_in_chunks(tiny.load_decoder(tmp_path / name), _token_ids(), [LENGTH])
        for name in ("one", "many")
    )
    assert torch.equal(one, many)


@pytest.mark.parametrize(
    "rope",
    [
        {"rope_type": "linear", "factor": 4.0},
        {
            "rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
            "original_max_position_embeddings": 64,
        },
        {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 64},
        {
            "rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 64,
            "beta_fast": 16.0, "beta_slow": 2.0, "mscale": 0.7, "mscale_all_dim": 1.2,
            "truncate": False,
        },
        {"rope_type": "dynamic", "factor": 2.0},
    ],
    ids=["linear", "llama3", "yarn", "yarn-mscale", "dynamic"],
)  # fmt: skip
def test_scaled_rotary_embeddings_equal_transformers(rope: dict[str, Any], tmp_path: Path) -> None:
    changes = {"rope_parameters": {"rope_theta": 1e4, **rope}}
    theirs = tiny.save_checkpoint(tmp_path, "llama", changes)
    token_ids = _token_ids()
    with torch.no_grad():
        want = theirs(torch.tensor([token_ids])).logits[0]
    got = tiny.logits_in_chunks(tiny.load_decoder(tmp_path), token_ids, [100, 50])
    assert float((got - want).abs().max()) < TOLERANCE


@EACH_FOR_MODELS
def test_bfloat16_stays_near_float32(name: str, tmp_path: Path) -> None:
    tiny.save_checkpoint(tmp_path, "qwen3")
    narrow, wide = (
        tiny.logits_in_chunks(
            tiny.load_decoder(tmp_path, dtype, kernels(name)), _token_ids(), [LENGTH]
        )
        for dtype in (torch.bfloat16, torch.float32)
    )
    # a dense model: experts that change places would make this a test of routing
    assert float((narrow - wide).abs().mean()) < 0.02 * float(wide.abs().mean()) + 0.02


@EACH_NATIVE
@MODEL_TYPES
def test_bfloat16_is_as_near_to_float32_as_the_reference_s(
    name: str, model_type: str, tmp_path: Path
) -> None:
    tiny.save_checkpoint(tmp_path, model_type)

    def logits(implementation: str, dtype: torch.dtype) -> Tensor:
        decoder = tiny.load_decoder(tmp_path, dtype, kernels(implementation))
        return tiny.logits_in_chunks(decoder, _token_ids(), [LENGTH])

    exact = logits("reference", torch.float32)
    ours, theirs = (
        float((logits(kind, torch.bfloat16) - exact).abs().mean()) for kind in (name, "reference")
    )
    assert ours < 1.2 * theirs + 0.001
