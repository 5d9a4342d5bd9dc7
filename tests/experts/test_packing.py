"""Writing a store: it appears whole or not at all, whatever interrupts it."""

from __future__ import annotations

import errno
import fcntl
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
from torch import Tensor

from moe_serve.errors import CheckpointError, StoreError
from moe_serve.experts.packing import write_store
from moe_serve.experts.store import ExpertStore
from tests.experts.stores import LAYOUT, batches, written

OLD = b"what was there before"


@pytest.fixture
def path(tmp_path: Path) -> Path:
    """Where a store goes, in place of another file."""
    path = tmp_path / "model.experts"
    path.write_bytes(OLD)
    return path


def assert_untouched(path: Path) -> None:
    assert os.listdir(path.parent) == [path.name]
    assert path.read_bytes() == OLD


def test_a_store_takes_the_place_of_another_file(path: Path) -> None:
    seen: list[tuple[int, int]] = []
    write_store(path, LAYOUT, batches(size=2), lambda *call: seen.append(call))
    assert os.listdir(path.parent) == [path.name]
    assert path.stat().st_size == LAYOUT.total_bytes == 81920
    # the header, then five experts and three, two by two
    sizes = [4096, 16384, 16384, 8192, 24576, 12288]
    assert seen == [(sum(sizes[: i + 1]), 81920) for i in range(len(sizes))]
    ExpertStore.open(path, LAYOUT).close()


def test_folders_are_made(tmp_path: Path) -> None:
    path = tmp_path / "a" / "b" / "model.experts"
    write_store(path, LAYOUT, batches())
    ExpertStore.open(path, LAYOUT).close()


def test_an_interrupt_leaves_nothing(path: Path) -> None:
    def interrupt(done: int, _: int) -> None:
        if done > 30000:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        write_store(path, LAYOUT, batches(), interrupt)
    assert_untouched(path)


def test_weights_that_cannot_be_read_leave_nothing(path: Path) -> None:
    def broken() -> Iterator[Tensor]:
        yield next(batches())
        raise CheckpointError("NaN")

    with pytest.raises(CheckpointError, match="NaN"):
        write_store(path, LAYOUT, broken())
    assert_untouched(path)


def test_too_little_space_is_seen_before_anything_is_written(
    path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    real = os.statvfs(path.parent)
    fields = list(real)
    fields[4] = (LAYOUT.total_bytes - 1) // real.f_frsize  # f_bavail
    monkeypatch.setattr(os, "statvfs", lambda _: os.statvfs_result(fields))
    asked: list[int] = []

    def counted() -> Iterator[Tensor]:
        asked.append(1)
        yield from batches()

    with pytest.raises(StoreError, match=r"needs 81920 bytes \(.* GiB\) of disk, but .* are free"):
        write_store(path, LAYOUT, counted())
    assert not asked
    assert_untouched(path)


@pytest.mark.parametrize("name", ["write", "fdatasync", "fsync", "replace"])
@pytest.mark.parametrize(
    ("number", "words"),
    [
        (errno.ENOSPC, r"No space left on device; it needs 81920 bytes \(.*, and .* are free in "),
        (errno.EIO, "Input/output error; name a folder that can be written to"),
    ],
    ids=["full", "broken"],
)
def test_a_disk_that_refuses_leaves_nothing(
    path: Path, monkeypatch: pytest.MonkeyPatch, name: str, number: int, words: str
) -> None:
    def refuse(*_: object) -> int:
        raise OSError(number, os.strerror(number))

    with monkeypatch.context() as patch:
        patch.setattr(os, name, refuse)
        with pytest.raises(StoreError, match=f"^{path}: cannot be written: {words}"):
            write_store(path, LAYOUT, batches())
    assert_untouched(path)


LIMITED = """
import resource, sys
from pathlib import Path
from moe_serve.errors import StoreError
from tests.experts.stores import written

resource.setrlimit(resource.RLIMIT_FSIZE, (40000, 40000))
try:
    written(Path(sys.argv[1]))
except StoreError as error:
    print(error)
"""


def test_a_file_that_may_not_grow_is_an_error(path: Path, repository: Path) -> None:
    done = subprocess.run(
        [sys.executable, "-c", LIMITED, str(path.parent)],
        cwd=repository, capture_output=True, text=True, check=True,
    )  # fmt: skip
    assert done.stdout.startswith(f"{path}: cannot be written: File too large; it needs 81920")
    assert_untouched(path)


def test_a_folder_that_cannot_be_is_an_error(path: Path) -> None:
    with pytest.raises(StoreError, match="cannot be written: File exists; name a folder that"):
        write_store(path / "model.experts", LAYOUT, batches())
    (path.parent / "folder" / "inner").mkdir(parents=True)
    with pytest.raises(StoreError, match="cannot be written: Is a directory; name a folder that"):
        write_store(path.parent / "folder", LAYOUT, batches())


def test_what_a_killed_process_left_is_removed_and_nothing_else(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    kept = ["model.experts.part-7-0", "model.experts.partial", "other.experts.part-1-0"]
    gone = ["model.experts.part-1-0", f"model.experts.part-{os.getpid()}-0"]
    for name in (*kept, *gone):
        (tmp_path / name).write_bytes(b"x")
    with (tmp_path / kept[0]).open("r+b") as alive:
        fcntl.flock(alive, fcntl.LOCK_EX)
        written(tmp_path)
    assert sorted(os.listdir(tmp_path)) == sorted(["model.experts", *kept])
    assert len(caplog.messages) == 2


def test_a_writer_that_is_killed_leaves_nothing_for_long(tmp_path: Path, repository: Path) -> None:
    code = """
import os, sys
from pathlib import Path
from moe_serve.experts.packing import write_store
from tests.experts.stores import LAYOUT, batches

def kill(done, total):
    if done > 30000:
        os.kill(os.getpid(), 9)

write_store(Path(sys.argv[1]) / "model.experts", LAYOUT, batches(), kill)
"""
    subprocess.run([sys.executable, "-c", code, str(tmp_path)], cwd=repository, check=False)
    (left,) = os.listdir(tmp_path)
    assert left.startswith("model.experts.part-")
    written(tmp_path)
    assert os.listdir(tmp_path) == ["model.experts"]


def test_two_writers_at_once_do_not_clash(path: Path) -> None:
    # the second begins and ends while the first is half done
    def nested() -> Iterator[Tensor]:
        for index, batch in enumerate(batches()):
            yield batch
            if index == 1:
                written(path.parent)
                assert len(os.listdir(path.parent)) == 2

    write_store(path, LAYOUT, nested())
    assert os.listdir(path.parent) == [path.name]
    ExpertStore.open(path, LAYOUT).close()


def test_records_of_another_number_or_size_are_our_mistake(path: Path) -> None:
    with pytest.raises(AssertionError):
        write_store(path, LAYOUT, list(batches())[:-1])
    with pytest.raises(AssertionError):
        write_store(path, LAYOUT, list(batches())[1:])
    assert_untouched(path)
