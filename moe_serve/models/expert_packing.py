"""From a model's weights to a store of its experts: a few at a time, so that no model need fit.

Decides what a store must hold and fills it; how it lies in a file is the store's own business.
"""

from __future__ import annotations

import glob
import logging
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path

import torch
from torch import Tensor

from moe_serve.errors import StoreError
from moe_serve.experts.packing import write_store
from moe_serve.experts.records import RECORD_ALIGNMENT
from moe_serve.experts.store import ExpertStore
from moe_serve.experts.store_layout import MODEL_ID_BYTES, StoredLayer, StoreLayout
from moe_serve.kernels.moe.base import plain_weights
from moe_serve.kernels.native.memory import allocate
from moe_serve.kernels.suite import Kernels
from moe_serve.models.expert_weights import expert_names, moe_layers
from moe_serve.models.spec import ModelSpec

logger = logging.getLogger(__name__)

BATCH_BYTES = 2**26  # of records that are in memory at once, unless one alone is larger

# Given tensors by name, and which experts they are of, fills them: `WeightReader.read`, or
# `fill_dummy_rows` of a spec.
FillExperts = Callable[[Mapping[str, Tensor], range], None]


def store_layout(
    spec: ModelSpec, dtype: torch.dtype, kernels: Kernels, model_hash: str, numerics_id: str
) -> StoreLayout:
    """Return what a store of this model must hold to serve these kernels.

    model_hash: hex, of `checkpoint_folder.model_hash` or `dummy_hash`. numerics_id: of kernels and
    dtype, as the engine reports it.
    """
    stored = []
    for layer in moe_layers(spec):
        moe = spec.layers[layer].moe
        assert moe is not None
        size = kernels.record_bytes(spec.hidden_size, moe.intermediate_size, dtype)
        record_bytes = -(-size // RECORD_ALIGNMENT) * RECORD_ALIGNMENT
        stored.append(StoredLayer(layer, moe.router.num_experts, record_bytes))
    model_id = bytes.fromhex(model_hash)[:MODEL_ID_BYTES]
    return StoreLayout(model_id, numerics_id, kernels.record_layout, dtype, tuple(stored))


def open_or_pack(
    path: Path,
    layout: StoreLayout,
    spec: ModelSpec,
    kernels: Kernels,
    fill: FillExperts,
    on_progress: Callable[[int, int], None] | None = None,
) -> ExpertStore:
    """Return the store at `path`, packed anew where it is absent or is not what `layout` wants.

    Raises as `pack_store` does.
    """
    if path.exists():
        try:
            return ExpertStore.open(path, layout)
        except StoreError as error:
            logger.warning("%s; it is packed anew", error)
    _tell_others(path, layout)
    pack_store(path, layout, spec, kernels, fill, on_progress)
    return ExpertStore.open(path, layout)


def _tell_others(path: Path, layout: StoreLayout) -> None:
    """Say which files hold a model of this name: nobody else would remove what is out of date."""
    name = path.name.partition(f"-{layout.model_id.hex()[:16]}-")[0]
    others = [p for p in path.parent.glob(f"{glob.escape(name)}-*.experts") if p != path]
    if others:
        logger.warning(
            "%s: packed experts of a model of this name, but of other weights, files changed "
            "since, other kernels or an older version, take %d bytes; remove what you no longer "
            "use: %s",
            path, sum(other.stat().st_size for other in others), ", ".join(map(str, others)),
        )  # fmt: skip


def pack_store(
    path: Path,
    layout: StoreLayout,
    spec: ModelSpec,
    kernels: Kernels,
    fill: FillExperts,
    on_progress: Callable[[int, int], None] | None = None,
) -> None:
    """Write the store of `layout` to `path`, in place of what is there.

    Memory at its peak is BATCH_BYTES of records, or one record where that is more, and a plain copy
    of a record for each of the kernels' threads. on_progress(bytes written, bytes in all) is called
    in this thread. Raises StoreError where the file cannot be written, CheckpointError from `fill`
    for weights that cannot be used, CapacityError where memory does not suffice; then no file is
    left of it, and what was at `path` is as it was.
    """
    logger.info("packing %d bytes of experts into %s", layout.total_bytes, path)
    write_store(path, layout, _packed(layout, spec, kernels, fill), on_progress)


def _packed(
    layout: StoreLayout, spec: ModelSpec, kernels: Kernels, fill: FillExperts
) -> Iterator[Tensor]:
    """Give the packed records of all layers, batch by batch, each in the memory of the last."""
    sizes = {stored: _batch_size(stored) for stored in layout.layers}
    memory = allocate(max((n * stored.record_bytes for stored, n in sizes.items()), default=0))
    for stored, size in sizes.items():
        moe = spec.layers[stored.layer].moe
        assert moe is not None
        for first in range(0, stored.num_experts, size):
            experts = range(first, min(first + size, stored.num_experts))
            records = memory[: len(experts) * stored.record_bytes].view(len(experts), -1)
            records.zero_()  # the padding, where a larger record may have been before
            views = plain_weights(records, spec.hidden_size, moe.intermediate_size, layout.dtype)
            fill(dict(zip(expert_names(stored.layer), views, strict=True)), experts)
            kernels.pack_records_(records, spec.hidden_size, moe.intermediate_size, layout.dtype)
            yield records


def _batch_size(stored: StoredLayer) -> int:
    """Return how many experts of a layer are packed at once."""
    return max(1, min(stored.num_experts, BATCH_BYTES // stored.record_bytes))
