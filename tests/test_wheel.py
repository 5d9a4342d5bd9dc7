"""The wheel: made from the sdist, installed away from the tree, and it writes text there.

With a compiler it holds the native kernels; without one it installs all the same.
"""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
import sysconfig
import zipfile
import zlib
from pathlib import Path
from shutil import copytree, ignore_patterns, which
from typing import Any

import pytest

ROOT = Path(__file__).resolve().parent.parent
LEFT_BEHIND = ignore_patterns(
    ".git", ".venv", ".*_cache", ".hypothesis", "__pycache__", "build", "dist", "*.egg-info", "*.so"
)
LIBRARY = re.compile(r"moe_serve/kernels/_cpu\.[^/]+\.so")
CXX = os.environ.get("CXX") or sysconfig.get_config_var("CXX") or "c++"
needs_compiler = pytest.mark.skipif(
    which(CXX.split()[0]) is None, reason=f"no C++ compiler: {CXX.split()[0]}"
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
    install(wheel, folder)
    return folder


@pytest.fixture(scope="module")
def site_without_compiler(wheel: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The same, installed from the sdist on a machine whose compiler always fails."""
    (sdist,) = wheel.parent.glob("*.tar.gz")
    folder = tmp_path_factory.mktemp("site_without_compiler")
    false = which("false")
    assert false is not None
    install(sdist, folder, CC=false, CXX=false)
    return folder


def install(package: Path, site: Path, **variables: str) -> None:
    command = [sys.executable, "-m", "pip", "install", "--quiet", "--no-deps", "--no-index"]
    command += ["--no-build-isolation", "--no-cache-dir", "--no-compile"]
    command += ["--disable-pip-version-check", "--target", str(site), str(package)]
    done = subprocess.run(command, env=os.environ | variables, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


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
            if path.suffix not in (".cpp", ".h", ".so"):
                expected[path.relative_to(ROOT).as_posix()] = zlib.crc32(path.read_bytes())
    with zipfile.ZipFile(wheel) as archive:
        found = {i.filename: i.CRC for i in archive.infolist() if ".dist-info/" not in i.filename}
    assert {name: crc for name, crc in found.items() if not LIBRARY.fullmatch(name)} == expected
    assert {"moe_serve/comm/__init__.py", "moe_serve/py.typed"} <= found.keys()


def test_the_wheel_carries_its_licence(wheel: Path) -> None:
    with zipfile.ZipFile(wheel) as archive:
        (name,) = (n for n in archive.namelist() if n.endswith(".dist-info/licenses/LICENSE"))
        assert archive.read(name) == (ROOT / "LICENSE").read_bytes()


@needs_compiler
def test_the_wheel_holds_the_native_kernels_and_names_its_platform(wheel: Path) -> None:
    with zipfile.ZipFile(wheel) as archive:
        libraries = [name for name in archive.namelist() if LIBRARY.fullmatch(name)]
    assert len(libraries) == 1
    platform = sysconfig.get_platform().replace("-", "_").replace(".", "_")
    assert wheel.name.endswith(f"-{platform}.whl")


def test_the_installed_package_is_not_the_tree(site: Path, tmp_path: Path) -> None:
    program = "import moe_serve, moe_serve.comm as c; print(moe_serve.__file__); print(c.__file__)"
    done = run_installed(site, tmp_path, sys.executable, "-c", program)
    assert done.returncode == 0, done.stderr
    expected = [site / "moe_serve" / "__init__.py", site / "moe_serve" / "comm" / "__init__.py"]
    assert [Path(line) for line in done.stdout.splitlines()] == expected


def generate(site: Path, home: Path) -> subprocess.CompletedProcess[str]:
    """Run the installed command, which must leave nothing in the home."""
    command = [str(site / "bin" / "moe-serve"), "generate", "Once upon a time", "--json"]
    done = run_installed(site, home, *command, "--max-tokens", "8")
    assert done.returncode == 0, done.stderr
    assert list(home.iterdir()) == []
    return done


@pytest.fixture(scope="module")
def report(site: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """What the installed command prints."""
    found: dict[str, Any] = json.loads(generate(site, tmp_path_factory.mktemp("home")).stdout)
    return found


def test_the_installed_command_writes_text(report: dict[str, Any]) -> None:
    (output,) = report["outputs"]
    assert len(output["token_ids"]) == 8
    assert output["finish_reason"] == "length"
    assert output["text"].strip()


@needs_compiler
def test_the_installed_command_uses_the_native_kernels(report: dict[str, Any]) -> None:
    assert report["numerics_id"].startswith("cpu")


def test_an_install_without_a_compiler_writes_text_and_says_what_it_lacks(
    site_without_compiler: Path, tmp_path: Path
) -> None:
    assert not list(site_without_compiler.rglob("*.so"))
    done = generate(site_without_compiler, tmp_path)
    report = json.loads(done.stdout)
    assert report["numerics_id"].startswith("reference-")
    assert len(report["outputs"][0]["token_ids"]) == 8
    assert done.stderr.count("the native library is not built; install a C++ compiler") == 1
