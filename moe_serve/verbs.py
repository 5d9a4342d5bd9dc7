"""What all verbs of the command line share: how flags are made, and what goes to the terminal.

stdout has the answer and nothing else; notes go to stderr. What a verb needs is imported inside it,
so that --help takes no time.
"""

from __future__ import annotations

import contextlib
import inspect
import io
import json
import os
import sys
from collections.abc import Callable, Container, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Self, TextIO

import typer

from moe_serve import plugin
from moe_serve.config import EngineConfig, OptionField, option_fields, resolve_options
from moe_serve.errors import ConfigError, MoeServeError, RequestError
from moe_serve.server.options import ServerConfig

if TYPE_CHECKING:
    from moe_serve.llm import LLM
    from moe_serve.text.prompts import Prompt
    from moe_serve.types import RequestOutput, SamplingParams

PROGRAM = "moe-serve"
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
_OPEN: list[LLM] = []  # what `load` made and the verb has not closed
# the engine's options that say what computes
RUNTIME_FLAGS = ("kernels", "isa", "numerics", "threads", "config")

# of click, or of the copy inside typer
UsageFault: type[Exception] = next(
    kind for kind in typer.BadParameter.__mro__ if kind.__name__ == "ClickException"
)

app = typer.Typer(
    name=PROGRAM,
    help="Run mixture-of-experts language models. With no --model, a small one is at hand.",
    rich_markup_mode=None,
    add_completion=False,
    pretty_exceptions_enable=False,
)
bench = typer.Typer(help="Measure how fast a model runs here, or a server.", rich_markup_mode=None)
app.add_typer(bench, name="bench")

Debug = Annotated[bool, typer.Option("--debug", help="Show where an error came from.")]


def _tree_parameter(leaf: OptionField) -> inspect.Parameter:
    flag = leaf.flag or f"--{leaf.name.replace('_', '-')}"
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
        yield _tree_parameter(leaf)
    yield _option("config", Path, "--config", "A TOML file of these options.")


def _sampling_parameters(without: Container[str]) -> Iterator[inspect.Parameter]:
    for name, kind, text in SAMPLING_FLAGS:
        if name not in without:
            yield _option(name, kind, f"--{name.replace('_', '-')}", text)


def verb_of(
    group: typer.Typer, without: Container[str] = ()
) -> Callable[[Callable[..., None]], Callable[..., None]]:
    """Add a verb; parameters `engine`, `runtime`, `sampling`, `server` stand for all such flags.

    without: sampling flags that the verb has no use for.
    """

    def add(function: Callable[..., None]) -> Callable[..., None]:
        generated = {
            "engine": list(_engine_parameters()),
            "runtime": [p for p in _engine_parameters() if p.name in RUNTIME_FLAGS],
            "sampling": list(_sampling_parameters(without)),
            "server": [_tree_parameter(leaf) for leaf in option_fields(ServerConfig)],
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
                raise typer.Exit(drop_stdout()) from None
            except BaseException:
                try:
                    _close_all()
                except MoeServeError as error:  # what came first is what is told last
                    note(f"error: {error}")
                raise
            _close_all()

        verb.__signature__ = inspect.Signature(  # type: ignore[attr-defined]
            [p.replace(kind=inspect.Parameter.KEYWORD_ONLY) for p in parameters]
        )
        verb.__annotations__ = {p.name: p.annotation for p in parameters}
        verb.__doc__ = function.__doc__
        group.command(function.__name__.replace("_", "-"))(verb)
        return function

    return add


def _close_all() -> None:
    """Close the models that the verb loaded: traces and profiles are written now."""
    while _OPEN:
        _OPEN.pop().close()


Prompts = Annotated[list[str] | None, typer.Argument(metavar="PROMPT", show_default=False)]
PromptFile = Annotated[
    Path | None, typer.Option("--prompts", help="JSON lines: prompt, prompt_token_ids or messages.")
]
Limit = Annotated[int | None, typer.Option("--limit", min=1, help="Only the first so many lines.")]
TemplateFile = Annotated[
    Path | None, typer.Option("--chat-template", help="A jinja file instead of the model's own.")
]
AsJson = Annotated[bool, typer.Option("--json", help="Print one JSON object and nothing else.")]


def load(
    engine: Mapping[str, Any], sampling: Mapping[str, Any], chat_template: Path | None
) -> tuple[LLM, SamplingParams]:
    """Return the model and what its outputs shall be, with all flags checked before it is read."""
    import dataclasses

    from moe_serve.launch.coordinator import RankedEngine  # imports torch
    from moe_serve.launch.lasting import LastingEngine
    from moe_serve.llm import LLM
    from moe_serve.types import SamplingParams

    given = {"max_tokens": DEFAULT_MAX_TOKENS, **sampling}
    SamplingParams.from_mapping(given)
    config = config_of(engine)
    if config.ranks.ep_size is not None and config.ranks.ep_size > 1:
        note(f"starting {config.ranks.ep_size} ranks")
    llm = LLM(config=config, chat_template=chat_template)
    _OPEN.append(llm)
    if not llm.is_first_rank:  # it works for rank 0 until that has ended
        _close_all()
        raise typer.Exit
    if isinstance(llm.engine, RankedEngine | LastingEngine):
        note(llm.engine.about)
    return llm, dataclasses.replace(llm.default_sampling_params(), **given)


def config_of(engine: Mapping[str, Any]) -> EngineConfig:
    flags = dict(engine)
    return EngineConfig.from_options(resolve_options(flags, file=flags.pop("config", None)))


def print_json(report: dict[str, Any]) -> None:
    print(json.dumps(report), flush=True)


def show_run(llm: LLM, outputs: Sequence[RequestOutput]) -> None:
    """Show a run's figures, and what failed, if anything; then the exit code is 1."""
    failed = [
        f"prompt {index}: {completion.error}"
        for index, output in enumerate(outputs)
        for completion in output.outputs
        if completion.finish_reason == "error"
    ]
    for why in failed:
        note(f"error: {why}")
    if llm.last_run is not None:
        note(llm.last_run.line(), program="")
    from moe_serve.text.run_metrics import experts_line, ranks_line  # imports torch

    stats = llm.engine.stats()
    if stats.experts:
        note(experts_line(stats.experts), program="")
    if stats.ranks:
        note(ranks_line(stats.ranks), program="")
    if failed:
        raise typer.Exit(1)


def note(text: str, program: str = f"{PROGRAM}: ") -> None:
    if sys.stderr is None:  # closed at the start; print would take stdout
        return
    with contextlib.suppress(OSError):  # a full disk, a reader who is gone: work goes on
        print(f"{program}{printable(text)}", file=sys.stderr, flush=True)


def note_lines(text: str) -> None:
    """Print a text of several lines, each of them made printable."""
    first, *others = text.split("\n")
    note(first)
    for line in others:
        note(line, program="")


def printable(text: str) -> str:
    """Return `text` on one line, with what could command a terminal made visible."""
    return "".join(
        character
        if character.isprintable()
        else character.encode("unicode_escape", "backslashreplace").decode()
        for character in text
    )


def drop_stdout() -> int:
    """Let what nobody reads vanish, or Python would complain at its end; return the exit code."""
    os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
    return 141


@dataclass(frozen=True, slots=True)
class PromptSource:
    """Prompts as they were given, before there is a model to read them for.

    entries: as `text.prompt_file` reads lines; places: what errors call each.
    """

    entries: list[dict[str, Any]]
    places: list[str]

    @classmethod
    def read(cls, named: list[str] | None, file: Path | None, limit: int | None) -> Self:
        """Take prompts that were named, or those of a file, or else stdin as one prompt."""
        from moe_serve.launch.environment import read_environment
        from moe_serve.text.prompt_file import read_prompt_file  # imports torch

        place = read_environment()
        if place is not None and place.rank > 0:  # rank 0 says what is asked
            return cls([], [])
        if file is None:
            if limit is not None:
                raise ConfigError("--limit is for --prompts; without a file it has no effect")
            entries: list[dict[str, Any]] = [{"prompt": text} for text in named or _stdin_prompt()]
            return cls(entries, [f"prompt {index}" for index in range(len(entries))])
        if named:
            raise ConfigError(
                "prompts are named and --prompts gives a file of them; use one of both"
            )
        lines = read_prompt_file(file, limit)
        return cls([line.entry for line in lines], [line.where for line in lines])

    @property
    def has_messages(self) -> bool:
        return any("messages" in entry for entry in self.entries)

    @property
    def priorities(self) -> list[int]:
        return [entry.get("priority", 0) for entry in self.entries]

    def prompts(self, llm: LLM) -> list[Prompt]:
        """Return them as `LLM.generate` takes them. Raises RequestError that names the place."""
        from moe_serve.text.prompt_file import prompt_of  # imports torch

        listed = []
        for place, entry in zip(self.places, self.entries, strict=True):
            try:
                listed.append(prompt_of(entry, llm.requests))
            except RequestError as error:
                raise type(error)(f"{place}: {error}") from error
        return listed


def _stdin_prompt() -> list[str]:
    if sys.stdin is None or sys.stdin.isatty():
        raise ConfigError(f"no prompt. Try: {EXAMPLE}")
    try:
        text = utf8_stdin().read().removesuffix("\n")
    except UnicodeDecodeError as error:
        raise not_utf8(error) from error
    if not text:
        raise ConfigError(f"no prompt, and nothing on stdin. Try: {EXAMPLE}")
    return [text]


def utf8_stdin() -> TextIO:
    """Return stdin, strict whatever the locale says."""
    if isinstance(sys.stdin, io.TextIOWrapper):
        sys.stdin.reconfigure(encoding="utf-8", errors="strict")
    return sys.stdin


def not_utf8(error: UnicodeDecodeError) -> RequestError:
    return RequestError(f"stdin is not UTF-8: byte 0x{error.object[error.start]:02x}; convert it")
