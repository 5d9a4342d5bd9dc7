"""A plan: by hand for a small model, in agreement with the engine, and what it advises."""

from __future__ import annotations

import json
import re
from dataclasses import fields, replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from moe_serve import cli
from moe_serve.config import EngineConfig
from moe_serve.engine import build, device_memory
from moe_serve.engine.memory import GIB, num_kv_blocks
from moe_serve.engine.residency import plan_residency
from moe_serve.errors import ConfigError
from moe_serve.experts.policies import adaptive
from moe_serve.experts.trace import write_trace
from moe_serve.kernels import suite
from moe_serve.models.hf_config import HFConfig
from moe_serve.models.registry import read_spec
from moe_serve.study import machine as machines
from moe_serve.study.expert_demand import demand_of
from moe_serve.study.machine import QUANTITIES, Machine, read_machine
from moe_serve.study.plan import Row, Subject, Workload, make_plan
from moe_serve.study.plan_report import as_json, command_of, text_of_plan, verdict_of
from moe_serve.study.replay import batched_steps, cache_shape, replay
from moe_serve.study.wire import copies_per_token, exchange
from tests.experts.routing import synthetic_trace

NUM_LAYERS, NUM_EXPERTS, TOP_K = 2, 8, 2
SMALL = {
    "model_type": "qwen3_moe", "hidden_size": 64, "intermediate_size": 64,
    "moe_intermediate_size": 32, "num_attention_heads": 2, "num_key_value_heads": 1, "head_dim": 32,
    "num_hidden_layers": NUM_LAYERS, "num_experts": NUM_EXPERTS, "num_experts_per_tok": TOP_K,
    "norm_topk_prob": True, "vocab_size": 100, "max_position_embeddings": 4096,
    "rms_norm_eps": 1e-6, "rope_theta": 10000.0, "hidden_act": "silu",
    "tie_word_embeddings": False, "dtype": "bfloat16",
}  # fmt: skip
# weights of 1.2 GB: two layers of eight experts of 75 MB
LARGE = {**SMALL, "hidden_size": 2048, "moe_intermediate_size": 6144}
DENSE = {
    **{key: value for key, value in SMALL.items() if "expert" not in key},
    "model_type": "qwen3",
}
ROUND = Machine(
    memory_gb=4.0, cores=16, memory_gb_per_s=10.0, gflop_per_s=1000.0, disk_gb_per_s=1.0,
    network_gb_per_s=2.0, latency_us=10.0, step_us=0.0, num_machines=1, sources={},
)  # fmt: skip


def subject(
    folder: Path,
    raw: dict[str, Any] = SMALL,
    machine: Machine = ROUND,
    num_seqs: int = 4,
    **more: Any,
) -> Subject:
    (folder / "config.json").write_text(json.dumps(raw))
    hf_config = HFConfig.read(folder)
    return Subject(
        config=EngineConfig.from_options({"model": str(folder)}),
        spec=read_spec(hf_config),
        dtype=torch.bfloat16,
        kernels=suite.load("auto", "auto"),
        machine=machine,
        workload=Workload(input_len=32, output_len=16, num_seqs=num_seqs),
        **more,
    )


def row_of(rows: tuple[Row, ...], kind: str, number: int, dispatcher: str | None = None) -> Row:
    (row,) = (
        row for row in rows
        if (row.kind, row.num_processes, row.dispatcher) == (kind, number, dispatcher)
    )  # fmt: skip
    return row


def known(**values: Any) -> Machine:
    return replace(ROUND, **values, sources=dict.fromkeys(QUANTITIES, "given"))


# -- by hand -----------------------------------------------------------------------------------


def test_a_step_of_one_process(tmp_path: Path) -> None:
    one = subject(tmp_path)
    row = row_of(make_plan(one, [1]).rows, "one", 1)
    slot_bytes = -(-one.kernels.record_bytes(64, 32, torch.bfloat16) // 4096) * 4096

    # of a layer: two norms, qkv, output, the heads' norms, all bfloat16; and a router in float32
    elements = 2 * 64 + 128 * 64 + 64 * 64 + 2 * 32
    body = 2 * (NUM_LAYERS * elements + 64) + 4 * NUM_LAYERS * NUM_EXPERTS * 64
    head = 2 * 100 * 64
    distinct = NUM_LAYERS * NUM_EXPERTS * (1 - (1 - 2 / 8) ** 4)
    kv_of_token = NUM_LAYERS * 2 * 32 * 2
    read = body + head + 4 * 128 + distinct * slot_bytes + 4 * (32 + 8) * kv_of_token
    assert row.read_bytes == pytest.approx(read)
    assert row.weights_bytes == body + 2 * head + NUM_LAYERS * NUM_EXPERTS * slot_bytes
    assert row.memory_s == pytest.approx(read / 10e9)
    matrices = NUM_LAYERS * (elements + NUM_EXPERTS * 64 + TOP_K * 3 * 64 * 32) + 64
    flops = 4 * (2 * matrices + 4 * 64 * 40 * NUM_LAYERS + 2 * 100 * 64)
    assert row.compute_s == pytest.approx(flops / 1e12)
    assert row.step_s == max(row.memory_s or 0, row.compute_s or 0)
    assert (row.miss_s, row.exchange_s, row.num_collectives) == (0, 0, 0)
    assert (row.num_seqs, row.num_running, row.slots) == (4, 4, None)
    assert row.prefill_s is not None
    assert row.tokens_per_s == pytest.approx(4 * 16 / (row.prefill_s + 15 * row.step_s))


def test_misses_come_from_the_disk(tmp_path: Path) -> None:
    one = subject(tmp_path, machine=replace(ROUND, step_us=100.0))
    row = next(row for row in make_plan(one, [1]).by_slots if row.given_slots == 4)
    missed = NUM_LAYERS * (NUM_EXPERTS - 4) * (1 - (1 - 2 / 8) ** 4)
    assert row.slots == 4
    assert row.missed_experts == pytest.approx(missed)
    assert row.miss_bytes is not None
    assert row.miss_s == pytest.approx(row.miss_bytes / 1e9)
    assert row.memory_s is not None
    assert row.step_s == pytest.approx(row.memory_s + (row.miss_s or 0) + 1e-4)


def test_ranks_share_a_machine_and_exchange_rows(tmp_path: Path) -> None:
    one = subject(tmp_path)
    rows = make_plan(one, [2], ["per_expert", "all_gather"]).rows
    row = row_of(rows, "ranks", 2, "per_expert")
    # of two tokens a rank: two rows each, half of them to the other rank, and back
    counts = 4 * 1 * 8
    sent = NUM_LAYERS * (2 * 2 * (2 * 0.5) * 128 + counts)
    assert row.network_bytes == pytest.approx(sent)
    assert row.num_collectives == 1 + NUM_LAYERS * 3
    assert row.exchange_s == pytest.approx(7 * 10e-6 + sent / 2e9)
    assert row.read_bytes is not None
    assert row.memory_s == pytest.approx(row.read_bytes / 5e9), "two share the rate"
    other = row_of(rows, "ranks", 2, "all_gather")
    assert other.num_collectives == 1 + NUM_LAYERS * 2
    two = make_plan(replace(one, machine=replace(ROUND, num_machines=2)), [2], ["per_expert"])
    assert row_of(two.rows, "ranks", 2, "per_expert").memory_s == pytest.approx(
        row.read_bytes / 10e9
    )


@pytest.mark.parametrize(
    ("num_experts", "top_k", "num_ranks", "per_expert", "dedup"),
    [(8, 2, 4, 1.50, 1.39), (64, 6, 8, 5.25, 3.97), (128, 8, 32, 7.75, 7.13)],
)
def test_copies_are_those_of_the_closed_form(
    num_experts: int, top_k: int, num_ranks: int, per_expert: float, dedup: float
) -> None:
    held = [num_experts // num_ranks] * num_ranks
    assert copies_per_token("per_expert", held, top_k)[0] == pytest.approx(per_expert, abs=0.006)
    out, back = copies_per_token("dedup", held, top_k)
    assert out == pytest.approx(dedup, abs=0.006)
    assert back == pytest.approx(per_expert, abs=0.006)
    assert copies_per_token("all_gather", held, top_k)[0] == num_ranks - 1


def test_static_has_room_for_a_power_of_two_in_rounds() -> None:
    one = exchange("static", [4, 4], 2, 5, 100)
    assert one == type(one)(2, 8 * (100 + 2 * 2 + 2 * 100))
    assert exchange("static", [4, 4], 2, 65, 100).num_collectives == 4


def test_one_token_is_uneven_over_ranks(tmp_path: Path) -> None:
    one = subject(tmp_path, num_seqs=1)
    demand = demand_of(one.spec, None, "adaptive")
    holds = np.zeros((NUM_LAYERS, NUM_EXPERTS, 2), bool)
    holds[:, :4, 0] = holds[:, 4:, 1] = True
    # both experts on one rank: 2 of C(8, 2) pairs are C(4, 2) each, 12 of 28
    expected = NUM_LAYERS * (2 * 12 / 28 + 1 * 16 / 28)
    assert demand.distinct(1, holds, True) == pytest.approx(expected, rel=0.1)
    alone = np.ones((NUM_LAYERS, NUM_EXPERTS, 1), bool)
    assert demand.distinct(1, alone, True) == NUM_LAYERS * TOP_K
    assert demand.distinct(1000, holds, True) == pytest.approx(NUM_LAYERS * 4)


# -- the engine's own answer -------------------------------------------------------------------


@pytest.mark.parametrize("memory_gb", [0.6, 0.9, 4.0])
def test_what_fits_is_what_the_engine_says(tmp_path: Path, memory_gb: float) -> None:
    one = subject(tmp_path, LARGE, replace(ROUND, memory_gb=memory_gb))
    row = row_of(make_plan(one, [1]).rows, "one", 1)

    config = EngineConfig.from_options({"max_num_seqs": 4, "max_model_len": 48})
    given = (one.spec, torch.bfloat16)
    available = int(memory_gb * GIB)
    residency = plan_residency(config, *given, one.kernels, 48, available)
    blocks = num_kv_blocks(config, *given, 48, available, residency.model_bytes, residency.kv_bytes)
    assert row.why_not is None
    assert row.weights_bytes == residency.model_bytes
    assert row.num_kv_blocks == min(blocks)
    held = None if residency.shape is None else residency.shape.slots_per_layer
    assert row.slots == held
    assert (held is None) == (memory_gb == 4.0)


def test_an_engine_that_is_started_holds_what_was_planned(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    one = subject(tmp_path)
    row = row_of(make_plan(one, [1]).rows, "one", 1)
    monkeypatch.setattr(device_memory, "available_bytes", lambda: one.machine.memory_bytes)
    options = {"load_format": "dummy", "max_num_seqs": 4, "max_model_len": 48}
    engine = build.build_engine(EngineConfig.from_options(options), tmp_path)
    stats = engine.stats()
    assert (stats.model_bytes, stats.kv_bytes) == (row.weights_bytes, row.kv_bytes)
    engine.close()


# -- a recorded trace --------------------------------------------------------------------------


def test_misses_of_a_trace_are_those_of_its_replay(tmp_path: Path) -> None:
    trace = synthetic_trace(num_layers=NUM_LAYERS, num_experts=NUM_EXPERTS, top_k=TOP_K)
    one = subject(tmp_path, trace=trace)
    row = next(row for row in make_plan(one, [1]).by_slots if row.given_slots == 4)
    shape = cache_shape(trace, 4, "layer")
    result = replay(trace, batched_steps(trace, 4), shape, adaptive.build(shape), with_counts=True)
    assert row.missed_experts == pytest.approx(result.misses / trace.num_tokens * 4)
    uniform = next(
        row for row in make_plan(replace(one, trace=None), [1]).by_slots if row.given_slots == 4
    )
    assert uniform.missed_experts is not None
    assert row.missed_experts is not None
    assert row.missed_experts < uniform.missed_experts


def test_ranks_of_a_trace_are_as_uneven_as_it_is(tmp_path: Path) -> None:
    trace = synthetic_trace(num_layers=NUM_LAYERS, num_experts=NUM_EXPERTS, top_k=TOP_K)
    first_half = replace(trace, ids=(trace.ids % 4).astype(np.uint8))
    reads = []
    for given in (trace, first_half):
        plan = make_plan(subject(tmp_path, trace=given), [2], ["dedup"])
        reads.append(row_of(plan.rows, "ranks", 2, "dedup").read_bytes or 0.0)
    alone = make_plan(subject(tmp_path, trace=first_half), [1]).rows[0].read_bytes
    assert alone is not None
    assert reads[1] > reads[0] * 0.9
    assert reads[1] > 0.7 * alone, "one rank has all that is used"


@pytest.mark.parametrize(
    ("shape", "num_seqs", "says"),
    [
        ({"num_layers": 3}, 4, "3 layers of 8 experts, top-2, and the model 2 of 8, top-2"),
        ({"num_layers": 2}, 7, "6 sequences, and 7 are to run at once"),
    ],
)
def test_a_trace_must_be_of_the_model_and_long_enough(
    tmp_path: Path, shape: dict[str, int], num_seqs: int, says: str
) -> None:
    trace = synthetic_trace(num_experts=NUM_EXPERTS, top_k=TOP_K, **shape)
    with pytest.raises(ConfigError, match=says):
        make_plan(subject(tmp_path, num_seqs=num_seqs, trace=trace), [1])


# -- verdicts ----------------------------------------------------------------------------------


def test_where_it_fits_on_one_ranks_are_not_advised(tmp_path: Path) -> None:
    one = subject(tmp_path)
    verdict = verdict_of(one, make_plan(one))
    assert verdict.best is not None
    assert verdict.best.kind == "one"
    assert verdict.sentence.startswith("use one process, all held: ")
    assert "do not use expert parallelism here: the model fits in one process" in verdict.sentence


def test_what_is_too_large_for_one_machine_goes_on_four(tmp_path: Path) -> None:
    four = known(memory_gb=0.8, disk_gb_per_s=0.2, num_machines=4)
    one = subject(tmp_path, LARGE, four)
    plan = make_plan(one)
    verdict = verdict_of(one, plan)
    assert verdict.best is not None
    assert (verdict.best.kind, verdict.best.num_processes) == ("ranks", 4)
    assert verdict.best.slots is None
    assert "expert parallelism pays here" in verdict.sentence
    command = command_of(one, verdict.best)
    assert command.startswith("torchrun --nnodes 4 --nproc-per-node 1 --node-rank RANK ")
    assert "--master-addr HOST --master-port 29500 -m moe_serve" in command
    assert "use 4 ranks" in text_of_plan(one, plan)


def test_replicas_are_advised_where_the_network_is_slow(tmp_path: Path) -> None:
    one = subject(tmp_path, machine=replace(ROUND, num_machines=4, latency_us=1e4), num_seqs=16)
    verdict = verdict_of(one, make_plan(one))
    assert verdict.best is not None
    assert verdict.best.kind == "replicas"
    assert "do not use expert parallelism here" in verdict.sentence


def test_a_dense_model_has_no_experts_to_place(tmp_path: Path) -> None:
    one = subject(tmp_path, DENSE, replace(ROUND, num_machines=4), num_seqs=16)
    plan = make_plan(one)
    assert {row.kind for row in plan.rows} == {"one", "replicas"}
    assert plan.by_slots == ()
    verdict = verdict_of(one, plan)
    assert "there are no experts to place" in verdict.sentence
    assert "replicas" in verdict.sentence


def test_what_fits_nowhere_says_what_is_missing(tmp_path: Path) -> None:
    small = known(memory_gb=0.1)
    one = subject(tmp_path, LARGE, small)
    plan = make_plan(one)
    sentence = verdict_of(one, plan).sentence
    assert sentence.startswith("does not fit anywhere: the nearest is one process")
    assert plan.missing is not None
    lacking, _ = plan.missing
    assert str(lacking) in sentence
    enough = replace(one, machine=replace(small, memory_gb=0.1 + lacking / GIB + 0.002))
    assert make_plan(enough, [1]).rows[0].why_not is None
    assert as_json(one, plan)["best"] is None
    assert "none can be" in text_of_plan(one, plan)


# -- bad input ---------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("no json", "not a machine"),
        ("[1]", "a machine is an object of some of memory_gb, cores"),
        ('{"memry_gb": 1}', "did you mean 'memory_gb'"),
        ('{"memory_gb": 0}', "memory_gb is 0; give a number from 0.001 to 1.04858e+06"),
        ('{"memory_gb": NaN}', "memory_gb is nan; give a number"),
        ('{"cores": 2.5}', "cores is 2.5; give a whole number from 1 to 65536"),
        ('{"latency_us": true}', "latency_us is True; give a number from 0"),
        ('{"num_machines": "4"}', "num_machines is '4'; give a whole number from 1 to 1024"),
    ],
)
def test_a_machine_that_cannot_be_is_refused(tmp_path: Path, text: str, says: str) -> None:
    path = tmp_path / "machine.json"
    path.write_text(text)
    with pytest.raises(ConfigError) as caught:
        read_machine(path)
    assert str(path) in str(caught.value)
    assert says in str(caught.value)


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (("--ranks", "0"), "ranks is 0; it must be from 1 to 1024"),
        (("--dispatcher", "auto"), "a plan models per_expert, dedup, all_gather, static"),
        (("--input-len", "0"), "input_len is 0; it must be from 1"),
        (("--output-len", "4096"), "are 4224 tokens; the model's context holds 4096"),
        (("--dtype", "int8"), "dtype is 'int8'"),
        (("--trace", "none.npz"), "none.npz: not a trace"),
        (("--machine", "none.json"), "none.json: not a machine"),
    ],
)
def test_bad_usage_is_refused(
    tmp_path: Path, arguments: tuple[str, ...], says: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run_verb(tmp_path, *arguments) in (2, 3)
    assert says in capsys.readouterr().err


def test_more_processes_than_cores_or_experts_say_so(tmp_path: Path) -> None:
    rows = make_plan(subject(tmp_path), [16, 32], ["dedup"]).rows
    assert "16 ranks for 8 experts" in (row_of(rows, "ranks", 16, "dedup").why_not or "")
    assert "32 processes on a machine of 16 cores" in (row_of(rows, "replicas", 32).why_not or "")


# -- the verb ----------------------------------------------------------------------------------


def run_verb(folder: Path, *arguments: str) -> int:
    (folder / "config.json").write_text(json.dumps(SMALL))
    if "--machine" not in arguments:
        path = folder / "machine.json"
        path.write_text(json.dumps({name: getattr(ROUND, name) for name in QUANTITIES}))
        arguments = (*arguments, "--machine", str(path))
    return cli.run(["plan", str(folder), *arguments])


def test_json_has_every_figure(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert run_verb(tmp_path, "--json", "--ranks", "1", "--ranks", "2") == 0
    result = json.loads(capsys.readouterr().out)
    assert set(result) == {
        "schema", "model", "dtype", "is_dense", "machine", "workload", "routing", "rows",
        "by_slots", "verdict", "best", "command",
    }  # fmt: skip
    assert result["schema"] == 1
    assert result["routing"] == "uniform"
    assert set(result["machine"]) == {*QUANTITIES, "sources"}
    assert set(result["machine"]["sources"].values()) == {"given"}
    layouts = [(row["kind"], row["num_processes"], row["dispatcher"]) for row in result["rows"]]
    assert layouts == [
        ("one", 1, None), ("replicas", 2, None), ("ranks", 2, "per_expert"),
        ("ranks", 2, "dedup"), ("ranks", 2, "all_gather"), ("ranks", 2, "static"),
    ]  # fmt: skip
    for row in (*result["rows"], *result["by_slots"], result["best"]):
        assert set(row) == {one.name for one in fields(Row)}
        terms = max(row["memory_s"], row["compute_s"]) + row["miss_s"] + row["exchange_s"]
        assert row["step_s"] == pytest.approx(terms + row["other_s"])
    assert result["best"]["kind"] == "one"
    assert result["command"].startswith("moe-serve generate --model ")


def test_a_table_says_what_is_assumed(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    trace = synthetic_trace(num_layers=NUM_LAYERS, num_experts=NUM_EXPERTS, top_k=TOP_K)
    write_trace(tmp_path / "t.npz", trace)
    assert run_verb(tmp_path) == 0
    out, err = capsys.readouterr()
    assert "uniform routing is assumed, the worst case" in err
    for title in ("the machine", "layouts of", "slots against KV, one process"):
        assert title in out
    assert re.search(r"^memory_gb_per_s +10 +GB/s read", out, re.M)
    arguments = ("--trace", str(tmp_path / "t.npz"), "--num-seqs", "4", "--ranks", "1")
    assert run_verb(tmp_path, *arguments) == 0
    assert "are of trace t, replayed with adaptive" in capsys.readouterr().err


def test_what_a_machine_leaves_out_is_measured_or_assumed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "machine.json"
    path.write_text('{"num_machines": 4, "memory_gb": 3}')
    config = EngineConfig.from_options({"expert_store": str(tmp_path)})
    found = machines.find_machine(path, config, torch.float32)
    assert (found.num_machines, found.memory_gb) == (4, 3)
    assert found.sources["memory_gb"] == "given"
    assert found.sources["memory_gb_per_s"] == "measured"
    assert found.sources["latency_us"] == "assumed"
    assert all(getattr(found, name) > 0 for name in QUANTITIES)
    assert sorted(file.name for file in tmp_path.iterdir()) == ["machine.json"]

    monkeypatch.setattr(machines, "measured_disk_gb_per_s", lambda folder: None)
    found = machines.find_machine(path, config, torch.float32)
    assert (found.disk_gb_per_s, found.sources["disk_gb_per_s"]) == (1.0, "assumed")
