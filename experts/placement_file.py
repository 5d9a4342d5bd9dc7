"""Placements as files: our own JSON, and the arrays of DeepSeek's EPLB and of SGLang."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from moe_serve.errors import ConfigError
from moe_serve.experts.output_file import whole_file
from moe_serve.experts.placement.base import Array, Mesh, Placement

SCHEMA = 1


def write_placement(path: Path, placement: Placement) -> None:
    """Write placement.json, whole or not at all. Raises TraceError."""
    with whole_file(path) as file:
        file.write(json.dumps(as_json(placement)).encode())


def write_sglang(path: Path, placement: Placement) -> None:
    """Write what SGLang's --init-expert-location reads. Raises as `to_physical`, TraceError."""
    physical = to_physical(placement).tolist()
    with whole_file(path) as file:
        file.write(json.dumps({"physical_to_logical_map": physical}).encode())


def as_json(placement: Placement) -> dict[str, Any]:
    """Return what placement.json holds."""
    return {
        "schema": SCHEMA,
        "model_id": placement.model_id,
        "num_layers": placement.num_layers,
        "num_experts": placement.num_experts,
        "num_ranks": placement.mesh.num_ranks,
        "ranks_per_node": placement.mesh.ranks_per_node,
        "strategy": placement.strategy,
        "layers": [[list(ranks) for ranks in layer] for layer in placement.ranks],
        "trained_on": placement.trained_on,
    }


def read_placement(path: Path, mesh: Mesh | None = None) -> Placement:
    """Read placement.json, or SGLang's form with `mesh`. Raises ConfigError."""
    try:
        data = json.loads(path.read_bytes())
    except (OSError, ValueError, RecursionError) as error:
        raise ConfigError(f"{path}: not a placement ({error})") from error
    if not isinstance(data, dict):
        raise ConfigError(f"{path}: not a placement: no object")
    try:
        if "physical_to_logical_map" in data:
            if mesh is None:
                raise ConfigError("physical_to_logical_map says nothing of ranks: name them")
            return from_physical(np.array(data["physical_to_logical_map"]), mesh)
        return placement_from(data)
    except ConfigError as error:
        raise ConfigError(f"{path}: {error}") from error
    except (KeyError, TypeError, ValueError, OverflowError) as error:
        raise ConfigError(f"{path}: not a placement: {error!r}") from error


def placement_from(data: Mapping[str, Any]) -> Placement:
    """Return what `as_json` gave. Raises ConfigError, and what odd data raises by itself."""
    if data.get("schema") != SCHEMA:
        raise ConfigError(f"schema is {data.get('schema')!r}, not {SCHEMA}")
    for name in ("num_ranks", "ranks_per_node", "num_layers", "num_experts"):
        if type(data[name]) is not int:
            raise ConfigError(f"{name} is {data[name]!r}, not a whole number")
    mesh = Mesh(num_ranks=data["num_ranks"], ranks_per_node=data["ranks_per_node"])
    ranks = tuple(tuple(tuple(sorted(_ranks(one))) for one in layer) for layer in data["layers"])
    if len(ranks) != data["num_layers"]:
        raise ConfigError(f"num_layers is {data['num_layers']}, but layers has {len(ranks)}")
    return Placement(
        mesh,
        data["num_experts"],
        ranks,
        str(data.get("strategy", "")),
        dict(data.get("trained_on") or {}),
        data.get("model_id"),
    )


def _ranks(given: Sequence[Any]) -> list[int]:
    if not all(isinstance(rank, int) and not isinstance(rank, bool) for rank in given):
        raise ConfigError(f"ranks are whole numbers, not {list(given)!r}")
    return list(given)


def from_physical(physical: Array, mesh: Mesh, num_experts: int | None = None) -> Placement:
    """Read EPLB's physical-to-logical map, int [num_layers, num_slots], slots rank by rank.

    An expert twice on one rank, which EPLB does not rule out, counts once.
    """
    if physical.ndim != 2 or not np.issubdtype(physical.dtype, np.integer):
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
