"""No line of the source runs what comes from outside, nor passes objects that could.

Read as a syntax tree. Each rule has samples that it must find, so that a rule cannot be blind.
"""

from __future__ import annotations

import ast
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
FOLDERS = ("moe_serve", "experts", "comm", "predictors", "launch", "benchmarks", "tests")
FILES = [path for folder in FOLDERS for path in sorted((ROOT / folder).rglob("*.py"))]

# modules whose data is a program, or that start shells
MODULES = frozenset(
    {"pickle", "_pickle", "dill", "cloudpickle", "marshal", "shelve", "joblib", "jsonpickle"}
    | {"yaml", "code", "codeop", "commands", "pty", "imp"}
)
BUILTINS = frozenset({"eval", "exec", "compile", "__import__"})
# by what they are called on; "" is any
CALLS = frozenset(
    {
        *(("os", name) for name in ("system", "popen")),
        *(("subprocess", name) for name in ("getoutput", "getstatusoutput")),
        *(("torch", name) for name in ("load", "save")),
        ("", "create_subprocess_shell"),
    }
)
COLLECTIVES = frozenset(
    {"all_gather_object", "broadcast_object_list", "gather_object", "scatter_object_list"}
    | {"send_object_list", "recv_object_list"}
)
KEYWORDS = frozenset({"shell", "trust_remote_code", "allow_pickle"})
# (file, finding): why it is right
ALLOWED = {
    # proves that a file of torch's pickles is refused
    ("tests/experts/placement_formats/test_every_format.py", "imports pickle"): 1,
    # the README's own blocks
    ("tests/test_house.py", "calls exec"): 1,
    ("tests/test_house.py", "calls compile"): 1,
}


def findings(tree: ast.AST) -> Iterator[str]:
    """Yield what is found, in a few words each."""
    for node in ast.walk(tree):
        match node:
            case ast.Import(names=names):
                for alias in names:
                    if alias.name.partition(".")[0] in MODULES:
                        yield f"imports {alias.name.partition('.')[0]}"
                    yield from _jinja(alias.name)
            case ast.ImportFrom(module=str(module), names=names):
                if module.partition(".")[0] in MODULES:
                    yield f"imports {module.partition('.')[0]}"
                for alias in names:
                    name = (module.partition(".")[0], alias.name)
                    if name in CALLS:
                        yield f"imports {'.'.join(name)}"
                    if alias.name in COLLECTIVES:
                        yield f"imports {alias.name}"
                    yield from _jinja(f"{module}.{alias.name}")
                    if name == ("jinja2", "Template"):
                        yield "imports jinja2.Template"
            case ast.Attribute(value=value, attr=attribute):
                owner = value.id if isinstance(value, ast.Name) else ""
                if (owner, attribute) in CALLS or ("", attribute) in CALLS:
                    yield f"uses {owner}.{attribute}"
                if attribute in COLLECTIVES:
                    yield f"uses {attribute}"
                if owner == "builtins" and attribute in BUILTINS:
                    yield f"uses builtins.{attribute}"
                if owner == "jinja2":
                    yield from _jinja(f"jinja2.{attribute}")
            case ast.Call(func=function, keywords=keywords, args=arguments):
                yield from _call(function, keywords, arguments)


def _call(
    function: ast.expr, keywords: list[ast.keyword], arguments: list[ast.expr]
) -> Iterator[str]:
    if isinstance(function, ast.Name) and function.id in BUILTINS:
        yield f"calls {function.id}"
    if ast.unparse(function) == "jinja2.Template":
        yield "calls jinja2.Template"
    if ast.unparse(function) in ("importlib.import_module", "import_module"):
        for name in [one.value for one in arguments[:1] if isinstance(one, ast.Constant)]:
            if isinstance(name, str) and name.partition(".")[0] in MODULES:
                yield f"imports {name}"
    for keyword in keywords:
        is_false = isinstance(keyword.value, ast.Constant) and not keyword.value.value
        if keyword.arg in KEYWORDS and not is_false:
            yield f"sets {keyword.arg}"


def _jinja(name: str) -> Iterator[str]:
    """Templates are compiled by the immutable sandbox alone."""
    unsafe = ("Environment", "NativeEnvironment", "NativeTemplate", "SandboxedEnvironment")
    root, _, rest = name.partition(".")
    # jinja2.Template is also what a compiled one is: what counts is who calls it
    if root == "jinja2" and rest.rpartition(".")[2] in unsafe:
        yield f"uses {name}"


SAMPLES = (
    "import pickle",
    "import a, marshal as m",
    "from shelve import open",
    "from dill.source import x",
    "import cloudpickle",
    "import yaml",
    "eval('1')",
    "exec(text)",
    "compile(text, 'a', 'exec')",
    "__import__(name)",
    "import builtins; builtins.eval('1')",
    "importlib.import_module('pickle')",
    "torch.load(path)",
    "torch.load(path, weights_only=True)",
    "from torch import load",
    "torch.save(x, path)",
    "dist.all_gather_object(out, x)",
    "torch.distributed.broadcast_object_list(x)",
    "from torch.distributed import gather_object",
    "dist.scatter_object_list(a, b)",
    "os.system('ls')",
    "from os import popen",
    "subprocess.run('ls', shell=True)",
    "subprocess.run('ls', shell=is_shell)",
    "subprocess.getoutput('ls')",
    "asyncio.create_subprocess_shell('ls')",
    "np.load(path, allow_pickle=True)",
    "AutoModel.from_pretrained(name, trust_remote_code=True)",
    "AutoModel.from_pretrained(name, trust_remote_code=given)",
    "from jinja2 import Environment",
    "jinja2.Environment()",
    "from jinja2.sandbox import SandboxedEnvironment",
    "from jinja2.nativetypes import NativeEnvironment",
    "jinja2.Template('x')",
    "from jinja2 import Template",
)
HARMLESS = (
    "re.compile('a')",
    "model.eval()",
    "compiler.compile(kind, text)",
    "json.load(file)",
    "np.load(path)",
    "np.load(path, allow_pickle=False)",
    "subprocess.run(['ls'], shell=False)",
    "AutoModel.from_pretrained(name, trust_remote_code=False)",
    "from jinja2.sandbox import ImmutableSandboxedEnvironment",
    "response_object(outputs)",
)


@pytest.mark.parametrize("sample", SAMPLES)
def test_a_rule_finds(sample: str) -> None:
    assert list(findings(ast.parse(sample)))


@pytest.mark.parametrize("sample", HARMLESS)
def test_no_rule_minds(sample: str) -> None:
    assert not list(findings(ast.parse(sample)))


def test_nothing_from_outside_is_run() -> None:
    assert len(FILES) > 300
    found: dict[tuple[str, str], int] = {}
    for path in FILES:
        for finding in findings(ast.parse(path.read_text())):
            key = (path.relative_to(ROOT).as_posix(), finding)
            found[key] = found.get(key, 0) + 1
    assert found == ALLOWED
