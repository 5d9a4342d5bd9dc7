"""One run: sends requests when they are due, and writes down what came back.

An open loop: arrivals do not wait for answers, so a server that falls behind is seen to. With a
limit on concurrency a request that is due waits here, and that counts in its latency, which begins
when it was due. All at once together with such a limit is a closed loop: so many clients, each of
which asks again when it was answered; a request is then due when it is sent.
"""

from __future__ import annotations

import asyncio
import math
import signal
import threading
import time
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field

from moe_serve.errors import ConfigError
from moe_serve.load.connection import BadAnswer, ConnectionFailed, ConnectionPool
from moe_serve.load.records import RequestRecord, StreamedAnswer
from moe_serve.load.workload import Asked


@dataclass(frozen=True, kw_only=True, slots=True)
class RunLimits:
    """Where a run ends; all may be given, the first that is reached counts.

    max_concurrency: requests at once. duration_s: no arrivals after it; what runs is waited for.
    timeout_s: a request fails so long after it was sent.
    """

    max_concurrency: int | None = None
    duration_s: float = math.inf
    timeout_s: float = 600.0

    def __post_init__(self) -> None:
        if self.max_concurrency is not None and self.max_concurrency < 1:
            raise ConfigError(f"--max-concurrency is {self.max_concurrency}; it must be at least 1")
        for flag, value in (("--duration", self.duration_s), ("--timeout", self.timeout_s)):
            if not value > 0:
                raise ConfigError(f"{flag} is {value}; it must be above 0")


@dataclass(slots=True)
class LoadRun:
    """Sends requests and keeps their records.

    offsets_s: when each is due; None: a closed loop. on_end is told of each record that ended.
    After `run`: records, in the order in which they were due; wall_s, to the last end;
    peak_concurrency; cpu_share, how much of one core this process used; is_interrupted.
    """

    pool: ConnectionPool
    path: str
    requests: Iterable[Asked]
    offsets_s: Iterable[float] | None
    limits: RunLimits
    on_end: Callable[[RequestRecord], None] = lambda record: None
    records: list[RequestRecord] = field(default_factory=list)
    start_s: float = 0.0
    wall_s: float = 0.0
    cpu_share: float = 0.0
    peak_concurrency: int = 0
    is_interrupted: bool = False
    _num_running: int = 0

    async def run(self) -> None:
        """Send everything and wait for it; SIGINT ends it early, with what there is so far."""
        loop = asyncio.get_running_loop()
        self.start_s = time.perf_counter()
        cpu_s = time.process_time()
        driver = loop.create_task(self._closed() if self.offsets_s is None else self._open())

        def interrupt() -> None:
            self.is_interrupted = True
            driver.cancel()

        is_main = threading.current_thread() is threading.main_thread()
        if is_main:  # no signal arrives elsewhere
            loop.add_signal_handler(signal.SIGINT, interrupt)
        try:
            await driver
        except asyncio.CancelledError:
            if not self.is_interrupted:
                raise
        finally:
            if is_main:
                loop.remove_signal_handler(signal.SIGINT)
            self._settle(time.process_time() - cpu_s)

    async def _open(self) -> None:
        assert self.offsets_s is not None
        limit = self.limits.max_concurrency
        room = None if limit is None else asyncio.Semaphore(limit)
        async with asyncio.TaskGroup() as group:
            # the body is there before its time has come
            for asked, offset_s in zip(self.requests, self.offsets_s, strict=False):
                if offset_s >= self.limits.duration_s:
                    break
                due_s = self.start_s + offset_s
                # a moment for the answers also when everything is due
                await asyncio.sleep(max(0.0, due_s - time.perf_counter()))
                group.create_task(self._send_when(room, self._record(asked, due_s), asked))

    async def _closed(self) -> None:
        assert self.limits.max_concurrency is not None
        requests = iter(self.requests)
        async with asyncio.TaskGroup() as group:
            for _ in range(self.limits.max_concurrency):
                group.create_task(self._client(requests))

    async def _client(self, requests: Iterator[Asked]) -> None:
        for asked in requests:
            now = time.perf_counter()
            if now - self.start_s >= self.limits.duration_s:
                return
            await self._send(self._record(asked, now), asked)

    def _record(self, asked: Asked, due_s: float) -> RequestRecord:
        record = RequestRecord(
            index=len(self.records),
            intended_s=due_s,
            asked_input_tokens=asked.input_len,
            asked_output_tokens=asked.output_len,
        )
        self.records.append(record)
        return record

    async def _send_when(
        self, room: asyncio.Semaphore | None, record: RequestRecord, asked: Asked
    ) -> None:
        if room is None:
            await self._send(record, asked)
        else:
            async with room:
                await self._send(record, asked)

    async def _send(self, record: RequestRecord, asked: Asked) -> None:
        answer = StreamedAnswer(record)
        request = self.pool.request("POST", self.path, asked.body)
        self._num_running += 1
        self.peak_concurrency = max(self.peak_concurrency, self._num_running)
        record.sent_s = time.perf_counter()
        failure, why = None, ""
        try:
            async with asyncio.timeout(self.limits.timeout_s):
                await self.pool.exchange(request, answer)
        except TimeoutError:
            failure, why = "timeout", f"no end within {self.limits.timeout_s:g} s"
        except ConnectionFailed as error:
            failure, why = "connection", str(error)
        except BadAnswer as error:
            failure, why = "bad answer", str(error)
        finally:
            self._num_running -= 1
        if record.end_s is None:
            record.end_s = time.perf_counter()
        try:
            answer.finish()
        except BadAnswer as error:
            if failure is None:
                failure, why = "bad answer", str(error)
        if failure is not None and record.failure is None and not answer.is_done:
            record.failure, record.message = failure, why
        self.on_end(record)

    def _settle(self, cpu_s: float) -> None:
        now = time.perf_counter()
        for record in self.records:
            if record.end_s is None:
                record.failure = "unfinished"
        ends = [record.end_s for record in self.records if record.end_s is not None]
        last_s = now if self.is_interrupted or not ends else max(ends)
        self.wall_s = last_s - self.start_s
        self.cpu_share = cpu_s / (now - self.start_s)
