"""This project, through the API that a user has."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from benchmarks.peers.systems.base import System
from benchmarks.results import source_state
from moe_serve import LLM, SamplingParams
from moe_serve.text.prompts import TokensPrompt


class MoeServe:
    """An engine with default options but the number of threads."""

    def __init__(self, model: Path, threads: int | None) -> None:
        self.version = f"moe-serve at {source_state()[0][:12]}"
        self._llm = LLM(model=str(model), threads=threads)
        self.numerics_id: str | None = self._llm.engine.numerics_id

    def generate(self, prompts: Sequence[Sequence[int]], output_tokens: int) -> list[list[int]]:
        sampling = SamplingParams(temperature=0, max_tokens=output_tokens, ignore_eos=True)
        outputs = self._llm.generate(
            [TokensPrompt(prompt_token_ids=list(prompt)) for prompt in prompts],
            sampling,
            use_tqdm=False,
        )
        return [list(output.outputs[0].token_ids) for output in outputs]


def build(model: Path, threads: int | None) -> System:
    """Load the checkpoint in `model`; threads None: the engine's own choice."""
    return MoeServe(model, threads)
