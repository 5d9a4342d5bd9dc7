"""DeepSeek's EPLB: .npz of the three arrays that its rebalance_experts returns.

physical_to_logical_map [num_layers, num_slots], slots rank by rank; logical_to_physical_map
[num_layers, num_experts, most replicas], slots of an expert and then -1; logical_count [num_layers,
num_experts], its replicas (github.com/deepseek-ai/EPLB). The map is enough to be read; what there
is of the others must agree with it.
"""

from __future__ import annotations

import zipfile
import zlib
from collections.abc import Sequence
from io import BytesIO

import numpy as np

from moe_serve.errors import ConfigError
from moe_serve.experts.placement.base import Array, Placement
from moe_serve.experts.placement_formats.base import (
    Known,
    array_bytes,
    from_physical,
    read_array,
    to_physical,
)

MAP, SLOTS, COUNT = "physical_to_logical_map", "logical_to_physical_map", "logical_count"
_MOST_BYTES = 2**28  # of one array; a thousand layers of a thousand slots are 8 MB


def recognises(data: bytes) -> bool:
    """Say whether `data` is a .npz file."""
    return data.startswith(b"PK\x03\x04")


def decode(data: bytes, known: Known) -> Placement:
    """See `base`."""
    arrays = _arrays(data)
    if MAP not in arrays:
        raise ConfigError(f"no {MAP} among its arrays: {', '.join(sorted(arrays)) or 'none'}")
    physical = arrays[MAP]
    num_experts = known.num_experts
    if COUNT in arrays and arrays[COUNT].ndim == 2:
        counted = int(arrays[COUNT].shape[1])
        if num_experts is not None and num_experts != counted:
            raise ConfigError(f"{COUNT} has {counted} experts, not {num_experts}")
        num_experts = counted
    placement = from_physical(physical, known.ranks(), num_experts)
    counts = _counts(physical, placement.num_experts)
    if COUNT in arrays and not np.array_equal(arrays[COUNT], counts):
        raise ConfigError(f"{COUNT} is not how often {MAP} has each expert")
    if SLOTS in arrays and not _agree(arrays[SLOTS], physical, counts):
        raise ConfigError(f"{SLOTS} does not have the slots in which {MAP} has each expert")
    return placement


def encode(placement: Placement, layer_ids: Sequence[int]) -> bytes:
    """See `base`. Raises ConfigError where ranks hold different numbers of experts."""
    physical = to_physical(placement)
    counts = _counts(physical, placement.num_experts)
    slots = np.full((*counts.shape, int(counts.max())), -1, np.int64)
    for layer, row in enumerate(physical):
        for expert in range(placement.num_experts):
            slots[layer, expert, : counts[layer, expert]] = np.flatnonzero(row == expert)
    file = BytesIO()
    with zipfile.ZipFile(file, "w", zipfile.ZIP_DEFLATED) as archive:
        for name, array in ((MAP, physical), (SLOTS, slots), (COUNT, counts)):
            archive.writestr(f"{name}.npy", array_bytes(array))
    return file.getvalue()


def _arrays(data: bytes) -> dict[str, Array]:
    arrays = {}
    try:
        with zipfile.ZipFile(BytesIO(data)) as archive:
            for member in archive.infolist():
                name = member.filename.removesuffix(".npy")
                if name in (MAP, SLOTS, COUNT):
                    if member.file_size > _MOST_BYTES:
                        raise ConfigError(f"{name} has {member.file_size} bytes; too many")
                    arrays[name] = read_array(archive.read(member))
    except (zipfile.BadZipFile, zlib.error, EOFError, OSError, NotImplementedError) as error:
        raise ConfigError(f"not a .npz file ({error})") from error
    except RuntimeError as error:  # zipfile's, for what is encrypted
        raise ConfigError(f"not a .npz file ({error})") from error
    return arrays


def _counts(physical: Array, num_experts: int) -> Array:
    """Return the replicas of each expert, int64 [num_layers, num_experts]."""
    return np.array([np.bincount(row, minlength=num_experts) for row in physical], np.int64)


def _agree(slots: Array, physical: Array, counts: Array) -> bool:
    """Say whether `slots` has of each expert the slots that hold it, in any order, then -1."""
    if slots.ndim != 3 or slots.shape[:2] != counts.shape:
        return False
    num_slots = physical.shape[1]
    if not ((slots == -1) | ((slots >= 0) & (slots < num_slots))).all():
        return False
    if not np.array_equal((slots >= 0).sum(axis=2), counts):
        return False
    layers, experts, _ = np.nonzero(slots >= 0)
    named = slots[slots >= 0].astype(np.int64)
    if len(np.unique(layers * num_slots + named)) < len(named):
        return False
    return bool((physical[layers, named] == experts).all())
