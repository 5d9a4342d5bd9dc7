"""What a GPU's memory is planned for, against what steps at real shapes hold."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

from moe_serve.config import EngineConfig
from moe_serve.engine import device_memory
from moe_serve.engine.device_memory import room_on, usable_bytes, workspace_bytes
from moe_serve.engine.memory import KV_SHARE, available_bytes
from moe_serve.engine.sampler import sampling_bytes
from moe_serve.kernels import suite
from moe_serve.models.checkpoint import allocated
from moe_serve.models.decoder import build_decoder
from moe_serve.models.hf_config import HFConfig
from moe_serve.models.registry import read_spec
from moe_serve.models.spec import ModelSpec
from moe_serve.types import ForwardBatch
from tests.models.elsewhere import ELSEWHERE, LiveBytes, launches

CONFIGS = {
    "qwen3_moe": {
        "model_type": "qwen3_moe", "hidden_size": 2048, "num_attention_heads": 32,
        "num_key_value_heads": 4, "head_dim": 128, "num_experts": 128, "num_experts_per_tok": 8,
        "moe_intermediate_size": 768, "intermediate_size": 6144, "vocab_size": 151936,
        "num_hidden_layers": 2, "norm_topk_prob": True,
    },
    "qwen2_moe": {
        "model_type": "qwen2_moe", "hidden_size": 2048, "num_attention_heads": 16,
        "num_key_value_heads": 16, "num_experts": 60, "num_experts_per_tok": 4,
        "moe_intermediate_size": 1408, "shared_expert_intermediate_size": 5632,
        "intermediate_size": 5632, "vocab_size": 151936, "num_hidden_layers": 2,
    },
    "llama": {
        "model_type": "llama", "hidden_size": 4096, "num_attention_heads": 32,
        "num_key_value_heads": 8, "intermediate_size": 14336, "vocab_size": 128256,
        "num_hidden_layers": 2,
    },
}  # fmt: skip
LONGEST = 2**17
SAME = {"max_position_embeddings": LONGEST, "rms_norm_eps": 1e-6, "torch_dtype": "bfloat16"}


def _spec(name: str, folder: Path) -> ModelSpec:
    (folder / "config.json").write_text(json.dumps(CONFIGS[name] | SAME))
    return read_spec(HFConfig.read(folder))


def _batch(query_lens: list[int], context: int, num_groups: int) -> ForwardBatch:
    num_tokens, num_seqs = sum(query_lens), len(query_lens)
    some = torch.zeros(num_tokens, dtype=torch.int64)
    table = torch.zeros(num_seqs, -(-context // 16), dtype=torch.int32)
    return ForwardBatch(
        token_ids=some,
        positions=some,
        sequence_ids=some,
        query_lens=tuple(query_lens),
        context_lens=(context,) * num_seqs,
        prompt_lens=(context,) * num_seqs,
        slot_mapping=(some,) * num_groups,
        block_tables=(table,) * num_groups,
        block_size=16,
        sample_rows=torch.arange(num_seqs),
    )


DECODES = [([1] * 256, 4096), ([1] * 60, 16384), ([1] * 8, LONGEST), ([1], LONGEST)]


@pytest.mark.parametrize("name", CONFIGS)
@pytest.mark.parametrize(
    ("query_lens", "context"),
    [([2048], 2048), ([1] * 200 + [616] * 3, 1024), ([1] * 31 + [4] * 31, LONGEST), *DECODES],
    ids=["prompt", "both", "far", "decodes", "long decodes", "few", "one"],
)
def test_a_step_stays_within_its_bound(
    name: str, query_lens: list[int], context: int, tmp_path: Path
) -> None:
    pytest.importorskip("triton")
    spec, dtype = _spec(name, tmp_path), torch.bfloat16
    config = EngineConfig.from_options({"max_num_seqs": 256, "max_num_batched_tokens": 2048})
    with launches(), torch.inference_mode():
        kernels = suite.load("triton")
        decoder = build_decoder(
            spec, dtype, kernels, LONGEST, lambda into: allocated(spec, dtype, ELSEWHERE, into)
        )
        caches = decoder.allocate_caches((512,) * len(decoder.groups), 16)
        batch = _batch(query_lens, context, len(decoder.groups)).on(ELSEWHERE)
        with LiveBytes() as live:
            hidden = decoder.forward(batch, caches)
            of_layers = live.peak
            logits = decoder.logits(hidden[batch.sample_rows])
    assert logits.shape == (len(query_lens), spec.vocab_size)
    bound = workspace_bytes(config, spec, dtype)
    # test_sampler.py has what is beside the logits
    assert live.peak + sampling_bytes(len(query_lens), spec.vocab_size) <= bound
    if len(query_lens) > 200:
        assert bound < 5 * live.peak, "a bound that leaves most of it unused is of no use"
    if (query_lens, context) in DECODES:
        # a graph has its own memory of all this, which no other step can use
        config = EngineConfig.from_options({**config.options(), "fused": False})
        assert bound - workspace_bytes(config, spec, dtype) > of_layers


def test_the_host_has_what_is_available() -> None:
    device, config = torch.device("cpu"), EngineConfig()
    room = room_on(device, config, None, torch.bfloat16)  # type: ignore[arg-type]
    assert room.kv_share == KV_SHARE
    assert room.num_bytes == pytest.approx(available_bytes(), rel=0.2)


@pytest.mark.parametrize(
    ("free", "reserved", "allocated_bytes", "utilization", "want"),
    [
        (90, 0, 0, 0.9, 80),  # 10 are others'
        (90, 0, 0, 1.0, 90),
        (5, 0, 0, 0.9, 0),
        (60, 40, 10, 0.9, 80),  # 30 that torch keeps can be used again
        (40, 50, 50, 0.5, 0),
    ],
)
def test_what_others_use_of_a_gpu_counts(
    free: int,
    reserved: int,
    allocated_bytes: int,
    utilization: float,
    want: int,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda device: (free, 100))
    monkeypatch.setattr(torch.cuda, "memory_reserved", lambda device: reserved)
    monkeypatch.setattr(torch.cuda, "memory_allocated", lambda device: allocated_bytes)
    assert usable_bytes(torch.device("cuda"), utilization) == want


def test_weights_get_what_steps_leave(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    spec, config = _spec("qwen3_moe", tmp_path), EngineConfig()
    steps = workspace_bytes(config, spec, torch.bfloat16)
    monkeypatch.setattr(device_memory, "usable_bytes", lambda device, share: 10 * steps)
    room = room_on(torch.device("cuda"), config, spec, torch.bfloat16)
    assert (room.num_bytes, room.kv_share) == (9 * steps, 1.0)
    monkeypatch.setattr(device_memory, "usable_bytes", lambda device, share: steps // 2)
    assert room_on(torch.device("cuda"), config, spec, torch.bfloat16).num_bytes == 0
