"""A tiny checkpoint, and the ways in which one can be broken: a table for several tests.

Each `BadCheckpoint` breaks a folder that `write_checkpoint` made; what then reads the folder must
fail with an error that holds all of `words`.
"""

from __future__ import annotations

import json
import os
import struct
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor

from moe_serve.models.hf_config import HFConfig
from moe_serve.models.registry import read_spec

SINGLE = "model.safetensors"
INDEX = "model.safetensors.index.json"
SHARDS = ("model-00001-of-00002.safetensors", "model-00002-of-00002.safetensors")
NORM = "model.norm.weight"

CONFIG: dict[str, Any] = {
    "model_type": "qwen3_moe",
    "architectures": ["Qwen3MoeForCausalLM"],
    "vocab_size": 32,
    "hidden_size": 16,
    "intermediate_size": 24,
    "moe_intermediate_size": 8,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 8,
    "num_experts": 4,
    "num_experts_per_tok": 2,
    "norm_topk_prob": True,
    "max_position_embeddings": 64,
    "rms_norm_eps": 1e-6,
    "rope_theta": 10000.0,
    "tie_word_embeddings": False,
    "dtype": "float32",
    "eos_token_id": 0,
}

Break = Callable[[Path], None]


@dataclass(frozen=True, slots=True)
class BadCheckpoint:
    """One way to break a folder. allocates: it can only be seen once weights are read."""

    name: str
    break_it: Break
    words: tuple[str, ...]
    is_sharded: bool = False
    allocates: bool = False


def write_checkpoint(folder: Path, *, is_sharded: bool = False) -> None:
    """Write a sound checkpoint of CONFIG: one file, or two and an index."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "config.json").write_text(json.dumps(CONFIG))
    tensors = source_tensors(folder)
    if not is_sharded:
        save_file(tensors, folder / SINGLE)
        return
    names = sorted(tensors)
    weight_map = {name: SHARDS[place % 2] for place, name in enumerate(names)}
    for shard in SHARDS:
        save_file({n: tensors[n] for n in names if weight_map[n] == shard}, folder / shard)
    (folder / INDEX).write_text(json.dumps({"metadata": {}, "weight_map": weight_map}))


def source_tensors(folder: Path) -> dict[str, Tensor]:
    """Make random tensors under the names that a checkpoint of the folder's config has."""
    spec = read_spec(HFConfig.read(folder))
    generator = torch.Generator().manual_seed(0)
    return {
        part.source: torch.randn(part.shape, generator=generator)
        for weight in spec.weights
        for part in weight.layouts[0]
    }


def edit_config(**fields: Any) -> Break:
    """Set fields of config.json."""

    def break_it(folder: Path) -> None:
        path = folder / "config.json"
        path.write_text(json.dumps({**json.loads(path.read_text()), **fields}))

    return break_it


def drop_field(name: str) -> Break:
    def break_it(folder: Path) -> None:
        path = folder / "config.json"
        fields = json.loads(path.read_text())
        del fields[name]
        path.write_text(json.dumps(fields))

    return break_it


def write_file(name: str, content: bytes) -> Break:
    def break_it(folder: Path) -> None:
        (folder / name).write_bytes(content)

    return break_it


def edit_index(**weight_map: Any) -> Break:
    """Set entries of the index; a name is written with "__" for each "."."""

    def break_it(folder: Path) -> None:
        path = folder / INDEX
        index = json.loads(path.read_text())
        index["weight_map"].update({k.replace("__", "."): v for k, v in weight_map.items()})
        path.write_text(json.dumps(index))

    return break_it


def edit_tensors(edit: Callable[[dict[str, Tensor]], object]) -> Break:
    """Write the single file again, after `edit` changed its tensors."""

    def break_it(folder: Path) -> None:
        tensors = source_tensors(folder)
        edit(tensors)
        save_file(tensors, folder / SINGLE)

    return break_it


def replace_norm(tensor: Tensor) -> Break:
    return edit_tensors(lambda tensors: tensors.update({NORM: tensor}))


def edit_entry(**fields: Any) -> Break:
    """Set fields of the final norm's entry in the header of the single file; None drops one."""

    def edit(header: dict[str, Any]) -> None:
        header[NORM].update(fields)
        header[NORM] = {name: value for name, value in header[NORM].items() if value is not None}

    return edit_header(edit)


def edit_header(edit: Callable[[dict[str, Any]], object]) -> Break:
    """Write the single file again, after `edit` changed its header and with the same data."""

    def break_it(folder: Path) -> None:
        header, data = split(folder / SINGLE)
        fields = json.loads(header)
        edit(fields)
        join(folder / SINGLE, json.dumps(fields).encode(), data)

    return break_it


def replace_header(header: bytes) -> Break:
    def break_it(folder: Path) -> None:
        join(folder / SINGLE, header, split(folder / SINGLE)[1])

    return break_it


def split(path: Path) -> tuple[bytes, bytes]:
    """Return the header and the data of a safetensors file."""
    content = path.read_bytes()
    (length,) = struct.unpack("<Q", content[:8])
    return content[8 : 8 + length], content[8 + length :]


def join(path: Path, header: bytes, data: bytes, *, length: int | None = None) -> None:
    """Write a safetensors file; `length` is what it says its header's length is."""
    path.write_bytes(struct.pack("<Q", len(header) if length is None else length) + header + data)


def cut(name: str, num_bytes: int) -> Break:
    """Take bytes off the end of a file."""

    def break_it(folder: Path) -> None:
        content = (folder / name).read_bytes()
        (folder / name).write_bytes(content[:-num_bytes])

    return break_it


def _only_bin(folder: Path) -> None:
    (folder / SINGLE).rename(folder / "pytorch_model.bin")


def _no_index(folder: Path) -> None:
    (folder / INDEX).unlink()


def _empty(folder: Path) -> None:
    for path in folder.iterdir():
        path.unlink()


def _no_folder(folder: Path) -> None:
    _empty(folder)
    folder.rmdir()


def _file_for_folder(folder: Path) -> None:
    _no_folder(folder)
    folder.write_text("{}")


def _dangling_link(folder: Path) -> None:
    (folder / SINGLE).unlink()
    (folder / SINGLE).symlink_to(folder / "gone")


def _pipe(folder: Path) -> None:
    (folder / SINGLE).unlink()
    os.mkfifo(folder / SINGLE)


def _folder_for_file(folder: Path) -> None:
    (folder / SINGLE).unlink()
    (folder / SINGLE).mkdir()


def _length_beyond_file(folder: Path) -> None:
    header, data = split(folder / SINGLE)
    join(folder / SINGLE, header, data, length=len(header) + len(data) + 1)


def _absurd_length(folder: Path) -> None:
    header, data = split(folder / SINGLE)
    join(folder / SINGLE, header, data, length=2**63)


def _duplicate_entry(folder: Path) -> None:
    header, data = split(folder / SINGLE)
    entry = json.dumps(json.loads(header)[NORM])
    join(folder / SINGLE, header.rstrip()[:-1] + f',"{NORM}":{entry}}}'.encode(), data)


def _shift(by: int) -> Break:
    """Move the last tensor of the file by some bytes, with its size as it was."""

    def edit(header: dict[str, Any]) -> None:
        entries = [entry for name, entry in header.items() if name != "__metadata__"]
        last = max(entries, key=lambda entry: int(entry["data_offsets"][1]))
        last["data_offsets"] = [offset + by for offset in last["data_offsets"]]

    return edit_header(edit)


def _trailing_bytes(folder: Path) -> None:
    with (folder / SINGLE).open("ab") as file:
        file.write(b"\0" * 12)


def _one_bad(value: float, dtype: torch.dtype = torch.float32) -> Tensor:
    tensor = torch.ones(CONFIG["hidden_size"], dtype=dtype)
    tensor[5] = value
    return tensor


_WRONG_NORM = torch.ones(CONFIG["hidden_size"] + 1)
_BYTE_NORM = torch.ones(CONFIG["hidden_size"], dtype=torch.int8)
_F8_NORM = torch.ones(CONFIG["hidden_size"]).to(torch.float8_e4m3fn)

BAD_CHECKPOINTS = (
    # the folder
    BadCheckpoint("empty-folder", _empty, ("empty", "config.json")),
    BadCheckpoint("no-folder", _no_folder, ("no such model folder",)),
    BadCheckpoint("file-for-folder", _file_for_folder, ("is a file",)),
    BadCheckpoint(
        "bin-only", _only_bin, ("pytorch_model.bin", "safetensors", "safe_serialization=True")
    ),
    BadCheckpoint("no-weights", lambda f: (f / SINGLE).unlink(), (SINGLE, INDEX)),
    BadCheckpoint("dangling-link", _dangling_link, (SINGLE, "cannot be read")),
    BadCheckpoint("pipe-for-file", _pipe, (SINGLE, "not a regular file")),
    BadCheckpoint("folder-for-file", _folder_for_file, (SINGLE, "not a regular file")),
    # config.json
    BadCheckpoint("no-config", lambda f: (f / "config.json").unlink(), ("no config.json",)),
    BadCheckpoint(
        "config-not-json", write_file("config.json", b"{'a': 1}"), ("config.json", "not JSON")
    ),
    BadCheckpoint(
        "config-not-utf8", write_file("config.json", b'{"a": "\xff"}'), ("config.json", "UTF-8")
    ),
    BadCheckpoint(
        "config-not-an-object", write_file("config.json", b"[1]"), ("config.json", "object")
    ),
    BadCheckpoint(
        "config-nan", write_file("config.json", b'{"rms_norm_eps": NaN}'), ("config.json", "NaN")
    ),
    BadCheckpoint(
        "config-too-deep", write_file("config.json", b'{"a":' * 200_000), ("config.json", "deep")
    ),
    BadCheckpoint(
        "config-name-twice",
        write_file("config.json", b'{"a": 1, "a": 2}'),
        ("config.json", "'a'", "twice"),
    ),
    BadCheckpoint(
        "config-5000-digits",
        write_file("config.json", b'{"hidden_size": ' + b"9" * 5000 + b"}"),
        ("config.json", "5000 digits"),
    ),
    BadCheckpoint("config-lacks-field", drop_field("hidden_size"), ("config.json", "hidden_size")),
    BadCheckpoint(
        "config-huge-integer", edit_config(vocab_size=2**40), ("vocab_size", str(2**40), "must be")
    ),
    BadCheckpoint(
        "config-negative", edit_config(num_hidden_layers=-1), ("num_hidden_layers", "-1", "must be")
    ),
    BadCheckpoint(
        "config-text-for-number", edit_config(num_experts="4"), ("num_experts", "'4'", "integer")
    ),
    BadCheckpoint(
        "config-rope-kind",
        edit_config(rope_scaling={"type": "su"}),
        ("rope_scaling", "'su'", "yarn"),
    ),
    BadCheckpoint(
        "config-rope-factor", edit_config(rope_scaling={"type": "linear"}), ("rope_scaling.factor",)
    ),
    BadCheckpoint(
        "config-quantised",
        edit_config(quantization_config={"quant_method": "gptq"}),
        ("quantization_config", "gptq", "not supported"),
    ),
    # the index
    BadCheckpoint(
        "missing-shard", lambda f: (f / SHARDS[1]).unlink(), (SHARDS[1], "missing"), is_sharded=True
    ),
    BadCheckpoint("no-index", _no_index, (SHARDS[0], INDEX), is_sharded=True),
    BadCheckpoint("index-not-json", write_file(INDEX, b"{"), (INDEX, "not JSON"), is_sharded=True),
    BadCheckpoint("index-empty", write_file(INDEX, b"{}"), (INDEX, "weight_map"), is_sharded=True),
    BadCheckpoint(
        "index-absent-tensor",
        edit_index(model__more=SHARDS[0]),
        (INDEX, "model.more", SHARDS[0]),
        is_sharded=True,
    ),
    BadCheckpoint(
        "index-absent-file",
        edit_index(model__more="b.safetensors"),
        ("b.safetensors", "missing"),
        is_sharded=True,
    ),
    BadCheckpoint(
        "index-escapes",
        edit_index(model__more="../b.safetensors"),
        (INDEX, "'../b.safetensors'"),
        is_sharded=True,
    ),
    BadCheckpoint(
        "index-absolute",
        edit_index(model__more="/b.safetensors"),
        (INDEX, "'/b.safetensors'"),
        is_sharded=True,
    ),
    BadCheckpoint(
        "index-number", edit_index(model__more=3), (INDEX, "model.more", "3"), is_sharded=True
    ),
    BadCheckpoint(
        "index-other-kind",
        edit_index(model__more="config.json"),
        (INDEX, "'config.json'", "name of a .safetensors file"),
        is_sharded=True,
    ),
    # the files
    BadCheckpoint(
        "truncated-shard", cut(SHARDS[1], 10), (SHARDS[1], "fetch the file again"), is_sharded=True
    ),
    BadCheckpoint("truncated-file", cut(SINGLE, 1), (SINGLE, "fetch the file again")),
    BadCheckpoint("empty-file", write_file(SINGLE, b""), (SINGLE, "ends at byte 0")),
    BadCheckpoint("four-bytes", write_file(SINGLE, b"\x10\0\0\0"), (SINGLE, "ends at byte 4")),
    BadCheckpoint("absurd-header-length", _absurd_length, (SINGLE, str(2**63))),
    BadCheckpoint("header-beyond-file", _length_beyond_file, (SINGLE, "header")),
    BadCheckpoint("header-not-json", replace_header(b"{]"), (SINGLE, "header", "not JSON")),
    BadCheckpoint("header-not-an-object", replace_header(b"[]"), (SINGLE, "header", "object")),
    BadCheckpoint("header-name-twice", _duplicate_entry, (SINGLE, NORM, "twice")),
    BadCheckpoint("overlapping-offsets", _shift(-4), (SINGLE, "overlaps")),
    BadCheckpoint("gap", _shift(4), (SINGLE, "gap")),
    BadCheckpoint("trailing-bytes", _trailing_bytes, (SINGLE, "12 bytes after")),
    BadCheckpoint(
        "offset-beyond-end", edit_entry(data_offsets=[10**9, 10**9 + 64]), (SINGLE, NORM, "gap")
    ),
    BadCheckpoint(
        "longer-than-file", edit_entry(shape=[10**9], data_offsets=[0, 4 * 10**9]), (SINGLE, NORM)
    ),
    BadCheckpoint("span-not-shape", edit_entry(shape=[17]), (SINGLE, NORM, "span 64 bytes", "68")),
    BadCheckpoint("huge-shape", edit_entry(shape=[2**62] * 4), (SINGLE, NORM, "span 64 bytes")),
    BadCheckpoint("negative-shape", edit_entry(shape=[-16]), (SINGLE, NORM, "-16")),
    BadCheckpoint("negative-twice", edit_entry(shape=[-4, -4]), (SINGLE, NORM, "integers from 0")),
    BadCheckpoint("boolean-shape", edit_entry(shape=[16, True]), (SINGLE, NORM, "True")),
    BadCheckpoint("unknown-dtype", edit_entry(dtype="F128"), (SINGLE, NORM, "'F128'")),
    BadCheckpoint("entry-lacks-dtype", edit_entry(dtype=None), (SINGLE, NORM, "no dtype")),
    BadCheckpoint("backward-offsets", edit_entry(data_offsets=[64, 0]), (SINGLE, NORM, "[64, 0]")),
    # what the model needs
    BadCheckpoint("missing-tensor", edit_tensors(lambda t: t.pop(NORM)), (SINGLE, NORM, "[16]")),
    BadCheckpoint("wrong-shape", replace_norm(_WRONG_NORM), (SINGLE, NORM, "[17]", "[16]")),
    BadCheckpoint("int8-weights", replace_norm(_BYTE_NORM), (SINGLE, NORM, "I8", "quantised")),
    BadCheckpoint("float8-weights", replace_norm(_F8_NORM), (SINGLE, NORM, "F8_E4M3", "quantised")),
    BadCheckpoint(
        "nan-weight",
        replace_norm(_one_bad(float("nan"))),
        (SINGLE, NORM, "nan", "element 5"),
        allocates=True,
    ),
    BadCheckpoint(
        "infinite-weight",
        replace_norm(_one_bad(float("-inf"))),
        (SINGLE, NORM, "-inf", "element 5"),
        allocates=True,
    ),
    BadCheckpoint(
        "weight-beyond-dtype",
        replace_norm(_one_bad(1e39, torch.float64)),
        (SINGLE, NORM, "1e+39", "does not fit float32"),
        allocates=True,
    ),
)
