"""What one measurement asks for: so many requests, of so many tokens in and out."""

from __future__ import annotations

import re
from dataclasses import dataclass

import numpy as np


@dataclass(frozen=True, slots=True)
class Job:
    """num_requests prompts of prompt_tokens, each continued by output_tokens, all sent at once."""

    num_requests: int
    prompt_tokens: int
    output_tokens: int

    @classmethod
    def parse(cls, text: str) -> Job:
        """Read "16x128/64": 16 requests of 128 tokens in and 64 out. ValueError otherwise."""
        match = re.fullmatch(r"([1-9]\d*)x([1-9]\d*)/([1-9]\d*)", text)
        if match is None:
            raise ValueError(f"job {text!r}; write REQUESTSxIN/OUT, such as 16x128/64")
        return cls(*(int(number) for number in match.groups()))

    def __str__(self) -> str:
        return f"{self.num_requests}x{self.prompt_tokens}/{self.output_tokens}"

    def prompts(self, vocab_size: int, round_index: int) -> list[list[int]]:
        """Return random prompts, the same for every system, new in every round.

        New ones, because a system that keeps prefixes would otherwise skip the work.
        """
        seed = (self.num_requests, self.prompt_tokens, self.output_tokens, round_index)
        ids = np.random.default_rng(seed).integers(
            vocab_size, size=(self.num_requests, self.prompt_tokens)
        )
        return [[int(token) for token in row] for row in ids]
