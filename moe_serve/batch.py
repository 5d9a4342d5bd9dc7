"""A file of requests to a file of answers, in OpenAI's batch form, line for line.

The output has the input's order although many lines are served at once. It is only appended to, a
whole line at a time: after a kill the next run continues behind the last whole line, and since a
line's seed comes from its number it gives what an uninterrupted run would have given. Only
`created`, the time of an answer, differs; how many tokens came from the prefix cache, which depends
on what ran beside a line, is not told.
"""

from __future__ import annotations

import fcntl
import json
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any

from moe_serve.errors import ConfigError, RequestError
from moe_serve.llm import LLM
from moe_serve.text.openai_form import Kind, error_object, read_body, response_object
from moe_serve.text.progress import progress_bar
from moe_serve.text.prompts import PreparedRequest
from moe_serve.types import RequestOutput

LINE_FIELDS = ("custom_id", "method", "url", "body")


@dataclass(frozen=True, slots=True)
class BatchReport:
    """num_lines: answers in the output now. num_resumed of them were there before this run, and
    num_failed of this run's have a status other than 200."""

    num_lines: int
    num_resumed: int
    num_failed: int


def run_batch(
    llm: LLM, source: Path, target: Path, *, is_bar_shown: bool | None = None
) -> BatchReport:
    """Answer every line of `source` in `target`, continuing what is there.

    A bad line is answered with status 400. ConfigError: a file that cannot be used, a target that
    belongs to another source or that another run is writing; it is then as it was.
    """
    if not source.is_file():
        raise ConfigError(f"{source}: no such file")
    with _open(source, "rb") as lines:
        if target.exists() and source.samefile(target):
            raise ConfigError(f"{target}: is the input; name another file for the output")
        with _open(target, "ab+") as answers:
            _lock(answers, target)
            done, num_bytes = _read_done(answers, target)
            job = _Job(llm, lines, answers, source)
            job.skip(done, target)
            answers.truncate(num_bytes)  # a torn last line goes, now that the file is ours
            num_lines = _count_lines(source)
            with progress_bar(num_lines, num_done=len(done), is_shown=is_bar_shown) as bar:
                for output in llm.serve(job.requests()):
                    job.take(output)
                    bar.advance(sum(len(o.token_ids) for o in output.outputs))
            return BatchReport(job.num_written, len(done), job.num_failed)


class _Job:
    """One run's state: answers that wait for their turn, and how far the output is.

    Answers are numbered from 0, as the lines that are not blank.
    """

    def __init__(self, llm: LLM, lines: IO[bytes], answers: IO[bytes], source: Path) -> None:
        self.num_written = 0
        self.num_failed = 0
        self._llm = llm
        self._lines = enumerate(line for line in lines if line.strip())
        self._answers = answers
        self._source = source
        self._window = 2 * llm.engine.config.scheduler.max_num_seqs
        self._defaults = llm.default_sampling_params()
        self._seen: set[str] = set()
        self._ready: dict[int, bytes] = {}
        self._served: dict[str, tuple[int, str, Kind]] = {}

    def skip(self, done: list[str | None], target: Path) -> None:
        """Pass over the lines that have answers, and check that the answers are theirs."""
        for number, answered in enumerate(done):
            _, line = next(self._lines, (number, None))
            if line is None:
                raise ConfigError(
                    f"{target}: has {len(done)} answers for the {number} lines of {self._source}: "
                    "it belongs to another input; name a new file"
                )
            asked = self._custom_id(_parse(line))
            if asked != answered:
                raise ConfigError(
                    f"{target}: answer {number} is for custom_id {answered!r:.80}, but "
                    f"{self._source} has {asked!r:.80} there: it belongs to another input; "
                    "name a new file"
                )
            if asked is not None:
                self._seen.add(asked)
        self.num_written = len(done)

    def requests(self) -> Iterator[PreparedRequest | None]:
        """Yield the requests of the good lines, None while too many wait; answer the bad ones."""
        while True:
            self._write_ready()
            # what has ended behind a slow line counts too, or memory would have no bound
            if len(self._served) + len(self._ready) >= self._window:
                yield None
                continue
            number, line = next(self._lines, (0, None))
            if line is None:
                return
            try:
                prepared = self._prepare(number, line)
            except RequestError as error:
                self._answer(number, self._custom_id(_parse(line)), 400, error_object(str(error)))
                continue
            yield prepared

    def _prepare(self, number: int, line: bytes) -> PreparedRequest:
        entry = _parse(line)
        custom_id = self._custom_id(entry)
        if isinstance(entry, str):
            raise RequestError(entry)
        missing = [name for name in LINE_FIELDS if name not in entry]
        if missing:
            raise RequestError(f"line {number + 1}: the field {missing[0]} is missing")
        if custom_id is None:
            raise RequestError(f"custom_id is {entry['custom_id']!r:.80}; it must be text")
        if custom_id in self._seen:
            raise RequestError(f"custom_id {custom_id!r:.80} is there twice; each must be unique")
        self._seen.add(custom_id)
        unknown = [name for name in entry if name not in LINE_FIELDS]
        if unknown:
            raise RequestError(f"field {unknown[0]!r:.80} is unknown; use {', '.join(LINE_FIELDS)}")
        if entry["method"] != "POST":
            raise RequestError(f"method is {entry['method']!r:.80}; it must be 'POST'")
        if not isinstance(entry["body"], dict) or not isinstance(entry["url"], str):
            raise RequestError("body must be an object, and url text")
        asked = read_body(entry["url"], entry["body"], self._llm.requests, self._defaults)
        prepared = self._llm.prepare(
            asked.prompt, asked.sampling, index=number, priority=asked.priority
        )
        self._served[prepared.request.request_id] = (number, custom_id, asked.kind)
        return prepared

    def take(self, output: RequestOutput) -> None:
        """Answer the line of a request that has finished, and write what is due."""
        number, custom_id, kind = self._served.pop(output.request_id)
        error = next((o.error for o in output.outputs if o.finish_reason == "error"), None)
        if error is not None and output.metrics.e2e_s is None:  # the engine refused it
            self._answer(number, custom_id, 400, error_object(error))
        elif error is not None:
            self._answer(number, custom_id, 500, error_object(error, "server_error"))
        else:
            prefix = "cmpl" if kind == "completion" else "chatcmpl"
            body = response_object(
                output,
                kind,
                model=self._llm.model,
                response_id=f"{prefix}-{number}",
                created=int(time.time()),
                tokenizer=self._llm.tokenizer,
            )
            self._answer(number, custom_id, 200, body)
        self._write_ready()

    def _answer(
        self, number: int, custom_id: str | None, status: int, body: dict[str, Any]
    ) -> None:
        self.num_failed += status != 200
        answer = {
            "id": f"batch_req_{number}",
            "custom_id": custom_id,
            "response": {"status_code": status, "request_id": f"request-{number}", "body": body},
            "error": None,
        }
        self._ready[number] = json.dumps(answer).encode() + b"\n"

    def _write_ready(self) -> None:
        while self.num_written in self._ready:
            self._answers.write(self._ready.pop(self.num_written))
            self._answers.flush()
            self.num_written += 1

    @staticmethod
    def _custom_id(entry: dict[str, Any] | str) -> str | None:
        found = entry.get("custom_id") if isinstance(entry, dict) else None
        return found if isinstance(found, str) else None


def _parse(line: bytes) -> dict[str, Any] | str:
    """Return the object in a line, or what is wrong with it."""
    try:
        entry = json.loads(line)
    except (ValueError, RecursionError) as error:
        return f"not JSON: {error}"
    return entry if isinstance(entry, dict) else "not a JSON object"


def _read_done(answers: IO[bytes], target: Path) -> tuple[list[str | None], int]:
    """Return the custom_ids of the answers that are there, and how many bytes these are.

    A last line without an end is what a kill leaves: it counts for nothing. ConfigError for what is
    no output of a batch; nothing is changed.
    """
    answers.seek(0)
    done: list[str | None] = []
    num_bytes = 0
    for number, line in enumerate(answers):
        if not line.endswith(b"\n") and _may_be_torn(line):
            break
        entry = _parse(line)
        if isinstance(entry, str) or not _is_answer(entry, number) or not line.endswith(b"\n"):
            raise ConfigError(
                f"{target}: line {number + 1} is no answer of a batch; name a new file"
            )
        done.append(entry["custom_id"])
        num_bytes += len(line)
    return done, num_bytes


def _is_answer(entry: dict[str, Any], number: int) -> bool:
    return (
        entry.get("id") == f"batch_req_{number}"
        and "response" in entry
        and isinstance(entry.get("custom_id", 0), str | None)
    )


def _may_be_torn(line: bytes) -> bool:
    """Whether a line without an end begins like an answer: else it is not ours to cut."""
    start = b'{"id": "batch_req_'
    return line.startswith(start) or start.startswith(line)


def _lock(answers: IO[bytes], target: Path) -> None:
    try:
        fcntl.flock(answers, fcntl.LOCK_EX | fcntl.LOCK_NB)  # freed when the process ends
    except OSError as error:
        raise ConfigError(f"{target}: another run is writing it; wait, or name another") from error


def _open(path: Path, mode: str) -> IO[bytes]:
    try:
        return open(path, mode)
    except OSError as error:
        raise ConfigError(f"{path}: cannot be opened ({error.strerror})") from error


def _count_lines(path: Path) -> int:
    """Return how many lines there are that are not blank."""
    with path.open("rb") as lines:
        return sum(1 for line in lines if line.strip())
