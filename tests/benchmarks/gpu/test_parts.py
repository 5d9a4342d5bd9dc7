from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
import torch

from benchmarks.gpu import checks, decode, engines, exactness, links, offload, peers
from benchmarks.gpu import tests as device_tests
from benchmarks.gpu.cases import Bench
from benchmarks.gpu.checks import CheckFailed
from benchmarks.gpu.engines import Decoding, offloaded, running
from benchmarks.gpu.figures import Figure
from benchmarks.gpu.limits import Limits
from benchmarks.gpu.offload import BASE, HostCase
from benchmarks.gpu.routing import made_up
from benchmarks.gpu.setting import Setting, installed
from benchmarks.gpu.shapes import TINY
from benchmarks.gpu.transfer import demand_s
from benchmarks.kernels.step import active_bytes
from moe_serve.errors import ConfigError
from moe_serve.kernels import suite


@pytest.fixture
def setting(tmp_path: Path) -> Setting:
    torch.manual_seed(0)
    return Setting(
        device=torch.device("cpu"),
        kernels="reference",
        is_dry=True,
        traces=(),
        scratch=tmp_path,
        seconds=60.0,
    )


def test_a_step_s_bytes_are_those_of_the_experts_it_used(setting: Setting) -> None:
    with running(setting, TINY, num_kv_blocks=16, max_num_seqs=2) as engine:
        decoding = Decoding(engine, TINY, 2, 9, 4)
        before = decoding._num_kv_tokens
        cost = decoding.step()
        tables = engine.runner.model.experts.layers.values()
        assert sum(int(table.uses.sum()) for table in tables) == 2 * TINY.top_k
        used = sum(int(table.uses.count_nonzero()) for table in tables)
        assert cost.num_bytes == active_bytes(TINY, used, before)
        assert decoding._num_kv_tokens == before + 2
        decoding.end()
        assert not engine.has_unfinished


def test_a_step_that_fails_is_no_figure(setting: Setting, monkeypatch: pytest.MonkeyPatch) -> None:
    with running(setting, TINY, num_kv_blocks=16, max_num_seqs=1) as engine:
        decoding = Decoding(engine, TINY, 1, 9, 4)

        def fail(*given: object) -> object:
            raise torch.OutOfMemoryError("none left")

        monkeypatch.setattr(engine.runner, "_run", fail)
        with pytest.raises(RuntimeError, match="none left"):
            decoding.step()


def test_demands_bring_in_what_they_name(setting: Setting) -> None:
    with running(setting, TINY, num_kv_blocks=8, expert_cache_slots=2, prefetch="off") as engine:
        experts = offloaded(engine)
        records = experts._memory.records
        assert demand_s(experts, 2, 1) > 0
        # experts 1 and 2 of the layer are in slots 0 and 1
        before = records[0].clone()
        demand_s(experts, 2, 0)
        assert torch.equal(records[1], before)


def test_what_differs_is_seen() -> None:
    want: exactness.Told = {"a": [((1,), "x"), ((2,), "y")], "b": [((3,), "z")]}
    assert exactness.agreement(want, want) == 1.0
    found: exactness.Told = {"a": [((1,), "x"), ((2,), "other")], "b": [((3,), "z")]}
    assert exactness.agreement(found, want) == pytest.approx(2 / 3)
    with pytest.raises(ValueError, match="zip"):
        exactness.agreement({"a": [((1,), "x")], "b": [((3,), "z")]}, want)


def test_ways_include_those_that_were_asked_for() -> None:
    options = [way.options for way in exactness.ways(TINY)]
    assert {"max_num_seqs": 1} in options
    assert {"fused": False} in options
    assert any("expert_cache_slots" in one for one in options)


def test_all_missing_experts_can_run_in_host_memory(setting: Setting) -> None:
    trace = made_up(1, TINY.num_experts, TINY.top_k)
    base = HostCase(resident=50, batch=1, more=engines.beside_cache(setting))
    sizes = offload.Sizes((50,), (1,), warm=0, steps=2, rounds=2)
    cases = offload.variants(base, is_full=True)
    samples, record_bytes = offload.samples_of(setting, sizes, trace, TINY, 1, cases["host"])
    assert record_bytes > 0
    assert sum(sample.counters["bytes"] for sample in samples) == 0
    assert sum(sample.counters["computed_on_cpu"] for sample in samples) > 0
    samples, _ = offload.samples_of(setting, sizes, trace, TINY, 1, cases["copy"])
    assert sum(sample.counters["bytes"] for sample in samples) > 0
    assert sum(sample.counters["computed_on_cpu"] for sample in samples) == 0


def test_experts_that_were_copied_all_the_same_are_no_figure(
    setting: Setting, monkeypatch: pytest.MonkeyPatch
) -> None:
    trace = made_up(1, TINY.num_experts, TINY.top_k)
    case = HostCase(resident=50, batch=1, more=engines.beside_cache(setting), prefetch="off")
    sizes = offload.Sizes((50,), (1,), warm=0, steps=2, rounds=1)
    monkeypatch.setattr(offload, "_never_copy", lambda subject: None)
    with pytest.raises(RuntimeError, match="were copied"):
        offload.samples_of(setting, sizes, trace, TINY, 1, replace(case, is_on_host=True))


def test_variants_differ_from_how_it_runs_unasked() -> None:
    base = HostCase(resident=25, batch=8, more={})
    cases = offload.variants(base, is_full=True)
    assert cases[BASE] == base
    assert cases["static"] == replace(base, eviction="static")
    assert list(offload.variants(base, is_full=False)) == [BASE, "no prefetch"]
    assert base.slots(128) == 32
    assert replace(base, resident=10).slots(64) == 6


def test_offloading_needs_a_trace(setting: Setting) -> None:
    setting.is_dry = False
    with pytest.raises(ConfigError, match="--trace"):
        list(offload.run(setting))


def test_the_limit_of_a_step_is_the_longer_of_two(setting: Setting) -> None:
    limits = Limits(setting)
    limits.__dict__ |= {"read_gb_s": 2.0, "matrix_tflop_s": 1.0}
    cost = engines.StepCost(1.0, num_bytes=4e9, flop=1e12)
    assert decode.least_s(cost, limits) == 2.0
    assert decode.least_s(replace(cost, flop=3e12), limits) == 3.0


def test_files_with_tests_for_a_gpu_are_found() -> None:
    assert "tests/kernels/test_moe.py" in device_tests.gpu_test_files()
    assert "tests/kernels/test_router.py" not in device_tests.gpu_test_files()


@pytest.mark.parametrize(
    ("printed", "counts", "num_passed"),
    [
        ("...\n12 passed, 3 skipped, 9 deselected in 1.2s\n", "12 passed, 3 skipped", 12),
        ("1 skipped, 5 deselected in 0.1s\n", "1 skipped", 0),
        ("2 failed, 7 passed, 1 error in 3s", "2 failed, 7 passed, 1 error", 7),
        ("", "no test", 0),
    ],
)
def test_what_was_skipped_has_not_passed(printed: str, counts: str, num_passed: int) -> None:
    assert device_tests.counted(printed) == (counts, num_passed)


def test_a_check_that_fails_is_a_missed_goal(monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(bench: Bench, num_rows: int, is_exact: bool) -> None:
        raise CheckFailed("rows differ")

    bench = Bench(TINY, suite.load("reference"))
    (found,) = device_tests.checked(bench, "greedy", 3, True, "greedy, 3 rows")
    assert found.is_met
    monkeypatch.setitem(checks.CHECKS, "greedy", fail)
    (found,) = device_tests.checked(bench, "greedy", 3, True, "greedy, 3 rows")
    assert not found.is_met


def test_only_what_was_asked_for_is_measured(setting: Setting) -> None:
    assert setting.wants("anything")
    setting.only = "batch 8"
    assert setting.wants("qwen3-30b, intent, batch 8")
    assert not setting.wants("qwen3-30b, intent, batch 1")


def test_links_of_this_tree_are_whole() -> None:
    assert links.are_whole()
    assert all(line.endswith("imported") for line in links.told())


def test_a_link_that_was_lost_is_told(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in links.LINKED:
        (tmp_path / name).mkdir()
        (tmp_path / "moe_serve" / name).mkdir(parents=True)
    monkeypatch.setattr(links, "ROOT", tmp_path)
    assert not links.are_whole()
    *told, restore = links.told()
    assert all("is no link" in line for line in told)
    assert restore.startswith("to make the links again: (cd moe_serve")
    for name in links.LINKED:
        (tmp_path / "moe_serve" / name).rmdir()
        (tmp_path / "moe_serve" / name).symlink_to(f"../{name}")
    assert links.are_whole()


@pytest.mark.skipif(not installed("transformers"), reason="transformers is not installed")
def test_the_same_model_runs_in_transformers(setting: Setting) -> None:
    found = list(peers.run(setting))
    assert all(isinstance(one, Figure) for one in found), found
    names = [one.row.name for one in found if isinstance(one, Figure)]
    assert sum("transformers" in name for name in names) == 2
    ours = [one for one in found if isinstance(one, Figure) and "moe_serve" in one.row.name]
    assert len(ours) == 2
    assert all(one.row.ratio is not None and one.row.ratio > 0 for one in ours)
