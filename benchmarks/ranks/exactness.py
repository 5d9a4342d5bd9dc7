"""Are tokens and logprobs those of one process, however a model is spread over ranks?

Hypothesis: yes, in all bits, for one model, dtype and numerics_id: worlds of 1 to 4, every exact
dispatcher, any placement, replicas, experts that move while requests run, ranks without tokens,
experts behind a cache. One factor at a time, then random combinations; every output is compared
with one process's, token by token and logprob by logprob, as exact floats.

    python -m benchmarks.ranks.exactness [--save]                  # all of it: a quarter of an hour
    python -m benchmarks.ranks.exactness --placements 3 --random 2 --worlds 2
"""

from __future__ import annotations

import argparse
import json
import random
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from benchmarks.exactness import WIDE
from benchmarks.ranks.cases import outputs_of
from benchmarks.ranks.start import finished, start
from benchmarks.results import Row, recorded_command, write_results
from moe_serve.llm import LLM

EXACT = ("per_expert", "dedup", "all_gather", "static", "auto")
NUM_PROMPTS, MAX_TOKENS = 10, 12
LOAD = 50  # placements taken over while requests run


def expected(options: dict[str, Any], num_layers: int, num_experts: int) -> dict[str, Any]:
    """Return prompts, half of them greedy, and what one process makes of them."""
    chance = random.Random(1)
    prompts = [
        [chance.randrange(2, 2000) for _ in range(chance.randint(1, 60))]
        for _ in range(NUM_PROMPTS)
    ]
    params = [
        {
            "max_tokens": chance.randint(1, MAX_TOKENS),
            "temperature": 0.9 * (index % 2),
            "seed": index,
            "logprobs": 2,
            "ignore_eos": True,
            "n": 2 if index == 3 else 1,
        }
        for index in range(NUM_PROMPTS)
    ]
    with LLM(**options) as llm:
        outputs = outputs_of(llm, prompts, params)
    return {
        "prompts": prompts, "params": params, "outputs": outputs, "options": options,
        "num_layers": num_layers, "num_experts": num_experts,
    }  # fmt: skip


def cases(
    size: int, num_placements: int, record_bytes: int, num_experts: int, top_k: int, store: str
) -> Iterator[tuple[str, dict[str, Any]]]:
    """Yield one factor at a time, by name."""
    for name in EXACT:
        yield f"dispatcher {name}", {"seed": 0, "options": {"dispatcher": name}}
    yield "placement round_robin", {"seed": 0, "options": {"placement": "round_robin"}}
    yield "no more prompts than ranks", {
        "seed": 1, "options": {}, "num_prompts": size, "num_rounds": 6,
    }  # fmt: skip
    if size == 1:
        return
    for name, replicas in (("dedup", "water_filling"), ("static", "nearest")):
        yield f"{num_placements} placements, {name}, {replicas}", {
            "seed": size, "num_rounds": num_placements + 1,
            "options": {"dispatcher": name, "replicas": replicas},
            "bytes_per_step": 10**12, "num_prompts": 4,
        }  # fmt: skip
    yield "moves under load", {
        "seed": 5, "options": {}, "num_rounds": LOAD + 1, "bytes_per_step": 30 * record_bytes,
    }  # fmt: skip
    yield "moves as fast as steps allow", {
        "seed": 6, "options": {}, "num_rounds": 8, "bytes_per_step": None,
    }  # fmt: skip
    yield "rebalance and homes by affinity", {
        "seed": 7, "options": {"rebalance": 2, "home": "affinity"}, "num_rounds": 8,
    }  # fmt: skip
    held = num_experts // size
    for slots in sorted({max(top_k, held // 2), max(top_k, held // 4)}, reverse=True):
        if slots < held:
            yield f"{slots} of {held} experts in a cache", {
                "seed": 8, "num_rounds": 4, "bytes_per_step": 10**12,
                "options": {"expert_cache_slots": slots, "expert_store": store, "prefetch": "on"},
            }  # fmt: skip


def combinations(
    count: int, sizes: list[int], record_bytes: int, num_experts: int, top_k: int, store: str
) -> Iterator[tuple[int, str, dict[str, Any]]]:
    """Yield worlds and random combinations of all factors."""
    chance = random.Random(2)
    for number in range(count):
        size = chance.choice([size for size in sizes if size > 1])
        options: dict[str, Any] = {
            "dispatcher": chance.choice(EXACT),
            "placement": chance.choice(["contiguous", "round_robin"]),
            "home": chance.choice(["load", "affinity"]),
            "replicas": chance.choice(["nearest", "round_robin", "water_filling"]),
            "rebalance": chance.choice([None, 2, 5]),
            "max_num_seqs": chance.choice([1, 2, 5, 32]),
            "max_num_batched_tokens": chance.choice([8, 33, 2048]),
            "max_prefill_chunk": chance.choice([1, 7, 64, None]),
            "block_size": chance.choice([1, 5, 16]),
            "enable_prefix_caching": chance.random() < 0.5,
        }
        slots = chance.choice([None, None, 2, 4])
        if slots is not None and max(top_k, num_experts // size // slots) < num_experts // size:
            options["expert_cache_slots"] = max(top_k, num_experts // size // slots)
            options["expert_store"] = store
            options["prefetch"] = chance.choice(["on", "off"])
        case: dict[str, Any] = {"seed": 100 + number, "options": options, "num_rounds": 3}
        if options["rebalance"] is None:
            case["bytes_per_step"] = chance.choice([1, 20 * record_bytes, 10**12, None])
        told = ", ".join(f"{k}={v}" for k, v in options.items() if k != "expert_store")
        yield size, f"random {number}: {told}", case


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("--worlds", default="1,2,3,4")
    parser.add_argument("--placements", type=int, default=17, help="of each of two dispatchers")
    parser.add_argument("--random", type=int, default=20, help="combinations, on each model")
    parser.add_argument("--only", default="", help="cases whose name has this in it")
    parser.add_argument("--experts", type=int, default=WIDE["num_experts"], help="of the dummy")
    parser.add_argument("--save", action="store_true", help="keep the figures in results/")
    args = parser.parse_args()
    sizes = [int(size) for size in args.worlds.split(",")]
    rows: list[Row] = []
    numerics: list[str] = []
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        (folder / "config.json").write_text(json.dumps({**WIDE, "num_experts": args.experts}))
        common = {"num_kv_blocks": 400, "max_model_len": 128, "threads": 1}
        wide = {**common, "model": name, "load_format": "dummy", "dtype": "bfloat16"}
        for model, options, shape in (
            ("embedded", common, (6, 32, 4, 3 * 256 * 64 * 2)),
            ("wide", wide, (4, args.experts, 4, 3 * 1024 * 384 * 2)),
        ):
            num_layers, num_experts, top_k, record_bytes = shape
            truth = expected(options, num_layers, num_experts)
            store = str(folder / "store")
            by_size: dict[int, list[tuple[str, dict[str, Any]]]] = {
                size: list(cases(size, args.placements, record_bytes, num_experts, top_k, store))
                for size in sizes
            }
            for size, text, case in combinations(
                args.random, sizes, record_bytes, num_experts, top_k, store
            ):
                by_size[size].append((text, case))
            for size, every in by_size.items():
                named = [(text, case) for text, case in every if args.only in text]
                if not named:
                    continue
                rows += run(f"{model}, {size} ranks", size, truth, named, folder, numerics)
    num_wrong = sum(int(row.value) for row in rows if row.limit == 0)
    print(f"{num_wrong} outputs differ from one process's")
    if args.save:
        command = recorded_command("benchmarks.ranks.exactness", sys.argv[1:])
        numerics_id = ", ".join(dict.fromkeys(numerics))
        kind = "-".join(["ranks-exactness", *args.only.split()])
        print(write_results(kind, rows, command=command, numerics_id=numerics_id))
    return 1 if num_wrong else 0


def run(
    name: str,
    size: int,
    truth: dict[str, Any],
    named: list[tuple[str, dict[str, Any]]],
    folder: Path,
    numerics: list[str],
) -> list[Row]:
    """Run cases on a world, print what came of each, and return it."""
    path = folder / "cases.json"
    path.write_text(json.dumps({"expected": truth, "cases": [case for _, case in named]}))
    results = finished(start(size, ["benchmarks.ranks.cases", str(path)]), 3000)
    for code, _, err in results:
        if code:
            raise SystemExit(f"{name}: a rank failed\n{err}")
    rows = []
    for (text, _), told in zip(named, json.loads(results[0][1]), strict=True):
        ranks = told["ranks"]
        label = f"{name}, {text}"
        rows.append(Row.of(f"{label}: outputs that differ", [told["num_wrong"]], "count", limit=0))
        figures = {
            "outputs": told["num_outputs"],
            "placements": told["num_placed"],
            "experts moved": ranks[0]["experts_moved"] if ranks else 0,
            "fewest steps without tokens": min((r["num_idle_steps"] for r in ranks), default=0),
        }
        shown = ", ".join(f"{value} {what}" for what, value in figures.items() if value)
        print(f"  {told['num_wrong']:3d} differ  {label}: {shown}", flush=True)
        rows += [Row.of(f"{label}: {w}", [v], "count") for w, v in figures.items() if v]
    numerics.append(told["numerics_id"])
    return rows


if __name__ == "__main__":
    sys.exit(main())
