"""A conversation to the text that a model was trained on, by its own template.

Templates come with checkpoints, from strangers. They run in jinja's immutable sandbox: no
attribute that leads to Python's insides, nothing changed that was passed in. A bomb is stopped by
budgets: of seconds (looked at in every turn of a loop or call of a macro, and at every piece of
output), of loop turns, of output characters, and of characters that `~`, `+`, `*` or a method make.
Not covered: one filter, or one format, told to pad to a huge width.
"""

from __future__ import annotations

import json
import os
import stat
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path
from typing import Any, NoReturn

import jinja2
from jinja2 import meta, nodes
from jinja2.exceptions import SecurityError
from jinja2.ext import Extension, LoopControlExtension
from jinja2.parser import Parser
from jinja2.runtime import Context
from jinja2.sandbox import ImmutableSandboxedEnvironment
from jinja2.visitor import NodeTransformer

from moe_serve.errors import CheckpointError, ConfigError, RequestError
from moe_serve.models import strict_json

TEMPLATE_FILE = "chat_template.jinja"
TEMPLATE_JSON_FILE = "chat_template.json"
SETTINGS_FILE = "tokenizer_config.json"
MAX_TEMPLATE_CHARS = 2**20
MAX_OUTPUT_CHARS = 2**24
MAX_RENDER_S = 5.0
MAX_TURNS = 1_000_000

# what a template reads beside special tokens and is not for those who send a conversation
_RESERVED = frozenset(
    {"messages", "tools", "documents", "functions", "add_generation_prompt", "tokenize"}
    | {"chat_template", "tokenizer", "self", "loop", "caller", "varargs", "kwargs"}
)
_BUDGET = " budget"  # the space keeps it out of a template's reach


class ChatTemplate:
    """A compiled template. special_tokens ("bos_token", ...) are variables it may use.

    variables: names that it reads and that a stranger may give, such as "enable_thinking". Raises
    CheckpointError where the source cannot be compiled.
    """

    def __init__(
        self,
        source: str,
        special_tokens: Mapping[str, str] | None = None,
        *,
        max_output_chars: int = MAX_OUTPUT_CHARS,
        max_render_s: float = MAX_RENDER_S,
    ) -> None:
        if len(source) > MAX_TEMPLATE_CHARS:
            raise CheckpointError(
                f"chat template has {len(source)} characters; at most {MAX_TEMPLATE_CHARS} are read"
            )
        self._special_tokens = dict(special_tokens or {})
        self._max_output_chars = max_output_chars
        self._max_render_s = max_render_s
        self.source = source
        self._template, named = self._compiled(source)
        self.variables = frozenset(
            name for name in named - _RESERVED if not name.endswith("_token")
        )

    @staticmethod
    def _compiled(source: str) -> tuple[jinja2.Template, frozenset[str]]:
        """Return the template, and the names in it that nothing in it defines."""
        environment = _Environment(
            trim_blocks=True, lstrip_blocks=True, extensions=[LoopControlExtension, _Generation]
        )
        environment.filters["tojson"] = _to_json
        environment.globals["raise_exception"] = _raise_exception
        environment.globals["strftime_now"] = _strftime_now
        try:
            named = meta.find_undeclared_variables(environment.parse(source))
            return environment.from_string(source), frozenset(named - environment.globals.keys())
        except (jinja2.TemplateError, RecursionError) as error:
            raise CheckpointError(f"chat template cannot be compiled: {error}") from error

    def render(
        self,
        messages: Sequence[Mapping[str, Any]],
        *,
        add_generation_prompt: bool = True,
        tools: Sequence[Mapping[str, Any]] | None = None,
        variables: Mapping[str, Any] | None = None,
    ) -> str:
        """Return the text of a conversation; what the template refuses is a RequestError.

        add_generation_prompt: end with the start of the assistant's answer.
        """
        deadline_s = time.monotonic() + self._max_render_s
        budget = _Budget(self._max_output_chars, deadline_s, MAX_TURNS)
        context = {
            **self._special_tokens,
            **(variables or {}),
            "messages": [dict(message) for message in messages],
            "tools": None if tools is None else list(tools),
            "documents": None,
            "add_generation_prompt": add_generation_prompt,
            _BUDGET: budget,
        }
        pieces = []
        template = self._template
        try:
            for piece in template.generate(context):
                budget.spend_output(piece)
                pieces.append(piece)
        except SecurityError as error:
            raise RequestError(f"chat template was stopped: {error}") from error
        except jinja2.TemplateError as error:
            raise RequestError(f"chat template refuses this conversation: {error}") from error
        except (ArithmeticError, LookupError, TypeError, ValueError, RecursionError) as error:
            raise RequestError(
                f"chat template fails on this conversation: {type(error).__name__}: {error}"
            ) from error
        return "".join(pieces)


def load_chat_template(
    folder: Path, special_tokens: Mapping[str, str] | None = None
) -> ChatTemplate | None:
    """Read the template in a model's folder; None if it has none.

    chat_template.jinja wins over chat_template.json, and that over tokenizer_config.json, where
    several templates may have names: "default" is taken.
    """
    path = folder / TEMPLATE_FILE
    if os.path.lexists(path):
        return _compiled(_read(path, CheckpointError), special_tokens, path, CheckpointError)
    for name in (TEMPLATE_JSON_FILE, SETTINGS_FILE):
        if os.path.lexists(folder / name):
            found = strict_json.read_object(folder / name).get("chat_template")
            source = _default_of(found, folder / name)
            if source is not None:
                return _compiled(source, special_tokens, folder / name, CheckpointError)
    return None


def read_chat_template(path: Path, special_tokens: Mapping[str, str] | None = None) -> ChatTemplate:
    """Read a template that the user names; one that cannot be used is a ConfigError."""
    return _compiled(_read(path, ConfigError), special_tokens, path, ConfigError)


def _compiled(
    source: str,
    special_tokens: Mapping[str, str] | None,
    path: Path,
    error_type: Callable[[str], Exception],
) -> ChatTemplate:
    """Name the file in what is wrong with its template."""
    try:
        return ChatTemplate(source, special_tokens)
    except CheckpointError as error:
        raise error_type(f"{path}: {error}") from error


def _read(path: Path, error_type: Callable[[str], Exception]) -> str:
    try:
        if not stat.S_ISREG(path.stat().st_mode):  # opening a pipe would wait for ever
            raise error_type(f"{path}: not a regular file")
        with path.open(encoding="utf-8") as file:
            return file.read(MAX_TEMPLATE_CHARS + 1)  # one more, so that its size is seen
    except OSError as error:
        raise error_type(f"{path}: cannot be read ({error.strerror})") from error
    except UnicodeDecodeError as error:
        raise error_type(f"{path}: not UTF-8 at byte {error.start}") from error


def _default_of(found: object, path: Path) -> str | None:
    if found is None or isinstance(found, str):
        return found
    if isinstance(found, list):
        found = {
            entry.get("name"): entry.get("template") for entry in found if isinstance(entry, dict)
        }
    if not isinstance(found, dict):
        raise CheckpointError(f"{path}: chat_template is of type {type(found).__name__}; not text")
    source = found.get("default")
    if not isinstance(source, str):
        names = ", ".join(sorted(map(str, found)))
        raise CheckpointError(
            f"{path}: chat_template has no 'default' among its names ({names}); pass one of them "
            "as a file with chat_template"
        )
    return source


@dataclass(slots=True)
class _Budget:
    """What one rendering may still use."""

    num_chars: int
    deadline_s: float
    num_turns: int

    def spend_output(self, piece: str) -> None:
        self.num_chars -= len(piece)
        if self.num_chars < 0:
            raise SecurityError("its output is longer than any context")
        self.check_time()

    def spend_turn(self) -> None:
        self.num_turns -= 1
        if self.num_turns < 0:
            raise SecurityError(f"more than {MAX_TURNS} turns of loops")
        self.check_time()

    def check_size(self, size: int) -> None:
        if size > MAX_OUTPUT_CHARS:
            raise SecurityError(f"a text of {size} characters; at most {MAX_OUTPUT_CHARS}")

    def check_time(self) -> None:
        if time.monotonic() > self.deadline_s:
            raise SecurityError("it ran for too many seconds")


class _Environment(ImmutableSandboxedEnvironment):
    """The sandbox, with budgets."""

    intercepted_binops = frozenset({"+", "*", "**"})

    def _parse(self, source: str, name: str | None, filename: str | None) -> nodes.Template:
        tree = super()._parse(source, name, filename)
        _Guard().visit(tree)
        return tree

    def call_binop(self, context: Context, operator: str, left: Any, right: Any) -> Any:
        budget = _budget(context)
        for one, other in ((left, right), (right, left)):
            if isinstance(one, str | list | tuple):
                if operator == "*" and isinstance(other, int):
                    budget.check_size(len(one) * other)
                elif operator == "+" and isinstance(other, str | list | tuple):
                    budget.check_size(len(one) + len(other))
        if isinstance(left, int) and isinstance(right, int) and operator != "+":
            bits = left.bit_length()
            budget.check_size(bits * right if operator == "**" else bits + right.bit_length())
        return super().call_binop(context, operator, left, right)

    def call(self, context: Context, function: Any, /, *args: Any, **kwargs: Any) -> Any:
        budget = _budget(context)
        budget.check_time()
        if isinstance(getattr(function, "__self__", None), str):
            budget.check_size(_text_size(function.__self__, function.__name__, args, kwargs))
        return super().call(context, function, *args, **kwargs)

    def spend_turn(self, context: Context) -> str:
        """Called by every loop body and macro, see `_Guard`."""
        _budget(context).spend_turn()
        return ""

    def concatenate(self, context: Context, *values: Any) -> str:
        """Called in place of the operator `~`."""
        texts = [str(value) for value in values]
        _budget(context).check_size(sum(map(len, texts)))
        return "".join(texts)


def _text_size(text: str, method: str, args: tuple[Any, ...], kwargs: dict[str, Any]) -> int:
    """Return about how many characters a method of `text` would make, at most."""
    match method, args:
        case "replace", (str(old), str(new), *_):
            return len(text) + text.count(old) * len(new)
        case "join", (list() | tuple() as parts,):
            return len(text) * len(parts)
        case _:  # the widths of ljust, rjust, center, zfill, expandtabs
            numbers = (x for x in (*args, *kwargs.values()) if isinstance(x, int))
            return max(numbers, default=0)


def _budget(context: Context) -> _Budget:
    budget = context.parent[_BUDGET]
    assert isinstance(budget, _Budget)
    return budget


class _Guard(NodeTransformer):
    """Make every turn of a loop, macro call and `~` ask the budget."""

    def visit_For(self, node: nodes.For) -> nodes.Node:
        return self._counted(node)

    def visit_Macro(self, node: nodes.Macro) -> nodes.Node:
        return self._counted(node)

    def visit_CallBlock(self, node: nodes.CallBlock) -> nodes.Node:
        return self._counted(node)

    def visit_Concat(self, node: nodes.Concat) -> nodes.Node:
        self.generic_visit(node)
        return _call("concatenate", node.nodes).set_lineno(node.lineno)

    def _counted(self, node: nodes.For | nodes.Macro | nodes.CallBlock) -> nodes.Node:
        self.generic_visit(node)
        turn = nodes.ExprStmt(_call("spend_turn", []))
        node.body.insert(0, turn.set_lineno(node.lineno))
        return node


def _call(method: str, arguments: list[nodes.Expr]) -> nodes.Call:
    function = nodes.EnvironmentAttribute(method)
    return nodes.Call(function, [nodes.ContextReference(), *arguments], [], None, None)


class _Generation(Extension):
    """{% generation %}...{% endgeneration %} marks what to train on: here without effect."""

    tags = {"generation"}  # noqa: RUF012  # jinja2's own type of it

    def parse(self, parser: Parser) -> list[nodes.Node]:
        next(parser.stream)
        return list(parser.parse_statements(("name:endgeneration",), drop_needle=True))


def _to_json(
    value: Any,
    ensure_ascii: bool = False,
    indent: int | None = None,
    separators: tuple[str, str] | None = None,
    sort_keys: bool = False,
) -> str:
    return json.dumps(
        value, ensure_ascii=ensure_ascii, indent=indent, separators=separators, sort_keys=sort_keys
    )


def _raise_exception(message: str) -> NoReturn:
    raise jinja2.TemplateError(message)


def _strftime_now(form: str) -> str:
    return datetime.now().strftime(form)
