"""SGLang's --init-expert-location: JSON {"physical_to_logical_map": [[expert of a slot]]}.

Slots are rank by rank. SGLang has a row for every layer of the model, also for those without
experts, whose rows it does not use: they are written as slot modulo experts, and left out where
they are read. Its other form, .pt, is a pickle and is not read.
"""

from __future__ import annotations

import json
from collections.abc import Sequence

import numpy as np

from moe_serve.errors import ConfigError
from moe_serve.experts.placement.base import Placement
from moe_serve.experts.placement_formats.base import (
    Known,
    from_physical,
    json_object,
    to_physical,
    whole_numbers,
)

MAP = "physical_to_logical_map"


def recognises(data: bytes) -> bool:
    """Say whether `data` is a JSON object with the map."""
    return MAP in json_object(data)


def decode(data: bytes, known: Known) -> Placement:
    """See `base`. Rows are of all layers where there are more of them than layers with experts."""
    physical = whole_numbers(json_object(data)[MAP], MAP)
    layer_ids = known.layer_ids
    if layer_ids is not None and physical.ndim == 2 and len(physical) > len(layer_ids):
        if max(layer_ids) >= len(physical):
            raise ConfigError(
                f"{MAP} has {len(physical)} rows, but the model has experts up to layer "
                f"{max(layer_ids)}"
            )
        physical = physical[list(layer_ids)]
    return from_physical(physical, known.ranks(), known.num_experts)


def encode(placement: Placement, layer_ids: Sequence[int]) -> bytes:
    """See `base`. Raises ConfigError where ranks hold different numbers of experts."""
    physical = to_physical(placement)
    num_slots = physical.shape[1]
    rows = np.tile(np.arange(num_slots) % placement.num_experts, (max(layer_ids) + 1, 1))
    rows[list(layer_ids)] = physical
    return json.dumps({MAP: rows.tolist()}).encode()
