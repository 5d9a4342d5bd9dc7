"""A file of requests to a file of answers, in OpenAI's batch form, line for line.

The output has the input's order although many lines are served at once. It is only appended to, a
whole line at a time: after a kill the next run continues behind the last whole line, and since a
line's seed comes from its number it gives what an uninterrupted run would have given. An answer's
id has marks of its line, of the options and of the engine, so that a run does not go on with others
in silence. Only `created`, the time of an answer, differs; how many tokens came from the prefix
cache, which depends on what ran beside a line, is not told.
"""

from __future__ import annotations

import fcntl
import hashlib
import json
import logging
import re
import time
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any, NamedTuple

from moe_serve.config import EngineConfig
from moe_serve.errors import ConfigError, MoeServeError, RequestError
from moe_serve.llm import LLM
from moe_serve.text.json_lines import read_line
from moe_serve.text.openai_form import BodyRequest, error_object, read_body, response_object
from moe_serve.text.openai_logprobs import TokenNames
from moe_serve.text.progress import progress_bar
from moe_serve.text.prompts import PreparedRequest
from moe_serve.types import RequestOutput

LINE_FIELDS = ("custom_id", "method", "url", "body")

logger = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class BatchReport:
    """num_lines: answers in the output now. num_resumed of them were there before this run, and
    num_failed of them all have a status other than 200."""

    num_lines: int
    num_resumed: int
    num_failed: int


class _Line(NamedTuple):
    """A line that is not blank: its number among these, from 0, and the file's, from 1."""

    number: int
    place: int
    data: bytes


class _Answered(NamedTuple):
    """What an answer that is there says of its line."""

    custom_id: str | None
    line_mark: str
    options_mark: str
    engine_mark: str
    is_failed: bool


def run_batch(
    llm: LLM, source: Path, target: Path, *, is_bar_shown: bool | None = None
) -> BatchReport:
    """Answer every line of `source` in `target`, continuing what is there.

    A bad line is answered with status 400. ConfigError: a file that cannot be used, a target that
    belongs to another source, model or engine, or that another run is writing; it is then as it
    was. MoeServeError: the target cannot be written; the answers that are there can be resumed.
    """
    _check_files(source, target)
    with _open(source, "rb") as lines, _open(target, "ab", buffering=0) as answers:
        _lock(answers, target)
        done, num_bytes = _read_done(target)
        numbered = _numbered(lines)
        options_mark = _options_mark(llm.config)
        _check_belongs(done, numbered, source, target, options_mark, _engine_mark(llm))
        job = _Job(llm, numbered, answers, source, target, done)
        answers.truncate(num_bytes)  # a torn last line goes, now that the file is ours
        num_lines = _count_lines(source)
        with progress_bar(num_lines, num_done=len(done), is_shown=is_bar_shown) as bar:
            for output in llm.serve(job.requests()):
                job.take(output)
                bar.advance(sum(len(o.token_ids) for o in output.outputs))
        return BatchReport(job.num_written, len(done), job.num_failed)


def finished_report(config: EngineConfig, source: Path, target: Path) -> BatchReport | None:
    """Return the report of a batch that has all its answers, or None: no model is needed for it.

    ConfigError as in `run_batch`, but for what only an engine can tell.
    """
    _check_files(source, target)
    if not target.is_file():
        return None
    done, num_bytes = _read_done(target)
    with _open(source, "rb") as lines:
        numbered = _numbered(lines)
        _check_belongs(done, numbered, source, target, _options_mark(config), None)
        if next(numbered, None) is not None or num_bytes != target.stat().st_size:
            return None
    return BatchReport(len(done), len(done), sum(answer.is_failed for answer in done))


class _Job:
    """One run's state: answers that wait for their turn, and how far the output is."""

    def __init__(
        self,
        llm: LLM,
        lines: Iterator[_Line],
        answers: IO[bytes],
        source: Path,
        target: Path,
        done: list[_Answered],
    ) -> None:
        self.num_written = len(done)
        self.num_failed = sum(answer.is_failed for answer in done)
        self._llm = llm
        self._lines = lines
        self._answers = answers
        self._source = source
        self._target = target
        self._run_marks = f"{_options_mark(llm.config)}_{_engine_mark(llm)}"
        self._window = 2 * llm.engine.config.scheduler.max_num_seqs
        self._defaults = llm.default_sampling_params()
        self._names = TokenNames(llm.tokenizer)
        self._seen = {answer.custom_id for answer in done if answer.custom_id is not None}
        self._has_warned_of_model = False
        self._ready: dict[int, bytes] = {}
        self._served: dict[str, tuple[_Line, str, BodyRequest]] = {}

    def requests(self) -> Iterator[PreparedRequest | None]:
        """Yield the requests of the good lines, None while too many wait; answer the bad ones."""
        while True:
            self._write_ready()
            # what has ended behind a slow line counts too, or memory would have no bound
            if len(self._served) + len(self._ready) >= self._window:
                yield None
                continue
            line = next(self._lines, None)
            if line is None:
                return
            entry = read_line(line.data)
            try:
                prepared = self._prepare(line, entry)
            except RequestError as error:
                self._answer(line, _custom_id(entry), 400, error_object(str(error)))
                continue
            except Exception as error:  # a fault of ours is one line's, not the whole job's
                logger.exception("%s:%d: a fault in making the request", self._source, line.place)
                message = f"a fault in making the request: {type(error).__name__}: {error}"
                self._answer(line, _custom_id(entry), 500, error_object(message, "server_error"))
                continue
            yield prepared

    def _prepare(self, line: _Line, entry: dict[str, Any] | str) -> PreparedRequest:
        if isinstance(entry, str):
            raise RequestError(f"line {line.place}: {entry}")
        custom_id = _custom_id(entry)
        missing = [name for name in LINE_FIELDS if name not in entry]
        if missing:
            raise RequestError(f"line {line.place}: the field {missing[0]} is missing")
        if custom_id is None:
            raise RequestError(
                f"line {line.place}: custom_id is {entry['custom_id']!r:.80}; it must be text"
            )
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
            asked.prompt, asked.sampling, index=line.number, priority=asked.priority
        )
        self._warn_of_model(line, entry["body"].get("model"))
        self._served[prepared.request.request_id] = (line, custom_id, asked)
        return prepared

    def _warn_of_model(self, line: _Line, asked: str | None) -> None:
        """Say once that lines ask for another model: files made for other servers do."""
        loaded = self._llm.model
        if asked in (None, loaded, Path(loaded).name) or self._has_warned_of_model:
            return
        self._has_warned_of_model = True
        logger.warning(
            "%s:%d asks for model %.80r; every line is answered by %s",
            self._source,
            line.place,
            asked,
            loaded,
        )

    def take(self, output: RequestOutput) -> None:
        """Answer the line of a request that has finished, and write what is due."""
        line, custom_id, asked = self._served.pop(output.request_id)
        failed = next((o for o in output.outputs if o.finish_reason == "error"), None)
        if failed is not None and failed.is_refused:
            self._answer(line, custom_id, 400, error_object(asked.as_sent(str(failed.error))))
        elif failed is not None:
            self._answer(line, custom_id, 500, error_object(str(failed.error), "server_error"))
        else:
            prefix = "cmpl" if asked.kind == "completion" else "chatcmpl"
            body = response_object(
                [output],
                asked,
                model=self._llm.model,
                response_id=f"{prefix}-{line.number}",
                created=int(time.time()),
                names=self._names,
            )
            self._answer(line, custom_id, 200, body)
        self._write_ready()

    def _answer(
        self, line: _Line, custom_id: str | None, status: int, body: dict[str, Any]
    ) -> None:
        self.num_failed += status != 200
        number = line.number
        answer = {
            "id": f"batch_req_{number}_{_mark(line.data.strip())}_{self._run_marks}",
            "custom_id": custom_id,
            "response": {"status_code": status, "request_id": f"request-{number}", "body": body},
            "error": None,
        }
        self._ready[number] = json.dumps(answer).encode() + b"\n"

    def _write_ready(self) -> None:
        while self.num_written in self._ready:
            rest = self._ready.pop(self.num_written)
            try:
                while rest:  # a file without a buffer may take a part
                    rest = rest[self._answers.write(rest) :]
            except OSError as error:
                raise MoeServeError(
                    f"{self._target}: cannot be written ({error.strerror}); the "
                    f"{self.num_written} answers in it stay, and the same command goes on behind "
                    "them"
                ) from error
            self.num_written += 1


def _custom_id(entry: dict[str, Any] | str) -> str | None:
    found = entry.get("custom_id") if isinstance(entry, dict) else None
    return found if isinstance(found, str) else None


def _check_files(source: Path, target: Path) -> None:
    for path in (source, target):
        if str(path) == "-":
            raise ConfigError("- is no file: a batch needs names, for it must find its place again")
    if not source.is_file():
        raise ConfigError(f"{source}: no such file")
    if target.exists() and not target.is_file():
        raise ConfigError(f"{target}: not a regular file; name another for the output")
    if target.exists() and source.samefile(target):
        raise ConfigError(f"{target}: is the input; name another file for the output")


def _check_belongs(
    done: list[_Answered],
    lines: Iterator[_Line],
    source: Path,
    target: Path,
    options_mark: str,
    engine_mark: str | None,
) -> None:
    """Pass over the lines that have answers, and check that the answers are theirs, and ours.

    engine_mark: None where there is no engine to compare with.
    """
    for number, answer in enumerate(done):
        line = next(lines, None)
        if line is None:
            raise ConfigError(
                f"{target}: has {len(done)} answers for the {number} lines of {source}: "
                "it belongs to another input; name a new file"
            )
        asked = _custom_id(read_line(line.data))
        where = f"{target}: answer {number + 1}"
        if asked != answer.custom_id:
            raise ConfigError(
                f"{where} is for custom_id {answer.custom_id!r:.80}, but {source}:{line.place} has "
                f"{asked!r:.80} there: it belongs to another input; name a new file"
            )
        if answer.line_mark != _mark(line.data.strip()):
            raise ConfigError(
                f"{where}: {source}:{line.place} has changed since it was given; name a new file"
            )
        if answer.options_mark != options_mark:
            raise ConfigError(
                f"{where} (to {source}:{line.place}) was given with another model, revision, "
                "tokenizer, dtype, load_format, max_model_len or seed; use the same, or name a new "
                "file"
            )
        if engine_mark is not None and answer.engine_mark != engine_mark:
            raise ConfigError(
                f"{where} (to {source}:{line.place}) was given with another chat template or by "
                "other kernels; use the same, or name a new file"
            )


def _options_mark(config: EngineConfig) -> str:
    """Return a mark of the options that answers depend on."""
    return _mark(repr((config.weights, config.runtime.seed)).encode())


def _engine_mark(llm: LLM) -> str:
    """Return a mark of what else answers depend on."""
    template = llm.requests.chat_template
    source = None if template is None else template.source
    return _mark(repr((llm.engine.numerics_id, source)).encode())


def _mark(data: bytes) -> str:
    return hashlib.blake2b(data, digest_size=4).hexdigest()


def _read_done(target: Path) -> tuple[list[_Answered], int]:
    """Return what the answers that are there say, and how many bytes these are.

    A last line without an end is what a kill leaves: it counts for nothing. ConfigError for what is
    no output of a batch; nothing is changed.
    """
    done: list[_Answered] = []
    num_bytes = 0
    with _open(target, "rb") as answers:
        for number, line in enumerate(answers):
            is_whole = line.endswith(b"\n")
            if not is_whole and _may_be_torn(line):
                break
            answered = _answered(line, number)
            if answered is None or not is_whole:
                raise ConfigError(
                    f"{target}: line {number + 1} is no answer of a batch; name a new file"
                )
            done.append(answered)
            num_bytes += len(line)
    return done, num_bytes


def _answered(line: bytes, number: int) -> _Answered | None:
    """Return what answer `number` says, or None if it is none."""
    entry = read_line(line)
    if isinstance(entry, str):
        return None
    mark = "([0-9a-f]{8})"
    marks = re.fullmatch(f"batch_req_{number}_{mark}_{mark}_{mark}", str(entry.get("id")))
    response, custom_id = entry.get("response"), entry.get("custom_id", 0)
    if marks is None or not isinstance(response, dict) or not isinstance(custom_id, str | None):
        return None
    line_mark, options_mark, engine_mark = marks.groups()
    is_failed = response.get("status_code") != 200
    return _Answered(custom_id, line_mark, options_mark, engine_mark, is_failed)


def _may_be_torn(line: bytes) -> bool:
    """Whether a line without an end begins like an answer: else it is not ours to cut."""
    start = b'{"id": "batch_req_'
    return line.startswith(start) or start.startswith(line)


def _lock(answers: IO[bytes], target: Path) -> None:
    try:
        fcntl.flock(answers, fcntl.LOCK_EX | fcntl.LOCK_NB)  # freed when the process ends
    except OSError as error:
        raise ConfigError(f"{target}: another run is writing it; wait, or name another") from error


def _open(path: Path, mode: str, buffering: int = -1) -> IO[bytes]:
    try:
        return open(path, mode, buffering)
    except OSError as error:
        raise ConfigError(f"{path}: cannot be opened ({error.strerror})") from error


def _numbered(lines: Iterable[bytes]) -> Iterator[_Line]:
    number = 0
    for place, line in enumerate(lines, 1):
        if line.strip():
            yield _Line(number, place, line)
            number += 1


def _count_lines(path: Path) -> int:
    """Return how many lines there are that are not blank."""
    with path.open("rb") as lines:
        return sum(1 for line in lines if line.strip())
