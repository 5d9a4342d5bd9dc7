"""One rank whose kernels seem to be compiled late: what steps of nobody's tokens leave behind.

Run as `python -m tests.warm_ranks FILE` on every rank, with torchrun's environment; FILE has the
cases' options, what they must give, and how long one rank compiles. Rank 0 prints JSON.
"""

from __future__ import annotations

import json
import os
import sys
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from benchmarks.ranks.cases import outputs_of, rank_engine
from moe_serve.engine import build, model_runner
from moe_serve.engine.model_runner import ModelRunner
from moe_serve.engine.warm_up import nobodys_prompts
from moe_serve.launch import rendezvous
from moe_serve.llm import LLM
from moe_serve.types import ForwardBatch


def run(options: dict[str, Any], expected: dict[str, Any]) -> dict[str, Any]:
    with LLM(**{**expected["options"], **options}) as llm:
        engine = rank_engine(llm)
        stats = engine.stats()
        recent = engine.recent_routing()[0].size if "rebalance" in options else 0
        used = [sum(map(sum, stats.expert_uses)), stats.experts.get("events", 0), recent]
        used += [engine.pairs_computed, *engine.steps_by_dispatcher().values()]
        counted = llm.engine.stats().ranks if llm.is_first_rank else []
        found = outputs_of(llm, expected["prompts"], expected["params"])
    return {"used": used, "counted": counted, "is_same": found == expected["outputs"]}


def main(given: dict[str, Any]) -> None:
    rank = int(os.environ["RANK"])
    rehearsed: list[Any] = []
    rehearse = ModelRunner._rehearse

    def slowly(self: ModelRunner, *args: Any) -> None:
        if not rehearsed and rank == given["slow_rank"]:
            time.sleep(given["compile_s"])
        rehearsed.append(args)
        rehearse(self, *args)

    def on_a_cpu(*args: Any) -> ForwardBatch:
        batch = nobodys_prompts(*args)
        # a CPU's kernels have to write keys somewhere: to the null block, which nobody reads
        return replace(batch, slot_mapping=tuple(slots * 0 for slots in batch.slot_mapping))

    patch = pytest.MonkeyPatch()
    patch.setattr(model_runner, "nobodys_prompts", on_a_cpu)
    patch.setattr(build, "compiles_late", lambda device: True)
    patch.setattr(ModelRunner, "_rehearse", slowly)
    patch.setattr(rendezvous, "COLLECTIVE_S", given["collective_s"])
    told = [run(options, given["expected"]) for options in given["cases"]]
    assert rehearsed
    if rank == 0:
        print(json.dumps(told))


if __name__ == "__main__":
    main(json.loads(Path(sys.argv[1]).read_text()))
