"""What a scheduler counts since its start, a few additions a step."""

from __future__ import annotations

from dataclasses import dataclass, field

from moe_serve.engine.sequence import ScheduledStep
from moe_serve.types import FinishReason


def _none_finished() -> dict[FinishReason, int]:
    return {"stop": 0, "length": 0, "abort": 0, "error": 0}


@dataclass(slots=True)
class Counts:
    """num_steps: that were run to their end. step_tokens: that ran in them; num_prompt_tokens: of
    these, those of prompts (what is computed again counts again, what was found in the cache does
    not). num_generation_tokens: given to outputs. num_finished: outputs, by why they ended.
    """

    num_steps: int = 0
    step_tokens: int = 0
    num_prompt_tokens: int = 0
    num_generation_tokens: int = 0
    num_finished: dict[FinishReason, int] = field(default_factory=_none_finished)

    def add(self, step: ScheduledStep, num_decodes: int) -> None:
        """Count a step that was run, before its sequences are told; its first are decodes."""
        self.num_steps += 1
        self.step_tokens += num_decodes
        if len(step.sequences) == num_decodes:
            return
        chunks = zip(step.sequences[num_decodes:], step.query_lens[num_decodes:], strict=True)
        for sequence, size in chunks:
            self.step_tokens += size
            left = sequence.num_prompt_tokens - sequence.num_computed_tokens
            self.num_prompt_tokens += max(0, min(size, left))
