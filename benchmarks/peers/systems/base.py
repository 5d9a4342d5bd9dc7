"""What a system under measurement is: one file here, whose name is its name on the command line.

A file defines `build(model, threads) -> System`. It may import the system's packages at its top or
in `build`: where one is missing (ModuleNotFoundError) the system is left out, and that is said.
A system with a recipe in `benchmarks.peers.install` has its own environment: its file imports only
what is installed there.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol


class System(Protocol):
    """A loaded model. version: what is measured, for the record; numerics_id: ours only."""

    version: str
    numerics_id: str | None

    def generate(self, prompts: Sequence[Sequence[int]], output_tokens: int) -> list[list[int]]:
        """Continue every prompt greedily by exactly `output_tokens`, whatever is sampled.

        prompts: token ids, all of one length. Returns the token ids that each prompt was given.
        """
        ...
