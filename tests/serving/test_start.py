"""A server that cannot start says why in a line; one that can does so wherever it is started."""

from __future__ import annotations

import os
import re
import select
import shutil
import signal
import socket
import subprocess
import sys
import time
import urllib.request
from pathlib import Path

import pytest

from benchmarks.serving.served import shared_memory
from tests.server.fronts import DEMO

LIMIT_S = 60.0
KEY = "sk-marker-of-a-key"


def start(*flags: str, stdin: int | None = None, **named: str) -> subprocess.Popen[str]:
    return subprocess.Popen(
        [sys.executable, "-m", "moe_serve", "serve", "--port", "0", *flags],
        stdin=stdin,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.PIPE,
        text=True,
        env={**os.environ, **named},
        # the idiom `<&-` of shells: the server's first file would be its stdin
        preexec_fn=None if stdin is not None else lambda: os.close(0),
    )


def is_ready(port: int) -> bool:
    try:
        with urllib.request.urlopen(f"http://127.0.0.1:{port}/ready", timeout=5) as answer:
            return bool(answer.status == 200)
    except OSError:
        return False


def refusal(*flags: str) -> tuple[int, str]:
    process = start(*flags, stdin=subprocess.DEVNULL)
    try:
        _, log = process.communicate(timeout=LIMIT_S)
    finally:
        process.kill()
        process.wait()
    return process.returncode, log


@pytest.mark.parametrize("template", [None, "{{ foo"])
def test_a_template_that_cannot_be_used_is_refused_at_once(
    tmp_path: Path, template: str | None
) -> None:
    file = tmp_path / "chat.jinja"
    if template is not None:
        file.write_text(template)
    code, log = refusal("--chat-template", str(file))
    assert code == 2, log
    assert "chat.jinja" in log.splitlines()[-1]
    assert "Traceback" not in log
    assert "loading" not in log


def test_what_keeps_a_front_end_from_starting_is_said_once(tmp_path: Path) -> None:
    shutil.copytree(DEMO, tmp_path / "demo")
    (tmp_path / "demo" / "generation_config.json").write_text('{"temperature": -1}')
    code, log = refusal(str(tmp_path / "demo"), "--stats-interval", "0")
    assert code == 3, log
    assert "generation_config.json: temperature" in log.splitlines()[-1]
    assert "Traceback" not in log
    assert "again" not in log


def test_it_starts_without_stdin_and_leaves_no_file_with_a_key(tmp_path: Path) -> None:
    before = shared_memory()
    process = start("--stats-interval", "0", TMPDIR=str(tmp_path), MOE_SERVE_API_KEY=KEY)
    try:
        assert process.stderr is not None
        begun = ""
        end_s = time.monotonic() + LIMIT_S
        # while it starts: what is there then would stay behind where it is killed
        while "serving at" not in begun:
            assert process.poll() is None, begun
            assert time.monotonic() < end_s
            if select.select([process.stderr], [], [], 0.001)[0]:
                begun += os.read(process.stderr.fileno(), 2**16).decode()
            for file in tmp_path.rglob("*"):
                if file.is_file():
                    assert KEY not in file.read_text(errors="replace")
        assert not list(tmp_path.iterdir())
        process.send_signal(signal.SIGTERM)
        _, log = process.communicate(timeout=LIMIT_S)
        assert process.returncode == 0, log
        assert re.search(r"shutting down: 0 requests may take 30 s", log)
    finally:
        process.kill()
        process.wait()
    assert not list(tmp_path.iterdir())
    assert shared_memory() == before


@pytest.mark.slow
def test_a_log_that_cannot_be_written_ends_nothing() -> None:
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = free.getsockname()[1]
    with open("/dev/full", "w") as full:
        process = subprocess.Popen(
            [sys.executable, "-m", "moe_serve", "serve", "--port", str(port)],
            stdin=subprocess.DEVNULL, stdout=subprocess.DEVNULL, stderr=full,
        )  # fmt: skip
    try:
        end_s = time.monotonic() + LIMIT_S
        while not is_ready(port):
            assert process.poll() is None
            assert time.monotonic() < end_s
            time.sleep(0.1)
        process.send_signal(signal.SIGTERM)
        assert process.wait(LIMIT_S) == 0
    finally:
        process.kill()
        process.wait()
