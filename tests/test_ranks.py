"""Ranks: the bits of one process, however a model is spread; and faults that end soon."""

from __future__ import annotations

import functools
import json
import os
import random
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import psutil
import pytest

from benchmarks.ranks.cases import outputs_of, random_placement
from benchmarks.ranks.start import environment, finished, free_port, start
from moe_serve.engine.engine import EngineStats
from moe_serve.errors import CapacityError, CommError, ConfigError, RequestError
from moe_serve.experts.placement.base import Mesh
from moe_serve.experts.trace import read_trace
from moe_serve.hub import resolve_model
from moe_serve.launch import links
from moe_serve.launch.lasting import LastingEngine
from moe_serve.llm import LLM
from moe_serve.types import Request, SamplingParams

OPTIONS: dict[str, Any] = {
    "num_kv_blocks": 256,
    "max_model_len": 128,
    "enable_prefix_caching": True,
}
RANKS = {**OPTIONS, "dispatcher": "static"}  # nothing to measure at start
EXACT = ("per_expert", "dedup", "all_gather", "static", "auto")
NUM_LAYERS, NUM_EXPERTS, TOP_K = 6, 32, 4
RECORD_BYTES = 3 * 256 * 64 * 2


@functools.cache
def expected(count: int = 10) -> dict[str, Any]:
    """Return prompts, and what one process makes of them."""
    chance = random.Random(1)
    prompts = [
        [chance.randrange(2, 6000) for _ in range(chance.randint(1, 40))] for _ in range(count)
    ]
    params = [
        {
            "max_tokens": chance.randint(1, 12),
            "temperature": chance.choice((0.0, 0.9)),
            "seed": index,
            "logprobs": 2,
            "ignore_eos": True,
            "n": 2 if index == 3 else 1,
        }
        for index in range(count)
    ]
    with LLM(**OPTIONS, threads=1) as llm:
        outputs = outputs_of(llm, prompts, params)
    return {
        "prompts": prompts,
        "params": params,
        "outputs": outputs,
        "options": OPTIONS,
        "num_layers": NUM_LAYERS,
        "num_experts": NUM_EXPERTS,
    }


def run_cases(folder: Path, size: int, cases: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Run cases on `size` ranks, one after the other; return what rank 0 tells of each."""
    path = folder / f"cases-{size}.json"
    path.write_text(json.dumps({"expected": expected(), "cases": cases}))
    results = finished(start(size, ["benchmarks.ranks.cases", str(path)]))
    for code, _, err in results:
        assert code == 0, err
    assert all(not out for _, out, _ in results[1:])
    told: list[dict[str, Any]] = json.loads(results[0][1])
    assert len(told) == len(cases)
    for one, given in zip(told, cases, strict=True):
        assert one["num_wrong"] == 0, given
    return told


def case(seed: int = 0, **options: Any) -> dict[str, Any]:
    return {"seed": seed, "options": {"dispatcher": "static", **options}}


@pytest.mark.parametrize("size", [2, 3, 4])
def test_bits_are_those_of_one_process(size: int, tmp_path: Path) -> None:
    cases = [case(dispatcher=name) for name in EXACT]
    cases += [case(placement="round_robin"), case(fused=False, max_num_seqs=2)]
    cases[1]["options"]["replicas"] = "water_filling"
    # as many prompts as ranks, of unlike lengths: each rank has no token in its turn
    cases += [{**case(seed), "num_prompts": size, "num_rounds": 8} for seed in range(2)]
    cases[-1] |= {"bytes_per_step": 5 * RECORD_BYTES, "num_rounds": 8}
    moved = {
        **case(size, dispatcher="dedup", replicas="water_filling"),
        "num_rounds": 8,
        "bytes_per_step": 60 * RECORD_BYTES,
    }
    cases[-2]["bytes_per_step"] = 10**9
    store = str(tmp_path / "store")
    for slots in (NUM_EXPERTS // size // 2, TOP_K):
        held = case(expert_store=store, expert_cache_slots=slots, prefetch="on")
        cases.append({**held, "num_rounds": 3, "bytes_per_step": 10**9})
    by_itself = case(replicas="round_robin", rebalance=2, home="affinity", dispatcher="static")
    by_itself["num_rounds"] = 6
    told = run_cases(tmp_path, size, [*cases, by_itself, moved])
    assert all(len(one["ranks"]) == size for one in told)
    for one in told:
        assert all(rank["bytes_sent"] > 0 for rank in one["ranks"])
        counts = [(rank["num_steps"], rank["num_collectives"], rank["epoch"], rank["bytes_moved"])
                  for rank in one["ranks"]]  # fmt: skip
        assert len(set(counts)) == 1, counts
    assert [one["ranks"][0]["epoch"] for one in told[:7]] == [0] * 7
    assert all(rank["num_idle_steps"] > 0 for rank in told[7]["ranks"])
    in_memory, cached = [*told[7:9], told[-1]], told[9:11]
    assert all(one["ranks"][0]["experts_moved"] > 30 for one in in_memory)
    assert all(one["ranks"][0]["epoch"] >= NUM_LAYERS for one in [*told[7:11], told[-1]])
    rebalance = told[11]["ranks"][0]["rebalance"]
    assert rebalance["considered"] > 0
    assert rebalance["error"] is None
    assert not any(one["ranks"][0]["experts_moved"] for one in cached)
    for one in cached:
        assert all(rank["experts"]["total"]["misses"] > 0 for rank in one["ranks"])


@pytest.mark.parametrize("dispatcher", ["static_sums", "dedup_sums", "auto"])
def test_sums_are_near_but_named(dispatcher: str) -> None:
    """Not the bits of one process, and the numerics' name says so; the same tokens at first."""
    truth = expected()
    with LLM(ep_size=2, combine="partial", dispatcher=dispatcher, **OPTIONS) as llm:
        assert llm.engine.numerics_id.endswith("-partial")
        found = outputs_of(llm, truth["prompts"], truth["params"])
    for (ids, logprobs, _, error), (wanted_ids, wanted, _, _) in zip(
        found, truth["outputs"], strict=True
    ):
        assert error is None
        if ids[0] == wanted_ids[0]:
            assert abs(logprobs[0][1] - wanted[0][1]) < 0.1
    same = sum(one[0][0] == whole[0][0] for one, whole in zip(found, truth["outputs"], strict=True))
    assert same >= len(found) - 2


def test_forms_on_ranks_are_those_of_one_process() -> None:
    """Each rank compiles for its own requests; one that only compiles takes part in every step."""
    form = {"regex": "[a-z]{3,9}-[0-9]{2}( (yes|no)){1,4}"}
    options = {"max_tokens": 40, "temperature": 1.0, "seed": 5}
    params = [
        SamplingParams.from_mapping(
            {**options, "n": 1 + index % 2, "structured_outputs": form if index % 3 else None}
        )
        for index in range(8)
    ]
    wrong = SamplingParams.from_mapping({"structured_outputs": {"regex": "((("}})
    prompts = [[100 + index] for index in range(8)]

    def outputs(llm: LLM) -> list[list[tuple[Any, ...]]]:
        both = llm.generate([*prompts, [5]], [*params, wrong], use_tqdm=False)
        alone = llm.generate([[7]], params[1], use_tqdm=False)
        return [
            [(o.token_ids, o.text, o.finish_reason, o.error, o.is_refused) for o in one.outputs]
            for one in (*both, *alone)
        ]

    with LLM(**OPTIONS, threads=1) as llm:
        want = outputs(llm)
    assert want[8][0][4], "the one that is wrong is refused"
    assert [output[2] for output in want[1]] == ["stop", "stop"]
    with LLM(ep_size=2, **RANKS) as llm:
        assert outputs(llm) == want
    assert not children()


def test_nan_in_an_expert_ends_only_what_used_it(tmp_path: Path) -> None:
    cases = [{**case(), "poison": [4, expert]} for expert in (3, 30)]
    for one in run_cases(tmp_path, 2, cases):
        assert 0 < one["num_failed"] < one["num_outputs"]


def test_a_rank_holds_its_share_and_sends_what_it_says(tmp_path: Path) -> None:
    """Memory of the process, and bytes on the loopback device, against what is reported."""
    config = {
        "model_type": "qwen3_moe", "vocab_size": 2048, "hidden_size": 1024, "head_dim": 64,
        "num_hidden_layers": 4, "num_attention_heads": 16, "num_key_value_heads": 4,
        "num_experts": 32, "num_experts_per_tok": 4, "moe_intermediate_size": 768,
        "norm_topk_prob": True, "rms_norm_eps": 1e-6, "max_position_embeddings": 1024,
    }  # fmt: skip
    prompts = [[token % 2000 for token in range(first, first + 300)] for first in range(3)]
    peaks, held = [], []
    for size in (8, 768):
        path = tmp_path / "config.json"
        path.write_text(json.dumps({**config, "moe_intermediate_size": size}))
        options = {**OPTIONS, "max_model_len": 512, "dtype": "bfloat16", "dispatcher": "dedup"}
        options["enable_prefix_caching"] = False
        with LLM(str(tmp_path), ep_size=3, load_format="dummy", **options) as llm:
            ratios = [sent_over_told(llm, prompts) for _ in range(3)]
            ranks = llm.engine.stats().ranks
        assert 0.9 < min(ratios) < 1.1, ratios  # what others send on the device only adds
        peaks.append([rank["peak_rss_bytes"] for rank in ranks])
        held.append([rank["model_bytes"] for rank in ranks])
    for rank in range(3):
        # the dense part is the same in both; a share is a third of the experts, rounded up or down
        share = held[1][rank] - held[0][rank]
        experts = 4 * (11, 11, 10)[rank] * 3 * 1024 * 2 * (768 - 8)
        assert abs(share / experts - 1) < 0.02
        assert abs((peaks[1][rank] - peaks[0][rank]) / share - 1) < 0.15


def sent_over_told(llm: LLM, prompts: list[list[int]]) -> float:
    """Run prompts; return the device's bytes over those that ranks say they sent."""
    before, ranks_before = loopback_bytes(), llm.engine.stats().ranks
    llm.generate(prompts, SamplingParams(max_tokens=1), use_tqdm=False)
    sent, ranks = loopback_bytes() - before, llm.engine.stats().ranks
    told: int = sum(r["bytes_sent"] for r in ranks) - sum(r["bytes_sent"] for r in ranks_before)
    return sent / told


def loopback_bytes() -> int:
    """Return how many bytes went over the loopback device since the machine started."""
    for line in Path("/proc/net/dev").read_text().splitlines():
        name, _, counts = line.strip().partition(":")
        if name == "lo":
            return int(counts.split()[0])
    raise AssertionError("no loopback device")


def generate_command(*flags: str) -> list[str]:
    return ["moe_serve", "generate", "Once upon a time", "--max-tokens", "4", *flags]


def refused(size: int, commands: list[list[str]], limit_s: float = 10) -> list[tuple[int, str]]:
    """Start rank r with command r; return each one's code and last line; all must end in time."""
    port = free_port()
    begun_s = time.monotonic()
    processes = [
        subprocess.Popen(
            [sys.executable, "-m", *command],
            env=environment(rank, size, port),
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        for rank, command in enumerate(commands)
    ]
    results = finished(processes)
    assert time.monotonic() - begun_s < limit_s
    return [(code, err.strip().splitlines()[-1]) for code, _, err in results]


def test_ranks_with_other_options_are_refused_on_all() -> None:
    told = refused(
        3, [generate_command(), generate_command(), generate_command("--block-size", "8")]
    )
    assert len(set(told)) == 1, told
    code, line = told[0]
    assert code == 3
    assert "ranks 0 and 2 were given different options: block_size 16 and 8" in line


def test_ranks_with_other_numerics_or_weights_are_refused_on_all(tmp_path: Path) -> None:
    told = refused(2, [generate_command(), generate_command("--kernels", "reference")])
    assert len(set(told)) == 1, told
    assert "differ in numerics_id" in told[0][1] or "different options: kernels" in told[0][1]
    original = Path(resolve_model("demo-moe", None))
    folders = [tmp_path / "a", tmp_path / "b"]
    for folder in folders:
        shutil.copytree(original, folder)
    weights = next(folders[1].glob("*.safetensors"))
    data = bytearray(weights.read_bytes())
    data[-200_000:] = bytes(200_000)  # others' weights: another checkpoint of the same shapes
    weights.write_bytes(data)
    # the folder is an option, too: the same path on both, as on two hosts
    os.symlink(folders[0], tmp_path / "model")
    command = generate_command("--model", str(tmp_path / "model"))
    script = tmp_path / "on_other_host.py"
    script.write_text(
        "import pathlib, sys\n"
        "from moe_serve import hub, cli\n"
        "from moe_serve.launch import named_model\n"
        f"named_model.resolve_model = lambda name, revision: pathlib.Path({str(folders[1])!r})\n"
        "sys.argv = ['moe-serve', *sys.argv[1:]]\n"
        "cli.main()\n"
    )
    port = free_port()
    commands = [["-m", *command], [str(script), *command[1:]]]
    results = finished(
        [
            subprocess.Popen(
                [sys.executable, *command],
                env=environment(rank, 2, port),
                stdout=subprocess.PIPE,
                stderr=subprocess.PIPE,
                text=True,
            )
            for rank, command in enumerate(commands)
        ]
    )
    lines = [err.strip().splitlines()[-1] for _, _, err in results]
    assert [code for code, _, _ in results] == [3, 3], results
    assert lines[0] == lines[1]
    assert "ranks 0 and 1 differ in model" in lines[0]


def test_a_port_in_use_is_said() -> None:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = taken.getsockname()[1]
        rank = environment(0, 2, port)
        result = subprocess.run(
            [sys.executable, "-m", *generate_command()],
            env=rank, capture_output=True, text=True, timeout=30,
        )  # fmt: skip
    assert result.returncode == 3
    assert f"127.0.0.1:{port}" in result.stderr
    assert "in use" in result.stderr


@pytest.mark.parametrize(
    ("options", "error", "text"),
    [
        ({"ep_size": 33}, CapacityError, "33 ranks for 32 experts"),
        ({"ep_size": 2, "dispatcher": "local"}, ConfigError, "for one process"),
        ({"ep_size": 2, "dispatcher": "dedupe"}, ConfigError, "did you mean 'dedup'"),
        ({"ep_size": 2, "dispatcher": "static_sums"}, ConfigError, "combine='partial'"),
        ({"ep_size": 2, "placement": "nowhere.json"}, ConfigError, "no such file; .*contiguous"),
        (
            {"ep_size": 2, "rebalance": 1, "rebalance_slots": 4},
            CapacityError,
            "give at least 16 slots",
        ),
        ({"ep": 2}, ConfigError, "--ep is the flag of 'ep_size'"),
        ({"ep_size": 2, "emulate_link": 4.0, "expert_cache_slots": 8}, ConfigError, "one process"),
        ({"ep_size": 2, "expert_cache_slots": 2}, CapacityError, "expert_cache_slots 4"),
        ({"ep_size": 2, "num_kv_blocks": 2**30}, CapacityError, "num_kv_blocks"),
    ],
)
def test_what_ranks_cannot_have(options: dict[str, Any], error: type[Exception], text: str) -> None:
    with pytest.raises(error, match=text):
        LLM(**options)
    assert not children()


def children() -> list[str]:
    """Return the ranks that this process has started and not waited for, as process ids.

    What other tests' grammars are tried in may still be there, and is no rank.
    """
    found = Path(f"/proc/self/task/{os.getpid()}/children").read_text().split()
    return [one for one in found if b"moe_serve.launch.child" in _command(one)]


def _command(process: str) -> bytes:
    try:
        return Path(f"/proc/{process}/cmdline").read_bytes()
    except OSError:  # it has ended since
        return b""


def placement_json(**changes: Any) -> dict[str, Any]:
    layers = [[[expert % 2] for expert in range(NUM_EXPERTS)] for _ in range(NUM_LAYERS)]
    plain = {
        "schema": 1, "model_id": None, "num_layers": NUM_LAYERS, "num_experts": NUM_EXPERTS,
        "num_ranks": 2, "ranks_per_node": 2, "strategy": "given", "layers": layers,
    }  # fmt: skip
    return {**plain, **changes}


def test_placements_of_others_are_refused(tmp_path: Path) -> None:
    layers = placement_json()["layers"]
    broken: dict[str, dict[str, Any]] = {
        "no rank": placement_json(layers=[[[], *layers[0][1:]], *layers[1:]]),
        "twice": placement_json(layers=[[[1, 1], *layers[0][1:]], *layers[1:]]),
        "another model": placement_json(model_id="0123456789abcdef"),
        "3 ranks": placement_json(num_ranks=3, ranks_per_node=3),
        "5 layers": placement_json(num_layers=5, layers=layers[:5]),
    }
    for text, placement in broken.items():
        path = tmp_path / "placement.json"
        path.write_text(json.dumps(placement))
        with pytest.raises(ConfigError, match=text):
            LLM(ep_size=2, placement=str(path), **RANKS)
    path.write_text(json.dumps(placement_json()))
    with LLM(ep_size=2, placement=str(path), **RANKS) as llm:
        assert outputs_of(llm, expected()["prompts"], expected()["params"]) == expected()["outputs"]


def rank_processes() -> list[int]:
    """Return the ranks that this process has started, by rank."""
    found = {}
    for child in children():
        variables = Path(f"/proc/{child}/environ").read_bytes().split(b"\0")
        found[int(next(v for v in variables if v.startswith(b"RANK=")).partition(b"=")[2])] = child
    return [int(found[rank]) for rank in sorted(found)]


LONG = SamplingParams(max_tokens=100, ignore_eos=True, temperature=0.8, seed=11)


def uninterrupted() -> tuple[int, ...]:
    with LLM(**OPTIONS) as llm:
        return llm.generate([5, 6, 7], LONG, use_tqdm=False)[0].outputs[0].token_ids


def test_a_rank_that_is_killed_is_started_again_and_no_token_is_lost() -> None:
    expected_ids = uninterrupted()
    with LLM(ep_size=3, **RANKS) as llm:
        engine = llm.engine
        assert isinstance(engine, LastingEngine)
        stream = llm.stream([5, 6, 7], LONG)
        next(stream)
        before = rank_processes()
        os.kill(before[1], signal.SIGKILL)
        begun_s = time.monotonic()
        while engine.generation == 0:
            next(stream)
        assert time.monotonic() - begun_s < 20  # with three models loaded
        output = next(stream)
        assert 0 < len(output.outputs[0].token_ids) < 100
        assert not set(before) & set(rank_processes())
        *_, output = stream
        assert output.outputs[0].token_ids == expected_ids
        assert engine.num_resubmitted == 1
        assert outputs_of(llm, expected()["prompts"], expected()["params"]) == expected()["outputs"]
    assert not children()


def test_worlds_are_not_formed_for_ever() -> None:
    with LLM(ep_size=2, **RANKS) as llm:
        engine = llm.engine
        assert isinstance(engine, LastingEngine)
        engine._max_losses = 0
        stream = llm.stream([5, 6, 7], LONG)
        next(stream)
        os.kill(rank_processes()[1], signal.SIGKILL)
        with pytest.raises(CommError, match=r"rank 1 is gone.*the limit is 0"):
            for _ in stream:
                pass
        assert not children()


def test_a_rank_that_is_killed_ends_the_others_without_a_supervisor() -> None:
    command = generate_command("--max-tokens", "120", "--ignore-eos")
    processes = start(3, [*command, "Once", "There", "--json"])
    stderr = processes[0].stderr
    assert stderr is not None
    assert any("3 ranks on 1 node" in line for line in iter(stderr.readline, ""))
    processes[2].kill()  # it generates from now on, for seconds
    begun_s = time.monotonic()
    results = finished(processes)
    assert time.monotonic() - begun_s < 5
    assert [code for code, _, _ in results] == [3, 3, -signal.SIGKILL], results
    assert "rank 2 is gone" in results[0][2]


def test_a_rank_that_is_frozen_is_replaced(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(links, "DEAD_AFTER_S", 2.5)
    lost_s: list[float] = []
    with LLM(ep_size=2, **RANKS) as llm:
        engine = llm.engine
        assert isinstance(engine, LastingEngine)
        engine._on_loss = lambda why: lost_s.append(time.monotonic())
        stream = llm.stream([5, 6, 7], LONG)
        next(stream)
        os.kill(rank_processes()[1], signal.SIGSTOP)
        begun_s = time.monotonic()
        *_, output = stream
        assert lost_s[0] - begun_s < 2.5 + 1
        assert output.outputs[0].token_ids == uninterrupted()
    assert not children()


def test_a_rank_that_dies_while_nobody_asks_is_replaced() -> None:
    with LLM(ep_size=2, **RANKS) as llm:
        os.kill(rank_processes()[0], signal.SIGKILL)
        assert llm.generate([5, 6, 7], LONG, use_tqdm=False)[0].outputs[0].token_ids == (
            uninterrupted()
        )


@pytest.mark.parametrize("how", [signal.SIGKILL, signal.SIGTERM])
def test_ranks_end_with_their_parent_also_where_one_is_stopped(how: signal.Signals) -> None:
    flags = ["--ep", "2", "--max-tokens", "120", "--ignore-eos", "Once"]
    parent = subprocess.Popen(
        [sys.executable, "-m", *generate_command(*flags)], stderr=subprocess.PIPE, text=True
    )
    assert parent.stderr is not None
    assert any("2 ranks on 1 node" in line for line in iter(parent.stderr.readline, ""))
    ranks = [child.pid for child in psutil.Process(parent.pid).children()]
    assert len(ranks) == 2
    os.kill(ranks[0], signal.SIGSTOP)
    parent.send_signal(how)
    parent.communicate()
    end_s = time.monotonic() + 5
    while any(psutil.pid_exists(rank) for rank in ranks):
        assert time.monotonic() < end_s
        time.sleep(0.02)


def alone() -> list[str]:
    greedy = SamplingParams(max_tokens=6, temperature=0.0)
    prompts = ["Once upon a time", "def", "The capital of France"]
    with LLM(**OPTIONS) as llm:
        found = llm.generate(prompts, greedy, use_tqdm=False)
    once, code, france = (output.outputs[0].text for output in found)
    return [once, code, once, code, france, once, "refused", code]


def test_a_script_with_ranks_of_its_own_runs_once() -> None:
    result = subprocess.run(
        [sys.executable, "-m", "tests.rank_script", json.dumps({"ep_size": 2}), "0"],
        capture_output=True, text=True, timeout=120,
    )  # fmt: skip
    assert result.returncode == 0, result.stderr
    assert json.loads(result.stdout) == alone()
    assert result.stderr.count("begun") == 1


def test_the_same_script_under_torchrun() -> None:
    """Two agents, as on two nodes; rank 0 alone has the texts, and waits for who is late."""
    port = free_port()
    late_s = str(links.DEAD_AFTER_S + 1)
    agents = [
        subprocess.Popen(
            [
                sys.executable, "-m", "torch.distributed.run", "--nnodes", "2",
                "--nproc-per-node", "1", "--node-rank", str(node), "--master-addr", "127.0.0.1",
                "--master-port", str(port), "-m", "tests.rank_script", "{}", late_s,
            ],
            stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
        )
        for node in range(2)
    ]  # fmt: skip
    results = finished(agents)
    for code, _, err in results:
        assert code == 0, err
    assert json.loads(results[0][1]) == alone()
    assert results[1][1] == ""


def test_the_command_line_under_torchrun() -> None:
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node"]
    run = [*command, "2", "-m", *generate_command("--json", "--temperature", "0")]
    result = subprocess.run(run, capture_output=True, text=True, timeout=120)
    assert result.returncode == 0, result.stderr
    report = json.loads(result.stdout)
    assert [rank["rank"] for rank in report["ranks"]] == [0, 1]
    assert report["outputs"][0]["token_ids"]
    assert result.stderr.count("2 ranks on 1 node, 16 of 32 experts of each layer on a rank") == 1
    assert result.stderr.count("ranks: 2 | ") == 1
    assert (
        sum(report["ranks"][0]["steps_by_dispatcher"].values()) == report["ranks"][0]["num_steps"]
    )
    assert report["metrics"]["peak_rss_bytes"] > 2 * 10**8
    run = [*command, "2", "-m", "moe_serve", "bench", "throughput", "--json"]
    run += ["--num-prompts", "4", "--num-iters", "1", "--input-len", "16", "--output-len", "4"]
    result = subprocess.run(run, capture_output=True, text=True, timeout=120)
    assert result.returncode == 0, result.stderr
    assert json.loads(result.stdout)


def test_what_has_no_effect_is_said(caplog: pytest.LogCaptureFixture) -> None:
    with LLM(dispatcher="static", rebalance=3, **OPTIONS):
        pass
    assert "one rank, so there is no effect of: dispatcher, rebalance" in caplog.text


def folders() -> set[Path]:
    return set(Path(tempfile.gettempdir()).glob("moe-serve-*"))


def test_what_cannot_be_done_harms_nobody(tmp_path: Path) -> None:
    """Requests that cannot be said, ids used twice, odd placements; then all is as it was."""
    trace, before = tmp_path / "trace.npz", folders()
    with LLM(ep_size=2, record_trace=str(trace), **RANKS) as llm:
        engine = llm.engine
        assert isinstance(engine, LastingEngine)
        with pytest.raises(RequestError, match="cannot be sent"):
            llm.generate([[1]], SamplingParams(stop=["\ud800"]), use_tqdm=False)
        with pytest.raises(RequestError, match="token id -5"):
            engine.add(Request(request_id="x", prompt_ids=(-5,), sampling=SamplingParams()))
        request = Request(request_id="x", prompt_ids=(5,), sampling=SamplingParams(max_tokens=2))
        engine.add(request)
        with pytest.raises(RequestError, match="in use"):
            engine.add(request)
        outputs = [output for _ in range(2) for output in engine.step()]
        assert [output.finish_reason for output in outputs] == [None, "length"]
        given = random_placement(random.Random(1), Mesh(num_ranks=2, ranks_per_node=2), 6, 32)
        with pytest.raises(ConfigError, match="bytes_per_step is 0"):
            engine.place(given, 0)
        with pytest.raises(ConfigError, match="5 layers"):
            engine.place(replace(given, ranks=given.ranks[:5]))
        engine.place(given)
        with pytest.raises(ConfigError, match="being taken over"):
            engine.place(given)
        assert outputs_of(llm, expected()["prompts"], expected()["params"]) == expected()["outputs"]
        assert folders() == before  # what ranks were started with is gone
    recorded = read_trace(trace)
    assert recorded.num_tokens == sum(np.diff(recorded.seq_offsets))
    assert recorded.num_layers == NUM_LAYERS
    assert {path.name for path in tmp_path.iterdir()} == {"trace.npz"}


def test_ranks_count_together_and_tell_whose_experts_were_used(tmp_path: Path) -> None:
    """Uses and experts of tokens, against those of one process; and what travelled."""
    prompts = expected()["prompts"]
    asked = SamplingParams(
        max_tokens=6, temperature=0.0, ignore_eos=True, return_routed_experts=True
    )
    options = {**OPTIONS, "enable_return_routed_experts": True}
    with LLM(**options, threads=1) as llm:
        want = llm.generate(prompts, asked, use_tqdm=False)
        alone = llm.engine.stats()
    held: dict[str, Any] = {"expert_store": str(tmp_path), "expert_cache_slots": TOP_K}
    for dispatcher, more in (("static", {}), ("per_expert", {}), ("dedup", held)):
        with LLM(ep_size=2, dispatcher=dispatcher, **options, **more) as llm:
            got = llm.generate(prompts, asked, use_tqdm=False)
            stats = llm.engine.stats()
        for one, whole in zip(got, want, strict=True):
            assert whole.outputs[0].routed_experts is not None
            assert one.outputs[0] == whole.outputs[0]
        assert isinstance(alone, EngineStats)
        assert isinstance(stats, EngineStats)
        for name in (
            "expert_layers", "expert_uses", "step_tokens", "num_prompt_tokens",
            "num_generation_tokens", "num_finished",
        ):  # fmt: skip
            assert getattr(stats, name) == getattr(alone, name), name
        assert stats.max_num_seqs == 2 * alone.max_num_seqs
        assert stats.num_kv_blocks == [2 * alone.num_kv_blocks[0]]
        ranks = stats.ranks
        assert stats.num_steps == ranks[0]["num_steps"]
        assert "expert_uses" not in ranks[0]
        computed = [rank["pairs_computed"] for rank in ranks]
        assert sum(computed) == sum(map(sum, stats.expert_uses))
        assert stats.rank_imbalance == pytest.approx(max(computed) / (sum(computed) / 2))
        # experts 0 to 15 are rank 0's: what it computed is its own, and what rank 1 sent
        uses = np.array(stats.expert_uses)
        assert computed == [uses[:, :16].sum(), uses[:, 16:].sum()]
        own = [rank["step_tokens"] * NUM_LAYERS * TOP_K - rank["pairs_sent"] for rank in ranks]
        assert computed == [own[0] + ranks[1]["pairs_sent"], own[1] + ranks[0]["pairs_sent"]]
        assert all(rank["pairs_sent"] > 0 for rank in ranks)
        assert all(0 < rank["exchange_s"] < 60 for rank in ranks)
        if more:
            assert np.array(stats.resident)[:, :16].sum(axis=1).tolist() == [TOP_K] * NUM_LAYERS
            assert stats.experts["total"]["disk_bytes"] == sum(
                rank["experts"]["total"]["disk_bytes"] for rank in ranks
            )
        else:
            assert stats.resident == []
