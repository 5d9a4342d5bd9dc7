"""The command line: flags to options, text and figures to the terminal; it decides nothing else.

What a verb needs is imported inside it, so that --help takes no time. stdout has the answer and
nothing else; notes, progress and errors go to stderr. Exit codes: 0, 1 (an output ended with an
error or cannot be written, or a fault of ours), 2 (usage, request), 3 (model), 130 (interrupted),
141 (pipe closed).
"""

from __future__ import annotations

import errno
import logging
import os
import sys
import traceback
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, NoReturn

try:
    import typer

    from moe_serve.errors import CheckpointError, ConfigError, MoeServeError, RequestError
    from moe_serve.openmp import wait_shortly
    from moe_serve.verbs import (
        PROGRAM,
        AsJson,
        Debug,
        Limit,
        PromptFile,
        Prompts,
        PromptSource,
        TemplateFile,
        UsageFault,
        app,
        bench,
        config_of,
        drop_stdout,
        load,
        not_utf8,
        note,
        note_lines,
        print_json,
        printable,
        show_run,
        utf8_stdin,
        verb_of,
    )
except KeyboardInterrupt:  # before there is a command whose `run` could be quiet about it
    raise SystemExit(130) from None

if TYPE_CHECKING:
    from moe_serve.llm import LLM
    from moe_serve.types import RequestOutput, SamplingParams

FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EIO)
NOT_OF_CHAT = frozenset({"n", "logprobs"})


def _print_version(is_asked: bool) -> None:
    if is_asked:
        import moe_serve

        print(f"{PROGRAM} {moe_serve.__version__}")
        raise typer.Exit


Version = Annotated[
    bool,
    typer.Option("--version", help="Show the version.", is_eager=True, callback=_print_version),
]


@app.callback()
def _root(debug: Debug = False, version: Version = False) -> None:
    """`main` looks for --debug itself, so that it may stand before or after the verb."""


@verb_of(app)
def generate(
    prompt: Prompts = None,
    prompts: PromptFile = None,
    limit: Limit = None,
    chat_template: TemplateFile = None,
    as_json: AsJson = False,
    *,
    sampling: dict[str, Any],
    engine: dict[str, Any],
) -> None:
    """Continue prompts: those named, those in a file, or what comes on stdin."""
    given = PromptSource.read(prompt, prompts, limit)
    llm, params = load(engine, sampling, chat_template)
    if not llm.has_chat_template and given.has_messages:
        _note_no_template(llm)
    if "logprobs" in sampling and not as_json:
        note("--logprobs shows nothing without --json")
    listed = given.prompts(llm)
    if len(listed) == 1 and params.n == 1 and not as_json:
        outputs = [_print_stream(llm, listed[0], params)]
    else:
        outputs = llm.generate(listed, params, priority=given.priorities)
        print_json(_json_report(llm, outputs)) if as_json else _print_texts(outputs)
    show_run(llm, outputs)


@verb_of(app, without=NOT_OF_CHAT)
def chat(
    chat_template: TemplateFile = None, *, sampling: dict[str, Any], engine: dict[str, Any]
) -> None:
    """Talk to a model: a line is a message; /reset begins anew, /exit ends.

    A model without a chat template continues the text of the conversation instead.
    """
    if sys.stdin is None:
        raise ConfigError("stdin is closed; chat reads its messages there")
    llm, params = load(engine, sampling, chat_template)
    if not llm.has_chat_template:
        _note_no_template(llm)
    history: list[dict[str, str]] = []
    num_failed = 0
    for line in _chat_lines():
        if line == "/exit":
            break
        if line == "/reset":
            history.clear()
        elif line.startswith("/"):
            note(f"no command {line.split()[0]!r} (there are: /reset, /exit)")
        elif line.strip():
            num_failed += not _answer(llm, params, history, line)
    if num_failed and not sys.stdin.isatty():
        raise typer.Exit(1)


@verb_of(app)
def batch(
    source: Annotated[Path, typer.Argument(metavar="IN.jsonl")],
    target: Annotated[Path, typer.Argument(metavar="OUT.jsonl")],
    chat_template: TemplateFile = None,
    *,
    engine: dict[str, Any],
) -> None:
    """Answer a file of requests in OpenAI's batch form, going on where it was stopped.

    A line that fails has an answer that says why (its status is not 200) and does not change the
    exit code; the closing line tells how many did.
    """
    from moe_serve.batch import finished_report, run_batch  # imports torch

    report = finished_report(config_of(engine), source, target)  # before the model is read
    if report is not None:
        note(
            f"{target} was complete: {report.num_lines} answers, {report.num_failed} of them to "
            "lines that failed"
        )
        return
    llm, _ = load(engine, {}, chat_template)
    report = run_batch(llm, source, target)
    note(
        f"{report.num_lines} answers in {target}: {report.num_resumed} were there before, "
        f"{report.num_failed} are to lines that failed"
    )
    show_run(llm, [])


@verb_of(bench)
def latency(
    input_len: Annotated[int, typer.Option(help="Tokens of each prompt.")] = 32,
    output_len: Annotated[int, typer.Option(help="Tokens of each output.")] = 128,
    batch_size: Annotated[int, typer.Option(help="Prompts at once.")] = 8,
    num_iters: Annotated[int, typer.Option(help="Rounds that count.")] = 5,
    as_json: AsJson = False,
    *,
    engine: dict[str, Any],
) -> None:
    """How long one batch of random prompts takes."""
    from moe_serve.bench import bench_latency  # imports torch

    llm, _ = load(engine, {}, None)
    rows = bench_latency(
        llm,
        input_len=input_len,
        output_len=output_len,
        batch_size=batch_size,
        num_iters=num_iters,
    )
    _print_bench(llm, rows, as_json)


@verb_of(bench)
def throughput(
    input_len: Annotated[int, typer.Option(help="Tokens of each prompt.")] = 128,
    output_len: Annotated[int, typer.Option(help="Tokens of each output.")] = 64,
    num_prompts: Annotated[int, typer.Option(help="Prompts, all given at once.")] = 64,
    num_iters: Annotated[int, typer.Option(help="Rounds that count.")] = 5,
    as_json: AsJson = False,
    *,
    engine: dict[str, Any],
) -> None:
    """How many random prompts are served a second."""
    from moe_serve.bench import bench_throughput  # imports torch

    llm, _ = load(engine, {}, None)
    rows = bench_throughput(
        llm,
        input_len=input_len,
        output_len=output_len,
        num_prompts=num_prompts,
        num_iters=num_iters,
    )
    _print_bench(llm, rows, as_json)


@verb_of(app)
def doctor(as_json: AsJson = False, *, runtime: dict[str, Any]) -> None:
    """Say which kernels run here and why, and how fast memory is."""
    from moe_serve.doctor import examine, lines_of  # imports torch

    report = examine(config_of(runtime).runtime)
    if as_json:
        print_json(report)
    else:
        for line in lines_of(report):
            print(printable(line))


import moe_serve.load_verb  # noqa: E402 - its verb comes after those above
import moe_serve.plan_verb  # noqa: E402 - and so for these
import moe_serve.serve_verb  # noqa: E402
import moe_serve.study_verbs  # noqa: E402, F401


def _print_stream(llm: LLM, prompt: Any, params: SamplingParams) -> RequestOutput:
    """Print an output's text while it comes; return the whole."""
    num_shown = 0
    output: RequestOutput | None = None
    for output in llm.stream(prompt, params):
        text = output.outputs[0].text
        sys.stdout.write(text[num_shown:])
        sys.stdout.flush()
        num_shown = len(text)
    assert output is not None
    print(flush=True)
    return output


def _print_texts(outputs: Sequence[RequestOutput]) -> None:
    for index, output in enumerate(outputs):
        for completion in output.outputs:
            of_n = f", output {completion.index}" if len(output.outputs) > 1 else ""
            print(f"=== prompt {index}{of_n} ({completion.finish_reason}) ===")
            print(completion.text)


def _json_report(llm: LLM, outputs: Sequence[RequestOutput]) -> dict[str, Any]:
    """Return the form of `generate --json`: an entry for each output, named by its prompt's place.

    With n > 1 the n outputs of a prompt follow each other, all with its index.
    """
    assert llm.last_run is not None
    stats = llm.engine.stats()
    return {
        "schema": 1,
        "model": llm.model,
        "numerics_id": llm.engine.numerics_id,
        "outputs": [
            {
                "index": index,
                "prompt_token_ids": list(output.prompt_token_ids),
                "token_ids": list(completion.token_ids),
                "text": completion.text,
                "finish_reason": completion.finish_reason,
                "logprobs": None
                if completion.logprobs is None
                else [[entry.token_id, entry.logprob] for entry in completion.logprobs],
            }
            for index, output in enumerate(outputs)
            for completion in output.outputs
        ],
        "metrics": llm.last_run.to_json(),
        "experts": dict(stats.experts),
        "ranks": list(stats.ranks),
    }


def _print_bench(llm: LLM, rows: Sequence[Any], as_json: bool) -> None:
    from moe_serve.bench import bench_report

    if as_json:
        print_json(bench_report(llm, f"{PROGRAM} {' '.join(sys.argv[1:])}", rows))
    else:
        for row in rows:
            print(row.line())
    show_run(llm, [])


def _chat_lines() -> Iterator[str]:
    """Yield what the user types, or the lines of stdin when nobody types."""
    if not sys.stdin.isatty():
        try:
            for line in utf8_stdin():
                yield line.rstrip("\n")
        except UnicodeDecodeError as error:
            raise not_utf8(error) from error
        return
    import readline  # noqa: F401  # its import gives input() a history and the arrow keys

    while True:
        try:
            yield input("> ")
        except EOFError:
            print()
            return


def _answer(llm: LLM, params: SamplingParams, history: list[dict[str, str]], line: str) -> bool:
    """Print the answer to one message; the history grows by both, or by nothing on an error.

    Return False on an error.
    """
    messages = [*history, {"role": "user", "content": line}]
    try:
        if llm.has_chat_template:
            prompt: Any = llm.requests.chat_prompt(messages)
        else:
            prompt = "\n".join(message["content"] for message in messages)
        answer = _print_stream(llm, prompt, params).outputs[0]
    except RequestError as error:
        note(f"error: {error} (/reset begins anew)")
        return False
    except KeyboardInterrupt:
        if not sys.stdin.isatty():
            raise
        print()  # the answer ends here, the conversation goes on
        return True
    if answer.finish_reason == "error":
        note(f"error: {answer.error} (the conversation is as it was before)")
        return False
    history[:] = [*messages, {"role": "assistant", "content": answer.text}]
    show_run(llm, [])
    return True


def _note_no_template(llm: LLM) -> None:
    note(f"{llm.model} has no chat template: it continues the text (see --chat-template)")


def run(arguments: Sequence[str]) -> int:
    """Run one command and return its exit code; errors are one line on stderr."""
    logging.basicConfig(level=logging.WARNING, format=f"{PROGRAM}: %(levelname)s: %(message)s")
    arguments = list(arguments) or ["--help"]
    flags = arguments[: arguments.index("--")] if "--" in arguments else arguments
    is_debug = "--debug" in flags
    if sys.stdout is None:
        note("error: stdout is closed; send it to a file, or to /dev/null")
        return 2
    try:
        code = app(arguments, prog_name=PROGRAM, standalone_mode=False)
        sys.stdout.flush()
        return code if isinstance(code, int) else 0
    except (KeyboardInterrupt, typer.Abort):
        return 130
    except BrokenPipeError:
        return drop_stdout()
    except Exception as error:
        if is_debug:
            traceback.print_exc()
        if isinstance(error, OSError) and error.filename is None and error.errno in FULL:
            # what is written by name names itself: the output of a batch does
            note(f"error: stdout cannot be written: {error.strerror}")
            drop_stdout()
            return 1
        return _report(error, is_debug)


def _report(error: Exception, is_debug: bool) -> int:
    if isinstance(error, MoeServeError):
        message, code = str(error), error.exit_code
    elif isinstance(error, UsageFault):
        message, code = error.format_message(), 2  # type: ignore[attr-defined]
    else:
        message, code = f"a fault in {PROGRAM}: {type(error).__name__}: {error}", 1
        message += "" if is_debug else " (--debug shows where)"
    if isinstance(error, CheckpointError):  # may list several problems, one a line
        note_lines(f"error: {message}")
    else:
        note(f"error: {message}")
    return code


def _open_standard_files() -> None:
    """Have 0, 1 and 2 be open: what is opened next would be taken for them by child processes."""
    for descriptor in range(3):
        try:
            os.fstat(descriptor)
        except OSError:
            os.open(os.devnull, os.O_RDWR)  # the system gives the lowest number that is free


def main() -> NoReturn:
    """The command `moe-serve`."""
    _open_standard_files()
    wait_shortly()
    sys.exit(run(sys.argv[1:]))
