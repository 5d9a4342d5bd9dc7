"""The verb `bench serve`: its streams, its exit codes, what it imports."""

from __future__ import annotations

import json
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest

from moe_serve import cli
from moe_serve.load_verb import without_key
from tests.load.scripted_server import answer, stream_of
from tests.load.test_session import served

ROOT = Path(__file__).resolve().parents[1]
SMALL = ["--input-len", "4", "--output-len", "3", "--num-prompts", "4"]
# the verb in a process of its own, which says at its end what it should not have imported
COMMAND = (
    "import sys\nfrom moe_serve.cli import run\ncode = run(sys.argv[1:])\n"
    "heavy = {'torch', 'transformers', 'numpy', 'tokenizers'} & set(sys.modules)\n"
    "sys.exit(f'imported {heavy}' if heavy else code)"
)


def bench_serve(url: str, *more: str) -> list[str]:
    return ["bench", "serve", "--base-url", url, *SMALL, *more]


def test_a_table_and_a_report(capsys: pytest.CaptureFixture[str]) -> None:
    with served(stream_of(3)) as server:
        assert cli.run(bench_serve(server.url, "--goodput", "ttft:60000")) == 0
        captured = capsys.readouterr()
        assert captured.err == ""
        for line in ("4 of 4 requests answered", "4 requests were good: ttft <= 60000 ms"):
            assert line in captured.out
        assert cli.run(bench_serve(server.url, "--json", "--api-key", "secret")) == 0
    captured = capsys.readouterr()
    report: dict[str, Any] = json.loads(captured.out)
    assert report["schema"] == 1
    assert report["num_answered"] == 4
    assert {"name", "value", "unit", "median", "min", "max", "n", "limit", "ratio"} <= set(
        report["rows"][0]
    )
    assert server.calls[-1].headers["authorization"] == "Bearer secret"
    assert "authorization" not in server.calls[0].headers
    assert "secret" not in captured.out


def test_the_key_may_be_in_the_environment(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("OPENAI_API_KEY", "secret")
    with served(stream_of(1)) as server:
        assert cli.run(bench_serve(server.url, "--json")) == 0
    assert server.calls[0].headers["authorization"] == "Bearer secret"
    captured = capsys.readouterr()
    assert "secret" not in captured.out + captured.err


def test_a_command_is_kept_without_its_key() -> None:
    kept = without_key(["bench", "serve", "--api-key", "a b", "--api-key=c", "--model", "x y"])
    assert kept == "moe-serve bench serve --api-key ... --api-key=... --model 'x y'"


def test_a_server_where_everything_fails_is_exit_code_1(
    capsys: pytest.CaptureFixture[str],
) -> None:
    async def refuse(call: Any) -> None:
        await call.write(answer(503, {"error": {"message": "full\x1b[31m"}}))

    with served(refuse) as server:
        assert cli.run(bench_serve(server.url)) == 1
    out = capsys.readouterr().out
    assert "failed, http 503: 4: full\\x1b[31m" in out


def test_no_server_is_exit_code_3_at_once_and_without_torch() -> None:
    begin_s = time.monotonic()
    done = subprocess.run(
        [sys.executable, "-c", COMMAND, *bench_serve("http://127.0.0.1:1")],
        cwd=ROOT, capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert (done.returncode, done.stdout) == (3, "")
    assert "no server at http://127.0.0.1:1: connection refused" in done.stderr
    assert done.stderr.count("\n") == 1
    assert time.monotonic() - begin_s < 10


def test_bad_flags_are_exit_code_2(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    (tmp_path / "p.jsonl").write_text('{"prompt": "a", "max_tokens": 3}\n')
    for flags, says in (
        (["--dataset", "radnom"], "did you mean 'random'"),
        (["--time-scale", "2"], "--time-scale has no effect with --dataset random"),
        (["--goodput", "ttft"], "write ttft:MS"),
        (["--base-url", "localhost:8000"], "write http://HOST:PORT"),
        (["--dataset", "file", "--prompts", str(tmp_path / "p.jsonl")], "'max_tokens' has no ef"),
    ):
        assert cli.run(["bench", "serve", *flags]) == 2
        captured = capsys.readouterr()
        assert says in captured.err
        assert captured.out == ""


def test_an_interrupt_prints_what_there_is_so_far() -> None:
    with served(stream_of(3, gap_s=0.02)) as server:
        flags = ["--duration", "600", "--max-concurrency", "2", "--json", "--debug"]
        arguments = ["bench", "serve", "--base-url", server.url, "--input-len", "4", *flags]
        process = subprocess.Popen(
            [sys.executable, "-c", COMMAND, *arguments],
            cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
        )  # fmt: skip
        limit_s = time.monotonic() + 30
        while len(server.calls) < 8 and time.monotonic() < limit_s:
            time.sleep(0.02)
        process.send_signal(signal.SIGINT)
        out, err = process.communicate(timeout=20)
    assert process.returncode == 130
    report = json.loads(out)
    assert report["is_interrupted"] is True
    assert report["num_answered"] >= 6
    assert report["failures"].get("unfinished", {"count": 0})["count"] <= 2
    assert "interrupted: figures are of what was answered so far" in err
    assert "Traceback" not in err
