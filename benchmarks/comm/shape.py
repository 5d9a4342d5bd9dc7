"""What is measured: one layer's shape, and the dispatchers."""

from __future__ import annotations

from dataclasses import dataclass

NAMES = ("per_expert", "dedup", "all_gather", "static", "auto")
BARE = "bare"  # two exchanges, and nothing else
COLLECTIVES = {"per_expert": 3, "dedup": 3, "all_gather": 2, "static": 2}


@dataclass(frozen=True, slots=True)
class Shape:
    """A layer in bfloat16."""

    num_experts: int = 32
    top_k: int = 4
    hidden_size: int = 512
    intermediate_size: int = 256
