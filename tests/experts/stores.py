"""A small store of random records, written as the engine does."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import torch
from torch import Tensor

from moe_serve.experts.packing import write_store
from moe_serve.experts.store_layout import StoredLayer, StoreLayout
from moe_serve.kernels.moe.base import HEADER_BYTES
from moe_serve.kernels.native.memory import allocate

# layers of two shapes, and one between them without experts
LAYOUT = StoreLayout(
    model_id=bytes(range(16)),
    numerics_id="cpu1-test-bfloat16",
    record_layout=1,
    dtype=torch.bfloat16,
    layers=(StoredLayer(2, 5, 8192), StoredLayer(4, 3, 3 * 4096)),
)


def weights_of(layer: int, expert: int, record_bytes: int) -> Tensor:
    """Return what lies behind a record's header: bytes that tell which it is."""
    generator = torch.Generator().manual_seed(1000 * layer + expert)
    size = (record_bytes - HEADER_BYTES,)
    return torch.randint(256, size, generator=generator, dtype=torch.uint8)


def batches(layout: StoreLayout = LAYOUT, size: int = 2) -> Iterator[Tensor]:
    """Give the packed records, without headers, `size` at a time."""
    for stored in layout.layers:
        for first in range(0, stored.num_experts, size):
            experts = range(first, min(first + size, stored.num_experts))
            records = torch.full((len(experts), stored.record_bytes), 255, dtype=torch.uint8)
            for record, expert in zip(records, experts, strict=True):
                record[HEADER_BYTES:] = weights_of(stored.layer, expert, stored.record_bytes)
            yield records


def written(folder: Path, layout: StoreLayout = LAYOUT) -> Path:
    """Write the store of `layout`; return where it is."""
    path = folder / "model.experts"
    write_store(path, layout, batches(layout))
    return path


def slot(num_bytes: int) -> Tensor:
    """Return a place for a record: aligned, and filled with what is no record."""
    return allocate(num_bytes).fill_(170)
