"""What may follow in an output whose text must have a form: grammars, compiled beside the steps.

A request's grammar is compiled by a thread, in which it is first tried in a process of its own
(`grammar_compiler.py`); its sequences wait meanwhile. Then each of its outputs has a `Matcher`,
which shares nothing with others, so that what it allows, and when it fails, is a function of the
request and the output's tokens. What is kept of a grammar for the next request is a verdict: that
it is sound and how large, or what is wrong with it.

It knows no logits and no queues.
"""

from __future__ import annotations

import hashlib
import os
import queue
import select
import subprocess
import sys
import threading
import time
import weakref
from collections import OrderedDict, deque
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import msgspec
import numpy as np
import numpy.typing as npt

from moe_serve.engine.grammar_compiler import (
    TOKENIZER_FILE,
    GrammarCompiler,
    GrammarError,
    allowed_ids,
    check,
    is_installed,
)
from moe_serve.errors import RequestError
from moe_serve.structured_outputs import MAX_GRAMMAR_S, StructuredOutputs
from moe_serve.types import Request

if TYPE_CHECKING:
    import llguidance

NUM_THREADS = 2
# of matchers at once; beyond it requests wait for others to end
ROOM_BYTES = 2**30
# of a matcher, beside what the trial found: what it builds up as it goes
GROWTH_BYTES = 2 * 2**20
MOST_VERDICTS = 4096
# until a trial's process has read the tokenizer
START_S = 60.0
# beyond its own limit, by which a trial's process ends itself
_GRACE_S = 1.0
# for a thread that is in the midst of compiling
_CLOSE_S = 5.0
_MOST_ANSWER = 2**16
_STACK_BYTES = 16 * 2**20

Allowed = npt.NDArray[np.bool_]


class Matcher:
    """One output's place in its grammar, a function of the output's tokens.

    It never looks at tokens twice, and never goes back: a sequence's tokens only become more.
    """

    __slots__ = (
        "__weakref__", "_allowed", "_begin", "_can_end", "_end_id", "_eos_ids", "_last_early",
        "_matcher", "_num_ids", "_num_taken", "_vocab_size",
    )  # fmt: skip

    def __init__(
        self,
        matcher: llguidance.LLMatcher,
        request: Request,
        vocab_size: int,
        num_ids: int,
        end_id: int,
    ) -> None:
        """num_ids, end_id: of the compiler; vocab_size: the model's, which may differ."""
        sampling = request.sampling
        self._matcher = matcher
        self._vocab_size = vocab_size
        self._num_ids = num_ids
        self._end_id = end_id
        self._begin = self._num_taken = len(request.prompt_ids)
        eos_ids = [] if sampling.ignore_eos else sorted(request.eos_token_ids)
        self._eos_ids = [token for token in eos_ids if token < vocab_size]
        # up to this many tokens an output cannot end by an end token
        self._last_early = self._begin + sampling.min_tokens
        self._can_end = bool(self._eos_ids)
        self._allowed: Allowed | None = None

    def allowed(self, token_ids: Sequence[int]) -> Allowed:
        """Return which tokens may come next, bool [vocab_size]; not to be written to.

        token_ids: prompt and output. End tokens are among them where the text may end, unless the
        request ignores them. Raises GrammarError where a limit was exceeded, now and ever after.
        """
        self._take(token_ids)
        if self._allowed is None:
            self._allowed = self._look()
        return self._allowed

    def is_complete(self, token_ids: Sequence[int]) -> bool:
        """Whether nothing can follow, so that an output ends here without an end token.

        What failed is not complete: `allowed` says why.
        """
        self._take(token_ids)
        if self._matcher.is_error():
            return False
        if self._matcher.is_stopped():
            return True
        if self._can_end and len(token_ids) >= self._last_early:
            return False  # if nothing can follow but an end token, that comes next
        try:
            return bool(self._matcher.is_accepting()) and not self.allowed(token_ids).any()
        except GrammarError:
            return False

    def _take(self, token_ids: Sequence[int]) -> None:
        new = token_ids[self._num_taken :]
        if not new:
            return
        self._num_taken, self._allowed = len(token_ids), None
        for token in new:
            if token not in self._eos_ids and not self._matcher.consume_token(token):
                return

    def _look(self) -> Allowed:
        check(self._matcher)
        found = allowed_ids(self._matcher, self._num_ids)
        allowed = np.zeros(self._vocab_size, np.bool_)
        common = min(self._vocab_size, self._num_ids)
        allowed[:common] = found[:common]
        if self._end_id < self._vocab_size:
            allowed[self._end_id] = False
        allowed[self._eos_ids] = self._matcher.is_accepting()
        return allowed


@dataclass(frozen=True, slots=True)
class Compiled:
    """What came of a request's grammar: a matcher for each output, or an error.

    is_refused: whether the error is the grammar's own fault.
    """

    request_id: str
    matchers: list[Matcher]
    error: str | None = None
    is_refused: bool = False


class Grammars:
    """Compiles the grammars of one engine's requests, in threads.

    folder: where the tokenizer.json is; it is read when the first grammar comes.
    """

    def __init__(self, folder: Path, vocab_size: int, limit_s: float = MAX_GRAMMAR_S) -> None:
        """limit_s: the longest that a grammar may take to compile."""
        self._path = folder / TOKENIZER_FILE
        self._shop = _Shop(self._path, vocab_size, limit_s)
        self._jobs: dict[str, _Job] = {}
        self._close = weakref.finalize(self, self._shop.close)

    @property
    def num_pending(self) -> int:
        """How many requests' grammars are being compiled."""
        return len(self._jobs)

    def check(self) -> None:
        """Raise RequestError where no grammar can be used at all."""
        if not is_installed():
            raise RequestError(
                "structured_outputs needs the package llguidance, which is not installed: "
                "pip install llguidance, or leave it out"
            )
        if not self._path.is_file():
            raise RequestError(
                f"structured_outputs needs a {TOKENIZER_FILE}, and the model's folder has none: "
                "name a folder with one as tokenizer, or leave it out"
            )

    def begin(self, request: Request) -> None:
        """Have a request's grammar compiled; `take` will give what came of it."""
        assert request.request_id not in self._jobs
        job = _Job(request)
        self._jobs[request.request_id] = job
        self._shop.put(job)

    def cancel(self, request_id: str) -> None:
        """Forget a request, if it is being compiled: nothing will be given for it."""
        job = self._jobs.pop(request_id, None)
        if job is not None:
            job.is_cancelled = True

    def take(self) -> list[Compiled]:
        """Return what has come since this was asked last."""
        found = []
        self._shop.has_done.clear()
        while self._shop.done:
            job, compiled = self._shop.done.popleft()
            if self._jobs.get(compiled.request_id) is job:
                del self._jobs[compiled.request_id]
                found.append(compiled)
        return found

    def wait(self, limit_s: float) -> None:
        """Wait until there is something to take, limit_s at most."""
        self._shop.has_done.wait(limit_s)

    def close(self) -> None:
        """End the threads, and the processes of trials. What is being compiled is forgotten."""
        self._jobs.clear()
        self._close()


class _Job:
    __slots__ = ("is_cancelled", "request")

    def __init__(self, request: Request) -> None:
        self.request = request
        self.is_cancelled = False


class _Verdict(msgspec.Struct, frozen=True):
    """What a trial gave: an error, or the size of a matcher and the time to make one."""

    error: str | None = None
    bytes: int = 0
    compile_s: float = 0.0


class _Shop:
    """What the threads share: jobs, results, verdicts, the compiler, and room for matchers."""

    def __init__(self, path: Path, vocab_size: int, limit_s: float) -> None:
        self.path = path
        self.vocab_size = vocab_size
        self.limit_s = limit_s
        self.jobs: queue.SimpleQueue[_Job | None] = queue.SimpleQueue()
        self.done: deque[tuple[_Job, Compiled]] = deque()
        self.has_done = threading.Event()
        self.is_closed = False
        self._compiler: GrammarCompiler | None = None
        self._reading = threading.Lock()
        self._verdicts: OrderedDict[bytes, _Verdict] = OrderedDict()
        # re-entrant, both: the collector may run finalizers of ours in any thread
        self._lock = threading.RLock()
        self._room = threading.Condition(threading.RLock())
        self._free_bytes = ROOM_BYTES
        self._trials: list[Trial] = []
        self._threads: list[threading.Thread] = []

    def put(self, job: _Job) -> None:
        """Have somebody work at a job."""
        while len(self._threads) < NUM_THREADS:
            self._threads.append(_thread(self))
        self.jobs.put(job)

    def work(self) -> None:
        """Compile what comes until the end."""
        trial = Trial(self.path, self.limit_s)
        with self._lock:
            self._trials.append(trial)
        try:
            while (job := self.jobs.get()) is not None:
                if job.is_cancelled or self.is_closed:
                    continue
                self.done.append((job, self._compile(job, trial)))  # nothing of it stays here
                self.has_done.set()
        finally:
            trial.close()

    def close(self) -> None:
        """Stop what is under way, and wait for the threads to end."""
        self.is_closed = True
        for _ in self._threads:
            self.jobs.put(None)
        with self._room:
            self._room.notify_all()
        with self._lock:
            for trial in self._trials:
                trial.kill()
        for thread in self._threads:
            if thread is not threading.current_thread():
                thread.join(_CLOSE_S)

    def _compile(self, job: _Job, trial: Trial) -> Compiled:
        request = job.request
        asked, n = request.sampling.structured_outputs, request.sampling.n
        assert asked is not None
        try:
            verdict = self._verdict(asked, trial)
            if verdict.error is not None:
                raise GrammarError(verdict.error)
            num_bytes = verdict.bytes + GROWTH_BYTES
            _check_affordable(verdict, n, num_bytes, self.limit_s)
            self._take_room(job, n * num_bytes)
            matchers = []
            try:
                compiler = self._read_compiler()
                for _ in range(n):
                    matcher = Matcher(
                        compiler.compile(asked.kind, asked.text),
                        request,
                        self.vocab_size,
                        compiler.num_ids,
                        compiler.end_id,
                    )
                    matchers.append(matcher)
            finally:
                self._give_room((n - len(matchers)) * num_bytes)
                for matcher in matchers:
                    weakref.finalize(matcher, self._give_room, num_bytes).atexit = False
        except GrammarError as error:
            name = f"structured_outputs.{asked.kind}"
            return Compiled(request.request_id, [], f"{name}: {error}", is_refused=True)
        except Exception as error:  # a fault of ours, or of the machine, is this request's alone
            why = f"the grammar could not be compiled: {type(error).__name__}: {error}"
            return Compiled(request.request_id, [], why)
        return Compiled(request.request_id, matchers)

    def _verdict(self, asked: StructuredOutputs, trial: Trial) -> _Verdict:
        """Return what is known of a grammar, or try it."""
        key = hashlib.blake2b(f"{asked.kind}:{asked.text}".encode(), digest_size=16).digest()
        with self._lock:
            if key in self._verdicts:
                self._verdicts.move_to_end(key)
                return self._verdicts[key]
        verdict, is_lasting = trial.run(asked.kind, asked.text)
        if is_lasting:
            with self._lock:
                self._verdicts[key] = verdict
                while len(self._verdicts) > MOST_VERDICTS:
                    self._verdicts.popitem(last=False)
        return verdict

    def _read_compiler(self) -> GrammarCompiler:
        with self._reading:
            if self._compiler is None:
                self._compiler = GrammarCompiler(self.path)
            return self._compiler

    def _take_room(self, job: _Job, num_bytes: int) -> None:
        with self._room:
            while self._free_bytes < num_bytes and not (job.is_cancelled or self.is_closed):
                self._room.wait(0.1)  # who cancels does not say so here
            self._free_bytes -= num_bytes

    def _give_room(self, num_bytes: int) -> None:
        with self._room:
            self._free_bytes += num_bytes
            self._room.notify_all()


def _check_affordable(verdict: _Verdict, n: int, num_bytes: int, limit_s: float) -> None:
    if n * num_bytes > ROOM_BYTES:
        raise GrammarError(
            f"it takes {num_bytes} bytes for each of n = {n} outputs, and there are {ROOM_BYTES} "
            "for all; simplify it, or lower n"
        )
    if n * verdict.compile_s > limit_s:
        raise GrammarError(
            f"it takes {verdict.compile_s:.2f} s to compile for each of n = {n} outputs, and may "
            f"take {limit_s:g} s in all; simplify it, or lower n"
        )


def _thread(shop: _Shop) -> threading.Thread:
    """Start a thread with a stack that has room for what a trial has let through."""
    before = threading.stack_size(_STACK_BYTES)
    try:
        thread = threading.Thread(target=shop.work, name="grammars", daemon=True)
        thread.start()
    finally:
        threading.stack_size(before)
    return thread


class Trial:
    """A process in which grammars are tried, started when the first comes, again when it ended."""

    def __init__(self, path: Path, limit_s: float) -> None:
        self._path = path
        self._limit_s = limit_s
        self._process: subprocess.Popen[bytes] | None = None
        self._lock = threading.RLock()
        self._is_closed = False

    def run(self, kind: str, text: str) -> tuple[_Verdict, bool]:
        """Try a grammar; return the verdict, and whether it would be the same another time.

        Raises GrammarError for a tokenizer that cannot be used, OSError and RuntimeError where
        there can be no process.
        """
        if self._process is None or self._process.poll() is not None:  # ended between two
            self._end()
            self._start()
        process = self._process
        assert process is not None
        assert process.stdin is not None
        start_s = time.monotonic()
        try:
            process.stdin.write(msgspec.json.encode({"kind": kind, "text": text}) + b"\n")
            process.stdin.flush()
            answer = _read_line(process, self._limit_s + _GRACE_S)
        except BrokenPipeError:
            answer = None
        if answer is not None:
            return msgspec.convert(answer, _Verdict), True
        took_s = time.monotonic() - start_s
        self._end()
        if took_s >= self._limit_s:
            error = f"it takes more than {self._limit_s:g} s to compile; simplify it"
            return _Verdict(error), False
        return _Verdict("it takes too much memory, or is too deep, to compile; simplify it"), True

    def kill(self) -> None:
        """End the process, whatever it does; from any thread. No other will be started."""
        with self._lock:
            self._is_closed = True
            if self._process is not None:
                self._process.kill()

    def close(self) -> None:
        """Give back what is held; from the thread that runs trials."""
        self.kill()
        self._end()

    def _start(self) -> None:
        command = [
            sys.executable, "-m", "moe_serve.engine.grammar_compiler", str(self._path),
            str(self._limit_s),
        ]  # fmt: skip
        # where this package is, the other process may not find by itself
        root = str(Path(__file__).resolve().parents[2])
        paths = [root, *filter(None, [os.environ.get("PYTHONPATH")])]
        with self._lock:
            if self._is_closed:
                raise RuntimeError("the engine was closed")
            self._process = subprocess.Popen(
                command,
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=subprocess.DEVNULL,
                env={**os.environ, "PYTHONPATH": os.pathsep.join(paths)},
                start_new_session=True,  # an interrupt at the terminal is not for it
            )
        answer = _read_line(self._process, START_S)
        if answer is None:
            self._end()
            raise RuntimeError(f"{' '.join(command[:3])} has ended, or said nothing in {START_S} s")
        if "error" in answer:
            self._end()
            raise GrammarError(str(answer["error"]))

    def _end(self) -> None:
        with self._lock:
            process, self._process = self._process, None
            if process is None:
                return
            process.kill()
            process.wait()
            for pipe in (process.stdin, process.stdout):
                if pipe is not None:
                    pipe.close()


def _read_line(process: subprocess.Popen[bytes], limit_s: float) -> dict[str, Any] | None:
    """Return the object that a process says in a line; None if it ends, or says none in time."""
    assert process.stdout is not None
    end_s, line = time.monotonic() + limit_s, b""
    file = process.stdout.fileno()
    while not line.endswith(b"\n"):
        left_s = end_s - time.monotonic()
        if left_s <= 0 or not select.select([file], [], [], left_s)[0]:
            return None
        part = os.read(file, _MOST_ANSWER)
        if not part:
            return None
        line += part
    found: dict[str, Any] = msgspec.json.decode(line)
    return found
