import io
import json
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from benchmarks.peers import worker
from benchmarks.peers.__main__ import parse_arguments, rows_of
from benchmarks.peers.driver import Measurement, NotInstalled, Worker, measure
from benchmarks.peers.jobs import Job
from benchmarks.peers.limit import MachineSpeed, least_seconds
from benchmarks.peers.shape import SHAPES, Shape, checkpoint
from benchmarks.results import ROOT
from moe_serve import plugin

TINY = SHAPES["tiny"]


class TestJob:
    @pytest.mark.parametrize("text", ["1x128/64", "16x512/16"])
    def test_text_and_back(self, text: str) -> None:
        assert str(Job.parse(text)) == text

    def test_fields(self) -> None:
        assert Job.parse("16x512/8") == Job(num_requests=16, prompt_tokens=512, output_tokens=8)

    @pytest.mark.parametrize("text", ["", "16", "0x1/1", "1x1", "1x1/0", "1x1/1 ", "ax1/1"])
    def test_what_is_no_job_is_refused(self, text: str) -> None:
        with pytest.raises(ValueError, match="REQUESTSxIN/OUT"):
            Job.parse(text)

    def test_prompts_repeat_for_every_system_but_not_for_the_next_round(self) -> None:
        job = Job(3, 20, 1)
        prompts = job.prompts(vocab_size=50, round_index=1)
        assert [len(prompt) for prompt in prompts] == [20, 20, 20]
        assert all(0 <= token < 50 for prompt in prompts for token in prompt)
        assert job.prompts(50, 1) == prompts
        assert job.prompts(50, 2) != prompts


class TestShape:
    def test_the_baseline_is_the_published_one(self) -> None:
        shape = SHAPES["baseline"]
        experts = shape.num_layers * shape.expert_elements
        total = shape.dense_elements + experts * shape.num_experts
        embedding = shape.hidden_size * shape.vocab_size
        assert (total + embedding) / 1e9 == pytest.approx(1.32, abs=0.005)
        assert (shape.dense_elements + experts * shape.top_k) / 1e9 == pytest.approx(
            0.225, abs=0.003
        )

    @pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::FutureWarning")
    def test_transformers_finds_every_tensor(self, tmp_path: Path) -> None:
        transformers = pytest.importorskip("transformers")
        path = checkpoint(TINY, tmp_path)
        model, report = transformers.AutoModelForCausalLM.from_pretrained(
            path, output_loading_info=True, dtype=torch.bfloat16
        )
        assert not report["missing_keys"]
        assert not report["unexpected_keys"]
        embedding = TINY.hidden_size * TINY.vocab_size
        experts = TINY.num_layers * TINY.num_experts * TINY.expert_elements
        norms = TINY.hidden_size + TINY.num_layers * 2 * (TINY.hidden_size + TINY.head_dim)
        num_elements = sum(p.numel() for p in model.parameters())
        assert num_elements == TINY.dense_elements + experts + norms + embedding

    def test_a_checkpoint_is_written_once(self, tmp_path: Path) -> None:
        path = checkpoint(TINY, tmp_path)
        before = {file.name: file.stat().st_mtime_ns for file in path.iterdir()}
        assert checkpoint(TINY, tmp_path) == path
        assert {file.name: file.stat().st_mtime_ns for file in path.iterdir()} == before
        assert list(tmp_path.iterdir()) == [path]

    def test_an_interrupted_write_leaves_nothing(
        self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        def fail(*_args: object, **_kwargs: object) -> None:
            raise OSError(28, "No space left on device")

        monkeypatch.setattr("benchmarks.peers.shape.save_file", fail)
        with pytest.raises(OSError, match="No space"):
            checkpoint(TINY, tmp_path)
        assert not list(tmp_path.iterdir())


class TestLimit:
    speed = MachineSpeed(read_bytes_per_s=1e9, flop_per_s=1e12)

    def test_one_output_token_costs_only_the_prompt(self) -> None:
        active = TINY.dense_elements + TINY.num_layers * TINY.top_k * TINY.expert_elements
        head = TINY.hidden_size * TINY.vocab_size
        expected = 2 * (100 * (active - head) + head) / 1e12
        assert least_seconds(TINY, Job(1, 100, 1), self.speed) == pytest.approx(expected)

    def test_one_request_reads_top_k_experts_a_step(self) -> None:
        active = TINY.dense_elements + TINY.num_layers * TINY.top_k * TINY.expert_elements
        one, three = (least_seconds(TINY, Job(1, 1, out), self.speed) for out in (1, 3))
        assert three - one == pytest.approx(2 * 2 * active / 1e9)

    def test_many_requests_read_no_more_than_all_experts(self) -> None:
        slow_memory = replace(self.speed, flop_per_s=1e18)
        all_experts = TINY.num_layers * TINY.num_experts * TINY.expert_elements
        one, two = (least_seconds(TINY, Job(500, 1, out), slow_memory) for out in (1, 2))
        assert two - one == pytest.approx(2 * (TINY.dense_elements + all_experts) / 1e9)


def test_rows_hold_rates_limits_and_ratios() -> None:
    job = Job(2, 30, 10)
    measurements = [
        Measurement("moe_serve", job, (1.0, 2.0, 4.0)),
        Measurement("transformers", job, (2.0, 3.0, 12.0)),
    ]
    speed = MachineSpeed(1e9, 1e12)
    rows = rows_of(measurements, TINY, speed)
    assert [(row.name, row.unit) for row in rows] == [
        ("2x30/10 moe_serve", "output tok/s"),
        ("2x30/10 moe_serve", "total tok/s"),
        ("2x30/10 transformers", "output tok/s"),
        ("2x30/10 transformers", "total tok/s"),
    ]
    assert (rows[0].value, rows[0].min, rows[0].max) == (10.0, 5.0, 20.0)
    assert rows[1].value == 40.0
    assert [row.ratio for row in rows] == [None, None, 2.0, 2.0]  # of 2/1, 3/2 and 12/4
    assert rows[0].limit == pytest.approx(20 / least_seconds(TINY, job, speed))


@pytest.mark.parametrize(
    ("argv", "complaint"),
    [
        (["--systems", "vlm"], "no system 'vlm'"),
        (["--jobs", "16"], "REQUESTSxIN/OUT"),
        (["--rounds", "0"], "--rounds is 0"),
    ],
    ids=["system", "job", "rounds"],
)
def test_bad_arguments_end_with_status_2(
    argv: list[str], complaint: str, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit) as ended:
        parse_arguments(argv)
    assert ended.value.code == 2
    assert complaint in capsys.readouterr().err


FAKE_WORKER = """
import json, sys
print(json.dumps({first}), flush=True)
for line in sys.stdin:
    print(json.dumps({{"seconds": 0.5, "output_tokens": 1}}), flush=True)
    print(sys.argv[1], line, file=sys.stderr, end="", flush=True)
"""


@pytest.fixture
def fake_worker(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Path:
    """Let `Worker` start a script that answers at once; returns the log of what it was asked."""
    log = tmp_path / "log"
    popen = subprocess.Popen

    def start(command: list[str], **options: object) -> subprocess.Popen[str]:
        first = {
            "absent": {"missing": "No module named 'absent'"},
            "broken": {"error": "out of memory"},
        }.get(command[3], {"ready": "1.0", "numerics_id": "x", "load_s": 0.1})
        script = FAKE_WORKER.format(first=repr(first))
        with log.open("a") as stderr:
            return popen(
                [sys.executable, "-c", script, command[3]],
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=stderr,
                text=True,
            )

    monkeypatch.setattr(subprocess, "Popen", start)
    return log


def test_systems_take_turns(fake_worker: Path, tmp_path: Path) -> None:
    jobs = [Job(1, 1, 1), Job(2, 1, 1)]
    with Worker("a", tmp_path, 10, None) as a, Worker("b", tmp_path, 10, None) as b:
        assert (a.version, a.numerics_id, a.load_s) == ("1.0", "x", 0.1)
        measurements = measure([a, b], jobs, rounds=2)
    assert [(m.system, str(m.job), m.seconds) for m in measurements] == [
        ("a", "1x1/1", (0.5, 0.5)),
        ("b", "1x1/1", (0.5, 0.5)),
        ("a", "2x1/1", (0.5, 0.5)),
        ("b", "2x1/1", (0.5, 0.5)),
    ]
    asked = [line.split(" ", 1) for line in fake_worker.read_text().splitlines()]
    for system in "ab":
        rounds = [json.loads(text)["round"] for name, text in asked if name == system]
        assert rounds[2:] == [0, 0, 1, 1]  # after one unmeasured run of each job


def test_a_system_that_is_not_installed_is_told_apart(fake_worker: Path, tmp_path: Path) -> None:
    with pytest.raises(NotInstalled, match="absent"), Worker("absent", tmp_path, 10, None):
        pass


def test_a_system_that_fails_is_an_error(fake_worker: Path, tmp_path: Path) -> None:
    with pytest.raises(RuntimeError, match="out of memory"), Worker("broken", tmp_path, 10, None):
        pass


@pytest.mark.parametrize("place", ["top", "build"])
def test_a_missing_package_is_told_wherever_it_is_imported(
    place: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    def missing(*_args: object) -> None:
        raise ModuleNotFoundError("No module named 'absent'", name="absent.inner")

    loaded = SimpleNamespace(build=missing)
    load = missing if place == "top" else lambda *_args: loaded
    monkeypatch.setattr(plugin, "load", load)
    replies = io.StringIO()
    worker.serve("absent", tmp_path, 10, None, replies)
    assert json.loads(replies.getvalue()) == {"missing": "No module named 'absent'"}


def test_a_missing_module_of_ours_is_no_missing_system(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    def broken(*_args: object) -> None:
        raise ModuleNotFoundError("No module named 'moe_serve.gone'", name="moe_serve.gone")

    monkeypatch.setattr(plugin, "load", lambda *_args: SimpleNamespace(build=broken))
    with pytest.raises(ModuleNotFoundError, match="gone"):
        worker.serve("moe_serve", tmp_path, 10, None, io.StringIO())


@pytest.mark.slow
def test_the_command_compares_this_project_with_transformers(tmp_path: Path) -> None:
    command = [sys.executable, "-m", "benchmarks.peers", "--shape", "tiny", "--rounds", "1"]
    command += ["--jobs", "2x8/4", "--cache", str(tmp_path)]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True)
    table = [line.split() for line in done.stdout.splitlines() if line.startswith("2x8/4")]
    assert [line[1] for line in table] == ["moe_serve"] * 2 + ["transformers"] * 2
    assert all(float(line[-1]) > 0 for line in table)


def test_shapes_differ_in_their_checkpoint(tmp_path: Path) -> None:
    other = replace(TINY, num_layers=1)
    assert isinstance(other, Shape)
    assert checkpoint(TINY, tmp_path) != checkpoint(other, tmp_path)
