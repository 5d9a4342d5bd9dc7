"""Find which tensors a model folder holds: one safetensors file, or several with an index.

Reads headers only. Does not know which tensors a model needs.
"""

from __future__ import annotations

import hashlib
import os
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path

from moe_serve.errors import CheckpointError
from moe_serve.models.hf_config import CONFIG_FILE, HFConfig, require_folder
from moe_serve.models.safetensors_file import TensorInfo, opened, read_header, read_into
from moe_serve.models.strict_json import read_object, shown, unreadable

SINGLE_FILE = "model.safetensors"
INDEX_FILE = "model.safetensors.index.json"
MAX_PROBLEMS = 10
PICKLE_SUFFIXES = (".bin", ".pt", ".pth")
SAMPLES_PER_FILE = 64
SAMPLE_BYTES = 4096


@dataclass(frozen=True, slots=True)
class Checkpoint:
    """The tensors of a folder, by name; listing: the file that says which there are."""

    folder: Path
    listing: Path
    tensors: dict[str, TensorInfo]

    @classmethod
    def open(cls, folder: Path) -> Checkpoint:
        """Read and check the headers in `folder`: model.safetensors, or what its index names."""
        require_folder(folder)
        single, index = folder / SINGLE_FILE, folder / INDEX_FILE
        if os.path.lexists(single):
            return cls(folder, single, read_header(single).tensors)
        if os.path.lexists(index):
            return cls(folder, index, _indexed_tensors(index))
        raise CheckpointError(_no_weights(folder))


def model_hash(folder: Path, *, counts_time: bool = True) -> str:
    """Return a cheap identity of a checkpoint, in hex: a sha256, without reading it all.

    counts_time: also of when the files were changed, which weights must be sure of; statistics of a
    model (traces, profiles) serve a copy as well, and leave it out.

    It is of config.json and, for each weight file: name, size, header, time of last change (ns) and
    64 blocks of 4,096 bytes spread evenly over the file. Fine-tunes of a model have the same
    config, headers and sizes; where training changed most weights the blocks tell them apart, where
    it changed few the time does. So a copy that does not keep the time has another hash, though the
    weights are the same: what is keyed by it is then made once more, which is never wrong.
    """
    require_folder(folder)
    try:
        digest = hashlib.sha256((folder / CONFIG_FILE).read_bytes())
    except OSError as error:
        raise unreadable(folder / CONFIG_FILE, error) from error
    for path in sorted(folder.glob("*.safetensors")):
        header = read_header(path)
        digest.update(f"\n{path.name} {header.file_bytes} ".encode() + header.sha256)
        with opened(path) as descriptor:
            if counts_time:
                digest.update(f" {os.fstat(descriptor).st_mtime_ns} ".encode())
            for block in _samples(descriptor, path, header.file_bytes):
                digest.update(block)
    return digest.hexdigest()


def _samples(descriptor: int, path: Path, file_bytes: int) -> Iterator[bytes]:
    """Read blocks at even distances from an open file, its first and its last among them."""
    size = min(SAMPLE_BYTES, file_bytes)
    places = {
        index * (file_bytes - size) // (SAMPLES_PER_FILE - 1) for index in range(SAMPLES_PER_FILE)
    }
    for place in sorted(places):
        block = bytearray(size)
        read_into(descriptor, place, memoryview(block), path)
        yield bytes(block)


def _indexed_tensors(index: Path) -> dict[str, TensorInfo]:
    """Return the tensors that an index names, from the headers of the files it names."""
    weight_map = HFConfig(read_object(index), index).section("weight_map")
    if weight_map is None:
        raise CheckpointError(f"{index}: has no weight_map")
    for name, file in weight_map.raw.items():
        if not isinstance(file, str) or not _is_plain_name(file):
            raise CheckpointError(
                f"{index}: weight_map puts {shown(name)} in {shown(file)}; it must be the name "
                "of a .safetensors file in the same folder"
            )
    files = sorted(set(weight_map.raw.values()))
    absent = [file for file in files if not (index.parent / file).exists()]
    raise_if_any(
        index, (f"{index.parent / file}: is missing; {index.name} names it" for file in absent)
    )
    stored = {file: read_header(index.parent / file).tensors for file in files}
    tensors = {
        name: stored[file][name] for name, file in weight_map.raw.items() if name in stored[file]
    }
    raise_if_any(
        index,
        (
            f"{index}: weight_map puts {shown(name)} in {file}, which does not hold it"
            for name, file in weight_map.raw.items()
            if name not in tensors
        ),
    )
    return tensors


def _is_plain_name(file: str) -> bool:
    """Return whether `file` names a .safetensors file in the folder itself, and no other place."""
    return file.endswith(".safetensors") and not any(part in file for part in ("/", "\\", "\0"))


def _no_weights(folder: Path) -> str:
    """Say why `folder` cannot be loaded from, by what is there instead of safetensors."""
    names = sorted(path.name for path in folder.iterdir())
    pickles = [name for name in names if name.endswith(PICKLE_SUFFIXES)]
    others = [name for name in names if name.endswith(".safetensors")]
    if others:
        return (
            f"{folder}: has {others[0]} but neither {SINGLE_FILE} nor {INDEX_FILE}; "
            "fetch the index too"
        )
    if pickles:
        return (
            f"{folder}: has only {pickles[0]}; weights are read from safetensors files only, "
            "since the other forms can run code: load it with transformers where you trust it, "
            "and write it with save_pretrained(folder, safe_serialization=True)"
        )
    return f"{folder}: has neither {SINGLE_FILE} nor {INDEX_FILE}"


def raise_if_any(where: Path, problems: Iterable[str]) -> None:
    """Raise one CheckpointError of the first MAX_PROBLEMS of `problems`, if there are any."""
    found = list(problems)
    if len(found) == 1:
        raise CheckpointError(found[0])
    if found:
        lines = found[:MAX_PROBLEMS]
        if len(found) > MAX_PROBLEMS:
            lines.append(f"and {len(found) - MAX_PROBLEMS} more")
        raise CheckpointError(f"{where}: {len(found)} problems:\n  " + "\n  ".join(lines))
