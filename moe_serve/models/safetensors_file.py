"""Read the safetensors format: check a file's header, and read bytes from where it says.

Files are read with preadv, never through a memory map: mapped pages count as this process's memory,
and a file that is cut short under a map kills the process. Nothing here knows what tensors mean.
"""

from __future__ import annotations

import hashlib
import math
import os
import stat
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from moe_serve.errors import CheckpointError
from moe_serve.models.strict_json import parse_object, shown, unreadable

MAX_HEADER_BYTES = 100_000_000
MAX_DIMENSIONS = 16
LENGTH_BYTES = 8

# Of every dtype that the format has; which of them a model can be read from is the loader's choice.
BITS_OF_DTYPE = {
    "F4": 4,
    **dict.fromkeys(("F6_E2M3", "F6_E3M2"), 6),
    **dict.fromkeys(("BOOL", "U8", "I8", "F8_E5M2", "F8_E4M3", "F8_E8M0"), 8),
    **dict.fromkeys(("F8_E4M3FNUZ", "F8_E5M2FNUZ"), 8),
    **dict.fromkeys(("U16", "I16", "F16", "BF16"), 16),
    **dict.fromkeys(("U32", "I32", "F32"), 32),
    **dict.fromkeys(("U64", "I64", "F64", "C64"), 64),
}


@dataclass(frozen=True, slots=True)
class TensorInfo:
    """Where one tensor lies: num_bytes from byte `offset` of the file at `path`."""

    path: Path
    name: str
    dtype: str
    shape: tuple[int, ...]
    offset: int
    num_bytes: int


@dataclass(frozen=True, slots=True)
class Header:
    """What a safetensors file holds; checked: in range, no gaps, no overlaps, no bytes left over.

    sha256: of the header's bytes; file_bytes: the size of the whole file.
    """

    path: Path
    tensors: dict[str, TensorInfo]
    file_bytes: int
    sha256: bytes


@contextmanager
def opened(path: Path) -> Iterator[int]:
    """Open the regular file at `path` (or the one that it links to); give its descriptor."""
    try:
        # before it is opened: opening a pipe would wait for ever
        if not stat.S_ISREG(path.stat().st_mode):
            raise CheckpointError(f"{path}: not a regular file")
        descriptor = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
    except OSError as error:
        raise unreadable(path, error) from error
    try:
        yield descriptor
    finally:
        os.close(descriptor)


def read_into(descriptor: int, offset: int, into: memoryview, path: Path) -> None:
    """Fill `into` (bytes) from byte `offset` of an open file; `path` is for messages."""
    while len(into):
        try:
            count = os.preadv(descriptor, [into], offset)
        except OSError as error:
            raise unreadable(path, error) from error
        if count == 0:
            raise CheckpointError(
                f"{path}: ends at byte {offset}, {len(into)} bytes too soon; fetch the file again"
            )
        offset += count
        into = into[count:]


def read_header(path: Path) -> Header:
    """Read and check the header of the file at `path`; no weights are read."""
    with opened(path) as descriptor:
        file_bytes = os.fstat(descriptor).st_size
        length = bytearray(LENGTH_BYTES)
        read_into(descriptor, 0, memoryview(length), path)
        header_bytes = int.from_bytes(length, "little")
        if header_bytes > MAX_HEADER_BYTES:
            raise CheckpointError(
                f"{path}: the header says that it is {header_bytes} bytes long; at most "
                f"{MAX_HEADER_BYTES} are read: this is no safetensors file"
            )
        if LENGTH_BYTES + header_bytes > file_bytes:
            raise CheckpointError(
                f"{path}: the header says that it is {header_bytes} bytes long, but the file has "
                f"{file_bytes}; fetch the file again"
            )
        text = bytearray(header_bytes)
        read_into(descriptor, LENGTH_BYTES, memoryview(text), path)
    fields = parse_object(bytes(text), f"{path}: header")
    fields.pop("__metadata__", None)
    start = LENGTH_BYTES + header_bytes
    tensors = {name: _tensor_info(path, name, entry, start) for name, entry in fields.items()}
    _check_extents(path, tensors, start, file_bytes)
    return Header(path, tensors, file_bytes, hashlib.sha256(text).digest())


def _tensor_info(path: Path, name: str, entry: Any, start: int) -> TensorInfo:
    """Check one entry of a header on its own; `start` is where the file's data begins."""
    where = f"{path}: header: {shown(name)}"
    if not isinstance(entry, dict):
        raise CheckpointError(f"{where} is {shown(entry)}; it must be an object")
    for field in ("dtype", "shape", "data_offsets"):
        if field not in entry:
            raise CheckpointError(f"{where} has no {field}")
    dtype, shape, offsets = entry["dtype"], entry["shape"], entry["data_offsets"]
    if not isinstance(dtype, str) or dtype not in BITS_OF_DTYPE:
        raise CheckpointError(f"{where}: dtype {shown(dtype)} is not one of {_known_dtypes()}")
    if not _are_sizes(shape) or len(shape) > MAX_DIMENSIONS:
        raise CheckpointError(
            f"{where}: shape is {shown(shape)}; it must be a list of integers from 0, "
            f"at most {MAX_DIMENSIONS}"
        )
    if not _are_sizes(offsets) or len(offsets) != 2 or offsets[0] > offsets[1]:
        raise CheckpointError(
            f"{where}: data_offsets is {shown(offsets)}; it must be [begin, end], from 0, "
            "and begin not after end"
        )
    num_bytes = offsets[1] - offsets[0]
    num_bits = math.prod(shape) * BITS_OF_DTYPE[dtype]
    if num_bits != num_bytes * 8:
        raise CheckpointError(
            f"{where}: data_offsets span {num_bytes} bytes, but {dtype} of shape {shape} "
            f"has {num_bits / 8:.12g}"
        )
    return TensorInfo(path, name, dtype, tuple(shape), start + offsets[0], num_bytes)


def _check_extents(path: Path, tensors: dict[str, TensorInfo], start: int, file_bytes: int) -> None:
    """Check that the tensors fill the file from byte `start` to its end, one after the other."""
    position = start
    for info in sorted(tensors.values(), key=lambda info: (info.offset, info.num_bytes)):
        if info.offset != position:
            what = "overlaps the one before it" if info.offset < position else "leaves a gap"
            raise CheckpointError(
                f"{path}: header: {shown(info.name)} {what}: it begins at byte "
                f"{info.offset - start} of the data, not at {position - start}"
            )
        position += info.num_bytes
        if position > file_bytes:
            raise CheckpointError(
                f"{path}: header: {shown(info.name)} ends at byte {position}, but the file has "
                f"{file_bytes}; fetch the file again"
            )
    if position != file_bytes:
        raise CheckpointError(
            f"{path}: {file_bytes - position} bytes after the last tensor, which ends at byte "
            f"{position} of {file_bytes}; fetch the file again"
        )


def _are_sizes(value: Any) -> bool:
    """Return whether `value` is a list of integers that are not negative."""
    return isinstance(value, list) and all(
        isinstance(item, int) and not isinstance(item, bool) and item >= 0 for item in value
    )


def _known_dtypes() -> str:
    return ", ".join(BITS_OF_DTYPE)
