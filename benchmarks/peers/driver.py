"""Runs jobs on several systems in turn, A B A B, so that a slow minute of the machine hits all."""

from __future__ import annotations

import json
import os
import signal
import subprocess
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Any, Self

from benchmarks.peers.jobs import Job
from benchmarks.results import ROOT

WARM_UP_ROUND = 1_000_000


class NotInstalled(Exception):
    """The system's packages are not there."""


@dataclass(frozen=True, slots=True)
class Answer:
    """What a system made of a job. token_ids: of each request, the prompt left out."""

    seconds: float
    token_ids: list[list[int]]


class Worker:
    """A system's process, from its start until the end of the `with` block.

    python: the interpreter that has the system's packages.
    """

    def __init__(
        self, system: str, python: Path, model: Path, vocab_size: int, threads: int | None
    ) -> None:
        self.system = system
        arguments = (system, str(model), str(vocab_size), str(threads or 0))
        self._process = subprocess.Popen(
            [str(python), "-m", "benchmarks.peers.worker", *arguments],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            cwd=ROOT,
            text=True,
            process_group=0,  # to end what it started with it
        )
        self.version = ""
        self.numerics_id: str | None = None
        self.load_s = 0.0

    def __enter__(self) -> Self:
        """Wait until the model is loaded. Raises NotInstalled, or RuntimeError if it dies."""
        try:
            message = self._read()
        except BaseException:
            self._stop()
            raise
        if "missing" in message:
            self._stop()
            raise NotInstalled(message["missing"])
        self.version, self.load_s = message["ready"], message["load_s"]
        self.numerics_id = message["numerics_id"]
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self._stop()

    def run(self, job: Job, round_index: int) -> Answer:
        """Do the job on the prompts of a round. Raises RuntimeError if the worker failed."""
        assert self._process.stdin is not None
        self._process.stdin.write(json.dumps({"job": str(job), "round": round_index}) + "\n")
        self._process.stdin.flush()
        message = self._read()
        return Answer(message["seconds"], message["token_ids"])

    def _read(self) -> dict[str, Any]:
        assert self._process.stdout is not None
        line = self._process.stdout.readline()
        if not line:
            raise RuntimeError(f"{self.system} ended with status {self._process.wait()}")
        message: dict[str, Any] = json.loads(line)
        if "error" in message:
            raise RuntimeError(message["error"])
        return message

    def _stop(self) -> None:
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        self._process.stdin.close()
        try:
            self._process.wait(timeout=10)
        except subprocess.TimeoutExpired:
            os.killpg(self._process.pid, signal.SIGKILL)
            self._process.wait()
        self._process.stdout.close()


@dataclass(frozen=True, slots=True)
class Measurement:
    """seconds: one per round."""

    system: str
    job: Job
    seconds: tuple[float, ...]

    @property
    def output_rates(self) -> list[float]:
        """Output tokens per second of each round, prompts' time included."""
        return [self.job.num_requests * self.job.output_tokens / s for s in self.seconds]

    @property
    def total_rates(self) -> list[float]:
        """Tokens in and out per second of each round."""
        tokens = self.job.num_requests * (self.job.prompt_tokens + self.job.output_tokens)
        return [tokens / s for s in self.seconds]


def measure(workers: Sequence[Worker], jobs: Sequence[Job], rounds: int) -> list[Measurement]:
    """Run every job on every worker once unmeasured, then `rounds` times in turn."""
    seconds: dict[tuple[Job, str], list[float]] = {
        (job, worker.system): [] for job in jobs for worker in workers
    }
    for job in jobs:
        for worker in workers:
            worker.run(job, WARM_UP_ROUND)
    for round_index in range(rounds):
        for job in jobs:
            for worker in workers:
                seconds[job, worker.system].append(worker.run(job, round_index).seconds)
    return [Measurement(system, job, tuple(s)) for (job, system), s in seconds.items()]
