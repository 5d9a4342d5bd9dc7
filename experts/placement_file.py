"""Placements as files: our own JSON, and those of other systems (experts/placement_formats)."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from moe_serve import plugin
from moe_serve.errors import ConfigError
from moe_serve.experts.output_file import whole_file
from moe_serve.experts.placement.base import Mesh, Placement
from moe_serve.experts.placement_formats.base import Known, check_layer_ids

SCHEMA = 1
FORMATS = "moe_serve.experts.placement_formats"


def write_placement(path: Path, placement: Placement) -> None:
    """Write placement.json, whole or not at all. Raises TraceError."""
    with whole_file(path) as file:
        file.write(json.dumps(as_json(placement)).encode())


def parse_export(text: str) -> tuple[str, Path]:
    """Return the format and the path of FORMAT:FILE. Raises ConfigError."""
    name, _, path = text.partition(":")
    if not path:
        known = ", ".join(plugin.names(FORMATS))
        raise ConfigError(f"{text!r} is not FORMAT:FILE, where FORMAT is one of {known}")
    plugin.load(FORMATS, name)
    return name, Path(path)


def export_placement(
    path: Path, format_name: str, placement: Placement, layer_ids: Sequence[int] | None = None
) -> None:
    """Write a placement as another system reads it, whole or not at all.

    format_name: a file of experts/placement_formats. layer_ids: the model's layers that have
    experts; None: all of its layers. Raises ConfigError where the format cannot say what the
    placement does, TraceError where it cannot be written.
    """
    ids = range(placement.num_layers) if layer_ids is None else layer_ids
    check_layer_ids(ids)
    if len(ids) != placement.num_layers:
        raise ConfigError(f"{len(ids)} layers, but the placement has {placement.num_layers}")
    try:
        data: bytes = plugin.load(FORMATS, format_name).encode(placement, ids)
    except ConfigError as error:
        raise ConfigError(f"{path}: {error}") from error
    with whole_file(path) as file:
        file.write(data)


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


def read_placement(
    path: Path,
    mesh: Mesh | None = None,
    *,
    num_experts: int | None = None,
    layer_ids: Sequence[int] | None = None,
) -> Placement:
    """Read placement.json, or a form of experts/placement_formats, told by its content.

    mesh, num_experts (of a layer) and layer_ids (the model's layers with experts) are for forms
    that do not say them. Raises ConfigError.
    """
    try:
        data = path.read_bytes()
    except OSError as error:
        raise ConfigError(f"{path}: not a placement ({error})") from error
    if data.startswith(b"\x80") or (data.startswith(b"PK") and b"/data.pkl" in data):
        raise ConfigError(
            f"{path}: a pickle, as SGLang's .pt is, which is not read, for it could run any code; "
            "write its physical_to_logical_map as JSON: torch.load(FILE, weights_only=True), then "
            'json.dump({"physical_to_logical_map": map.tolist()}, ...)'
        )
    known = Known(mesh=mesh, num_experts=num_experts, layer_ids=layer_ids)
    try:
        for name in plugin.names(FORMATS):
            form = plugin.load(FORMATS, name)
            if form.recognises(data):
                found: Placement = form.decode(data, known)
                return found
        own = json.loads(data)
        if not isinstance(own, dict):
            raise ConfigError("not a placement: no object")
        return placement_from(own)
    except ConfigError as error:
        raise ConfigError(f"{path}: {error}") from error
    except (KeyError, TypeError, ValueError, OverflowError, RecursionError) as error:
        raise ConfigError(f"{path}: not a placement ({error!r})") from error


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
