"""A server of its own for a measurement: its processes by what they are, and how they are ended."""

from __future__ import annotations

import contextlib
import json
import os
import re
import select
import signal
import subprocess
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import psutil

START_S = 120.0
# the shipped model has no template of its own
CHAT_FLAGS = ("--chat-template", str(Path(__file__).with_name("chat.jinja")))


class Served:
    """`moe-serve serve FLAGS...` on a free port, from its start to its end."""

    def __init__(
        self,
        *flags: str,
        environment: dict[str, str] | None = None,
        launcher: Sequence[str] = (),
    ) -> None:
        """Start it and wait until it serves; start_s: how long that took.

        launcher: what starts it, and is then the supervisor: a module of Python and its arguments.
        """
        begun_s = time.monotonic()
        self.process = subprocess.Popen(
            [sys.executable, *launcher, "-m", "moe_serve", "serve", "--port", "0", *flags],
            stderr=subprocess.PIPE,
            stdout=subprocess.DEVNULL,
            text=True,
            env={**os.environ, **(environment or {})},
            start_new_session=True,
        )
        self.log: list[str] = []
        self.headers: dict[str, str] = {}  # of each request that this sends
        self.url = self._address()
        self.port = int(self.url.rpartition(":")[2])
        self.start_s = time.monotonic() - begun_s

    def _address(self) -> str:
        end_s = time.monotonic() + START_S
        while time.monotonic() < end_s:
            self.read_log(0.2)
            for line in self.log:
                if (found := re.search(r"serving at (http://\S+)", line)) is not None:
                    return found[1]
            if self.process.poll() is not None:
                raise RuntimeError("the server ended: " + "".join(self.log))
        self.kill()
        raise RuntimeError("the server has not come: " + "".join(self.log))

    def read_log(self, wait_s: float = 0.0) -> list[str]:
        """Return all lines of its stderr so far."""
        stream = self.process.stderr
        assert stream is not None
        while select.select([stream], [], [], wait_s)[0]:
            data = os.read(stream.fileno(), 2**16).decode(errors="replace")
            if not data:
                break
            self.log.append(data)
            wait_s = 0.0
        return self.log

    # -- its processes -----------------------------------------------------------------------------

    def processes(self) -> dict[str, int]:
        """Return {"supervisor": pid, "front end": pid, "rank 0": pid, ...} of those that live.

        A rank's own are "grammar_compiler of rank 0" and the like, the second of them with ", 2".
        """
        found = {"supervisor": self.process.pid}
        with contextlib.suppress(psutil.Error):
            children = psutil.Process(self.process.pid).children(recursive=True)
            for child in sorted(children, key=lambda process: process.pid):
                with contextlib.suppress(psutil.Error):
                    if child.status() != psutil.STATUS_ZOMBIE:
                        role = _role(child)
                        same = sum(name.partition(",")[0] == role for name in found)
                        found[f"{role}, {same + 1}" if same else role] = child.pid
        return found

    def listeners(self) -> list[tuple[str, int]]:
        """Return the address and port of each socket that any of its processes listens on."""
        found = set()
        for pid in self.processes().values():
            with contextlib.suppress(psutil.Error):
                for entry in psutil.Process(pid).net_connections("inet"):
                    if entry.status == psutil.CONN_LISTEN:
                        found.add((entry.laddr.ip, entry.laddr.port))
        return sorted(found)

    # -- what it says ------------------------------------------------------------------------------

    def get(self, path: str, limit_s: float = 5.0) -> tuple[int, bytes]:
        """Return status and body; status 0: no answer."""
        try:
            request = urllib.request.Request(self.url + path, headers=self.headers)
            with urllib.request.urlopen(request, timeout=limit_s) as answer:
                return answer.status, answer.read()
        except urllib.error.HTTPError as error:
            return error.code, error.read()
        except OSError:
            return 0, b""

    def post(self, path: str, body: dict[str, Any], limit_s: float = 60.0) -> tuple[int, Any]:
        """Return status and what the body says; status 0: no answer."""
        request = urllib.request.Request(
            self.url + path,
            json.dumps(body).encode(),
            {"Content-Type": "application/json", **self.headers},
        )
        try:
            with urllib.request.urlopen(request, timeout=limit_s) as answer:
                return answer.status, json.loads(answer.read())
        except urllib.error.HTTPError as error:
            return error.code, json.loads(error.read())
        except OSError:
            return 0, None

    def metrics(self) -> dict[str, float]:
        """Return each sample of /metrics by name and labels, without model_name."""
        found = {}
        for line in self.get("/metrics")[1].decode().splitlines():
            if not line.startswith("#"):
                name, _, value = line.rpartition(" ")
                name = (
                    re.sub(r'model_name="[^"]*",?', "", name).replace(",}", "}").replace("{}", "")
                )
                found[name.removeprefix("moe_serve:")] = float(value)
        return found

    def wait_until_ready(self, limit_s: float = START_S) -> float:
        """Return after how many seconds a completion was given."""
        begun_s = time.monotonic()
        while time.monotonic() - begun_s < limit_s:
            body = {"prompt": [5], "max_tokens": 1}
            if self.post("/v1/completions", body, limit_s)[0] == 200:
                return time.monotonic() - begun_s
            time.sleep(0.02)
        raise RuntimeError(f"not ready after {limit_s:.0f} s: " + "".join(self.read_log()))

    # -- its end -----------------------------------------------------------------------------------

    def stop(self, limit_s: float = 60.0) -> int:
        """End it as an operator does; return its exit code."""
        self.process.send_signal(signal.SIGTERM)
        return self.wait(limit_s)

    def wait(self, limit_s: float = 60.0) -> int:
        """Wait for its end; return its exit code."""
        end_s = time.monotonic() + limit_s
        while self.process.poll() is None:
            if time.monotonic() > end_s:
                self.kill()
                raise RuntimeError("the server has not ended: " + "".join(self.log))
            self.read_log(0.05)
        return self.process.returncode

    def kill(self) -> None:
        """End it without a word."""
        if self.process.poll() is None:
            self.process.kill()
        self.process.wait()
        self.read_log()


@contextlib.contextmanager
def served(*flags: str, environment: dict[str, str] | None = None) -> Iterator[Served]:
    """Give a server, and end it."""
    server = Served(*flags, environment=environment)
    try:
        yield server
    finally:
        server.kill()
        assert server.process.stderr is not None
        server.process.stderr.close()


def alive(pids: Sequence[int]) -> list[int]:
    """Return those of `pids` that are there, stopped ones too, zombies not."""
    found = []
    for pid in pids:
        with contextlib.suppress(psutil.Error):
            if psutil.Process(pid).status() != psutil.STATUS_ZOMBIE:
                found.append(pid)
    return found


def wait_until_gone(pids: Sequence[int], limit_s: float) -> list[int]:
    """Wait until none of `pids` is there, or so long; return those that are."""
    end_s = time.monotonic() + limit_s
    while (left := alive(pids)) and time.monotonic() < end_s:
        time.sleep(0.02)
    return left


def shared_memory() -> set[str]:
    """Return the names in /dev/shm."""
    return {path.name for path in Path("/dev/shm").iterdir()}


def _role(process: psutil.Process) -> str:
    command = process.cmdline()
    if len(command) < 3:  # it has just ended
        raise psutil.NoSuchProcess(process.pid)
    if "front_end" in command:
        return "front end"
    rank = f"rank {process.environ().get('RANK', '?')}"
    # torchrun's ranks are servers; a rank has processes of its own, too
    if "rank" in command or "serve" in command:
        return rank
    return f"{command[2].rpartition('.')[2]} of {rank}"
