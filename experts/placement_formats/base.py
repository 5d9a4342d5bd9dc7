"""Placements as other systems write them, and what their formats share.

A format is one file of this folder with `recognises(data)`, whether the bytes of a file are in it;
`decode(data, known) -> Placement`, which raises ConfigError; and `encode(placement, layer_ids) ->
bytes`, which raises ConfigError where the format cannot say what the placement does. layer_ids: the
model's layers that have experts, for formats that count the others too.
"""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from dataclasses import dataclass
from io import BytesIO
from typing import Any

import numpy as np

from moe_serve.errors import ConfigError
from moe_serve.experts.placement.base import Array, Mesh, Placement

_MOST_LAYERS = 2**16


@dataclass(frozen=True, kw_only=True, slots=True)
class Known:
    """What is known beside a file, for what its format leaves out; None: not known.

    num_experts: of a layer. layer_ids: the model's layers that have experts, rising.
    """

    mesh: Mesh | None = None
    num_experts: int | None = None
    layer_ids: Sequence[int] | None = None

    def __post_init__(self) -> None:
        if self.layer_ids is not None:
            check_layer_ids(self.layer_ids)

    def ranks(self) -> Mesh:
        """Return the mesh. Raises ConfigError where it is not known."""
        if self.mesh is None:
            raise ConfigError("this format says nothing of ranks: name them")
        return self.mesh

    def experts(self) -> int:
        """Return the experts of a layer. Raises ConfigError where they are not known."""
        if self.num_experts is None:
            raise ConfigError("this format does not say how many experts a layer has: name them")
        return self.num_experts

    def layers(self) -> Sequence[int]:
        """Return the layers with experts. Raises ConfigError where they are not known."""
        if self.layer_ids is None:
            raise ConfigError("this format does not say how many layers there are: name them")
        return self.layer_ids


def check_layer_ids(layer_ids: Sequence[int]) -> None:
    """Raise ConfigError where these are no numbers of a model's layers, rising."""
    if list(layer_ids) != sorted(set(layer_ids)) or not all(
        0 <= layer < _MOST_LAYERS for layer in layer_ids
    ):
        raise ConfigError(
            f"layers with experts are numbered {list(layer_ids)[:8]}; they must rise from 0 or "
            f"above to less than {_MOST_LAYERS}"
        )


def json_object(data: bytes) -> dict[str, Any]:
    """Return the JSON object that `data` is, or an empty one where it is none."""
    try:
        found = json.loads(data)
    except (ValueError, RecursionError):
        return {}
    return found if isinstance(found, dict) else {}


def whole_numbers(rows: Any, what: str) -> Array:
    """Return lists of whole numbers as int64 of their shape. Raises ConfigError for other lists."""
    try:
        array = np.array(rows)
    except (ValueError, TypeError, OverflowError, RecursionError) as error:
        raise ConfigError(f"{what}: the lists have different lengths") from error
    if not np.issubdtype(array.dtype, np.integer):
        raise ConfigError(f"{what}: whole numbers below 2 ** 63 are needed, not {array.dtype}")
    return array


def read_array(data: bytes) -> Array:
    """Return the array of a .npy file, whose header must say how long it is. Raises ConfigError."""
    file = BytesIO(data)
    try:
        version = np.lib.format.read_magic(file)
        header = {
            (1, 0): np.lib.format.read_array_header_1_0,
            (2, 0): np.lib.format.read_array_header_2_0,
        }[version]
        shape, is_fortran, dtype = header(file)
    except (ValueError, KeyError, OSError, SyntaxError) as error:
        raise ConfigError(f"not a .npy array: {error}") from error
    body = data[file.tell() :]
    if dtype.hasobject or not np.issubdtype(dtype, np.integer):
        raise ConfigError(f"an array of {dtype}; whole numbers are needed")
    if math.prod(shape) * dtype.itemsize != len(body):
        raise ConfigError(f"an array of {list(shape)} {dtype} has not {len(body)} bytes")
    array: Array = np.frombuffer(body, dtype).reshape(shape, order="F" if is_fortran else "C")
    return array


def array_bytes(array: Array) -> bytes:
    """Return an array as a .npy file."""
    file = BytesIO()
    np.lib.format.write_array(file, array, allow_pickle=False)
    return file.getvalue()


def from_physical(physical: Array, mesh: Mesh, num_experts: int | None = None) -> Placement:
    """Read EPLB's physical-to-logical map, int [num_layers, num_slots], slots rank by rank.

    An expert twice on one rank, which EPLB does not rule out, counts once. Raises ConfigError.
    """
    if physical.ndim != 2 or not physical.size or not np.issubdtype(physical.dtype, np.integer):
        raise ConfigError(
            f"a map of slots is [layers, slots] of whole numbers, not {physical.dtype} "
            f"{list(physical.shape)}"
        )
    if physical.shape[1] % mesh.num_ranks:
        raise ConfigError(f"{physical.shape[1]} slots cannot be shared by {mesh.num_ranks} ranks")
    if physical.min() < 0:
        raise ConfigError("a map of slots has an expert below 0")
    experts = int(physical.max()) + 1 if num_experts is None else num_experts
    if not int(physical.max()) < experts <= physical.shape[1]:
        raise ConfigError(
            f"{physical.shape[1]} slots cannot hold {experts} experts, of which the last is "
            f"{int(physical.max())}"
        )
    size = physical.shape[1] // mesh.num_ranks
    layers = []
    for row in physical:
        ranks: list[set[int]] = [set() for _ in range(experts)]
        for slot, expert in enumerate(row.tolist()):
            ranks[expert].add(slot // size)
        layers.append(tuple(tuple(sorted(held)) for held in ranks))
    return Placement(mesh, experts, tuple(layers), "given")


def to_physical(placement: Placement) -> Array:
    """Return EPLB's physical-to-logical map, int64 [num_layers, num_slots].

    Raises ConfigError where ranks hold different numbers of experts: the map cannot say that.
    """
    holds = placement.holds()
    sizes = holds.sum(axis=1)
    if (sizes != sizes[0, 0]).any():
        raise ConfigError(
            "a map of slots needs as many experts on every rank and layer; this placement has "
            f"{int(sizes.min())} to {int(sizes.max())}"
        )
    rows = [
        [
            expert
            for rank in range(placement.mesh.num_ranks)
            for expert in np.flatnonzero(layer[:, rank])
        ]
        for layer in holds
    ]
    return np.array(rows, np.int64)


def only_owners(placement: Placement, format_name: str) -> Array:
    """Return each expert's rank, int64 [num_layers, num_experts]. Raises ConfigError for replicas.

    format_name: what the error calls the format, which has one rank for an expert.
    """
    for layer, experts in enumerate(placement.ranks):
        for expert, ranks in enumerate(experts):
            if len(ranks) > 1:
                raise ConfigError(
                    f"{format_name} has one rank for each expert, but expert {expert} of layer "
                    f"{layer} is on {list(ranks)}: place without replicas"
                )
    return placement.owners()
