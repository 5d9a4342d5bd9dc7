import json
from itertools import pairwise
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch

from benchmarks.offload import __main__ as command
from benchmarks.offload import plan as plan_module
from benchmarks.offload import subject as subject_module
from benchmarks.offload.figures import Figure, comparison, line, rows_of
from benchmarks.offload.limits import DiskReads, TraceLimits
from benchmarks.offload.plan import Choices, Plan, measure
from benchmarks.offload.routing import Replay, start
from benchmarks.offload.subject import Case, Sample, Subject, shape_of, write_model
from benchmarks.peers.shape import Shape
from benchmarks.results import Row
from moe_serve.errors import ConfigError
from moe_serve.experts.policies import lru
from moe_serve.experts.policies.base import CacheShape
from moe_serve.experts.recorder import StepNotes
from moe_serve.experts.trace import Trace, write_trace
from moe_serve.kernels.native import loader
from moe_serve.study.replay import batched_steps, replay
from moe_serve.types import ForwardBatch

try:
    loader.load()
except loader.NotBuilt:
    pytest.skip("routing is replayed in fused passes only", allow_module_level=True)

LENGTHS = (9, 14, 5, 11, 8, 12, 1, 10)
LAYERS, EXPERTS, TOP_K = 3, 8, 2


@pytest.fixture(scope="module")
def trace() -> Trace:
    """Eight short sequences that use some experts more than others."""
    chance = np.random.default_rng(0)
    rank = chance.random((sum(LENGTHS), LAYERS, EXPERTS)) + np.arange(EXPERTS) * 0.1
    return Trace(
        name="tiny",
        ids=np.argsort(rank, axis=2)[..., :TOP_K].astype(np.uint8),
        weights=np.full((sum(LENGTHS), LAYERS, TOP_K), 0.5, np.float16),
        seq_offsets=np.cumsum([0, *LENGTHS]),
        layer_ids=np.arange(LAYERS),
        num_experts=EXPERTS,
        top_k=TOP_K,
    )


@pytest.fixture(scope="module")
def shape(trace: Trace) -> Shape:
    return shape_of(trace, hidden_size=64, intermediate_size=32)


@pytest.fixture(autouse=True)
def _one_thread() -> None:
    torch.set_num_threads(1)


class TestRouting:
    @pytest.mark.parametrize("batch", [1, 3])
    def test_a_step_runs_the_tokens_that_a_replay_has_in_it(
        self, trace: Trace, shape: Shape, tmp_path: Path, batch: int
    ) -> None:
        subject = Subject(trace, write_model(shape, tmp_path), batch)
        experts: Any = subject.engine.runner.model.experts
        given, steps = experts.replay, []

        def noted(tokens: ForwardBatch, notes: StepNotes) -> None:
            steps.append(sorted(given.rows(tokens).tolist()))
            given(tokens, notes)

        experts.replay = noted
        while subject.engine.has_unfinished:
            subject.engine.step()
        wanted = batched_steps(trace, batch)
        assert steps == [
            np.flatnonzero(wanted == number).tolist() for number in range(wanted.max() + 1)
        ]

    def test_notes_are_the_traces_rows(self, trace: Trace) -> None:
        given = Replay(trace)
        first: Any = SimpleNamespace(
            sequence_ids=torch.tensor([40, 41]), positions=torch.tensor([0, 0])
        )
        later: Any = SimpleNamespace(
            sequence_ids=torch.tensor([42, 41]), positions=torch.tensor([3, 6])
        )
        given.rows(first)
        notes: Any = SimpleNamespace(
            ids=torch.zeros(LAYERS, 2, TOP_K, dtype=torch.int64),
            weights=torch.zeros(LAYERS, 2, TOP_K),
        )
        given(later, notes)
        rows = [LENGTHS[0] + LENGTHS[1] + 3, LENGTHS[0] + 6]
        assert notes.ids.tolist() == trace.ids[rows].transpose(1, 0, 2).tolist()
        assert notes.weights.eq(0.5).all()

    @pytest.mark.parametrize("batch", [1, 3])
    def test_runtime_and_replay_miss_alike(
        self, trace: Trace, shape: Shape, tmp_path: Path, batch: int
    ) -> None:
        case = Case(resident=50, batch=batch, link_gb_per_s=100.0, eviction="lru", prefetch="off")
        subject = Subject(trace, write_model(shape, tmp_path), batch, case, tmp_path)
        assert subject.offloaded is not None
        while subject.engine.has_unfinished:
            subject.engine.step()
        slots = CacheShape(
            num_layers=LAYERS, num_experts=EXPERTS, slots_per_layer=4, total_slots=4 * LAYERS
        )
        wanted = replay(trace, batched_steps(trace, batch), slots, lru.build(slots))
        assert tuple(subject.offloaded.cache.counters.misses) == wanted.misses_per_layer
        subject.close()

    def test_a_model_of_another_shape_is_refused(
        self, trace: Trace, shape: Shape, tmp_path: Path
    ) -> None:
        subject = Subject(trace, write_model(shape, tmp_path), 1)
        for index in range(trace.num_seqs):
            subject.engine.abort(str(index))
        other = Trace(
            name="other",
            ids=trace.ids[:, :2],
            weights=trace.weights[:, :2],
            seq_offsets=trace.seq_offsets,
            layer_ids=trace.layer_ids[:2],
            num_experts=EXPERTS,
            top_k=TOP_K,
        )
        with pytest.raises(ValueError, match=r"other has \(2, 8, 2\)"):
            start(subject.engine, other)


class TestSubject:
    def test_a_restart_begins_the_trace_anew(
        self, trace: Trace, shape: Shape, tmp_path: Path
    ) -> None:
        subject = Subject(trace, write_model(shape, tmp_path), 2)
        experts: Any = subject.engine.runner.model.experts
        subject.run(5)
        subject.restart()
        assert subject.run(2).num_tokens == 4
        assert experts.replay._first_number is not None
        assert subject.engine.stats().num_waiting == len(LENGTHS) - 2

    def test_all_are_resident_at_100_percent(
        self, trace: Trace, shape: Shape, tmp_path: Path
    ) -> None:
        case = Case(resident=100, batch=2, link_gb_per_s=100.0)
        subject = Subject(trace, write_model(shape, tmp_path), 2, case, tmp_path)
        subject.run(2)
        sample = subject.run(4)
        assert sample.counters["misses"] == sample.counters["bytes"] == 0
        assert sample.counters["hits"] > 0
        subject.close()

    def test_no_proc_no_bytes(self, monkeypatch: pytest.MonkeyPatch) -> None:
        def refused(path: Path) -> str:
            raise PermissionError(path)

        monkeypatch.setattr(Path, "read_text", refused)
        assert subject_module.disk_read_bytes() is None


class TestLimits:
    def test_windows_add_up_to_the_whole(self, trace: Trace) -> None:
        limits = TraceLimits(trace)
        last = limits.num_steps(2)
        cuts = [0, 3, 11, last]
        parts = [limits.least_misses(2, 4, first, end) for first, end in pairwise(cuts)]
        assert sum(parts) == limits.least_misses(2, 4, 0, last)
        assert all(part > 0 for part in parts)

    def test_no_policy_is_below(self, trace: Trace) -> None:
        limits = TraceLimits(trace)
        slots = CacheShape(
            num_layers=LAYERS, num_experts=EXPERTS, slots_per_layer=4, total_slots=4 * LAYERS
        )
        found = replay(trace, batched_steps(trace, 1), slots, lru.build(slots)).misses
        least = limits.least_misses(1, 4, 0, limits.num_steps(1))
        assert least < found
        used = sum(len(np.unique(trace.ids[:, layer])) for layer in range(LAYERS))
        assert limits.least_misses(1, EXPERTS, 0, limits.num_steps(1)) == used

    def test_disk_reads(self, tmp_path: Path) -> None:
        path = tmp_path / "records"
        path.write_bytes(bytes(2**20))
        try:
            assert DiskReads(path, 2**16, num_threads=2).gb_per_s(0.02, seed=1) > 0
        except ConfigError as error:
            pytest.skip(str(error))


def figure(times: list[float], stalls: list[float], **changes: Any) -> Figure:
    """A case on a disk of 2 GB/s whose rounds are 10 tokens in 10 steps, times in ms a token."""
    samples = [
        Sample(
            num_tokens=10,
            num_steps=10,
            seconds=ms / 100,
            stall_s=stall / 100,
            counters={"bytes": 80_000_000, "misses": 40, "issued": 10},
            disk_bytes=76_000_000,
            predictor_us=[5.0, 15.0],
            planning_us=[15.0, 25.0],
        )
        for ms, stall in zip(times, stalls, strict=True)
    ]
    resident = [Sample(num_tokens=10, num_steps=10, seconds=0.02) for _ in times]
    return Figure(
        case=Case(resident=25, batch=1, **changes),
        routing="tiny",
        samples=samples,
        resident=resident,
        gb_per_s=[2.0, 1.0, 3.0],
        least_bytes=120_000_000,
    )


class TestFigures:
    def test_the_limit_is_the_slower_of_compute_and_tier(self) -> None:
        found = figure([4.0, 5.0, 6.0], [1.0, 1.0, 1.0])
        assert found.compute_ms == pytest.approx(2.0)
        assert found.tier_ms == pytest.approx(2.0)  # 4 MB a token at 2 GB/s
        assert found.ms == pytest.approx(5.0)
        assert found.ratio == pytest.approx(2.5)

    def test_rows(self) -> None:
        rows = {row.name.rpartition(": ")[2]: row for row in rows_of(figure([4, 5, 6], [1, 2, 3]))}
        assert rows["time"].value == pytest.approx(5.0)
        assert rows["time"].ratio == pytest.approx(2.5)
        assert rows["speed"].value == pytest.approx(200.0)
        assert rows["stall"].value == pytest.approx(2.0)
        assert rows["fetched"].value == pytest.approx(8e6)
        assert rows["fetched"].limit == pytest.approx(4e6)
        assert rows["misses"].value == pytest.approx(4.0)
        assert rows["read as the kernel says, against fetched"].ratio == pytest.approx(0.95)
        assert rows["predictor"].value == pytest.approx(10.0)
        assert rows["predictor and planning"].value == pytest.approx(20.0)
        assert "late" not in rows
        assert all("25 %, batch 1, adaptive" in row.name for row in rows_of(figure([4], [1])))

    def test_a_link_has_no_rows_of_a_disk(self) -> None:
        names = [row.name for row in rows_of(figure([4], [1], link_gb_per_s=4.0))]
        assert not any("kernel" in name or "direct" in name for name in names)

    def test_comparison(self) -> None:
        base = figure([4.0, 8.0, 4.0], [2.0, 2.0, 2.0])
        other = figure([2.0, 6.0, 3.0], [1.0, 2.0, 0.0], prefetch="off")
        time, stall = comparison(other, base)
        assert time.ratio == pytest.approx(0.75)
        assert stall.ratio == pytest.approx(0.5)
        assert "no prefetch" in time.name
        assert time.name.endswith("(disk, 25 %, batch 1, adaptive, learned_ids auto, copy): time")

    def test_line_names_the_case(self) -> None:
        assert line(figure([4.0], [1.0])).startswith("disk, 25 %, batch 1, adaptive")


class TestPlan:
    CHOICES = Choices(
        tiers=("disk", "link"),
        links=(4.0, 12.0),
        resident=(50, 100),
        policies=("lru", "lfu"),
        predictors=("popularity", "transition"),
        prefetch=("on", "off"),
        miss=("copy", "split"),
    )

    def test_bases(self) -> None:
        found = [(case.tier, case.resident) for case in self.CHOICES.bases(1)]
        links = [(f"link {rate} GB/s", share) for rate in (4, 12) for share in (50, 100)]
        assert found == [("disk", 50), *links]

    def test_variants_differ_in_one_thing(self) -> None:
        disk, link = list(self.CHOICES.bases(1))[:2]
        names = [case.name.split(", ", 3)[3] for case in self.CHOICES.variants(link)]
        assert names == [
            "lru, popularity on, copy",
            "lfu, popularity on, copy",
            "lru, no prefetch, copy",
            "lru, transition on, copy",
            "lru, popularity on, split",
        ]
        assert len(self.CHOICES.variants(disk)) == 4

    def test_the_base_runs_with_every_group(
        self, trace: Trace, shape: Shape, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        plan = Plan(
            limits=TraceLimits(trace), shape=shape, cache=tmp_path, warm=2, steps=2, rounds=2
        )
        monkeypatch.setattr(Plan, "num_at_once", lambda *_: 2)
        groups = []
        measured = plan_module.measure_group

        def noted(plan: Plan, cases: list[Case], resident: Subject) -> list[Figure]:
            groups.append([case.eviction for case in cases])
            return measured(plan, cases, resident)

        monkeypatch.setattr(plan_module, "measure_group", noted)
        cases = [
            Case(resident=50, batch=2, link_gb_per_s=100.0, eviction=name, prefetch="off")
            for name in ("lru", "lfu", "heat")
        ]
        resident = Subject(trace, write_model(shape, tmp_path), 2)
        found = list(measure(plan, cases, resident))
        assert groups == [["lru", "lfu"], ["lru", "heat"]]
        assert [figure.case for figure in found] == cases
        tokens = [[sample.num_tokens for sample in figure.samples] for figure in found]
        assert tokens == [[4, 4]] * 3


class TestCommand:
    TINY = ("--hidden-size", "64", "--intermediate-size", "32", "--resident", "50,100")

    def test_end_to_end(
        self,
        trace: Trace,
        tmp_path: Path,
        monkeypatch: pytest.MonkeyPatch,
        capsys: pytest.CaptureFixture[str],
    ) -> None:
        path = tmp_path / "tiny.npz"
        write_trace(path, trace)
        (tmp_path / "probe").write_bytes(bytes(4096))
        tiers = "disk,link"
        try:
            DiskReads(tmp_path / "probe", 4096).gb_per_s(0, seed=0)
        except ConfigError:  # a file system in memory
            tiers = "link"
        saved: list[tuple[str, list[Row], dict[str, Any]]] = []

        def save(name: str, rows: list[Row], **rest: Any) -> Path:
            saved.append((name, rows, rest))
            return Path("saved.json")

        monkeypatch.setattr(command, "write_results", save)
        monkeypatch.setattr(plan_module, "_DISK_SAMPLE_S", 0.02)
        words = [
            "--replay-routing",
            str(path),
            *self.TINY,
            "--policies",
            "lru,lfu",
            "--tier",
            tiers,
        ]
        words += ["--predictors", "popularity", "--prefetch", "on", "--emulate-link", "50"]
        words += ["--batch", "2", "--warm", "2", "--steps", "2", "--rounds", "2", "--save"]
        assert command.main(words) == 0
        [(name, rows, rest)] = saved
        assert name == "offload-disk-link-tiny"
        assert "--replay-routing FOLDER/tiny.npz" in rest["command"]
        assert str(tmp_path) not in rest["command"]
        times = [row for row in rows if row.name.endswith("routing tiny: time")]
        # two policies at disk 50 %, link 50 and 100 %
        assert len(times) == 2 * (1 + len(tiers.split(",")))
        assert all(row.ratio is not None and row.ratio > 0 for row in times)
        told = [row.ratio for row in rows if "kernel says" in row.name]
        assert all(ratio is not None and ratio >= 0.95 for ratio in told)
        assert json.loads(json.dumps(rest["numerics_id"]))
        printed = capsys.readouterr().out
        assert "routing tiny" in printed
        assert "disk, 100 %" not in printed

    def test_too_short_a_trace(
        self, trace: Trace, tmp_path: Path, capsys: pytest.CaptureFixture[str]
    ) -> None:
        path = tmp_path / "tiny.npz"
        write_trace(path, trace)
        assert command.main(["--replay-routing", str(path), "--batch", "8"]) == 2
        assert "14 steps long at batch 8; 240 are wanted" in capsys.readouterr().err

    @pytest.mark.parametrize(
        ("words", "message"),
        [
            (("--policies", "lru,mru"), "there is no 'mru'"),
            (("--resident", "0"), "each must be from 0.1 to 100"),
            (("--batch", "1,x"), "no list of numbers"),
            (("--rounds", "0"), "--rounds is 0; it must be at least 1"),
        ],
        ids=lambda value: value[0] if isinstance(value, tuple) else "",
    )
    def test_what_cannot_be(
        self, words: tuple[str, ...], message: str, capsys: pytest.CaptureFixture[str]
    ) -> None:
        with pytest.raises(SystemExit, match="2"):
            command.parse_arguments(["--replay-routing", "x.npz", *words])
        assert message in capsys.readouterr().err
