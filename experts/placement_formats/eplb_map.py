"""DeepSeek's EPLB, the map alone: .npy of physical_to_logical_map, int [num_layers, num_slots].

Slots are rank by rank (github.com/deepseek-ai/EPLB, README); layers are those with experts.
"""

from __future__ import annotations

from collections.abc import Sequence

from moe_serve.experts.placement.base import Placement
from moe_serve.experts.placement_formats.base import (
    Known,
    array_bytes,
    from_physical,
    read_array,
    to_physical,
)


def recognises(data: bytes) -> bool:
    """Say whether `data` is a .npy file."""
    return data.startswith(b"\x93NUMPY")


def decode(data: bytes, known: Known) -> Placement:
    """See `base`."""
    return from_physical(read_array(data), known.ranks(), known.num_experts)


def encode(placement: Placement, layer_ids: Sequence[int]) -> bytes:
    """See `base`. Raises ConfigError where ranks hold different numbers of experts."""
    return array_bytes(to_physical(placement))
