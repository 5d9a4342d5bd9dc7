"""The command line: its flags, its streams, its exit codes."""

from __future__ import annotations

import io
import json
import re
import signal
import subprocess
import sys
import time
import tomllib
from pathlib import Path
from typing import Any

import pytest

import moe_serve
import moe_serve.llm
from moe_serve import cli, verbs
from moe_serve.config import EngineConfig
from tests.bad_requests import BAD_COMMANDS
from tests.fake_engine import FakeEngine
from tests.models.bad_checkpoints import (
    BAD_CHECKPOINTS,
    BadCheckpoint,
    edit_config,
    write_checkpoint,
)

ROOT = Path(__file__).resolve().parents[1]
ENGINE_FLAGS = {
    "--model", "--tokenizer", "--revision", "--dtype", "--load-format", "--max-model-len",
    "--admission-horizon", "--block-size", "--num-kv-blocks", "--kv-cache-gb",
    "--enable-prefix-caching", "--no-enable-prefix-caching",
    "--max-num-seqs", "--max-num-batched-tokens", "--max-prefill-chunk", "--scheduling-policy",
    "--expert-cache-slots", "--expert-cache-gb", "--expert-cache-scope", "--eviction", "--prefetch",
    "--expert-stream-slots", "--predictor", "--predictor-state", "--miss", "--expert-store",
    "--usage-profile",
    "--record-trace", "--enable-return-routed-experts", "--no-enable-return-routed-experts",
    "--emulate-link", "--ep", "--placement", "--dispatcher",
    "--combine", "--replicas", "--home", "--rebalance", "--rebalance-strategy", "--rebalance-slots",
    "--kernels", "--isa", "--numerics", "--gpu-memory-utilization", "--fused", "--no-fused",
    "--threads", "--seed", "--config", "--debug", "--help",
}  # fmt: skip
SAMPLING_FLAGS = {
    "--max-tokens", "--min-tokens", "--temperature", "--top-p", "--top-k", "--min-p", "--n",
    "--repetition-penalty", "--presence-penalty", "--frequency-penalty", "--stop", "--ignore-eos",
    "--logprobs",
}  # fmt: skip
BENCH_FLAGS = {"--input-len", "--output-len", "--num-iters", "--json"}
FLAGS = {
    "generate": ENGINE_FLAGS
    | SAMPLING_FLAGS
    | {"--prompts", "--limit", "--chat-template", "--json"},
    "chat": ENGINE_FLAGS | SAMPLING_FLAGS - {"--n", "--logprobs"} | {"--chat-template"},
    "batch": ENGINE_FLAGS | {"--chat-template"},
    "bench latency": ENGINE_FLAGS | BENCH_FLAGS | {"--batch-size"},
    "bench throughput": ENGINE_FLAGS | BENCH_FLAGS | {"--num-prompts"},
    "bench serve": {
        "--base-url", "--api-key", "--model", "--endpoint", "--dataset", "--input-len",
        "--output-len", "--range-ratio", "--vocab-size", "--first-token-id", "--prompts", "--trace",
        "--time-scale", "--max-len", "--limit", "--request-rate", "--burstiness", "--burst-every",
        "--burst-size", "--max-concurrency", "--duration", "--num-prompts", "--timeout", "--seed",
        "--ignore-eos", "--temperature", "--extra-body", "--goodput", "--save-requests", "--json",
        "--debug", "--help",
    },
    "doctor": {
        "--json", "--kernels", "--isa", "--numerics", "--threads", "--config", "--debug", "--help",
    },
    "plan": {
        "--machine",
        "--ranks",
        "--dispatcher",
        "--input-len",
        "--output-len",
        "--num-seqs",
        "--trace",
        "--dtype",
        "--json",
        "--kernels",
        "--isa",
        "--numerics",
        "--threads",
        "--config",
        "--debug",
        "--help",
    },
}  # fmt: skip


@pytest.fixture
def engines(monkeypatch: pytest.MonkeyPatch) -> list[FakeEngine]:
    """Let every command run on an engine without a model; the list is of those that were built."""
    built: list[FakeEngine] = []

    def build(config: EngineConfig, folder: Path, on_progress: Any) -> FakeEngine:
        built.append(FakeEngine(config, error_id=5))
        return built[-1]

    monkeypatch.setattr(moe_serve.llm, "open_engine", build)
    monkeypatch.setattr(sys, "stdin", io.StringIO())
    return built


def test_help_is_quick_and_imports_no_torch() -> None:
    code = (
        "import sys\nfrom moe_serve.cli import run\ncode = run(sys.argv[1:])\n"
        "heavy = {'torch', 'transformers', 'numpy', 'tokenizers'} & set(sys.modules)\n"
        "sys.exit(f'imported {heavy}' if heavy or code else 0)"
    )
    for arguments in (["--help"], ["generate", "--help"], []):
        times = []
        for _ in range(3):
            start_s = time.monotonic()
            done = subprocess.run(
                [sys.executable, "-c", code, *arguments],
                capture_output=True,
                text=True,
                check=False,
            )
            times.append(time.monotonic() - start_s)
            assert done.returncode == 0, done.stderr
            assert "Usage: moe-serve" in done.stdout
            if times[-1] < 0.5:
                break
        assert min(times) < 0.5, times


@pytest.mark.parametrize("verb", FLAGS)
def test_flags_are_these(verb: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.run([*verb.split(), "--help"]) == 0
    words = capsys.readouterr().out.replace(" / ", "\n  ").splitlines()
    shown = {line.split()[0] for line in words if line.startswith("  --")}
    assert shown == FLAGS[verb]


def test_the_version(capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.run(["--version"]) == 0
    assert re.fullmatch(r"moe-serve \d+\.\d+\.\d+\n", capsys.readouterr().out)
    assert (
        moe_serve.__version__
        == tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["version"]
    )


def test_sampling_flags_show_their_defaults(capsys: pytest.CaptureFixture[str]) -> None:
    cli.run(["generate", "--help"])
    shown = capsys.readouterr().out
    assert all("[default: " in text for _, _, text in verbs.SAMPLING_FLAGS)
    assert shown.count("[default:") >= len(verbs.SAMPLING_FLAGS)


def test_verbs_are_these(capsys: pytest.CaptureFixture[str]) -> None:
    cli.run(["--help"])
    commands = capsys.readouterr().out.partition("Commands:\n")[2]
    assert [line.split()[0] for line in commands.splitlines() if line.startswith("  ")] == [
        "generate",
        "chat",
        "batch",
        "doctor",
        "plan",
        "serve",
        "trace",
        "simulate",
        "place",
        "train-predictor",
        "bench",
    ]


@pytest.mark.parametrize(
    ("arguments", "says"), [b[1:] for b in BAD_COMMANDS], ids=[b[0] for b in BAD_COMMANDS]
)
@pytest.mark.usefixtures("engines")
def test_bad_usage_is_one_line_and_exit_code_2(
    arguments: list[str], says: tuple[str, ...], capsys: pytest.CaptureFixture[str]
) -> None:
    assert cli.run(["generate", *arguments]) == 2
    captured = capsys.readouterr()
    assert captured.out == ""
    assert captured.err.startswith("moe-serve: error: ")
    assert captured.err.count("\n") == 1
    assert all(part in captured.err for part in says), captured.err


def test_unknown_verb_names_the_nearest(capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.run(["generat"]) == 2
    assert "'generate'" in capsys.readouterr().err


def test_a_missing_model_is_exit_code_3(capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.run(["generate", "x", "--model", "/no/such/folder"]) == 3
    assert "/no/such/folder" in capsys.readouterr().err


def test_debug_shows_where(capsys: pytest.CaptureFixture[str]) -> None:
    for arguments in (["--debug", "generate", "x", "--n", "0"], ["generate", "x", "--n", "0"]):
        assert cli.run(arguments) == 2
        assert ("Traceback" in capsys.readouterr().err) == ("--debug" in arguments)


def test_our_own_fault_is_exit_code_1(
    engines: list[FakeEngine], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def broken(self: FakeEngine) -> Any:
        raise RuntimeError("lost\x1b[31m\nmy way")

    monkeypatch.setattr(FakeEngine, "step", broken)
    assert cli.run(["generate", "x"]) == 1
    error = capsys.readouterr().err
    assert "a fault in moe-serve: RuntimeError: lost\\x1b[31m\\nmy way" in error
    assert "\x1b" not in error


def test_one_prompt_streams_its_text(
    engines: list[FakeEngine], capsys: pytest.CaptureFixture[str]
) -> None:
    assert cli.run(["generate", "Hi you", "--max-tokens", "2", "--temperature", "0"]) == 0
    captured = capsys.readouterr()
    assert captured.out == "Hi\n"
    assert captured.err.startswith("first token ")
    assert captured.err.count("\n") == 1
    (request,) = engines[0].added
    assert (request.sampling.temperature, request.sampling.top_p) == (0.0, 0.95)  # the model's


def test_several_outputs_have_headers(
    engines: list[FakeEngine], capsys: pytest.CaptureFixture[str]
) -> None:
    assert cli.run(["generate", "Hi", "you", "--max-tokens", "1", "--n", "2"]) == 0
    assert capsys.readouterr().out == (
        "=== prompt 0, output 0 (length) ===\nH\n=== prompt 0, output 1 (length) ===\ni\n"
        "=== prompt 1, output 0 (length) ===\nyou\n=== prompt 1, output 1 (length) ===\nyou\n"
    )


def test_flags_reach_the_engine(engines: list[FakeEngine]) -> None:
    flags = ["--block-size", "8", "--no-enable-prefix-caching", "--seed", "3", "--kv-cache-gb", "1"]
    assert cli.run(["generate", "x", "--stop", "a", "--stop", "b", "--ignore-eos", *flags]) == 0
    config = engines[0].config
    assert (config.kv.block_size, config.kv.enable_prefix_caching) == (8, False)
    assert (config.runtime.seed, config.kv.kv_cache_gb) == (3, 1.0)
    sampling = engines[0].added[0].sampling
    assert (sampling.stop, sampling.ignore_eos, sampling.max_tokens) == (("a", "b"), True, 128)


def test_flag_over_environment_over_file(
    engines: list[FakeEngine], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    (tmp_path / "c.toml").write_text("block_size = 4\nmax_num_seqs = 5\nseed = 6\n")
    monkeypatch.setenv("MOE_SERVE_BLOCK_SIZE", "7")
    monkeypatch.setenv("MOE_SERVE_MAX_NUM_SEQS", "8")
    config_flag = ["--config", str(tmp_path / "c.toml")]
    assert cli.run(["generate", "x", *config_flag, "--block-size", "9"]) == 0
    config = engines[0].config
    assert config.kv.block_size == 9
    assert config.scheduler.max_num_seqs == 8
    assert config.runtime.seed == 6


def test_json_is_the_only_thing_on_stdout(
    engines: list[FakeEngine], capsys: pytest.CaptureFixture[str]
) -> None:
    arguments = ["Hi", "you", "--json", "--max-tokens", "2", "--logprobs", "1", "--n", "2"]
    assert cli.run(["generate", *arguments]) == 0
    report = json.loads(capsys.readouterr().out)
    assert list(report) == [
        "schema", "model", "numerics_id", "outputs", "metrics", "experts", "ranks",
    ]  # fmt: skip
    assert (report["schema"], report["model"], report["numerics_id"]) == (1, "demo-moe", "fake")
    assert [entry["index"] for entry in report["outputs"]] == [0, 0, 1, 1]
    assert report["outputs"][0] == {
        "index": 0,
        "prompt_token_ids": [41, 74],
        "token_ids": [41, 74],
        "text": "Hi",
        "finish_reason": "length",
        "logprobs": [[41, -0.5], [74, -0.5]],
    }
    assert list(report["metrics"]) == [
        "ttft_s", "tpot_s", "output_tok_s", "requests_s", "num_preemptions", "prefix_hit_tokens",
        "model_bytes", "kv_bytes", "peak_rss_bytes",
    ]  # fmt: skip
    assert (report["experts"], report["ranks"]) == ({}, [])


def test_prompts_from_a_file(
    engines: list[FakeEngine], capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    path = tmp_path / "p.jsonl"
    lines = [
        {"prompt": "Hi", "priority": 2, "cache_salt": "s"},
        {"messages": [{"role": "user", "content": "you"}], "cache_salt": "t"},
        {"prompt_token_ids": [41]},
    ]
    path.write_text("\n".join(map(json.dumps, lines)))
    arguments = ["generate", "--prompts", str(path), "--json", "--max-tokens", "1"]
    assert cli.run([*arguments, "--limit", "2"]) == 0
    assert len(json.loads(capsys.readouterr().out)["outputs"]) == 2
    (tmp_path / "t.jinja").write_text("<{{ messages[0].content }}>")
    assert cli.run([*arguments, "--chat-template", str(tmp_path / "t.jinja")]) == 0
    texts = [entry["text"] for entry in json.loads(capsys.readouterr().out)["outputs"]]
    assert texts == ["H", "<", "H"]
    asked = [[(r.priority, r.cache_salt) for r in engine.added] for engine in engines]
    assert asked == [[(2, "s"), (0, "t")], [(2, "s"), (0, "t"), (0, "")]]


def test_the_prompt_may_come_on_stdin(
    engines: list[FakeEngine],
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(sys, "stdin", io.StringIO("Hi\n"))
    assert cli.run(["generate", "--max-tokens", "2"]) == 0
    assert capsys.readouterr().out == "Hi\n"


def test_a_failed_output_is_told_and_exit_code_1(
    engines: list[FakeEngine], capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    path = tmp_path / "p.jsonl"
    path.write_text('{"prompt": "Hi"}\n{"prompt_token_ids": [5]}\n')
    assert cli.run(["generate", "--prompts", str(path), "--max-tokens", "2"]) == 1
    captured = capsys.readouterr()
    assert "=== prompt 0 (length) ===\nHi\n=== prompt 1 (error) ===" in captured.out
    assert "prompt 1: a NaN in its logits" in captured.err


# a command on an engine without a model, in a process of its own
COMMAND = """
import sys
import moe_serve.llm
from moe_serve import cli
from tests.fake_engine import FakeEngine
moe_serve.llm.open_engine = lambda config, folder, on_progress: FakeEngine(
    config, max_model_len=10**6, step_s=0.001
)
sys.exit(cli.run(["generate", "Hi you", "--max-tokens", "100000"]))
"""


@pytest.mark.parametrize(("how", "code"), [("interrupt", 130), ("closed pipe", 141)])
def test_a_run_that_is_cut_short_is_quiet(how: str, code: int) -> None:
    process = subprocess.Popen(
        [sys.executable, "-c", COMMAND], cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.PIPE
    )
    assert process.stdout is not None
    assert process.stderr is not None
    assert process.stdout.read(6) == b"Hi you"  # it is on its way
    if how == "interrupt":
        process.send_signal(signal.SIGINT)
        _, error = process.communicate(timeout=20)
    else:
        process.stdout.close()
        error = process.stderr.read()
        process.stderr.close()
    assert process.wait(timeout=20) == code
    assert error == b""


@pytest.mark.parametrize(
    ("redirect", "code", "says"),
    [
        ("generate hi >&-", 2, "stdout is closed"),
        ("--help >/dev/full", 1, "stdout cannot be written: No space left"),
        ("chat <&-", 2, "stdin is closed"),
        ("generate <&-", 2, "no prompt"),
        ("generate x --block-size 0 2>&-", 2, ""),
    ],
)
def test_streams_that_are_closed_or_full(redirect: str, code: int, says: str) -> None:
    if "/dev/full" in redirect and not Path("/dev/full").exists():
        pytest.skip("needs /dev/full")
    done = subprocess.run(
        ["sh", "-c", f'exec "$0" -m moe_serve {redirect}', sys.executable],
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=False,
    )
    assert (done.returncode, done.stdout) == (code, "")
    assert says in done.stderr
    assert done.stderr.count("\n") == bool(says)


def test_an_interrupt_while_imports_run_is_quiet() -> None:
    code = (
        "import sys\n"
        "class Interrupt:\n"
        "    def find_spec(self, name, path=None, target=None):\n"
        "        if name == 'typer': raise KeyboardInterrupt\n"
        "sys.meta_path.insert(0, Interrupt())\n"
        "import moe_serve.cli\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=False
    )
    assert (done.returncode, done.stdout, done.stderr) == (130, "", "")


def test_stdin_that_is_not_utf8(
    engines: list[FakeEngine], capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    for verb in ("generate", "chat"):
        stdin = io.TextIOWrapper(io.BytesIO(b"Hi \xff\n"), encoding="ascii", errors="ignore")
        monkeypatch.setattr(sys, "stdin", stdin)
        assert cli.run([verb]) == 2
        assert "stdin is not UTF-8: byte 0xff" in capsys.readouterr().err


def test_what_has_no_effect_is_told(
    engines: list[FakeEngine],
    capsys: pytest.CaptureFixture[str],
    caplog: pytest.LogCaptureFixture,
    tmp_path: Path,
) -> None:
    (tmp_path / "p.jsonl").write_text('{"messages": [{"role": "user", "content": "Hi"}]}\n')
    flags = ["--max-tokens", "1", "--logprobs", "1", "--revision", "main"]
    assert cli.run(["generate", "--prompts", str(tmp_path / "p.jsonl"), *flags]) == 0
    error = capsys.readouterr().err
    assert error.count("has no chat template: it continues the text") == 1
    assert "--logprobs shows nothing without --json" in error
    assert "revision main has no effect: demo-moe is no name of the hub" in caplog.text


def test_chat_keeps_the_conversation(
    engines: list[FakeEngine],
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
    tmp_path: Path,
) -> None:
    (tmp_path / "t.jinja").write_text("{% for m in messages %}<{{ m.content }}>{% endfor %}")
    typed = "Hi\nyou\n/reset\nHi\n/nothing\n\n/exit\nnever\n"
    monkeypatch.setattr(sys, "stdin", io.StringIO(typed))
    template = ["--chat-template", str(tmp_path / "t.jinja")]
    assert cli.run(["chat", "--max-tokens", "3", *template]) == 0
    captured = capsys.readouterr()
    first, second, third = (request.prompt_ids for request in engines[0].added)
    assert first == third
    assert len(second) > len(first)
    assert captured.out == "<Hi\n<Hi\n<Hi\n"
    assert engines[0].is_closed
    assert "no command '/nothing'" in captured.err


def test_chat_without_a_template_continues_the_text(
    engines: list[FakeEngine],
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(sys, "stdin", io.StringIO("Hi\nyou\n"))
    assert cli.run(["chat", "--max-tokens", "2"]) == 0
    captured = capsys.readouterr()
    assert captured.err.count("has no chat template") == 1
    assert captured.out == "Hi\nHi\n"
    assert engines[0].added[1].prompt_ids[:2] == (41, 74)
    assert len(engines[0].added[1].prompt_ids) > 4


def test_chat_goes_on_after_an_answer_that_failed(
    engines: list[FakeEngine],
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
    tmp_path: Path,
) -> None:
    (tmp_path / "t.jinja").write_text("{% for m in messages %}{{ m.content }}{% endfor %}")
    failing = "$"  # the fake engine fails on a prompt that begins with this token
    typed = f"{failing}\n{'word ' * 300}\nHi\nyou\n/exit\n"
    monkeypatch.setattr(sys, "stdin", io.StringIO(typed))
    template = ["--chat-template", str(tmp_path / "t.jinja")]
    assert cli.run(["chat", "--max-tokens", "2", *template]) == 1
    captured = capsys.readouterr()
    assert "error: a NaN in its logits" in captured.err
    assert "error: the prompt has" in captured.err
    assert captured.out.splitlines() == ["", "Hi", "Hi"]
    assert engines[0].added[1].prompt_ids == (41, 74)  # nothing of the failed turns is kept


@pytest.mark.parametrize("bad", BAD_CHECKPOINTS, ids=lambda bad: bad.name)
def test_a_bad_checkpoint_is_exit_code_3(
    bad: BadCheckpoint, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = tmp_path / "model"
    write_checkpoint(folder, is_sharded=bad.is_sharded)
    bad.break_it(folder)
    flags = ["--model", str(folder), "--dtype", "float32", "--num-kv-blocks", "4"]
    assert cli.run(["generate", "x", *flags]) == 3
    captured = capsys.readouterr()
    assert captured.out == ""
    assert captured.err.startswith(f"moe-serve: error: {folder}")
    assert captured.err.count("\n") == 1
    assert "Traceback" not in captured.err
    for word in bad.words:
        assert word in captured.err


def test_the_checkpoint_that_is_broken_above_is_sound(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    write_checkpoint(tmp_path)
    (tmp_path / "p.jsonl").write_text('{"prompt_token_ids": [5, 6]}\n')
    prompts = ["--prompts", str(tmp_path / "p.jsonl"), "--max-tokens", "2", "--json"]
    assert cli.run(["generate", "--model", str(tmp_path), "--num-kv-blocks", "4", *prompts]) == 0
    assert len(json.loads(capsys.readouterr().out)["outputs"][0]["token_ids"]) == 2


def test_an_unknown_model_type_is_exit_code_2(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    write_checkpoint(tmp_path)
    edit_config(model_type="qwen3_mo")(tmp_path)
    assert cli.run(["generate", "x", "--model", str(tmp_path)]) == 2
    error = capsys.readouterr().err
    for word in ("config.json", "'qwen3_mo'", "did you mean 'qwen3_moe'", "mixtral"):
        assert word in error
    assert error.count("\n") == 1


def test_several_problems_are_a_line_each(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    write_checkpoint(tmp_path)
    edit_config(hidden_size=32)(tmp_path)
    assert cli.run(["generate", "x", "--model", str(tmp_path)]) == 3
    first, *others = capsys.readouterr().err.splitlines()
    assert first.startswith("moe-serve: error: ")
    assert first.endswith("problems:")
    assert len(others) == 11
    assert all(line.startswith("  ") and "\\n" not in line for line in others)
    assert cli.run(["generate", "x", "--model", "no\x1b[31m\nfolder"]) == 3
    assert "\x1b" not in capsys.readouterr().err


def test_batch_reports_what_it_did(
    engines: list[FakeEngine], capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    body = {"prompt": "Hi you", "max_tokens": 3}
    line = {"custom_id": "a", "method": "POST", "url": "/v1/completions", "body": body}
    (tmp_path / "in.jsonl").write_text(json.dumps(line) + "\nnot json\n")
    files = [str(tmp_path / "in.jsonl"), str(tmp_path / "out.jsonl")]
    for says in (
        "0 were there before, 1 are to lines that failed",
        "was complete: 2 answers, 1 of",
    ):
        assert cli.run(["batch", *files]) == 0
        captured = capsys.readouterr()
        assert captured.out == ""
        assert says in captured.err
        assert ("requests/s" in captured.err) == ("before" in says)
    assert len(engines) == 1  # what was complete needs no model
    assert cli.run(["batch", *files, "--seed", "5"]) == 2
    assert "another model, revision" in capsys.readouterr().err
    for dash in (["-", files[1]], [files[0], "-"]):
        assert cli.run(["batch", *dash]) == 2
        assert "- is no file" in capsys.readouterr().err
    answers = [json.loads(text) for text in (tmp_path / "out.jsonl").read_text().splitlines()]
    assert [answer["response"]["status_code"] for answer in answers] == [200, 400]
    assert cli.run(["batch", str(tmp_path / "none.jsonl"), files[1]]) == 2
    assert "no such file" in capsys.readouterr().err


def test_bench_prints_rows(engines: list[FakeEngine], capsys: pytest.CaptureFixture[str]) -> None:
    sizes = ["--input-len", "4", "--output-len", "3", "--num-iters", "5"]
    assert cli.run(["bench", "latency", *sizes, "--batch-size", "2"]) == 0
    assert "latency 2x4/3" in capsys.readouterr().out
    assert cli.run(["bench", "throughput", *sizes, "--num-prompts", "2", "--json"]) == 0
    report = json.loads(capsys.readouterr().out)
    assert [row["unit"] for row in report["rows"]] == ["requests/s", "tokens/s", "tokens/s"]
    assert cli.run(["bench", "latency", "--input-len", "0"]) == 2


def test_printable() -> None:
    assert verbs.printable("a\x1b[0m\n\u202eb\u00e9\ud800") == "a\\x1b[0m\\n\\u202eb\u00e9\\ud800"
