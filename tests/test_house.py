"""Promises about the tree itself: its links, what imports what, and what its documents say."""

from __future__ import annotations

import ast
import importlib
import importlib.metadata
import importlib.util
import os
import re
import subprocess
import sys
import tomllib
from collections.abc import Iterator
from pathlib import Path

import pytest

import moe_serve
from moe_serve import plugin
from moe_serve.models import registry

ROOT = Path(__file__).resolve().parent.parent
LINKED = ("experts", "comm", "predictors", "launch")
ENGINE_SIDE = (
    "engine", "models", "layers", "experts", "comm", "predictors", "kernels",
    "types", "structured_outputs", "config", "errors", "plugin", "openmp", "blas",
)  # fmt: skip
ENGINE_SIDE_MAY_IMPORT = {"torch", "numpy", "safetensors", "msgspec"}
# optional, imported by the function that needs it: what is without it refuses what needs it
IMPORTED_WHEN_NEEDED = {
    "moe_serve/engine/grammar.py": {"llguidance"},
    "moe_serve/engine/grammar_compiler.py": {"llguidance"},
}
PYTHON_FOLDERS = ("moe_serve", *LINKED, "tests", "benchmarks")
DOCUMENTS = ("README.md", "CONTRIBUTING.md", "CHANGELOG.md", "docs", "moe_serve/assets")
# What each module of a folder of alternatives must define; models have a test of their own.
ENTRY_POINTS = {
    "moe_serve.engine.policies": "build",
    "moe_serve.comm": "build",
    "moe_serve.experts.policies": "build",
    "moe_serve.experts.placement": "place",
    "moe_serve.experts.placement_formats": "decode",
    "moe_serve.predictors": "build",
    "benchmarks.peers.systems": "build",
}
KERNELS = [
    path
    for path in sorted((ROOT / "moe_serve" / "kernels").iterdir())
    if path.is_dir() and path.name not in ("native", "gpu", "__pycache__")
]


def python_files(*folders: str) -> Iterator[Path]:
    for folder in folders:
        yield from sorted((ROOT / folder).rglob("*.py"))


def engine_side_files() -> Iterator[Path]:
    for name in ENGINE_SIDE:
        path = ROOT / "moe_serve" / name
        yield from (
            sorted(path.resolve().rglob("*.py")) if path.is_dir() else (path.with_suffix(".py"),)
        )


def documents() -> Iterator[Path]:
    for name in DOCUMENTS:
        path = ROOT / name
        yield from sorted(path.rglob("*.md")) if path.is_dir() else (path,)


def relative(path: Path) -> str:
    return path.relative_to(ROOT).as_posix()


@pytest.mark.parametrize("name", LINKED)
def test_subpackage_is_the_root_folder(name: str) -> None:
    link = ROOT / "moe_serve" / name
    assert link.is_symlink()
    assert os.readlink(link) == f"../{name}"
    assert link.resolve() == ROOT / name


@pytest.mark.parametrize("path", list(engine_side_files()), ids=relative)
def test_engine_side_names_no_other_package(path: Path) -> None:
    allowed = ENGINE_SIDE_MAY_IMPORT | set(sys.stdlib_module_names) | {"moe_serve"}
    if path.name == "triton.py":
        allowed.add("triton")
    optional = IMPORTED_WHEN_NEEDED.get(relative(path), set())
    tree = ast.parse(path.read_text())
    when_needed = set(lines_imported_when_needed(tree))
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            roots = {alias.name.partition(".")[0] for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"line {node.lineno}: write the whole name"
            roots = {(node.module or "").partition(".")[0]}
        else:
            continue
        if node.lineno in when_needed:
            roots -= optional
        assert roots <= allowed, f"line {node.lineno} imports {sorted(roots - allowed)}"


def lines_imported_when_needed(tree: ast.AST) -> Iterator[int]:
    """Yield the lines within functions, and those that only a type checker reads."""
    for node in ast.walk(tree):
        is_for_types = isinstance(node, ast.If) and ast.unparse(node.test) == "TYPE_CHECKING"
        if is_for_types or isinstance(node, ast.FunctionDef):
            assert isinstance(node, ast.If | ast.FunctionDef)
            yield from range(node.lineno, (node.end_lineno or node.lineno) + 1)


# Runs in a process of its own: import the allowed packages and what they need, forbid all others,
# then import every module on the engine's side.
IMPORT_ALL = """
import importlib, importlib.abc, pkgutil, re, sys
from importlib.metadata import PackageNotFoundError, requires

engine_side, allowed = sys.argv[1].split(","), set(sys.argv[2].split(","))

def with_dependencies(name, found):
    if name not in found:
        found.add(name)
        try:
            lines = requires(name) or []
        except PackageNotFoundError:
            lines = []
        for line in lines:
            if "extra ==" not in line:
                with_dependencies(re.match(r"[A-Za-z0-9_.-]+", line)[0], found)
    return found

known = set(sys.stdlib_module_names) | {"moe_serve", "torchgen", "functorch"}
for package in allowed:
    known |= {name.replace("-", "_").lower() for name in with_dependencies(package, set())}

class Forbid(importlib.abc.MetaPathFinder):
    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0].lower() not in known:
            raise ModuleNotFoundError(f"the engine's side may not import {name}", name=name)

sys.meta_path.insert(0, Forbid())
for name in engine_side:
    module = importlib.import_module(f"moe_serve.{name}")
    for found in pkgutil.walk_packages(getattr(module, "__path__", []), f"moe_serve.{name}."):
        if found.name.rpartition(".")[2] not in ("triton", "_cpu"):  # _cpu is no module of Python's
            importlib.import_module(found.name)
for name in sys.argv[3:]:
    importlib.import_module(name)
loaded = {name.split(".")[1] for name in sys.modules if name.startswith("moe_serve.")}
above = loaded - set(engine_side)
assert not above, f"the engine's side imported moe_serve.{sorted(above)}"
print(len(loaded))
"""


def import_engine_side(*more: str) -> subprocess.CompletedProcess[str]:
    arguments = (",".join(ENGINE_SIDE), ",".join(sorted(ENGINE_SIDE_MAY_IMPORT)), *more)
    return subprocess.run(
        [sys.executable, "-c", IMPORT_ALL, *arguments], cwd=ROOT, capture_output=True, text=True
    )


def test_engine_side_imports_in_a_bare_environment() -> None:
    done = import_engine_side()
    assert done.returncode == 0, done.stderr
    assert int(done.stdout) == len(ENGINE_SIDE)


def test_the_bare_environment_is_bare() -> None:
    done = import_engine_side("pytest")
    assert done.returncode != 0
    assert "may not import pytest" in done.stderr


def test_the_package_gives_what_it_promises() -> None:
    assert {"LLM", "SamplingParams", "EngineConfig"} <= set(moe_serve.__all__)
    assert set(moe_serve.__all__) <= set(dir(moe_serve))
    for name in moe_serve.__all__:
        if name != "__version__":
            assert getattr(moe_serve, name).__name__ == name
    with pytest.raises(AttributeError, match="LMM"):
        moe_serve.LMM  # noqa: B018


def test_importing_the_package_does_not_import_torch() -> None:
    program = "import sys, moe_serve; print('torch' in sys.modules)"
    done = subprocess.run(
        [sys.executable, "-c", program], cwd=ROOT, capture_output=True, text=True, check=True
    )
    assert done.stdout == "False\n"


@pytest.mark.parametrize(
    "path",
    [p for p in python_files("moe_serve", *LINKED) if p.name == "__init__.py"],
    ids=relative,
)
def test_only_the_package_s_own_init_has_code(path: Path) -> None:
    assert path == ROOT / "moe_serve" / "__init__.py" or not path.read_text().strip()


def test_every_folder_with_a_base_is_known_as_one_of_alternatives() -> None:
    folders = {
        relative(path.parent)
        for path in python_files("moe_serve", *LINKED, "benchmarks")
        if path.name == "base.py"
    }
    named = {package.replace(".", "/") for package in (*ENTRY_POINTS, "moe_serve.models")}
    of_kernels = {folder for folder in folders if folder.startswith("moe_serve/kernels/")}
    assert folders - of_kernels == {relative((ROOT / name).resolve()) for name in named}


@pytest.mark.parametrize("folder", KERNELS, ids=lambda folder: folder.name)
def test_every_kernel_has_its_implementations(folder: Path) -> None:
    names = {path.stem for path in folder.glob("*.py")} - {"__init__", "base", "triton"}
    # what a fused forward pass must equal is models/decoder.py
    assert names == {"cpu", "gpu" if folder.name == "forward" else "reference"}
    assert (ROOT / "tests" / "kernels" / f"test_{folder.name}.py").is_file()


@pytest.mark.parametrize("package", ENTRY_POINTS)
def test_every_alternative_has_its_entry_point(package: str) -> None:
    names = plugin.names(package)
    assert names
    for name in names:
        # read, not imported: a peer needs packages that only its own environment has
        spec = importlib.util.find_spec(f"{package}.{name}")
        assert spec is not None
        assert spec.origin is not None
        tree = ast.parse(Path(spec.origin).read_text())
        functions = {node.name for node in tree.body if isinstance(node, ast.FunctionDef)}
        assert ENTRY_POINTS[package] in functions, f"{name} has no entry point"
        assert ast.get_docstring(tree), f"{name} does not say what it is"


@pytest.mark.parametrize("model_type", registry.model_types())
def test_every_model_has_its_entry_point(model_type: str) -> None:
    module = importlib.import_module(f"moe_serve.models.{model_type}")
    assert callable(getattr(module, "build", None))
    assert module.__doc__


@pytest.mark.parametrize("path", list(python_files(*PYTHON_FOLDERS)), ids=relative)
def test_house_rules_hold_in(path: Path) -> None:
    text = path.read_text()
    assert text.isascii()
    assert path.stem not in ("utils", "util", "helpers", "misc", "common")
    assert not re.search(r"#\s*(TODO|FIXME|XXX)\b(?!\s*\()", text), "anchor it: TODO(0.2)"
    for node in ast.walk(ast.parse(text)):
        if isinstance(node, ast.ExceptHandler):
            is_broad = node.type is None or (
                isinstance(node.type, ast.Name) and node.type.id in ("Exception", "BaseException")
            )
            is_silent = all(isinstance(statement, ast.Pass) for statement in node.body)
            assert not (is_broad and is_silent), f"line {node.lineno} hides every error"


HOST_PATH = re.compile(r"(?<![\w.~$}/-])/(work|tmp|home|root)/")


@pytest.mark.parametrize(
    "path",
    [*python_files(*PYTHON_FOLDERS), *documents(), ROOT / "Makefile", ROOT / ".ci" / "run"],
    ids=relative,
)
def test_no_path_of_one_machine_in(path: Path) -> None:
    lines = path.read_text().splitlines()
    found = [f"{i}: {line}" for i, line in enumerate(lines, 1) if HOST_PATH.search(line)]
    assert not found


def test_the_version_is_the_changelog_s() -> None:
    version = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["version"]
    newest = re.search(r"^## (\S+)", (ROOT / "CHANGELOG.md").read_text(), re.MULTILINE)
    assert newest is not None
    assert newest.group(1) == version


def makefile_targets() -> dict[str, str]:
    text = (ROOT / "Makefile").read_text()
    return dict(re.findall(r"^([a-z]+):[ ]*(.*)$", text, re.MULTILINE))


def test_every_verb_depends_on_install() -> None:
    targets = makefile_targets()
    for verb in ("check", "test", "bench", "build", "demo"):
        assert "install" in targets[verb].split()


@pytest.mark.parametrize("path", list(documents()), ids=relative)
def test_documents_name_verbs_that_exist(path: Path) -> None:
    verbs = set(re.findall(r"(?:^|`)make ([a-z]+)", path.read_text(), re.MULTILINE))
    assert verbs <= set(makefile_targets())


@pytest.mark.parametrize("path", list(documents()), ids=relative)
def test_links_of_documents_lead_somewhere(path: Path) -> None:
    for target in re.findall(r"\]\(([^)#\s]+)[^)]*\)", path.read_text()):
        if not target.startswith("http"):
            assert (path.parent / target).exists(), target


def test_the_readme_s_verbs_are_the_command_s() -> None:
    blocks = re.findall(r"```sh\n(.*?)```", (ROOT / "README.md").read_text(), re.DOTALL)
    verbs = set(re.findall(r"^moe-serve ([a-z]+)", "\n".join(blocks), re.MULTILINE))
    assert verbs
    help_text = subprocess.run(
        [sys.executable, "-m", "moe_serve", "--help"],
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=True,
    ).stdout
    assert verbs <= set(re.findall(r"[a-z]+", help_text))


def test_the_readme_s_python_runs(capsys: pytest.CaptureFixture[str]) -> None:
    blocks = re.findall(r"```python\n(.*?)```", (ROOT / "README.md").read_text(), re.DOTALL)
    assert blocks
    for block in blocks:
        exec(compile(block, "README.md", "exec"), {"__name__": "readme"})
    assert capsys.readouterr().out.strip()


def test_constraints_pin_every_dependency_within_its_range() -> None:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    extras = project["optional-dependencies"]
    requirements = [*project["dependencies"], *extras["dev"], *extras["study"]]
    pins = dict(
        line.lower().replace("_", "-").split("==")
        for line in (ROOT / "constraints.txt").read_text().splitlines()
        if line and not line.startswith("#")
    )
    for requirement in requirements:
        match = re.fullmatch(r"([A-Za-z0-9_-]+)>=([\d.]+)(?:,<([\d.]+))?(?:; .+)?", requirement)
        assert match is not None, requirement
        name, low, high = match.groups()
        if name == "setuptools":
            continue  # comes with the virtual environment or from the build; any will do
        pin = _numbers(pins[name.lower().replace("_", "-")])
        assert _numbers(low) <= pin, requirement
        assert high is None or pin < _numbers(high), requirement


def _numbers(version: str) -> tuple[int, ...]:
    return tuple(int(part) for part in version.split("."))


def test_what_is_installed_is_this_version() -> None:
    try:
        installed = importlib.metadata.version("moe-serve")
    except importlib.metadata.PackageNotFoundError:
        pytest.skip("runs from the tree alone")
    version = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["version"]
    assert installed == version
