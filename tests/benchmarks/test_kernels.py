import functools
import json
import math
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from torch import Tensor

from benchmarks.kernels import __main__ as command
from benchmarks.kernels import attention, products, rows, sampling, timing
from benchmarks.kernels.limits import Limits, product
from benchmarks.kernels.report import goal_lines, kernel_rows, step_rows
from benchmarks.kernels.step import StepBench, StepFigure, active_bytes
from benchmarks.kernels.timing import (
    Case,
    Figure,
    Work,
    interleaved,
    measure,
    num_sets,
)
from benchmarks.kernels.workload import WORKLOADS
from benchmarks.results import write_results
from moe_serve.kernels.native import loader
from moe_serve.kernels.suite import Kernels
from tests.kernels.implementations import FOR_MODELS
from tests.kernels.implementations import kernels as kernels_named

TINY = WORKLOADS["tiny"]
# of the tiny shape: hidden 64, experts of 32, 8 of them, 2 for a token
EXPERT_BYTES = 3 * 64 * 32 * 2


@pytest.fixture(params=FOR_MODELS)
def kernels(request: pytest.FixtureRequest) -> Kernels:
    return kernels_named(request.param)


@pytest.fixture
def limits() -> Limits:
    return Limits(None, 2**16)


@pytest.fixture(autouse=True)
def _one_thread() -> None:
    torch.manual_seed(0)
    torch.set_num_threads(1)


def figure(**changes: object) -> Figure:
    values = {
        "table": "linear",
        "name": "a",
        "num_rows": 1,
        "num_bytes": 2e9,
        "flop": 8e9,
        "unit": "GB/s",
        "limit_name": "read",
        "seconds": [1.0, 2.0, 4.0],
        "limit_rates": [2.0, 2.0, 1.0],
        "torch_seconds": None,
        "empty_seconds": None,
    }
    return Figure(**{**values, **changes})  # type: ignore[arg-type]


class TestTiming:
    def test_works_take_turns_and_inputs_rotate(self) -> None:
        seen: list[tuple[int, int]] = []

        def work(index: int) -> Callable[[int], object]:
            return lambda turn: seen.append((index, turn))

        samples = interleaved([work(0), work(1)], seconds=1e-9, rounds=3)
        assert [len(of_work) for of_work in samples] == [3, 3]
        warm, rounds = seen[:6], seen[6:]
        assert warm == [(0, 0), (0, 1), (0, 2), (1, 0), (1, 1), (1, 2)]
        assert rounds == [(0, 3), (1, 3), (0, 4), (1, 4), (0, 5), (1, 5)]

    def test_samples_divide_the_time_between_works(self, monkeypatch: pytest.MonkeyPatch) -> None:
        now = 0.0
        turns: dict[float, list[int]] = {0.001: [], 0.5: []}

        def work(seconds: float) -> Callable[[int], None]:
            def run(turn: int) -> None:
                nonlocal now
                now += seconds
                turns[seconds].append(turn)

            return run

        monkeypatch.setattr(timing, "time", SimpleNamespace(perf_counter=lambda: now))
        short, long = interleaved([work(0.001), work(0.5)], seconds=0.402, rounds=2)
        # a sample has 0.1005 s: 101 calls of the one, a single one of the other
        assert turns == {0.001: list(range(3 + 2 * 101)), 0.5: list(range(3 + 2))}
        assert short == pytest.approx([0.001] * 2)
        assert long == pytest.approx([0.5] * 2)

    def test_rates_and_ratios(self) -> None:
        found = figure(torch_seconds=[2.0, 2.0, 2.0], empty_seconds=[0.5, 0.9, 0.1])
        assert found.rates == [2.0, 1.0, 0.5]
        assert found.ratio == 0.5  # of 1, 0.5 and 0.5
        assert found.rates_without_call == [4.0, 2 / 1.5, 2 / 3.5]
        assert found.ratio_without_call == pytest.approx(2 / 3)
        assert found.torch_ratio == 1.0

    def test_the_unit_says_what_counts(self) -> None:
        assert figure(unit="GFLOP/s").rates == [8.0, 4.0, 2.0]

    def test_a_call_that_is_all_there_is_leaves_no_rate(self) -> None:
        found = figure(empty_seconds=[1.0, 1.0, 1.0])
        assert found.rates_without_call is None
        assert found.ratio_without_call is None

    def test_measure_keeps_each_work_apart(self) -> None:
        calls = dict.fromkeys(("work", "limit", "torch", "empty"), 0)

        def count(name: str) -> Work:
            def run(_: int) -> None:
                calls[name] += 1

            return Work(run, num_bytes=3e9)

        case = Case(
            table="t", name="n", num_rows=4, work=count("work"), unit="GB/s", limit=count("limit"),
            limit_name="read", torch=None, empty=count("empty"),
        )  # fmt: skip
        found = measure(case, seconds=1e-9, rounds=2)
        assert calls == {"work": 5, "limit": 5, "torch": 0, "empty": 5}
        assert found.torch_seconds is None
        assert found.empty_seconds is not None
        assert (len(found.seconds), len(found.limit_rates), len(found.empty_seconds)) == (2, 2, 2)

    def test_sets_are_enough_to_leave_the_caches(self) -> None:
        assert num_sets(3 * 2**20, 200_000_000) * 3 * 2**20 >= 200_000_000
        assert num_sets(10**9, 200_000_000) == 2
        assert num_sets(10, 200_000_000) == 4096


def test_the_torch_limits_read_and_copy_all_of_a_window(limits: Limits) -> None:
    assert (limits.read.num_bytes, limits.copy.num_bytes) == (2**20, 2**21)
    total = limits.read.run(3)
    assert isinstance(total, Tensor)
    word = torch.full((4,), 1, dtype=torch.uint8).view(torch.float32)
    assert float(total) == pytest.approx(float(word) * 2**18, rel=1e-3)
    copied = limits.copy.run(1)
    assert isinstance(copied, Tensor)
    assert copied.nbytes == 2**20


@pytest.mark.skipif(len(FOR_MODELS) == 1, reason="the native library is not built")
def test_the_native_limits_take_time() -> None:
    native = Limits(loader.load(), 2**16)
    assert native.measured_by == "native"
    for work in (native.read, native.copy):
        assert [0 < float(str(work.run(turn))) < 1 for turn in range(9)] == [True] * 9


def test_a_product_counts_both_operations() -> None:
    work = product(3, 5, 7, torch.bfloat16)
    assert (work.flop, work.num_bytes) == (2 * 3 * 5 * 7, 5 * 7 * 2)
    result = work.run(0)
    assert isinstance(result, Tensor)
    assert result.shape == (3, 5)


def results(case: Case, turn: int) -> tuple[Tensor, Tensor]:
    """Return what the kernel and torch gave in a turn."""
    assert case.torch is not None
    ours, theirs = case.work.run(turn), case.torch.run(turn)
    assert isinstance(ours, Tensor)
    assert isinstance(theirs, Tensor)
    return ours, theirs


class TestProducts:
    def test_linear(self, kernels: Kernels, limits: Limits) -> None:
        cases = list(products.linear(kernels, TINY, limits))
        assert [case.name for case in cases[::2]] == [
            "qkv 256x64, 1 rows", "output 64x128, 1 rows", "head 256x64, 1 rows",
            "expert 64x64, 1 rows",
        ]  # fmt: skip
        one, many = cases[:2]
        assert (one.work.num_bytes, one.work.flop, one.unit) == (2 * 256 * 64, 2 * 256 * 64, "GB/s")
        assert one.limit is limits.read
        assert (many.work.flop, many.limit.flop) == (2 * 32 * 256 * 64,) * 2
        assert (many.unit, many.limit_name) == ("GFLOP/s", "torch.mm")
        for case in cases:
            ours, theirs = results(case, 1)
            torch.testing.assert_close(ours, theirs, rtol=0.02, atol=0.02)
            assert case.empty is not None
            empty = case.empty.run(0)
            assert isinstance(empty, Tensor)
            assert empty.shape == (0, ours.shape[1])

    def test_moe(self, kernels: Kernels, limits: Limits) -> None:
        one, many = products.moe(kernels, TINY, limits)
        assert one.name == "1 tokens, 2.0 of 8 experts"
        assert one.work.num_bytes == 2 * EXPERT_BYTES
        assert one.work.flop == 2 * 2 * EXPERT_BYTES / 2
        assert (one.unit, many.unit) == ("GB/s", "GFLOP/s")
        assert many.work.flop == 128 * one.work.flop
        assert many.limit_name == "torch.mm, 32 rows"
        assert many.limit.flop == 2 * 32 * EXPERT_BYTES / 2
        for case in (one, many):
            for turn in range(3):
                ours, theirs = results(case, turn)
                assert ours.shape == (case.num_rows * 2, 64)
                torch.testing.assert_close(ours, theirs, rtol=0.05, atol=0.05)
            assert case.empty is not None
            empty = case.empty.run(0)
            assert isinstance(empty, Tensor)
            assert empty.shape == (0, 64)

    def test_every_token_has_different_experts(self, kernels: Kernels) -> None:
        found = products.routed(kernels, 0, 50, 8, 8)
        assert found.counts.tolist() == [50] * 8
        assert found.num_touched == 8


class TestRows:
    @pytest.mark.parametrize(
        ("cases", "num_bytes"),
        [
            (rows.rms_norm, 4 * 64 * 2),
            (rows.combine, 3 * 64 * 2 + 2 * 12),
            (rows.silu, 3 * 32 * 2),
            (rows.rope, 2 * 8 * 32 * 2),
        ],
        ids=["rms_norm", "combine", "silu", "rope"],
    )
    def test_bytes(
        self, kernels: Kernels, limits: Limits, cases: rows.Cases, num_bytes: int
    ) -> None:
        found = list(cases(kernels, TINY, limits))
        assert [case.num_rows for case in found] == [1, 5]
        for case in found:
            assert case.work.num_bytes == case.num_rows * num_bytes
            assert case.limit is limits.copy
            for turn in range(3):
                case.work.run(turn)

    def test_torch_does_the_same(self, kernels: Kernels, limits: Limits) -> None:
        for case in rows.silu(kernels, TINY, limits):
            torch.testing.assert_close(*results(case, 1), rtol=0.02, atol=0.02)
        for case in rows.rms_norm(kernels, TINY, limits):
            assert case.torch is not None
            ours, theirs = case.work.run(1), case.torch.run(1)
            assert isinstance(ours, tuple)
            torch.testing.assert_close(ours[0], theirs, rtol=0.02, atol=0.02)

    def test_router(self, kernels: Kernels, limits: Limits) -> None:
        found = list(rows.router(kernels, TINY, limits))
        scores, top_k = found[:2], found[2:]
        assert [case.work.num_bytes for case in scores] == [8 * 64 * 4] * 2
        assert [case.work.num_bytes for case in top_k] == [4 * 8 + 12 * 2, 5 * (4 * 8 + 12 * 2)]
        for case in scores:
            torch.testing.assert_close(*results(case, 0), rtol=1e-3, atol=1e-3)
        for case in top_k:
            case.work.run(0)


class TestAttention:
    def test_costs(self) -> None:
        assert attention.kv_bytes(TINY.shape, 10) == 2 * 10 * 2 * 32 * 2
        assert attention.causal_flop(TINY.shape, 3) == 4 * 4 * 32 * (1 + 2 + 3)

    def test_cases_run(self, kernels: Kernels, limits: Limits) -> None:
        found = list(attention.attention(kernels, TINY, limits))
        assert [case.name for case in found] == [
            "decode, 1 x context 20", "decode, 3 x context 20", "decode, 1 x context 70",
            "decode, 3 x context 70", "prompt of 33",
        ]  # fmt: skip
        assert found[3].work.num_bytes == 3 * 70 * 2 * 2 * 32 * 2
        assert [case.unit for case in found] == ["GB/s"] * 4 + ["GFLOP/s"]
        for case in found:
            for turn in range(2):
                out = case.work.run(turn)
                assert isinstance(out, Tensor)
                assert out.shape == (case.num_rows, 4, 32)
                assert bool(out.isfinite().all())

    def test_no_two_tables_share_a_block(self) -> None:
        cache = attention.PagedCache(TINY.shape, 23)
        tables = cache.tables(num_seqs=2, num_tokens=33, most=100)
        assert [table.shape for table in tables] == [(2, 3)] * 3
        ids = torch.cat(tables).flatten().tolist()
        assert len(set(ids)) == len(ids)
        assert 1 <= min(ids) <= max(ids) <= 23
        assert len(cache.tables(1, 16, most=4)) == 4


def test_sampling_reads_each_row_once(kernels: Kernels, limits: Limits) -> None:
    found = list(sampling.sampling(kernels, TINY, limits))
    assert [case.work.num_bytes for case in found] == [1024.0, 1024.0, 3072.0, 3072.0]
    for case in found[::2]:
        assert case.torch is not None
        ours, theirs = case.work.run(5), case.torch.run(5)
        assert isinstance(ours, tuple)
        assert isinstance(theirs, Tensor)
        assert ours[0].tolist() == theirs.tolist()
    for case in found[1::2]:
        ids = case.work.run(5)
        assert isinstance(ids, Tensor)
        assert ids.shape == (case.num_rows,)


class TestStep:
    def test_active_bytes_are_those_of_the_baseline(self) -> None:
        shape = WORKLOADS["baseline"].shape
        # 0.225 B parameters in bfloat16; the routers' million once more, as they are float32
        one = active_bytes(shape, num_experts=16 * 8, num_kv_tokens=0)
        assert one == pytest.approx(0.45e9 + 2e6, rel=0.01)
        assert active_bytes(shape, 129, 0) - one == 3 * 1024 * 384 * 2
        assert active_bytes(shape, 128, 10) - one == 10 * 16 * 1024

    @pytest.mark.parametrize("name", FOR_MODELS)
    def test_measure(self, name: str, limits: Limits) -> None:
        kind, _, isa = name.partition("-")
        bench = StepBench(TINY, {"kernels": kind, "isa": isa or "auto"})
        for num_requests in (3, 1):
            found = bench.measure(num_requests, limits, seconds=0.002, rounds=2)
            assert found.num_requests == num_requests
            assert len(found.seconds) == len(found.limit_seconds) == 2
            assert found.ratio > 0
            if kind == "cpu":
                assert {"forward", "linear", "greedy"} <= set(found.native_seconds)
                assert all(0 < share < 1 for share in found.outside)
            else:
                assert not found.native_seconds
                assert not found.outside
            bench.engine.step()
            assert not bench.engine.has_unfinished

    def test_a_step_is_charged_with_what_it_read(self) -> None:
        bench = StepBench(TINY, {})
        bench._start(2)
        _, first = bench._step(2)
        # both prompts, the token that each ended with; two layers of 2 to 4 experts
        spans = [active_bytes(TINY.shape, count, 2 * 21) for count in range(4, 9)]
        assert first in spans


class TestReport:
    def test_rows_are_named_and_have_limits(self) -> None:
        found = kernel_rows(figure(torch_seconds=[2.0] * 3, empty_seconds=[0.5] * 3))
        assert [row.name for row in found] == [
            "linear: a, over read",
            "linear: a, without the call, over read",
            "linear: a, torch; ours over torch's",
        ]
        assert [row.limit for row in found] == [2.0] * 3
        assert [row.value for row in found] == [1.0, 2 / 1.5, 1.0]
        assert found[0].ratio == 0.5

    def test_steps_are_in_milliseconds(self) -> None:
        step = StepFigure(
            num_requests=1, seconds=[0.02], limit_seconds=[0.01], native_seconds={}, outside=[0.05]
        )
        time, outside = step_rows(step)
        assert (time.value, time.limit, time.ratio, time.unit) == (20.0, 10.0, 0.5, "ms")
        assert (outside.value, outside.unit) == (5.0, "%")

    def test_goals(self) -> None:
        fast = {"seconds": [1.0] * 3, "limit_rates": [2.0] * 3}
        slow = {"seconds": [1.0] * 3, "limit_rates": [4.0] * 3}
        figures = [
            figure(**fast, empty_seconds=[0.5] * 3),
            figure(**slow, num_rows=8, name="b"),
            figure(**slow, num_rows=16),  # no goal speaks of it
            figure(**fast, num_rows=256),
            figure(**fast, table="router"),
        ]
        step = StepFigure(
            num_requests=1, seconds=[1.0], limit_seconds=[0.9], native_seconds={}, outside=[0.2]
        )
        other = StepFigure(
            num_requests=16, seconds=[1.0], limit_seconds=[0.1], native_seconds={}, outside=[]
        )
        lines = list(goal_lines(figures, [step, other]))
        assert [line[:7].strip() for line in lines] == ["NOT MET", "met", "met", "NOT MET"]
        assert "least 50.0 % (b), median 75.0 %" in lines[0]
        assert "90.0 % of its limit" in lines[2]
        assert "20.0 % outside kernels" in lines[3]


class TestCommand:
    def test_everything_runs_and_is_kept(
        self, monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]
    ) -> None:
        keep = functools.partial(write_results, folder=tmp_path)
        monkeypatch.setattr(command, "write_results", keep)
        words = ["--workload", "tiny", "--seconds", "0.001", "--threads", "1", "--save"]
        assert command.main(words) == 0
        printed = capsys.readouterr().out
        for table in (*command.TABLES, command.STEP):
            assert f"\n{table}" in printed
        document = json.loads(next(tmp_path.glob("*-kernels-*.json")).read_text())
        assert document["numerics_id"].endswith("-bfloat16")
        found = document["rows"]
        names = [row["name"] for row in found]
        assert len(set(names)) == len(names)
        assert {name.partition(":")[0] for name in names} >= {"machine", *command.TABLES}
        assert all(row["n"] >= 5 and math.isfinite(row["value"]) for row in found)
        compared = [row for row in found if row["ratio"] is not None]
        assert all(row["limit"] > 0 for row in compared)

    def test_only_what_is_asked_for_runs(self, capsys: pytest.CaptureFixture[str]) -> None:
        words = ["--workload", "tiny", "--seconds", "0.001", "--only", "silu"]
        assert command.main([*words, "--kernels", "reference"]) == 0
        printed = capsys.readouterr().out
        assert "\nsilu" in printed
        assert "\nlinear" not in printed
        assert "reference-torch" in printed

    @pytest.mark.parametrize(
        ("words", "message"),
        [
            (["--only", "linear,mo"], "no table 'mo'; there are: linear, moe"),
            (["--threads", "0"], "--threads is 0; it must be at least 1"),
            (["--seconds", "0"], "--seconds is 0.0; it must be above 0"),
        ],
    )
    def test_what_cannot_be_is_refused(
        self, words: list[str], message: str, capsys: pytest.CaptureFixture[str]
    ) -> None:
        with pytest.raises(SystemExit) as stopped:
            command.main(words)
        assert stopped.value.code == 2
        assert message in capsys.readouterr().err

    def test_reference_kernels_have_no_instruction_set(
        self, capsys: pytest.CaptureFixture[str]
    ) -> None:
        assert command.main(["--kernels", "reference", "--isa", "plain"]) == 2
        assert "the reference kernels have none" in capsys.readouterr().err
