"""One rank of a test: models spread in many ways must give what one process gives, in all bits.

Run as `python -m tests.rank_cases FILE` on every rank, with torchrun's environment; FILE names the
cases and has what they must give. Rank 0 prints JSON with what was run.
"""

from __future__ import annotations

import json
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
        return local._worker.engine
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
    """Run one case on this rank; compare on rank 0."""
    chance = random.Random(case["seed"])
    prompts, params, outputs = expected["prompts"], expected["params"], expected["outputs"]
    count = case.get("num_prompts", len(prompts))
    per_prompt = [params[index].get("n", 1) for index in range(len(prompts))]
    with LLM(**expected["options"], **case["options"]) as llm:
        for number in range(case.get("num_rounds", 1)):
            engine = llm.engine
            is_placing = number > 0 and "bytes_per_step" in case
            if is_placing and isinstance(engine, RankedEngine) and not engine.is_moving:
                mesh = Mesh(num_ranks=len(engine.stats().ranks), ranks_per_node=1)
                shape = expected["num_layers"], expected["num_experts"]
                engine.place(random_placement(chance, mesh, *shape), case["bytes_per_step"])
            if "poison" in case:
                poison(rank_engine(llm), *case["poison"])
            order = chance.sample(range(len(prompts)), count)
            found = outputs_of(llm, [prompts[i] for i in order], [params[i] for i in order])
            if not llm.is_first_rank:
                continue
            starts = [sum(per_prompt[:index]) for index in order]
            wanted = [
                outputs[start + part]
                for start, index in zip(starts, order, strict=True)
                for part in range(per_prompt[index])
            ]
            if "poison" in case:
                wanted = [
                    one if one[3] is not None and "not finite" in one[3] else whole
                    for one, whole in zip(found, wanted, strict=True)
                ]
                failed = sum(one[2] == "error" for one in wanted)
                assert 0 < failed < len(wanted), failed
            assert found == wanted, (case, number)
        return {"ranks": llm.engine.stats().ranks}


def main(path: Path) -> None:
    given = json.loads(path.read_text())
    told = [run(case, given["expected"]) for case in given["cases"]]
    if told[0]["ranks"]:
        print(json.dumps(told))


if __name__ == "__main__":
    main(Path(sys.argv[1]))
