"""Servers that are told to end while 16 streams run, or at a worse moment: what becomes of all.

Hypothesis: whoever is served when SIGTERM comes has its whole answer if there is time, and else an
error that says so; nobody is let in meanwhile, and of the server nothing is left.

    python -m benchmarks.serving.drains --rounds 20 --save

A round is a drain of each kind below; --kinds names some of them.
"""

from __future__ import annotations

import argparse
import asyncio
import os
import random
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from benchmarks import results
from benchmarks.serving.exchanges import Exchange
from benchmarks.serving.report import report
from benchmarks.serving.served import (
    Served,
    served,
    shared_memory,
    wait_until_gone,
)
from benchmarks.serving.streams import Stream, run_stream

NUM_STREAMS = 16
# beyond the time that requests are given
EXIT_S = 5.0
AT_ONCE_S = 2.0
STOPPED = 143
FLAGS = ("--stats-interval", "0")
_SHORT_S = 1.0


@dataclass
class Drain:
    """What came of one server's end. end_s: from the (last) signal to its end; limit_s: for that.

    num_whole, num_cut (ended with an error that says why), num_other: streams. refused: answers to
    requests that came during the drain, "503", or "connection" where none was had; ready: of /ready
    then.
    """

    kind: str
    limit_s: float
    code: int = 0
    wanted_code: int = 0
    end_s: float = 0.0
    num_whole: int = 0
    num_cut: int = 0
    num_other: int = 0
    refused: list[str] = field(default_factory=list)
    ready: list[int] = field(default_factory=list)
    left: list[str] = field(default_factory=list)
    faults: list[str] = field(default_factory=list)

    def count(self, streams: Sequence[Stream]) -> None:
        for stream in streams:
            if stream.is_whole and stream.error is None:
                self.num_whole += 1
            elif (stream.error or "").startswith(("connection", "hung")):
                self.num_other += 1
            else:
                self.num_cut += 1

    def judge(self) -> None:
        """Note what is so whatever the kind."""
        if self.code != self.wanted_code:
            self.faults.append(f"exit code {self.code}, not {self.wanted_code}")
        if self.end_s > self.limit_s:
            self.faults.append(f"ended after {self.end_s:.1f} s, limit {self.limit_s:g} s")
        if self.left:
            self.faults.append(f"left behind: {self.left}")
        if any(answer not in ("503", "connection") for answer in self.refused):
            self.faults.append(f"requests during the drain: {self.refused}")
        if any(status not in (0, 503) for status in self.ready):
            self.faults.append(f"/ready during the drain: {self.ready}")

    def line(self) -> str:
        return (
            f"{self.kind}: ended {self.end_s:.2f} s (limit {self.limit_s:g} s), code {self.code}, "
            f"whole {self.num_whole}, cut {self.num_cut}, other {self.num_other}, "
            f"refused {len(self.refused)}" + "".join(f"; BROKEN: {one}" for one in self.faults)
        )


class _Place:
    """Where a server is, to see that nothing is left of it. It makes its folders in one of its own.

    environment: with which it is to be started.
    """

    def __init__(self) -> None:
        self._folder = Path(tempfile.mkdtemp(prefix="drain-"))
        self.environment = {"TMPDIR": str(self._folder)}
        self._memory = shared_memory()
        self._pids: set[int] = set()
        self._port = 0

    def note(self, server: Served) -> None:
        """Take note of a server's processes and port."""
        self._pids.update(server.processes().values())
        self._port = server.port

    def note_below(self, pid: int) -> int:
        """Take note of all processes below `pid`; return how many there are."""
        found = _children(pid)
        self._pids |= found
        return len(found)

    def wait(self, limit_s: float) -> None:
        """Wait until the processes are gone, or so long."""
        wait_until_gone(list(self._pids), limit_s)

    def left(self) -> list[str]:
        """Return what is left, and remove the folder."""
        found = [f"process {pid}" for pid in wait_until_gone(list(self._pids), 2.0)]
        found += [f"/dev/shm/{name}" for name in shared_memory() - self._memory]
        found += [f"folder {path.name}" for path in self._folder.iterdir()]
        shutil.rmtree(self._folder)
        with socket.socket() as probe:
            if self._port and probe.connect_ex(("127.0.0.1", self._port)) == 0:
                found.append(f"port {self._port}")
        return found


def bodies(chance: random.Random, num_tokens: int, n: int = 1) -> list[dict[str, Any]]:
    """Make requests for streams of so many tokens."""
    return [
        {
            "prompt": [chance.randrange(2, 6000) for _ in range(chance.randint(2, 24))],
            "max_tokens": num_tokens,
            "temperature": 0.8,
            "ignore_eos": True,
            "n": n,
            "stream": True,
        }
        for _ in range(NUM_STREAMS)
    ]


async def _running(server: Served, many: Sequence[dict[str, Any]]) -> tuple[list[Stream], Any]:
    """Start streams; return them, and what to wait for, when each has had a token."""
    streams = [Stream(body) for body in many]
    tasks = asyncio.gather(*(run_stream(server.port, stream) for stream in streams))
    while not all(stream.times_s or stream.has_ended for stream in streams):
        await asyncio.sleep(0.002)
    ends = [stream.error for stream in streams if stream.has_ended]
    assert not ends, (ends, server.read_log())
    return streams, tasks


async def _meanwhile(server: Served, drain: Drain, is_over: Callable[[], bool]) -> None:
    """Come during a drain, again and again."""
    await asyncio.sleep(0.1)
    while not is_over():
        try:
            exchange = await Exchange.begin(
                server.port, "/v1/completions", {"prompt": [5], "max_tokens": 2}
            )
            try:
                status = await exchange.head()
            finally:
                exchange.close()
            if status == 503 and "retry-after" not in exchange.headers:
                drain.faults.append("a 503 without Retry-After")
            drain.refused.append(str(status))
        except OSError:
            drain.refused.append("connection")
        if not is_over():
            drain.ready.append((await asyncio.to_thread(server.get, "/ready"))[0])
        await asyncio.sleep(0.05)


async def _drain(
    server: Served,
    drain: Drain,
    many: Sequence[dict[str, Any]],
    signals: Sequence[signal.Signals],
    *,
    to_all: bool = False,
) -> None:
    """Send signals while streams run; see what becomes of them."""
    streams, tasks = await _running(server, many)
    begun_s = time.monotonic()
    for number in signals:
        begun_s = time.monotonic()
        for pid in server.processes().values() if to_all else (server.process.pid,):
            os.kill(pid, number)
        await asyncio.sleep(0.1)
    ended = asyncio.create_task(asyncio.to_thread(server.wait))
    await _meanwhile(server, drain, lambda: all(one.has_ended for one in streams) or ended.done())
    await tasks
    drain.code = await ended
    drain.end_s = time.monotonic() - begun_s
    drain.count(streams)


# -- kinds -----------------------------------------------------------------------------------------


def whole(
    chance: random.Random,
    numbers: Sequence[signal.Signals] = (signal.SIGTERM,),
    *,
    to_all: bool = False,
) -> Drain:
    """There is time for all streams."""
    drain = Drain(f"{numbers[0].name}{' to all' if to_all else ''}", 30.0 + EXIT_S)
    place = _Place()
    with served(*FLAGS, "--shutdown-timeout", "30", environment=place.environment) as server:
        place.note(server)
        asyncio.run(_drain(server, drain, bodies(chance, 500), numbers, to_all=to_all))
        drain.left = place.left()
    if drain.num_whole < NUM_STREAMS:
        drain.faults.append(f"{NUM_STREAMS - drain.num_whole} streams were not whole")
    if not drain.refused:
        drain.faults.append("nobody came during the drain")
    return drain


def interrupted(chance: random.Random) -> Drain:
    """As `whole`, by Ctrl-C."""
    return whole(chance, (signal.SIGINT,))


def of_all(chance: random.Random) -> Drain:
    """As `whole`, where every process gets the signal, as from a service manager."""
    return whole(chance, to_all=True)


def cut(chance: random.Random) -> Drain:
    """There is too little time."""
    drain = Drain("too little time", _SHORT_S + EXIT_S)
    place = _Place()
    with served(
        *FLAGS, "--shutdown-timeout", f"{_SHORT_S:g}", environment=place.environment
    ) as server:
        place.note(server)
        asyncio.run(_drain(server, drain, bodies(chance, 990, 4), (signal.SIGTERM,)))
        drain.left = place.left()
    if drain.num_cut < NUM_STREAMS:
        drain.faults.append(f"{drain.num_cut} streams ended with an error, not {NUM_STREAMS}")
    return drain


def twice(chance: random.Random) -> Drain:
    """A second signal: at once."""
    drain = Drain("twice", AT_ONCE_S, wanted_code=STOPPED)
    place = _Place()
    with served(*FLAGS, environment=place.environment) as server:
        place.note(server)
        numbers = (signal.SIGTERM, signal.SIGTERM)
        asyncio.run(_drain(server, drain, bodies(chance, 990, 4), numbers))
        drain.left = place.left()
    return drain


def loading(chance: random.Random) -> Drain:
    """While the model is being loaded: there is nobody to wait for."""
    drain = Drain("while loading", EXIT_S)
    place = _Place()
    process = subprocess.Popen(
        [sys.executable, "-m", "moe_serve", "serve", "--port", "0", *FLAGS],
        stderr=subprocess.PIPE,
        start_new_session=True,
        env={**os.environ, **place.environment},
    )
    assert process.stderr is not None
    # from where signals are handled on (its ranks are there) up to where it serves
    while not place.note_below(process.pid):
        time.sleep(0.01)
        assert process.poll() is None
    time.sleep(chance.uniform(0.3, 2.0))
    place.note_below(process.pid)
    begun_s = time.monotonic()
    process.send_signal(signal.SIGTERM)
    said = process.stderr.read()
    drain.code = process.wait(60)
    process.stderr.close()
    drain.end_s = time.monotonic() - begun_s
    drain.left = place.left()
    if b"Traceback" in said:
        drain.faults.append("a traceback was printed")
    return drain


def reforming(chance: random.Random) -> Drain:
    """While the ranks are started again."""
    drain = Drain("while ranks are lost", 30.0 + EXIT_S)
    place = _Place()
    with served(*FLAGS, "--shutdown-timeout", "30", environment=place.environment) as server:
        place.note(server)
        asyncio.run(_lose_and_drain(server, drain, place, chance))
        drain.left = place.left()
    if drain.num_whole < NUM_STREAMS:
        drain.faults.append(f"{NUM_STREAMS - drain.num_whole} streams were not whole")
    return drain


async def _lose_and_drain(
    server: Served, drain: Drain, place: _Place, chance: random.Random
) -> None:
    streams, tasks = await _running(server, bodies(chance, 500))
    os.kill(server.processes()["rank 0"], signal.SIGKILL)
    await asyncio.sleep(chance.uniform(0.1, 2.0))
    place.note(server)
    begun_s = time.monotonic()
    server.process.send_signal(signal.SIGTERM)
    ended = asyncio.create_task(asyncio.to_thread(server.wait))
    await tasks
    drain.code = await ended
    drain.end_s = time.monotonic() - begun_s
    drain.count(streams)


# A terminal's session: its leader starts a server and waits. A server of it is told when it ends.
_SHELL = """
import fcntl, subprocess, sys, termios
fcntl.ioctl(0, termios.TIOCSCTTY, 0)
sys.exit(subprocess.call(sys.argv[1:], stdin=subprocess.DEVNULL))
"""


def terminal(chance: random.Random) -> Drain:
    """The terminal that it was started in is closed."""
    drain = Drain("terminal closed", 30.0 + EXIT_S)
    place = _Place()
    ours, theirs = os.openpty()
    shell = subprocess.Popen(
        [
            sys.executable, "-c", _SHELL,
            sys.executable, "-m", "moe_serve", "serve", "--port", "0", *FLAGS,
        ],
        stdin=theirs, stdout=theirs, stderr=theirs, start_new_session=True,
        env={**os.environ, **place.environment},
    )  # fmt: skip
    os.close(theirs)
    said = b""
    while b"serving at" not in said:
        said += os.read(ours, 2**12)
    place.note_below(shell.pid)
    begun_s = time.monotonic()
    shell.kill()
    shell.wait()
    place.wait(drain.limit_s)
    drain.end_s = time.monotonic() - begun_s
    os.close(ours)
    drain.left = place.left()
    return drain


def _children(pid: int) -> set[int]:
    """Return all processes below `pid`."""
    found: set[int] = set()
    for task in Path(f"/proc/{pid}/task").glob("*/children"):
        for child in map(int, task.read_text().split()):
            found |= {child} | _children(child)
    return found


KINDS: dict[str, Callable[[random.Random], Drain]] = {
    "whole": whole,
    "interrupted": interrupted,
    "of-all": of_all,
    "cut": cut,
    "twice": twice,
    "loading": loading,
    "reforming": reforming,
    "terminal": terminal,
}


def run(kind: str, chance: random.Random) -> Drain:
    """End a server, and judge how."""
    drain = KINDS[kind](chance)
    drain.judge()
    return drain


def rows_of(drains: Sequence[Drain]) -> list[results.Row]:
    """Return the figures of many."""
    rows = [results.Row.of("drains", [len(drains)], "count")]
    for kind in dict.fromkeys(drain.kind for drain in drains):
        of_kind = [drain for drain in drains if drain.kind == kind]
        limit = of_kind[0].limit_s
        rows.append(
            results.Row.of(f"{kind}: end after", [d.end_s for d in of_kind], "s", limit=limit)
        )
    for name, values in {
        "streams whole": [drain.num_whole for drain in drains],
        "streams that ended with an error event": [drain.num_cut for drain in drains],
        "streams cut without a word": [drain.num_other for drain in drains],
        "refused during a drain": [len(drain.refused) for drain in drains],
        "left behind": [len(drain.left) for drain in drains],
        "drains with a fault": [int(bool(drain.faults)) for drain in drains],
    }.items():
        rows.append(results.Row.of(name, [sum(values)], "count"))
    return rows


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rounds", type=int, default=20)
    parser.add_argument("--kinds", default=",".join(KINDS))
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--save", action="store_true")
    given = parser.parse_args()
    chance = random.Random(given.seed)
    drains = []
    for _ in range(given.rounds):
        for kind in given.kinds.split(","):
            drains.append(run(kind, chance))
            print(drains[-1].line(), flush=True)
    faults = [f"{drain.kind}: {fault}" for drain in drains for fault in drain.faults]
    return report("drains", rows_of(drains), faults, is_saved=given.save)


if __name__ == "__main__":
    sys.exit(main())
