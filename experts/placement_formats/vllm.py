"""The file proposed for vLLM's --expert-placement-file: JSON {"expert_to_ep_rank": [rank]}.

One list for all layers, the rank of each expert, without replicas
(github.com/vllm-project/vllm, issue 34297; pull request 34811, open when this was written).
"""

from __future__ import annotations

import json
from collections.abc import Sequence

import numpy as np

from moe_serve.errors import ConfigError
from moe_serve.experts.placement.base import Placement, from_owners
from moe_serve.experts.placement_formats.base import (
    Known,
    json_object,
    only_owners,
    whole_numbers,
)

KEY = "expert_to_ep_rank"


def recognises(data: bytes) -> bool:
    """Say whether `data` is a JSON object with the list."""
    return KEY in json_object(data)


def decode(data: bytes, known: Known) -> Placement:
    """See `base`. The model's layers are all placed alike."""
    owners = whole_numbers(json_object(data)[KEY], KEY)
    if owners.ndim != 1 or not owners.size:
        raise ConfigError(f"{KEY} is one list of ranks, not {list(owners.shape)}")
    if known.num_experts is not None and len(owners) != known.num_experts:
        raise ConfigError(f"{KEY} has {len(owners)} experts, not {known.num_experts}")
    rows = np.tile(owners, (len(known.layers()), 1))
    return from_owners(known.ranks(), rows, "given")


def encode(placement: Placement, layer_ids: Sequence[int]) -> bytes:
    """See `base`. Raises ConfigError for replicas, and where layers are placed differently."""
    owners = only_owners(placement, "vLLM's file")
    differ = np.flatnonzero((owners != owners[0]).any(axis=1))
    if len(differ):
        raise ConfigError(
            f"vLLM's file has one list for all layers, but layer {int(differ[0])} is not placed as "
            "layer 0 is; only such as contiguous and round_robin can be written"
        )
    return json.dumps({KEY: owners[0].tolist()}).encode()
