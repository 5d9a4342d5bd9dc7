"""transformers: `generate` on one padded batch, experts one after the other ("eager")."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import torch
import transformers

from benchmarks.peers.systems.base import System


class Transformers:
    """The model as `AutoModelForCausalLM` loads it."""

    numerics_id: str | None = None

    def __init__(self, model: Path, threads: int | None) -> None:
        if threads is not None:
            torch.set_num_threads(threads)
        transformers.utils.logging.disable_progress_bar()
        self.version = f"transformers {transformers.__version__}, torch {torch.__version__}"
        self._model = transformers.AutoModelForCausalLM.from_pretrained(
            model, dtype=torch.bfloat16, experts_implementation="eager"
        ).eval()

    def generate(self, prompts: Sequence[Sequence[int]], output_tokens: int) -> list[list[int]]:
        prompt_ids = torch.tensor([list(prompt) for prompt in prompts])
        with torch.inference_mode():
            ids = self._model.generate(
                prompt_ids,
                attention_mask=torch.ones_like(prompt_ids),
                do_sample=False,
                min_new_tokens=output_tokens,
                max_new_tokens=output_tokens,
                eos_token_id=None,
                pad_token_id=0,
            )
        outputs: list[list[int]] = ids[:, prompt_ids.shape[1] :].tolist()
        return outputs


def build(model: Path, threads: int | None) -> System:
    """Load the checkpoint in `model`; threads None: torch's own choice."""
    return Transformers(model, threads)
