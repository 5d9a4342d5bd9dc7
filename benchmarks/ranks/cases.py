"""One rank of many cases: a model spread in many ways must give the bits of one process.

Run as `python -m benchmarks.ranks.cases FILE` on every rank, with torchrun's environment; FILE has
the cases and what they must give. Rank 0 prints JSON: of each case how many outputs differ, how
many ended with an error, and what the ranks counted.
"""

from __future__ import annotations

import json
import os
import random
import sys
from pathlib import Path
from typing import Any

from moe_serve.engine.lockstep import LockstepEngine
from moe_serve.experts.placement.base import Mesh, Placement
from moe_serve.experts.rank_experts import RankExperts
from moe_serve.kernels.moe.base import HEADER_BYTES
from moe_serve.launch.coordinator import RankedEngine
from moe_serve.launch.links import LocalLink
from moe_serve.llm import LLM
from moe_serve.types import SamplingParams


def random_placement(
    chance: random.Random, mesh: Mesh, num_layers: int, num_experts: int
) -> Placement:
    """Return one: uneven, some experts on several ranks, sometimes a rank with none of a layer."""
    layers = []
    for _ in range(num_layers):
        ranks = list(range(mesh.num_ranks))
        if mesh.num_ranks > 1 and chance.random() < 0.3:
            ranks.remove(chance.choice(ranks))
        most = chance.choice((1, 1, len(ranks)))
        layers.append(
            tuple(
                tuple(sorted(chance.sample(ranks, chance.randint(1, most))))
                for _ in range(num_experts)
            )
        )
    return Placement(mesh, num_experts, tuple(layers), "random")


def outputs_of(llm: LLM, prompts: list[list[int]], params: list[dict[str, Any]]) -> list[Any]:
    """Return what must be the same bits, as JSON would give it back."""
    given = [SamplingParams(**one) for one in params]
    found = llm.generate(prompts, given, use_tqdm=False)
    listed = [
        [part.token_ids, part.logprobs, part.finish_reason, part.error]
        for output in found
        for part in output.outputs
    ]
    plain: list[Any] = json.loads(json.dumps(listed, default=_plain))
    return plain


def _plain(value: Any) -> Any:
    return [value.token_id, value.logprob, value.rank, value.top]


def rank_engine(llm: LLM) -> LockstepEngine:
    """Return the engine of this very rank."""
    engine = llm.engine
    if isinstance(engine, RankedEngine):
        local = engine._links[0]
        assert isinstance(local, LocalLink)
        engine = local._worker.engine
    assert isinstance(engine, LockstepEngine)
    return engine


def poison(engine: LockstepEngine, layer: int, expert: int) -> None:
    """Fill an expert with NaN at the rank that holds it."""
    experts = engine.runner.model.experts
    assert isinstance(experts, RankExperts)
    slot = int(experts.layers[layer].slot_of_expert[expert])
    if slot >= 0:
        experts.layers[layer].records[slot, HEADER_BYTES:] = 0xFF  # NaN, in every float


def run(case: dict[str, Any], expected: dict[str, Any]) -> dict[str, Any]:
    """Run one case on this rank; compare on rank 0.

    case: options, of the LLM; seed; num_prompts: of those there are, drawn anew in each of
    num_rounds; bytes_per_step: with it another random placement is taken over from round to round
    (null: as fast as steps allow); poison: (layer, expert) to be filled with NaN, whose users may
    end with an error.
    """
    chance = random.Random(case["seed"])
    prompts, params, outputs = expected["prompts"], expected["params"], expected["outputs"]
    count = case.get("num_prompts", len(prompts))
    per_prompt = [one.get("n", 1) for one in params]
    starts = [sum(per_prompt[:index]) for index in range(len(prompts))]
    told = {"num_wrong": 0, "num_failed": 0, "num_outputs": 0, "num_placed": 0}
    with LLM(**{**expected["options"], **case["options"]}) as llm:
        for number in range(case.get("num_rounds", 1)):
            engine = llm.engine
            is_placing = number > 0 and "bytes_per_step" in case
            if is_placing and isinstance(engine, RankedEngine) and not engine.is_moving:
                mesh = Mesh(num_ranks=len(engine.stats().ranks), ranks_per_node=1)
                shape = expected["num_layers"], expected["num_experts"]
                engine.place(random_placement(chance, mesh, *shape), case["bytes_per_step"])
                told["num_placed"] += 1
            if "poison" in case:
                poison(rank_engine(llm), *case["poison"])
            order = chance.sample(range(len(prompts)), count)
            found = outputs_of(llm, [prompts[i] for i in order], [params[i] for i in order])
            if not llm.is_first_rank:
                continue
            wanted = [outputs[starts[i] + part] for i in order for part in range(per_prompt[i])]
            failed = [one[3] is not None and "not finite" in one[3] for one in found]
            told["num_outputs"] += len(found)
            told["num_failed"] += sum(failed)
            told["num_wrong"] += sum(
                one != whole and not (has_failed and "poison" in case)
                for one, whole, has_failed in zip(found, wanted, failed, strict=True)
            )
        about = {"numerics_id": llm.engine.numerics_id, "ranks": llm.engine.stats().ranks}
        return {**told, **about}


def main(path: Path) -> None:
    given = json.loads(path.read_text())
    told = [run(case, given["expected"]) for case in given["cases"]]
    if int(os.environ["RANK"]) == 0:
        print(json.dumps(told))


if __name__ == "__main__":
    main(Path(sys.argv[1]))
