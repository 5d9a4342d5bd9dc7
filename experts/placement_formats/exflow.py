"""ExFlow's solutions: CSV with the columns Expert,Node, one line for each expert of each layer.

Expert is layer * num_experts + expert, of the layers with experts; Node is the rank (a GPU, in its
script solve_affinity.py; arXiv 2401.08383). Lines may be in any order. There are no replicas.
"""

from __future__ import annotations

import re
from collections.abc import Sequence

import numpy as np

from moe_serve.errors import ConfigError
from moe_serve.experts.placement.base import Placement, from_owners
from moe_serve.experts.placement_formats.base import Known, only_owners

_HEADER = b"Expert,Node"


def recognises(data: bytes) -> bool:
    """Say whether the first line names the columns."""
    return re.split(rb"[\r\n]", data, maxsplit=1)[0].strip() == _HEADER


def decode(data: bytes, known: Known) -> Placement:
    """See `base`."""
    num_experts = known.experts()
    rank_of: dict[int, int] = {}
    for number, line in enumerate(data.splitlines()[1:], 2):
        if not line.strip():
            continue
        if not (match := re.fullmatch(rb"\s*(\d{1,9})\s*,\s*(\d{1,9})\s*", line)):
            raise ConfigError(f"line {number} is {line[:40]!r}, not an expert and a rank")
        expert, rank = int(match[1]), int(match[2])
        if expert in rank_of:
            raise ConfigError(f"line {number}: expert {expert} is there twice")
        rank_of[expert] = rank
    count = len(rank_of)
    num_layers = count // num_experts if known.layer_ids is None else len(known.layer_ids)
    if not count or count != num_layers * num_experts:
        raise ConfigError(
            f"{count} experts in all, which are not whole layers of {num_experts}"
            if known.layer_ids is None
            else f"{count} experts in all, not {num_layers} layers of {num_experts}"
        )
    if (most := max(rank_of)) >= count:
        missing = next(expert for expert in range(count) if expert not in rank_of)
        raise ConfigError(f"expert {missing} is on no rank, but there is an expert {most}")
    owners = np.array([rank_of[expert] for expert in range(count)])
    return from_owners(known.ranks(), owners.reshape(num_layers, num_experts), "given")


def encode(placement: Placement, layer_ids: Sequence[int]) -> bytes:
    """See `base`. Raises ConfigError for replicas."""
    ranks = only_owners(placement, "ExFlow's CSV").ravel().tolist()
    lines = [_HEADER.decode(), *(f"{expert},{rank}" for expert, rank in enumerate(ranks))]
    return "".join(f"{line}\r\n" for line in lines).encode()  # as Python's csv ends lines
