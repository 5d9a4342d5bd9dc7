"""Run a model that is larger than the memory this process may take; print what happened as JSON.

Started by tests/test_larger_than_memory.py as a process of its own.
"""

from __future__ import annotations

import json
import resource
import sys
from pathlib import Path
from typing import Any

from moe_serve.llm import LLM
from moe_serve.types import SamplingParams

MIB = 2**20
CONFIG = {
    "model_type": "qwen3_moe",
    "architectures": ["Qwen3MoeForCausalLM"],
    "vocab_size": 512,
    "hidden_size": 512,
    "intermediate_size": 512,
    "moe_intermediate_size": 256,
    "num_hidden_layers": 6,
    "num_attention_heads": 8,
    "num_key_value_heads": 2,
    "head_dim": 32,
    "num_experts": 64,
    "num_experts_per_tok": 4,
    "norm_topk_prob": True,
    "max_position_embeddings": 256,
    "rms_norm_eps": 1e-6,
    "rope_theta": 10000.0,
    "tie_word_embeddings": False,
    "dtype": "bfloat16",
    "eos_token_id": 0,
}
EXPERT_BYTES = 64 * 6 * 3 * 512 * 256 * 2
KEPT_BYTES = 48 * MIB
# stacks of threads, work space, a batch of records while they are packed
OTHER_BYTES = 100 * MIB


def main(folder: Path, options: dict[str, Any]) -> dict[str, int]:
    """Return what was read to serve, in bytes, and how far resident memory grew.

    Counted from when a tiny model has run: by then all code and its work space are there.
    """
    _run(folder / "tiny", {**CONFIG, "moe_intermediate_size": 8}, {"expert_cache_slots": 4})
    Path("/proc/self/clear_refs").write_text("5")  # the peak begins anew
    before = _status("VmRSS:")
    limit = _status("VmData:") + KEPT_BYTES + OTHER_BYTES
    resource.setrlimit(resource.RLIMIT_DATA, (limit, limit))
    counted = _run(folder / "large", CONFIG, options)
    return {**counted, "growth": _status("VmHWM:") - before}


def _run(folder: Path, config: dict[str, Any], options: dict[str, Any]) -> dict[str, int]:
    folder.mkdir(exist_ok=True)
    (folder / "config.json").write_text(json.dumps(config))
    given: dict[str, Any] = {
        "max_model_len": 128,
        "num_kv_blocks": 32,
        "threads": 1,
        "prefetch": "off",
    }
    with LLM(str(folder), load_format="dummy", expert_store=str(folder), **given, **options) as llm:
        read_before = _read_bytes()
        sampling = SamplingParams(max_tokens=8, temperature=0.0, ignore_eos=True)
        outputs = llm.generate([[index + 1] * (index + 1) for index in range(4)], sampling)
        assert all(output.outputs[0].finish_reason == "length" for output in outputs), outputs
        stats = llm.engine.stats()
        return {
            "planned": stats.model_bytes + stats.kv_bytes,
            "fetched": stats.experts["total"]["bytes"],
            "read": _read_bytes() - read_before,
        }


def _status(name: str) -> int:
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith(name)) * 1024


def _read_bytes() -> int:
    lines = Path("/proc/self/io").read_text().splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith("read_bytes:"))


if __name__ == "__main__":
    print(json.dumps(main(Path(sys.argv[1]), json.loads(sys.argv[2]))))
