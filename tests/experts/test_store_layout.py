"""The form of a store: bytes of its header, places of its records, its name."""

from __future__ import annotations

import struct
import zlib
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from moe_serve.experts.records import RecordHeader
from moe_serve.experts.store_layout import (
    MAX_STORE_HEADER_BYTES,
    StoredLayer,
    StoreLayout,
    store_path,
)
from tests.experts.stores import LAYOUT

MANY_LAYERS = replace(LAYOUT, layers=tuple(StoredLayer(i, 7, 4096) for i in range(4096)))


@pytest.mark.parametrize(
    "layout",
    [LAYOUT, replace(LAYOUT, layers=()), replace(LAYOUT, dtype=torch.float32), MANY_LAYERS],
    ids=["two-layers", "none", "fp32", "4096-layers"],
)
def test_header_round_trip(layout: StoreLayout) -> None:
    header = layout.pack()
    assert len(header) == layout.header_bytes <= MAX_STORE_HEADER_BYTES
    assert StoreLayout.unpack(header) == layout
    assert StoreLayout.unpack(header + b"records") == layout


def test_header_bytes_are_fixed() -> None:
    # what is written today must be read, or refused, by what comes later
    record = RecordHeader(1, torch.bfloat16, bytes(range(16)), 0, 0, 0).pack()
    expected = struct.pack(
        "<8s4IQ96s64s6Q", b"MOESTORE", 1, 4096, 2, 0, 4096 + 5 * 8192 + 3 * 12288,
        b"cpu1-test-bfloat16", record, 2 | 5 << 32, 8192, 4 | 3 << 32, 12288, 0, 0,
    ).ljust(4092, b"\0")  # fmt: skip
    assert LAYOUT.pack() == expected + struct.pack("<I", zlib.crc32(expected))


def test_places_follow_from_layer_and_expert() -> None:
    assert LAYOUT.first_bytes() == {2: 4096, 4: 4096 + 5 * 8192}
    assert LAYOUT.total_bytes == 4096 + 5 * 8192 + 3 * 12288
    records = [(stored.layer, expert) for stored, expert in LAYOUT.records()]
    assert records == [(2, 0), (2, 1), (2, 2), (2, 3), (2, 4), (4, 0), (4, 1), (4, 2)]


def test_every_flipped_byte_of_a_header_is_seen() -> None:
    header = LAYOUT.pack()
    for place in (*range(300), 2000, 4091, 4092, 4095):
        broken = bytearray(header)
        broken[place] ^= 4
        with pytest.raises(ValueError, match=r"no store of experts|of version|damaged header"):
            StoreLayout.unpack(bytes(broken))


def test_headers_that_are_cut_off_are_refused() -> None:
    header = MANY_LAYERS.pack()
    for size in (0, 7, 4095, 4096, len(header) - 1):
        with pytest.raises(ValueError, match=r"less than a header|damaged header"):
            StoreLayout.unpack(header[:size])


@pytest.mark.parametrize(
    ("other", "words"),
    [
        (replace(LAYOUT, model_id=bytes(16)), "is of model 0000"),
        (replace(LAYOUT, numerics_id="x"), "packed for numerics x; wanted is cpu1-test-bfloat16"),
        (replace(LAYOUT, record_layout=0), "records of layout 0 in torch.bfloat16; wanted is"),
        (replace(LAYOUT, dtype=torch.float32), "records of layout 1 in torch.float32; wanted is"),
        (replace(LAYOUT, layers=LAYOUT.layers[:1]), "other layers"),
    ],
    ids=["model", "numerics", "layout", "dtype", "layers"],
)
def test_what_differs_is_named(other: StoreLayout, words: str) -> None:
    assert words in str(LAYOUT.difference(other))
    assert LAYOUT.difference(StoreLayout.unpack(LAYOUT.pack())) is None


@pytest.mark.parametrize(
    ("name", "readable"),
    [
        ("demo-moe", "demo-moe"),
        ("org/Model 7B", "org-Model-7B"),
        ("../..", "model"),
        ("", "model"),
        ("m" * 300, "m" * 64),
    ],
    ids=["plain", "hub", "dots", "empty", "long"],
)
def test_file_names(name: str, readable: str) -> None:
    path = store_path(Path("cache"), name, LAYOUT)
    assert path.parent == Path("cache")
    assert path.name == f"{readable}-0001020304050607-cpu1-test-bfloat16.experts"
