"""The wheel: made from the sdist, installed away from the tree, and it writes text there."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import zipfile
import zlib
from pathlib import Path
from shutil import copytree, ignore_patterns

import pytest

ROOT = Path(__file__).resolve().parent.parent
LEFT_BEHIND = ignore_patterns(
    ".git", ".venv", ".*_cache", ".hypothesis", "__pycache__", "build", "dist", "*.egg-info"
)


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Build as `make build` does, sdist first, from a copy of the tree."""
    folder = tmp_path_factory.mktemp("build")
    copytree(ROOT, folder / "tree", symlinks=True, ignore=LEFT_BEHIND)
    command = [sys.executable, "-m", "build", "--no-isolation", "--outdir", str(folder / "dist")]
    done = subprocess.run(
        [*command, str(folder / "tree")], cwd=folder, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-2000:]
    (path,) = (folder / "dist").glob("*.whl")
    return path


@pytest.fixture(scope="module")
def site(wheel: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder that holds the installed wheel; its dependencies are those of this environment."""
    folder = tmp_path_factory.mktemp("site")
    command = [sys.executable, "-m", "pip", "install", "--quiet", "--no-deps", "--no-index"]
    command += ["--no-compile", "--disable-pip-version-check", "--target", str(folder)]
    subprocess.run([*command, str(wheel)], check=True, capture_output=True)
    return folder


def run_installed(site: Path, cwd: Path, *command: str) -> subprocess.CompletedProcess[str]:
    """Run in an empty home, with the installed package before all others."""
    variables = {k: v for k, v in os.environ.items() if not k.startswith(("PYTHON", "HF_"))}
    variables |= {"HOME": str(cwd), "PYTHONPATH": str(site), "HF_HUB_OFFLINE": "1"}
    return subprocess.run(command, cwd=cwd, env=variables, capture_output=True, text=True)


def test_the_wheel_holds_the_tree_and_nothing_else(wheel: Path) -> None:
    expected = {}
    for folder, folders, files in os.walk(ROOT / "moe_serve", followlinks=True):
        folders[:] = [name for name in folders if name != "__pycache__"]
        for name in files:
            path = Path(folder) / name
            expected[path.relative_to(ROOT).as_posix()] = zlib.crc32(path.read_bytes())
    with zipfile.ZipFile(wheel) as archive:
        found = {i.filename: i.CRC for i in archive.infolist() if ".dist-info/" not in i.filename}
    assert found == expected
    assert {"moe_serve/comm/__init__.py", "moe_serve/py.typed"} <= found.keys()


def test_the_wheel_carries_its_licence(wheel: Path) -> None:
    with zipfile.ZipFile(wheel) as archive:
        (name,) = (n for n in archive.namelist() if n.endswith(".dist-info/licenses/LICENSE"))
        assert archive.read(name) == (ROOT / "LICENSE").read_bytes()


def test_the_installed_package_is_not_the_tree(site: Path, tmp_path: Path) -> None:
    program = "import moe_serve, moe_serve.comm as c; print(moe_serve.__file__); print(c.__file__)"
    done = run_installed(site, tmp_path, sys.executable, "-c", program)
    assert done.returncode == 0, done.stderr
    expected = [site / "moe_serve" / "__init__.py", site / "moe_serve" / "comm" / "__init__.py"]
    assert [Path(line) for line in done.stdout.splitlines()] == expected


def test_the_installed_command_writes_text(site: Path, tmp_path: Path) -> None:
    command = str(site / "bin" / "moe-serve")
    prompt = "Once upon a time"
    done = run_installed(site, tmp_path, command, "generate", prompt, "--max-tokens", "8", "--json")
    assert done.returncode == 0, done.stderr
    (output,) = json.loads(done.stdout)["outputs"]
    assert len(output["token_ids"]) == 8
    assert output["finish_reason"] == "length"
    assert output["text"].strip()
    assert list(tmp_path.iterdir()) == []  # nothing is left in the home
