"""Trained models end to end: the text is transformers', and copied experts change nothing."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from moe_serve.llm import LLM
from moe_serve.types import SamplingParams
from tests.kernels.implementations import EACH_FOR_MODELS, FOR_MODELS, kernels

STORY_TOKENS = 250
BOS = 1
OPENINGS = ("Once upon a time", "The little dog", "Lily and Tom went to the park", "One day")


def _greedy(
    llm: LLM, prompts: list[str] | list[list[int]], max_tokens: int
) -> list[tuple[int, ...]]:
    params = SamplingParams(temperature=0.0, max_tokens=max_tokens, ignore_eos=True)
    outputs = llm.generate(prompts, params, use_tqdm=False)
    return [output.outputs[0].token_ids for output in outputs]


def _options(name: str) -> dict[str, Any]:
    """Return the options that choose an implementation of the kernels."""
    chosen = kernels(name)
    return {"kernels": chosen.name, "isa": chosen.isa or "auto"}


def test_stories260k_tells_transformers_story(shared_data: Path) -> None:
    """In every implementation: they share transformers' story."""
    from transformers import AutoModelForCausalLM

    folder = shared_data / "models" / "stories260k"
    theirs = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    prompt = torch.tensor([[BOS]])
    with torch.no_grad():
        want = theirs.generate(
            prompt,
            attention_mask=torch.ones_like(prompt),
            do_sample=False,
            min_new_tokens=STORY_TOKENS,
            max_new_tokens=STORY_TOKENS,
        )
    for name in FOR_MODELS:
        llm = LLM(model=str(folder), **_options(name))
        (got,) = _greedy(llm, [[BOS]], STORY_TOKENS)
        # a story ends with BOS, not EOS: both go on with a new one
        assert list(got) == want[0, 1:].tolist(), name
    params = SamplingParams(temperature=0.0, max_tokens=40)
    text = llm.generate([[BOS]], params, use_tqdm=False)[0].outputs[0].text
    assert text.strip().startswith("Once upon a time, there was a little girl named Lily.")


@EACH_FOR_MODELS
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_identical_experts_are_the_dense_model(
    shared_data: Path, tmp_path: Path, name: str, dtype: str
) -> None:
    dense = shared_data / "models" / "stories260k"
    _copy_into_experts(dense, tmp_path, num_experts=8)
    prompts = list(OPENINGS)
    options = {"dtype": dtype, **_options(name)}
    want = _greedy(LLM(model=str(dense), **options), prompts, 100)
    sparse = LLM(model=str(tmp_path), **options)
    assert sparse.engine.spec.model_type == "mixtral"
    assert _greedy(sparse, prompts, 100) == want


def _copy_into_experts(dense: Path, folder: Path, num_experts: int) -> None:
    """Write the dense checkpoint as a Mixtral of copies of its MLP, with a random router."""
    config = json.loads((dense / "config.json").read_text())
    config |= {
        "model_type": "mixtral",
        "architectures": ["MixtralForCausalLM"],
        "num_local_experts": num_experts,
        "num_experts_per_tok": 2,
    }
    (folder / "config.json").write_text(json.dumps(config))
    for name in ("tokenizer.json", "tokenizer_config.json", "generation_config.json"):
        shutil.copy(dense / name, folder / name)
    torch.manual_seed(0)
    tensors = {}
    for name, tensor in load_file(dense / "model.safetensors").items():
        layer, found, part = name.partition(".mlp.")
        if not found:
            tensors[name] = tensor
            continue
        theirs = {"gate_proj.weight": "w1", "up_proj.weight": "w3", "down_proj.weight": "w2"}[part]
        for expert in range(num_experts):
            place = f"{layer}.block_sparse_moe.experts.{expert}.{theirs}.weight"
            tensors[place] = tensor.clone()
        router = f"{layer}.block_sparse_moe.gate.weight"
        tensors[router] = torch.randn(num_experts, config["hidden_size"])
    save_file(tensors, folder / "model.safetensors")
