"""Write a store of expert records: beside its place, then published by rename, or not at all.

Knows nothing of models and kernels: it is given packed records and adds what says which they are.
"""

from __future__ import annotations

import contextlib
import errno
import fcntl
import glob
import logging
import os
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from itertools import count
from pathlib import Path

import torch
from torch import Tensor

from moe_serve.errors import StoreError
from moe_serve.experts.store_layout import StoreLayout, record_crc
from moe_serve.kernels.moe.base import HEADER_BYTES

logger = logging.getLogger(__name__)

_PART = ".part-"
# of the disk, of a user's quota, of what the process may write
_TOO_LITTLE_SPACE = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)


@contextmanager
def one_at_a_time(folder: Path) -> Iterator[None]:
    """Wait until no other process of this machine is inside of this for the same folder.

    For those that would all write the same store: the first does, the others find it. Where a
    folder cannot be locked they do it all.
    """
    try:
        folder.mkdir(parents=True, exist_ok=True)
        descriptor = os.open(folder, os.O_RDONLY)
    except OSError:  # whoever writes there will say so
        yield
        return
    try:
        with contextlib.suppress(OSError):
            fcntl.flock(descriptor, fcntl.LOCK_EX)
        yield
    finally:
        os.close(descriptor)


def write_store(
    path: Path,
    layout: StoreLayout,
    batches: Iterable[Tensor],
    on_progress: Callable[[int, int], None] | None = None,
) -> None:
    """Write the store that `layout` describes to `path`, in place of what is there.

    batches: uint8 [num_records, record_bytes] each, packed records in the file's order, contiguous;
    their headers are written into them. A batch is on the disk before the next one is asked for, so
    it may be the same memory. on_progress(bytes written, bytes in all) follows each. The file
    appears whole, by rename; on any failure, an interrupt included, nothing of it is left. What a
    process that was killed left behind is removed. Several processes may write the same store at
    once: the last one's stays. Raises StoreError where the disk is full or refuses.
    """
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        _remove_abandoned(path)
        _check_space(path, layout)
        part, descriptor = _new_part(path)
    except OSError as error:
        raise _unwritable(path, layout, error) from error
    try:
        _write_all(descriptor, path, layout, batches, on_progress)
        try:
            os.fsync(descriptor)
            os.replace(part, path)
            part = path
            _sync_folder(path.parent)
        except OSError as error:
            raise _unwritable(path, layout, error) from error
    finally:
        if part != path:
            part.unlink(missing_ok=True)
        os.close(descriptor)


def _write_all(
    descriptor: int,
    path: Path,
    layout: StoreLayout,
    batches: Iterable[Tensor],
    on_progress: Callable[[int, int], None] | None,
) -> None:
    records = layout.records()
    done = 0

    def write(data: memoryview) -> None:
        nonlocal done
        try:
            _write(descriptor, data, done)
        except OSError as error:
            raise _unwritable(path, layout, error) from error
        done += len(data)
        if on_progress is not None:
            on_progress(done, layout.total_bytes)

    write(memoryview(layout.pack()))
    for batch in batches:
        for record in batch:
            stored, expert = next(records)
            assert record.shape == (stored.record_bytes,), (record.shape, stored)
            crc32 = record_crc(record.numpy().data)
            header = layout.record_header(stored, expert, crc32).pack()
            record[:HEADER_BYTES] = torch.frombuffer(bytearray(header), dtype=torch.uint8)
        write(batch.view(-1).numpy().data)
    assert done == layout.total_bytes, (done, layout.total_bytes)


def _write(descriptor: int, data: memoryview, offset: int) -> None:
    """Write `data`, wait until it is on the disk, and give its pages of memory back."""
    num_bytes = len(data)
    while len(data):
        data = data[os.write(descriptor, data) :]
    # as it goes on: at the end all of it could be in memory, beside the budget
    os.fdatasync(descriptor)
    if hasattr(os, "posix_fadvise"):
        os.posix_fadvise(descriptor, offset, num_bytes, os.POSIX_FADV_DONTNEED)


def _new_part(path: Path) -> tuple[Path, int]:
    """Make a file beside `path` to write to, locked for as long as it is open."""
    for attempt in count():
        part = path.with_name(f"{path.name}{_PART}{os.getpid()}-{attempt}")
        try:
            descriptor = os.open(part, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o666)
        except FileExistsError:  # another thread's, or of a process with this id on another machine
            continue
        fcntl.flock(descriptor, fcntl.LOCK_EX)
        if os.fstat(descriptor).st_nlink:
            return part, descriptor
        os.close(descriptor)  # taken for abandoned before it was locked
    raise AssertionError


def _remove_abandoned(path: Path) -> None:
    """Remove what other processes began to write and were killed over: what nobody has locked."""
    for part in path.parent.glob(f"{glob.escape(path.name)}{_PART}*"):
        try:
            descriptor = os.open(part, os.O_WRONLY | os.O_CLOEXEC | os.O_NONBLOCK)
        except OSError:  # its writer was quicker
            continue
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
            # by now another file may have this name
            if os.path.samestat(os.fstat(descriptor), part.stat()):
                part.unlink()
                logger.warning("%s: removed; its writer was killed", part)
        except (BlockingIOError, FileNotFoundError):  # it is being written, or was published
            continue
        finally:
            os.close(descriptor)


def _check_space(path: Path, layout: StoreLayout) -> None:
    """Raise StoreError where the file system has too little space, before anything is written."""
    free = _free_bytes(path.parent)
    if free < layout.total_bytes:
        raise StoreError(
            f"{path}: needs {_text(layout.total_bytes)} of disk, but {_text(free)} are free in "
            f"{path.parent}; free some, or name another folder"
        )


def _unwritable(path: Path, layout: StoreLayout, error: OSError) -> StoreError:
    message = f"{path}: cannot be written: {error.strerror}"
    if error.errno not in _TOO_LITTLE_SPACE:
        return StoreError(f"{message}; name a folder that can be written to")
    return StoreError(
        f"{message}; it needs {_text(layout.total_bytes)}, and {_text(_free_bytes(path.parent))} "
        f"are free in {path.parent}, by its file system: free some, or name another folder"
    )


def _free_bytes(folder: Path) -> int:
    """Return what this user may still write in `folder`."""
    status = os.statvfs(folder)
    return status.f_bavail * status.f_frsize


def _sync_folder(folder: Path) -> None:
    """Make a rename in `folder` outlast a loss of power."""
    descriptor = os.open(folder, os.O_RDONLY | os.O_CLOEXEC | os.O_DIRECTORY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _text(num_bytes: int) -> str:
    return f"{num_bytes} bytes ({num_bytes / 2**30:.3g} GiB)"
