"""Cases of the exactness matrix in which experts do not fit: what must not change any bit."""

from __future__ import annotations

import random
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

from moe_serve import plugin

# belady and the oracle need the future: they are for studies
NOT_SERVED = ("belady", "oracle")
LINK_GB_S = 4.0


@dataclass(frozen=True, slots=True)
class Held:
    """How much of a model's experts is held, and how.

    share: of each layer's experts, 0 for the least that serves a token. resizes: the share changes
    every few steps, up and down.
    """

    share: float
    options: dict[str, Any] = field(default_factory=dict)
    resizes: bool = False

    def slots(self, num_experts: int, top_k: int) -> int:
        """Return how many experts of each layer are held at first."""
        return max(top_k, round(self.share * num_experts))


def policies() -> tuple[str, ...]:
    """Return the eviction policies that can serve."""
    names = plugin.names("moe_serve.experts.policies")
    return tuple(name for name in names if name not in NOT_SERVED)


def predictors() -> tuple[str, ...]:
    """Return the predictors that can serve."""
    return tuple(name for name in plugin.names("moe_serve.predictors") if name not in NOT_SERVED)


def held_factors() -> Iterator[tuple[str, dict[str, Any], Held]]:
    """Yield a name, options that are not about experts, and how many are held: one at a time."""
    quiet = {"prefetch": "off"}
    for share in (1.0, 0.5, 0.25, 0.0):
        yield f"{round(100 * share)} % held", {}, Held(share, quiet)
    yield "batch of 1, 25 % held", {"max_num_seqs": 1}, Held(0.25, quiet)
    yield "batch of 16, 25 % held", {"max_num_seqs": 16}, Held(0.25, quiet)
    yield "layer by layer, 25 % held", {"fused": False}, Held(0.25, {"prefetch": "on"})
    for name in policies():
        yield f"eviction {name}", {}, Held(0.25, quiet | {"eviction": name})
    for scope in ("shared", "global"):
        yield f"scope {scope}", {}, Held(0.25, quiet | {"expert_cache_scope": scope})
    for name in predictors():
        yield f"predictor {name}", {}, Held(0.25, {"prefetch": "on", "predictor": name})
    link = {"emulate_link": LINK_GB_S}
    yield "split", {}, Held(0.25, quiet | link | {"miss": "split"})
    yield "copy", {}, Held(0.25, quiet | link | {"miss": "copy"})
    yield "split and prefetch", {}, Held(0.25, link | {"miss": "split", "prefetch": "on"})
    yield "live resize", {}, Held(0.5, {"prefetch": "on"}, resizes=True)


def random_held(chance: random.Random) -> Held:
    """Return any combination."""
    options: dict[str, Any] = {
        "eviction": chance.choice(policies()),
        "predictor": chance.choice(predictors()),
        "prefetch": chance.choice(["off", "on", "auto"]),
        "expert_cache_scope": chance.choice(["layer", "layer", "shared", "global"]),
    }
    if chance.random() < 0.4:
        options |= {"emulate_link": chance.choice([1.0, 4.0, 25.0])}
        options |= {"miss": chance.choice(["copy", "split", "auto"])}
    return Held(
        chance.choice([0.0, 0.2, 0.25, 0.5, 0.75]),
        options,
        resizes="emulate_link" not in options and chance.random() < 0.3,
    )
