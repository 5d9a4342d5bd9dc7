"""The checkpoint as llama.cpp reads it: one GGUF file of the same bf16 weights, no vocabulary.

Owns the names and shapes of both forms. Needs numpy, and to write also the package `gguf`: it runs
in the environment of llama_cpp, which has no torch.
"""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

ARCHITECTURE = "qwen3moe"
_FILE_TYPE_BF16 = 32


@dataclass(frozen=True, slots=True)
class GgufTensor:
    """One tensor of the file. sources: its parts in the checkpoint.

    is_stacked: the parts, one an expert, get a new first axis. is_float32: norms and routers, which
    llama.cpp keeps in single precision.
    """

    name: str
    sources: tuple[str, ...]
    is_stacked: bool = False
    is_float32: bool = False


# (GGUF, checkpoint) within a layer; both add ".weight"
_LAYER_NORMS = (
    ("attn_norm", "input_layernorm"),
    ("ffn_norm", "post_attention_layernorm"),
    ("attn_q_norm", "self_attn.q_norm"),
    ("attn_k_norm", "self_attn.k_norm"),
    ("ffn_gate_inp", "mlp.gate"),
)
_LAYER_MATRICES = (
    ("attn_q", "self_attn.q_proj"),
    ("attn_k", "self_attn.k_proj"),
    ("attn_v", "self_attn.v_proj"),
    ("attn_output", "self_attn.o_proj"),
)
_EXPERT_MATRICES = (
    ("ffn_gate_exps", "gate_proj"),
    ("ffn_up_exps", "up_proj"),
    ("ffn_down_exps", "down_proj"),
)


def gguf_tensors(config: Mapping[str, Any]) -> Iterator[GgufTensor]:
    """Yield the tensors of the file in its order. config: the checkpoint's config.json."""
    yield GgufTensor("token_embd.weight", ("model.embed_tokens.weight",))
    for layer in range(config["num_hidden_layers"]):
        ours, theirs = f"model.layers.{layer}", f"blk.{layer}"
        for name, source in _LAYER_NORMS:
            sources = (f"{ours}.{source}.weight",)
            yield GgufTensor(f"{theirs}.{name}.weight", sources, is_float32=True)
        for name, source in _LAYER_MATRICES:
            yield GgufTensor(f"{theirs}.{name}.weight", (f"{ours}.{source}.weight",))
        for name, source in _EXPERT_MATRICES:
            experts = tuple(
                f"{ours}.mlp.experts.{expert}.{source}.weight"
                for expert in range(config["num_experts"])
            )
            yield GgufTensor(f"{theirs}.{name}.weight", experts, is_stacked=True)
    yield GgufTensor("output_norm.weight", ("model.norm.weight",), is_float32=True)
    yield GgufTensor("output.weight", ("lm_head.weight",))


def gguf_metadata(config: Mapping[str, Any]) -> dict[str, int | float | str]:
    """Return what the file says beside its tensors: an int is a uint32 there, a float a float32."""
    of_model = {
        "vocab_size": config["vocab_size"],
        "context_length": config["max_position_embeddings"],
        "embedding_length": config["hidden_size"],
        "block_count": config["num_hidden_layers"],
        "feed_forward_length": config["intermediate_size"],
        "attention.head_count": config["num_attention_heads"],
        "attention.head_count_kv": config["num_key_value_heads"],
        "attention.key_length": config["head_dim"],
        "attention.value_length": config["head_dim"],
        "attention.layer_norm_rms_epsilon": config["rms_norm_eps"],
        "rope.dimension_count": config["head_dim"],
        "rope.freq_base": config["rope_theta"],
        "expert_count": config["num_experts"],
        "expert_used_count": config["num_experts_per_tok"],
        "expert_feed_forward_length": config["moe_intermediate_size"],
    }
    return {
        "general.file_type": _FILE_TYPE_BF16,
        "tokenizer.ggml.model": "no_vocab",
        **{f"{ARCHITECTURE}.{key}": value for key, value in of_model.items()},
    }


class Checkpoint:
    """The bf16 tensors of a folder of safetensors files, read where they lie."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        index = json.loads((folder / "model.safetensors.index.json").read_text())
        self._file_of: dict[str, str] = index["weight_map"]
        self._files: dict[str, tuple[dict[str, Any], NDArray[np.uint8]]] = {}

    def tensor(self, name: str) -> NDArray[np.uint16]:
        """Return the bits of a tensor in its shape. Raises ValueError if it is not bf16."""
        header, contents = self._file(self._file_of[name])
        entry = header[name]
        if entry["dtype"] != "BF16":
            raise ValueError(f"{name} is {entry['dtype']}; only BF16 checkpoints are converted")
        start, end = entry["data_offsets"]
        return contents[start:end].view(np.uint16).reshape(entry["shape"])

    def _file(self, name: str) -> tuple[dict[str, Any], NDArray[np.uint8]]:
        """Return a file's header and, mapped, the bytes that its offsets count in."""
        if name not in self._files:
            contents = np.memmap(self._folder / name, dtype=np.uint8, mode="r")
            size = int(contents[:8].view("<u8")[0])
            header = json.loads(contents[8 : 8 + size].tobytes())
            self._files[name] = header, contents[8 + size :]
        return self._files[name]


def gguf_bytes(tensor: GgufTensor, checkpoint: Checkpoint) -> NDArray[np.uint8 | np.float32]:
    """Return what the file holds of a tensor: float32, or the bytes of bf16 (last axis doubled)."""
    parts = [checkpoint.tensor(source) for source in tensor.sources]
    bits = np.stack(parts) if tensor.is_stacked else parts[0]
    if tensor.is_float32:
        return (bits.astype(np.uint32) << 16).view(np.float32)
    return bits.view(np.uint8)


def gguf_file(folder: Path) -> Path:
    """Return the GGUF file beside a checkpoint's folder, writing it if it is not there.

    It appears under its name only when it is complete. Raises ModuleNotFoundError when it is not
    there and the package `gguf` is not installed.
    """
    path = folder.with_name(f"{folder.name}-bf16.gguf")
    if not path.exists():
        print(f"writing {path.name}", file=sys.stderr)
        partial = path.with_name(f".{path.name}.{os.getpid()}")
        try:
            _write(folder, partial)
            partial.rename(path)
        finally:
            partial.unlink(missing_ok=True)
    return path


def _write(folder: Path, path: Path) -> None:
    """Write the file; two passes, so that no more than one tensor is in memory."""
    import gguf  # type: ignore[import-not-found, unused-ignore]  # of llama_cpp's environment only

    config = json.loads((folder / "config.json").read_text())
    checkpoint = Checkpoint(folder)
    writer = gguf.GGUFWriter(path, ARCHITECTURE)
    for key, value in gguf_metadata(config).items():
        if isinstance(value, str):
            writer.add_string(key, value)
        elif isinstance(value, float):
            writer.add_float32(key, value)
        else:
            writer.add_uint32(key, value)
    types = gguf.GGMLQuantizationType
    for tensor in gguf_tensors(config):
        contents = gguf_bytes(tensor, checkpoint)
        kind = types.F32 if tensor.is_float32 else types.BF16
        writer.add_tensor_info(
            tensor.name, contents.shape, contents.dtype, contents.nbytes, raw_dtype=kind
        )
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_ti_data_to_file()
    for tensor in gguf_tensors(config):
        writer.write_tensor_data(gguf_bytes(tensor, checkpoint))
    writer.close()
