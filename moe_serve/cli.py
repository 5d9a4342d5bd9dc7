"""The command line: flags to options, text and figures to the terminal; it decides nothing else.

What a verb needs is imported inside it, so that --help takes no time. stdout has the answer and
nothing else; notes, progress and errors go to stderr. Exit codes: 0, 1 (an output ended with an
error or cannot be written, or a fault of ours), 2 (usage, request), 3 (model), 130 (interrupted),
141 (pipe closed).
"""

from __future__ import annotations

import errno
import inspect
import io
import json
import logging
import os
import sys
import traceback
from collections.abc import Callable, Container, Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, NoReturn, TextIO

try:
    import typer

    from moe_serve import plugin
    from moe_serve.config import EngineConfig, OptionField, option_fields, resolve_options
    from moe_serve.errors import CheckpointError, ConfigError, MoeServeError, RequestError
    from moe_serve.openmp import wait_shortly
except KeyboardInterrupt:  # before there is a command whose `run` could be quiet about it
    raise SystemExit(130) from None

if TYPE_CHECKING:
    from moe_serve.llm import LLM
    from moe_serve.types import RequestOutput, SamplingParams

PROGRAM = "moe-serve"
FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EIO)
DEFAULT_MAX_TOKENS = 128
EXAMPLE = f'{PROGRAM} generate "Once upon a time, there was a little girl named Lily."'

# flag, type, help; what is not given is the model's own generation_config, or the neutral value
SAMPLING_FLAGS: tuple[tuple[str, Any, str], ...] = (
    ("max_tokens", int, f"Most tokens of an output. [default: {DEFAULT_MAX_TOKENS}]"),
    ("min_tokens", int, "No end before so many tokens. [default: 0]"),
    ("temperature", float, "0 is greedy. [default: the model's, or 1]"),
    (
        "top_p",
        float,
        "How much probability the tokens to choose from have together. "
        "[default: the model's, or 1]",
    ),
    ("top_k", int, "How many tokens to choose from; 0: all. [default: the model's, or 0]"),
    (
        "min_p",
        float,
        "Least probability of a token, as a share of the best one's. [default: the model's, or 0]",
    ),
    ("n", int, "Outputs of each prompt. [default: 1]"),
    (
        "repetition_penalty",
        float,
        "Above 1: what was there becomes less likely. [default: the model's, or 1]",
    ),
    ("presence_penalty", float, "Taken from the logits of what was there. [default: 0]"),
    ("frequency_penalty", float, "The same, for each time it was there. [default: 0]"),
    ("stop", list[str], "A text that ends an output; may be given again. [default: none]"),
    ("ignore_eos", bool, "Go on after the end token. [default: no]"),
    (
        "logprobs",
        int,
        "With --json: [id, logprob] of each token that was chosen. The number, 0 to 20, is how "
        "many of the best are kept too, which only Python's API shows. [default: none]",
    ),
)
NOT_OF_CHAT = frozenset({"n", "logprobs"})
# the engine's options that say what computes
RUNTIME_FLAGS = ("kernels", "isa", "threads", "config")

# of click, or of the copy inside typer
_UsageFault: type[Exception] = next(
    kind for kind in typer.BadParameter.__mro__ if kind.__name__ == "ClickException"
)

app = typer.Typer(
    name=PROGRAM,
    help="Run mixture-of-experts language models. With no --model, a small one is at hand.",
    rich_markup_mode=None,
    add_completion=False,
    pretty_exceptions_enable=False,
)
bench = typer.Typer(help="Measure how fast a model runs here.", rich_markup_mode=None)
app.add_typer(bench, name="bench")

Debug = Annotated[bool, typer.Option("--debug", help="Show where an error came from.")]


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


def _engine_parameter(leaf: OptionField) -> inspect.Parameter:
    flag = f"--{leaf.name.replace('_', '-')}"
    if leaf.kind is bool:
        flag = f"{flag}/--no-{flag[2:]}"
    known = f" One of {', '.join(plugin.names(leaf.package))}." if leaf.package else ""
    default = "" if leaf.default is None else f" [default: {leaf.default}]"
    return _option(leaf.name, leaf.kind, flag, leaf.help + known + default)


def _option(name: str, kind: Any, flag: str, text: str) -> inspect.Parameter:
    """Return a parameter that is None when its flag is not given."""
    option = typer.Option(flag, help=text, show_default=False)
    return inspect.Parameter(
        name,
        inspect.Parameter.KEYWORD_ONLY,
        default=None,
        annotation=Annotated[kind | None, option],
    )


def _engine_parameters() -> Iterator[inspect.Parameter]:
    for leaf in option_fields():
        yield _engine_parameter(leaf)
    yield _option("config", Path, "--config", "A TOML file of these options.")


def _sampling_parameters(without: Container[str]) -> Iterator[inspect.Parameter]:
    for name, kind, text in SAMPLING_FLAGS:
        if name not in without:
            yield _option(name, kind, f"--{name.replace('_', '-')}", text)


def _verb(
    group: typer.Typer, without: Container[str] = ()
) -> Callable[[Callable[..., None]], Callable[..., None]]:
    """Add a verb; its parameters `engine`, `runtime`, `sampling` stand for all flags of their kind.

    without: sampling flags that the verb has no use for.
    """

    def add(function: Callable[..., None]) -> Callable[..., None]:
        generated = {
            "engine": list(_engine_parameters()),
            "runtime": [p for p in _engine_parameters() if p.name in RUNTIME_FLAGS],
            "sampling": list(_sampling_parameters(without)),
        }
        own = inspect.signature(function, eval_str=True).parameters
        parameters: list[inspect.Parameter] = []
        for name, parameter in own.items():
            parameters.extend(generated.get(name, [parameter]))
        parameters.append(
            inspect.Parameter(
                "debug", inspect.Parameter.KEYWORD_ONLY, default=False, annotation=Debug
            )
        )

        def verb(**given: Any) -> None:
            del given["debug"]
            for name in generated.keys() & own.keys():
                flags = {p.name: given.pop(p.name) for p in generated[name]}
                given[name] = {key: value for key, value in flags.items() if value is not None}
            try:
                function(**given)
            except BrokenPipeError:
                raise typer.Exit(_drop_stdout()) from None

        verb.__signature__ = inspect.Signature(  # type: ignore[attr-defined]
            [p.replace(kind=inspect.Parameter.KEYWORD_ONLY) for p in parameters]
        )
        verb.__annotations__ = {p.name: p.annotation for p in parameters}
        verb.__doc__ = function.__doc__
        group.command(function.__name__)(verb)
        return function

    return add


Prompts = Annotated[list[str] | None, typer.Argument(metavar="PROMPT", show_default=False)]
PromptFile = Annotated[
    Path | None, typer.Option("--prompts", help="JSON lines: prompt, prompt_token_ids or messages.")
]
Limit = Annotated[int | None, typer.Option("--limit", min=1, help="Only the first so many lines.")]
TemplateFile = Annotated[
    Path | None, typer.Option("--chat-template", help="A jinja file instead of the model's own.")
]
AsJson = Annotated[bool, typer.Option("--json", help="Print one JSON object and nothing else.")]


@_verb(app)
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
    from moe_serve.text.prompt_file import prompt_of, read_prompt_file  # imports torch

    if prompts is None:
        if limit is not None:
            raise ConfigError("--limit is for --prompts; without a file it has no effect")
        entries: list[dict[str, Any]] = [{"prompt": text} for text in prompt or _stdin_prompt()]
        places = [f"prompt {index}" for index in range(len(entries))]
    elif prompt:
        raise ConfigError("prompts are named and --prompts gives a file of them; use one of both")
    else:
        lines = read_prompt_file(prompts, limit)
        entries, places = [line.entry for line in lines], [line.where for line in lines]
    llm, params = _load(engine, sampling, chat_template)
    if not llm.has_chat_template and any("messages" in entry for entry in entries):
        _note_no_template(llm)
    if "logprobs" in sampling and not as_json:
        _note("--logprobs shows nothing without --json")
    listed = []
    for place, entry in zip(places, entries, strict=True):
        try:
            listed.append(prompt_of(entry, llm.requests))
        except RequestError as error:
            raise type(error)(f"{place}: {error}") from error
    if len(entries) == 1 and params.n == 1 and not as_json:
        outputs = [_print_stream(llm, listed[0], params)]
    else:
        priorities = [entry.get("priority", 0) for entry in entries]
        outputs = llm.generate(listed, params, priority=priorities)
        _print_json(_json_report(llm, outputs)) if as_json else _print_texts(outputs)
    _close(llm, outputs)


@_verb(app, without=NOT_OF_CHAT)
def chat(
    chat_template: TemplateFile = None, *, sampling: dict[str, Any], engine: dict[str, Any]
) -> None:
    """Talk to a model: a line is a message; /reset begins anew, /exit ends.

    A model without a chat template continues the text of the conversation instead.
    """
    if sys.stdin is None:
        raise ConfigError("stdin is closed; chat reads its messages there")
    llm, params = _load(engine, sampling, chat_template)
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
            _note(f"no command {line.split()[0]!r} (there are: /reset, /exit)")
        elif line.strip():
            num_failed += not _answer(llm, params, history, line)
    if num_failed and not sys.stdin.isatty():
        raise typer.Exit(1)


@_verb(app)
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

    report = finished_report(_config(engine), source, target)  # before the model is read
    if report is not None:
        _note(
            f"{target} was complete: {report.num_lines} answers, {report.num_failed} of them to "
            "lines that failed"
        )
        return
    llm, _ = _load(engine, {}, chat_template)
    report = run_batch(llm, source, target)
    _note(
        f"{report.num_lines} answers in {target}: {report.num_resumed} were there before, "
        f"{report.num_failed} are to lines that failed"
    )
    _close(llm, [])


@_verb(bench)
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

    llm, _ = _load(engine, {}, None)
    rows = bench_latency(
        llm,
        input_len=input_len,
        output_len=output_len,
        batch_size=batch_size,
        num_iters=num_iters,
    )
    _print_bench(llm, rows, as_json)


@_verb(bench)
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

    llm, _ = _load(engine, {}, None)
    rows = bench_throughput(
        llm,
        input_len=input_len,
        output_len=output_len,
        num_prompts=num_prompts,
        num_iters=num_iters,
    )
    _print_bench(llm, rows, as_json)


@_verb(app)
def doctor(as_json: AsJson = False, *, runtime: dict[str, Any]) -> None:
    """Say which kernels run here and why, and how fast memory is."""
    from moe_serve.doctor import examine, lines_of  # imports torch

    report = examine(_config(runtime).runtime)
    if as_json:
        _print_json(report)
    else:
        for line in lines_of(report):
            print(printable(line))


def _load(
    engine: Mapping[str, Any], sampling: Mapping[str, Any], chat_template: Path | None
) -> tuple[LLM, SamplingParams]:
    """Return the model and what its outputs shall be, with all flags checked before it is read."""
    import dataclasses

    from moe_serve.llm import LLM  # imports torch
    from moe_serve.types import SamplingParams

    given = {"max_tokens": DEFAULT_MAX_TOKENS, **sampling}
    SamplingParams.from_mapping(given)
    llm = LLM(config=_config(engine), chat_template=chat_template)
    return llm, dataclasses.replace(llm.default_sampling_params(), **given)


def _config(engine: Mapping[str, Any]) -> EngineConfig:
    flags = dict(engine)
    return EngineConfig.from_options(resolve_options(flags, file=flags.pop("config", None)))


def _stdin_prompt() -> list[str]:
    if sys.stdin is None or sys.stdin.isatty():
        raise ConfigError(f"no prompt. Try: {EXAMPLE}")
    try:
        text = _utf8_stdin().read().removesuffix("\n")
    except UnicodeDecodeError as error:
        raise _not_utf8(error) from error
    if not text:
        raise ConfigError(f"no prompt, and nothing on stdin. Try: {EXAMPLE}")
    return [text]


def _utf8_stdin() -> TextIO:
    """Return stdin, strict whatever the locale says."""
    if isinstance(sys.stdin, io.TextIOWrapper):
        sys.stdin.reconfigure(encoding="utf-8", errors="strict")
    return sys.stdin


def _not_utf8(error: UnicodeDecodeError) -> RequestError:
    return RequestError(f"stdin is not UTF-8: byte 0x{error.object[error.start]:02x}; convert it")


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
        "experts": dict(llm.engine.stats().experts),
        "ranks": [],
    }


def _print_json(report: dict[str, Any]) -> None:
    print(json.dumps(report), flush=True)


def _print_bench(llm: LLM, rows: Sequence[Any], as_json: bool) -> None:
    from moe_serve.bench import bench_report

    if as_json:
        _print_json(bench_report(llm, f"{PROGRAM} {' '.join(sys.argv[1:])}", rows))
    else:
        for row in rows:
            print(row.line())
    _close(llm, [])


def _close(llm: LLM, outputs: Sequence[RequestOutput]) -> None:
    """End a run with its figures, and with exit code 1 if an output failed."""
    failed = [
        f"prompt {index}: {completion.error}"
        for index, output in enumerate(outputs)
        for completion in output.outputs
        if completion.finish_reason == "error"
    ]
    for why in failed:
        _note(f"error: {why}")
    if llm.last_run is not None:
        _note(llm.last_run.line(), program="")
    experts = llm.engine.stats().experts
    if experts:
        from moe_serve.text.run_metrics import experts_line  # imports torch

        _note(experts_line(experts), program="")
    llm.close()
    if failed:
        raise typer.Exit(1)


def _chat_lines() -> Iterator[str]:
    """Yield what the user types, or the lines of stdin when nobody types."""
    if not sys.stdin.isatty():
        try:
            for line in _utf8_stdin():
                yield line.rstrip("\n")
        except UnicodeDecodeError as error:
            raise _not_utf8(error) from error
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
        _note(f"error: {error} (/reset begins anew)")
        return False
    except KeyboardInterrupt:
        if not sys.stdin.isatty():
            raise
        print()  # the answer ends here, the conversation goes on
        return True
    if answer.finish_reason == "error":
        _note(f"error: {answer.error} (the conversation is as it was before)")
        return False
    history[:] = [*messages, {"role": "assistant", "content": answer.text}]
    _close(llm, [])
    return True


def _note_no_template(llm: LLM) -> None:
    _note(f"{llm.model} has no chat template: it continues the text (see --chat-template)")


def _note(text: str, program: str = f"{PROGRAM}: ") -> None:
    if sys.stderr is None:  # closed at the start; print would take stdout
        return
    print(f"{program}{printable(text)}", file=sys.stderr, flush=True)


def _note_lines(text: str) -> None:
    """Print a text of several lines, each of them made printable."""
    first, *others = text.split("\n")
    _note(first)
    for line in others:
        _note(line, program="")


def printable(text: str) -> str:
    """Return `text` on one line, with what could command a terminal made visible."""
    return "".join(
        character
        if character.isprintable()
        else character.encode("unicode_escape", "backslashreplace").decode()
        for character in text
    )


def run(arguments: Sequence[str]) -> int:
    """Run one command and return its exit code; errors are one line on stderr."""
    logging.basicConfig(level=logging.WARNING, format=f"{PROGRAM}: %(levelname)s: %(message)s")
    arguments = list(arguments) or ["--help"]
    flags = arguments[: arguments.index("--")] if "--" in arguments else arguments
    is_debug = "--debug" in flags
    if sys.stdout is None:
        _note("error: stdout is closed; send it to a file, or to /dev/null")
        return 2
    try:
        code = app(arguments, prog_name=PROGRAM, standalone_mode=False)
        sys.stdout.flush()
        return code if isinstance(code, int) else 0
    except (KeyboardInterrupt, typer.Abort):
        return 130
    except BrokenPipeError:
        return _drop_stdout()
    except Exception as error:
        if is_debug:
            traceback.print_exc()
        if isinstance(error, OSError) and error.filename is None and error.errno in FULL:
            # what is written by name names itself: the output of a batch does
            _note(f"error: stdout cannot be written: {error.strerror}")
            _drop_stdout()
            return 1
        return _report(error, is_debug)


def _drop_stdout() -> int:
    """Let what nobody reads vanish, or Python would complain at its end; return the exit code."""
    os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
    return 141


def _report(error: Exception, is_debug: bool) -> int:
    if isinstance(error, MoeServeError):
        message, code = str(error), error.exit_code
    elif isinstance(error, _UsageFault):
        message, code = error.format_message(), 2  # type: ignore[attr-defined]
    else:
        message, code = f"a fault in {PROGRAM}: {type(error).__name__}: {error}", 1
        message += "" if is_debug else " (--debug shows where)"
    if isinstance(error, CheckpointError):  # may list several problems, one a line
        _note_lines(f"error: {message}")
    else:
        _note(f"error: {message}")
    return code


def main() -> NoReturn:
    """The command `moe-serve`."""
    wait_shortly()
    sys.exit(run(sys.argv[1:]))
