"""What torchrun, or our supervisor, tells a process of its place among others: read here alone."""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import dataclass

from moe_serve.errors import ConfigError

_NEEDED = ("RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")
_AGENT_STORE = "TORCHELASTIC_USE_AGENT_STORE"


@dataclass(frozen=True, kw_only=True, slots=True)
class RankEnvironment:
    """One rank of a world. Ranks are numbered node by node, as many on each.

    has_store: whether somebody else hosts the store at master_host:master_port; else rank 0 does.
    generation: how often the world was started anew.
    """

    rank: int
    world_size: int
    local_rank: int
    local_world_size: int
    master_host: str
    master_port: int
    has_store: bool
    generation: int

    def variables(self) -> dict[str, str]:
        """Return the environment that `read_environment` makes this of."""
        return {
            "RANK": str(self.rank),
            "WORLD_SIZE": str(self.world_size),
            "LOCAL_RANK": str(self.local_rank),
            "LOCAL_WORLD_SIZE": str(self.local_world_size),
            "MASTER_ADDR": self.master_host,
            "MASTER_PORT": str(self.master_port),
            _AGENT_STORE: str(self.has_store),
            "TORCHELASTIC_RESTART_COUNT": str(self.generation),
        }


def read_environment(environ: Mapping[str, str] | None = None) -> RankEnvironment | None:
    """Return this process's place, or None where it was started alone.

    Raises ConfigError for variables that contradict each other, or are no numbers.
    """
    given = os.environ if environ is None else environ
    if not all(given.get(name) for name in _NEEDED):
        return None
    world_size = _number(given, "WORLD_SIZE", 1, None)
    rank = _number(given, "RANK", 0, world_size - 1)
    local_world_size = _number(given, "LOCAL_WORLD_SIZE", 1, world_size, world_size)
    if world_size % local_world_size:
        raise ConfigError(
            f"environment WORLD_SIZE is {world_size} and LOCAL_WORLD_SIZE {local_world_size}: "
            "every node must have as many ranks"
        )
    return RankEnvironment(
        rank=rank,
        world_size=world_size,
        local_rank=_number(given, "LOCAL_RANK", 0, local_world_size - 1, rank % local_world_size),
        local_world_size=local_world_size,
        master_host=given["MASTER_ADDR"],
        master_port=_number(given, "MASTER_PORT", 1, 65535),
        has_store=given.get(_AGENT_STORE, "") == "True",
        generation=_number(given, "TORCHELASTIC_RESTART_COUNT", 0, None, 0),
    )


def _number(
    given: Mapping[str, str], name: str, least: int, most: int | None, default: int | None = None
) -> int:
    text = given.get(name)
    if text is None and default is not None:
        return default
    try:
        number = int(text or "")
    except ValueError:
        raise ConfigError(f"environment {name} is {text!r}; it must be a whole number") from None
    if number < least or (most is not None and number > most):
        upper = "" if most is None else f" to {most}"
        raise ConfigError(f"environment {name} is {number}; it must be from {least}{upper}")
    return number
