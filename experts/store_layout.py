"""The form of a store: which record lies where in its file, and the header that says whose it is.

A file is a header, then the records, each aligned to 4,096 bytes, in the order of (layer, expert):
where one lies follows from both. Knows no files.
"""

from __future__ import annotations

import re
import struct
import zlib
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import torch

from moe_serve.experts.records import RECORD_ALIGNMENT, RecordHeader
from moe_serve.kernels.moe.base import HEADER_BYTES
from moe_serve.kernels.native.crc32 import crc32

MAGIC = b"MOESTORE"
VERSION = 1
MODEL_ID_BYTES = 16
# enough for 4,096 layers; a model of up to 244 has a header of 4,096 bytes
MAX_STORE_HEADER_BYTES = 2**17

_NUMERICS_BYTES = 96
# magic, version, bytes of the header, layers, zero, bytes of the file, numerics, record header
_FIXED = struct.Struct(f"<8sIIIIQ{_NUMERICS_BYTES}s{HEADER_BYTES}s")
_LAYER = struct.Struct("<IIQ")  # layer, experts, bytes of a record
_CRC = struct.Struct("<I")  # the last bytes of the header: of all before them
_NAME_LENGTH = 64


@dataclass(frozen=True, slots=True)
class StoredLayer:
    """A layer's experts in a store. layer: of the model, counted with those that have none."""

    layer: int
    num_experts: int
    record_bytes: int

    @property
    def num_bytes(self) -> int:
        return self.num_experts * self.record_bytes


@dataclass(frozen=True, slots=True)
class StoreLayout:
    """What a store holds: a model's experts, as one set of kernels has them.

    model_id: 16 bytes, of the model's hash. numerics_id: of the kernels and the dtype; it is ASCII,
    at most 96 bytes. record_layout: the kernels'. layers: those with experts, in rising order.
    """

    model_id: bytes
    numerics_id: str
    record_layout: int
    dtype: torch.dtype
    layers: tuple[StoredLayer, ...]

    def __post_init__(self) -> None:
        assert len(self.model_id) == MODEL_ID_BYTES, self.model_id
        assert self.numerics_id.isascii(), self.numerics_id
        assert len(self.numerics_id) <= _NUMERICS_BYTES, self.numerics_id
        assert all(stored.record_bytes % RECORD_ALIGNMENT == 0 for stored in self.layers)
        assert self.header_bytes <= MAX_STORE_HEADER_BYTES, len(self.layers)

    @property
    def header_bytes(self) -> int:
        """Of the file's header: where the first record begins."""
        size = _FIXED.size + len(self.layers) * _LAYER.size + _CRC.size
        return -(-size // RECORD_ALIGNMENT) * RECORD_ALIGNMENT

    @property
    def total_bytes(self) -> int:
        """Of the whole file."""
        return self.header_bytes + sum(stored.num_bytes for stored in self.layers)

    def first_bytes(self) -> dict[int, int]:
        """Return where the first record of each layer begins."""
        places, at = {}, self.header_bytes
        for stored in self.layers:
            places[stored.layer] = at
            at += stored.num_bytes
        return places

    def records(self) -> Iterator[tuple[StoredLayer, int]]:
        """Give (layer, expert) of all records, in the file's order."""
        for stored in self.layers:
            for expert in range(stored.num_experts):
                yield stored, expert

    def record_header(self, stored: StoredLayer, expert: int, crc32: int) -> RecordHeader:
        """Return what a record says of itself; crc32: see `record_crc`."""
        return RecordHeader(
            self.record_layout,
            self.dtype,
            self.model_id,
            stored.layer,
            expert,
            stored.record_bytes,
            crc32,
        )

    def pack(self) -> bytes:
        """Return the header of the file."""
        shared = RecordHeader(self.record_layout, self.dtype, self.model_id, 0, 0, 0).pack()
        fixed = _FIXED.pack(
            MAGIC, VERSION, self.header_bytes, len(self.layers), 0, self.total_bytes,
            self.numerics_id.encode(), shared,
        )  # fmt: skip
        layers = b"".join(
            _LAYER.pack(stored.layer, stored.num_experts, stored.record_bytes)
            for stored in self.layers
        )
        header = (fixed + layers).ljust(self.header_bytes - _CRC.size, b"\0")
        return header + _CRC.pack(zlib.crc32(header))

    @classmethod
    def unpack(cls, data: bytes) -> StoreLayout:
        """Read a header; data: the first MAX_STORE_HEADER_BYTES of a file, or all that it has.

        Raises ValueError that says why it is none.
        """
        if len(data) < RECORD_ALIGNMENT:
            raise ValueError(f"has {len(data)} bytes, less than a header")
        magic, version, size, num_layers, _, _, numerics, shared = _FIXED.unpack_from(data)
        if magic != MAGIC:
            raise ValueError(f"is no store of experts: it begins with {magic!r}")
        if version != VERSION:
            raise ValueError(f"is of version {version}; this program reads version {VERSION}")
        end = size - _CRC.size
        room = end - _FIXED.size
        if not _CRC.size < size <= len(data) or num_layers * _LAYER.size > room:
            raise ValueError(f"has a damaged header: {size} bytes for {num_layers} layers")
        if _CRC.unpack_from(data, end)[0] != zlib.crc32(data[:end]):
            raise ValueError("has a damaged header: its checksum does not fit")
        record = RecordHeader.unpack(shared)
        entries = data[_FIXED.size : _FIXED.size + num_layers * _LAYER.size]
        return cls(
            record.model_id,
            numerics.rstrip(b"\0").decode("ascii"),
            record.layout,
            record.dtype,
            tuple(StoredLayer(*entry) for entry in _LAYER.iter_unpack(entries)),
        )

    def difference(self, found: StoreLayout) -> str | None:
        """Say in what `found`, of a file, is not this layout, or None."""
        if found.model_id != self.model_id:
            return f"is of model {found.model_id.hex()}; wanted is {self.model_id.hex()}"
        if found.numerics_id != self.numerics_id:
            return f"was packed for numerics {found.numerics_id}; wanted is {self.numerics_id}"
        if (found.record_layout, found.dtype) != (self.record_layout, self.dtype):
            return (
                f"holds records of layout {found.record_layout} in {found.dtype}; "
                f"wanted is layout {self.record_layout} in {self.dtype}"
            )
        if found.layers != self.layers:
            return "holds other layers, or records of another size, than the model has"
        return None


def record_crc(record: memoryview) -> int:
    """Return the crc32 of a record: of all behind its header of 64 bytes, padding included."""
    return crc32(record[HEADER_BYTES:])


def store_path(folder: Path, name: str, layout: StoreLayout) -> Path:
    """Return where the store of a model called `name` lies in the cache folder `folder`.

    The model's identity and the numerics are in the file's name: stores of several live together.
    """
    readable = re.sub(r"[^A-Za-z0-9._-]+", "-", name).strip("-.")[:_NAME_LENGTH] or "model"
    return folder / f"{readable}-{layout.model_id.hex()[:16]}-{layout.numerics_id}.experts"
