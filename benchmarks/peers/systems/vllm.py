"""vLLM's CPU build, through its offline `LLM`, on token ids.

Settings: bf16; one OpenMP thread a core; the engine in this process, since its default, a scheduler
in a process beside the worker, takes a core from a machine of two, or, bound to all of them, costs
a sixth of the speed of one request; compiled, as by default; no prefix cache, as every round has
new prompts; 2 GiB of KV, enough for every job of the comparison at once. A first start compiles for
half a minute, and the first run of a job for some seconds more, which is not measured.
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path

from benchmarks.peers.systems.base import System


class Vllm:
    """The model as `vllm.LLM` loads it."""

    numerics_id: str | None = None

    def __init__(self, model: Path, threads: int | None) -> None:
        os.environ.update(
            OMP_NUM_THREADS=str(threads or len(os.sched_getaffinity(0))),
            VLLM_CPU_OMP_THREADS_BIND="nobind",
            VLLM_ENABLE_V1_MULTIPROCESSING="0",
            VLLM_CPU_KVCACHE_SPACE="2",
            VLLM_LOGGING_LEVEL="ERROR",
            VLLM_NO_USAGE_STATS="1",
            HF_HUB_OFFLINE="1",
        )
        # only now: it reads the environment when it is imported
        import vllm  # type: ignore[import-not-found, unused-ignore]  # has its own environment

        self.version = f"vllm {vllm.__version__}"
        self._sampling_params = vllm.SamplingParams
        self._llm = vllm.LLM(
            model=str(model),
            dtype="bfloat16",
            skip_tokenizer_init=True,
            enable_prefix_caching=False,
        )

    def generate(self, prompts: Sequence[Sequence[int]], output_tokens: int) -> list[list[int]]:
        sampling = self._sampling_params(
            temperature=0, max_tokens=output_tokens, ignore_eos=True, detokenize=False
        )
        outputs = self._llm.generate(
            [{"prompt_token_ids": list(prompt)} for prompt in prompts], sampling, use_tqdm=False
        )
        return [list(output.outputs[0].token_ids) for output in outputs]


def build(model: Path, threads: int | None) -> System:
    """Load the checkpoint in `model`; threads None: all cores."""
    return Vllm(model, threads)
