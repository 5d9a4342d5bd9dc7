"""Ranks run steps of nobody's tokens before they meet: nobody waits, and nothing is counted."""

from __future__ import annotations

import json
from pathlib import Path

from benchmarks.ranks.start import finished, start
from moe_serve.experts.trace import read_trace
from tests.test_ranks import RANKS, TOP_K, expected


def test_ranks_warm_up_alone_and_leave_nothing(tmp_path: Path) -> None:
    traced = {"record_trace": str(tmp_path / "trace.npz"), "enable_prefix_caching": False}
    cases = [
        {"dispatcher": "dedup", "replicas": "water_filling", **traced},
        {"dispatcher": "auto"},
        {**RANKS, "expert_store": str(tmp_path / "store"), "expert_cache_slots": TOP_K},
        {**RANKS, "rebalance": 1000, "fused": False},
    ]
    file = tmp_path / "cases.json"
    # one compiles for longer than a collective may take
    given = {"cases": cases, "slow_rank": 1, "compile_s": 4, "collective_s": 3}
    file.write_text(json.dumps({**given, "expected": expected()}))
    (code, out, err), (other_code, _, other_err) = finished(
        start(2, ["tests.warm_ranks", str(file)])
    )
    assert (code, other_code) == (0, 0), err + other_err
    for case, told in zip(cases, json.loads(out), strict=True):
        assert told["is_same"], case
        assert not any(told["used"]), (case, told["used"])
        assert len(told["counted"]) == 2
        for rank in told["counted"]:
            names = ("pairs_sent", "num_collectives", "bytes_sent", "exchange_s", "num_waits")
            assert not any(rank[name] for name in names), (case, rank)
    params = expected()["params"]
    num_prompt_tokens = sum(len(prompt) for prompt in expected()["prompts"])  # each runs once
    num_decodes = sum((one["max_tokens"] - 1) * one["n"] for one in params)
    assert read_trace(tmp_path / "trace.npz").num_tokens == num_prompt_tokens + num_decodes
