"""Reading expert records: all that a disk, or another process, can do to the file."""

from __future__ import annotations

import errno
import fcntl
import logging
import os
import threading
import zlib
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from moe_serve.errors import StoreError
from moe_serve.experts.records import RecordHeader
from moe_serve.experts.store import ExpertStore
from moe_serve.experts.store_layout import StoreLayout
from moe_serve.kernels.moe.base import HEADER_BYTES
from tests.experts.stores import LAYOUT, slot, weights_of, written

ALL = [(stored.layer, expert, stored.record_bytes) for stored, expert in LAYOUT.records()]
RealPreadv = Callable[[int, Sequence[memoryview], int], int]


def assert_all_read(store: ExpertStore) -> None:
    for layer, expert, record_bytes in ALL:
        into = slot(record_bytes)
        store.read(layer, expert, into)
        assert torch.equal(into[HEADER_BYTES:], weights_of(layer, expert, record_bytes))


def edited(path: Path, place: int, data: bytes) -> None:
    with path.open("r+b") as file:
        file.seek(place)
        file.write(data)


def instead(path: Path, make: Callable[[Path], None]) -> None:
    path.unlink()
    make(path)


def with_checksum(header: bytes) -> bytes:
    """Return a store's header with the checksum that fits what it says."""
    return header[:-4] + zlib.crc32(header[:-4]).to_bytes(4, "little")


def refuse_direct_reads(monkeypatch: pytest.MonkeyPatch) -> None:
    """Have the system refuse what some file systems do: direct reads of an open file."""
    control = fcntl.fcntl

    def refuse(descriptor: int, command: int, argument: int = 0) -> int:
        if argument & getattr(os, "O_DIRECT", 0):
            raise OSError(errno.EINVAL, "Invalid argument")
        return control(descriptor, command, argument)

    monkeypatch.setattr(fcntl, "fcntl", refuse)


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return written(tmp_path)


def test_what_was_written_is_read(path: Path) -> None:
    with ExpertStore.open(path, LAYOUT) as store:
        assert store.bytes_read == 0
        assert_all_read(store)
        assert store.bytes_read == sum(record_bytes for _, _, record_bytes in ALL)
        assert (store.record_bytes(2), store.record_bytes(4)) == (8192, 12288)
        into = slot(12288)
        store.read(4, 2, into)
    header = RecordHeader.unpack(bytes(into[:HEADER_BYTES].tolist()))
    crc32 = zlib.crc32(weights_of(4, 2, 12288).numpy().tobytes())
    assert header == RecordHeader(1, torch.bfloat16, bytes(range(16)), 4, 2, 12288, crc32)


def test_a_record_is_read_in_chunks_of_any_order(path: Path) -> None:
    with ExpertStore.open(path, LAYOUT) as store:
        into = slot(12288)
        for begin, end in ((8192, 12288), (0, 4096)):
            store.read_chunk(4, 1, into, begin, end)
        assert into[4096:8192].eq(170).all()
        with pytest.raises(StoreError, match=r"layer 4, expert 1 is damaged"):
            store.verify(4, 1, into)
        store.read_chunk(4, 1, into, 4096, 8192)
        store.verify(4, 1, into)
        with pytest.raises(StoreError, match=r"layer 4, expert 0 is another record.* expert 1;"):
            store.verify(4, 0, into)
        with pytest.raises(AssertionError):
            store.read_chunk(4, 1, into, 0, 100)
        with pytest.raises(AssertionError):
            store.read_chunk(4, 3, into, 0, 4096)


BREAKS: dict[str, tuple[Callable[[Path], object], str]] = {
    "absent": (lambda path: path.unlink(), "cannot be opened: No such file"),
    "empty": (lambda path: os.truncate(path, 0), "has 0 bytes, less than a header"),
    "cut": (lambda path: os.truncate(path, 80000), "has 80000 bytes; by its header it must have"),
    "longer": (lambda path: os.truncate(path, 90000), "has 90000 bytes; by its header it must"),
    "garbage": (lambda path: edited(path, 0, os.urandom(4096)), "is no store of experts"),
    "flipped": (lambda path: edited(path, 60, b"\xff"), "its checksum does not fit"),
    "older": (
        lambda path: edited(path, 0, with_checksum(b"MOESTORE\0\0\0\0" + LAYOUT.pack()[12:])),
        "is of version 0; this program reads version 1",
    ),
    "foreign": (
        lambda path: edited(path, 0, replace(LAYOUT, model_id=b"m" * 16).pack()),
        "is of model 6d6d6d6d6d6d6d6d6d6d6d6d6d6d6d6d; wanted is 0001",
    ),
    "numerics": (
        lambda path: edited(path, 0, replace(LAYOUT, numerics_id="cpu1-plain").pack()),
        "was packed for numerics cpu1-plain; wanted is cpu1-test-bfloat16",
    ),
    "folder": (lambda path: instead(path, os.mkdir), "is no regular file"),
    "pipe": (lambda path: instead(path, os.mkfifo), "is no regular file"),
}


@pytest.mark.parametrize("name", BREAKS)
def test_a_file_that_is_not_this_store_is_refused(path: Path, name: str) -> None:
    break_it, words = BREAKS[name]
    break_it(path)
    num_open = len(os.listdir("/proc/self/fd")) if Path("/proc/self/fd").exists() else None
    with pytest.raises(StoreError, match=f"^{path}: .*{words}"):
        ExpertStore.open(path, LAYOUT)
    if num_open is not None:
        assert len(os.listdir("/proc/self/fd")) == num_open


@pytest.mark.parametrize(
    "place", [0, 9, 15, 20, 33, 37, 41, 48, 63, 64, 5000, 8191], ids=lambda place: f"byte{place}"
)
def test_a_flipped_bit_in_a_record_is_never_used(path: Path, place: int) -> None:
    at = 4096 + 3 * 8192 + place
    data = path.read_bytes()[at]
    edited(path, at, bytes([data ^ 1]))
    with ExpertStore.open(path, LAYOUT) as store:
        into = slot(8192)
        store.read(2, 2, into)
        store.read(2, 4, into)
        if 52 <= place < 64:  # padding of the header, which nothing reads
            store.read(2, 3, into)
            return
        with pytest.raises(StoreError, match=r"layer 2, expert 3 .*; remove the file") as caught:
            store.read(2, 3, into)
        assert str(caught.value).startswith(f"{path}: ")


def test_a_record_in_anothers_place_is_never_used(path: Path) -> None:
    edited(path, 4096 + 8192, path.read_bytes()[4096 : 4096 + 8192])
    with (
        ExpertStore.open(path, LAYOUT) as store,
        pytest.raises(StoreError, match=r"expert 1 is another record: it has expert 0"),
    ):
        store.read(2, 1, slot(8192))


@pytest.mark.parametrize("left", [0, 4096, 4096 + 100, 4096 + 4096, 4096 + 8191])
def test_a_file_cut_while_it_is_open_is_an_error(path: Path, left: int) -> None:
    with ExpertStore.open(path, LAYOUT) as store:
        assert_all_read(store)
        os.truncate(path, left)
        with pytest.raises(StoreError, match=r"layer 2, expert 0 is cut off: the file had 81920"):
            store.read(2, 0, slot(8192))


def test_a_file_that_is_replaced_by_rename_is_read_on(path: Path, tmp_path: Path) -> None:
    other = replace(LAYOUT, model_id=b"m" * 16)
    (tmp_path / "other").mkdir()
    with ExpertStore.open(path, LAYOUT) as store:
        written(tmp_path / "other", other).replace(path)
        assert_all_read(store)
    with ExpertStore.open(path, other) as store:
        assert_all_read(store)


def test_a_file_that_is_overwritten_in_place_is_an_error(path: Path, tmp_path: Path) -> None:
    (tmp_path / "other").mkdir()
    other = written(tmp_path / "other", replace(LAYOUT, model_id=b"m" * 16))
    with ExpertStore.open(path, LAYOUT) as store:
        path.write_bytes(other.read_bytes())
        with pytest.raises(StoreError, match="is another record: it has model_id b'mmmm"):
            store.read(4, 0, slot(12288))


def test_a_read_error_names_the_record_and_the_next_read_goes_on(
    path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def broken(*_: object) -> int:
        raise OSError(errno.EIO, os.strerror(errno.EIO))

    with ExpertStore.open(path, LAYOUT) as store:
        with monkeypatch.context() as patch:
            patch.setattr(os, "preadv", broken)
            with pytest.raises(StoreError, match=r"layer 4, expert 1 cannot be read: Input/output"):
                store.read(4, 1, slot(12288))
        assert_all_read(store)


@pytest.mark.parametrize("is_direct", [True, False])
def test_short_reads_go_on_where_they_ended(
    path: Path, monkeypatch: pytest.MonkeyPatch, is_direct: bool
) -> None:
    if not is_direct:
        refuse_direct_reads(monkeypatch)
    preadv: RealPreadv = os.preadv
    counts: list[int] = []

    def short(descriptor: int, buffers: Sequence[memoryview], offset: int) -> int:
        counts.append(min(5000, preadv(descriptor, buffers, offset)))
        buffers[0][counts[-1] :] = bytes(len(buffers[0]) - counts[-1])
        return counts[-1]

    monkeypatch.setattr(os, "preadv", short)
    with ExpertStore.open(path, LAYOUT) as store:
        was_direct = store.is_direct
        assert_all_read(store)
        assert store.bytes_read == sum(record_bytes for _, _, record_bytes in ALL)
        assert store.is_direct == was_direct, "a read that goes on was refused"
    assert 5000 in counts


needs_direct = pytest.mark.skipif(
    not hasattr(os, "O_DIRECT"), reason="this system has no direct reads"
)


@needs_direct
def test_direct_reads_are_asked_for(path: Path, caplog: pytest.LogCaptureFixture) -> None:
    with ExpertStore.open(path, LAYOUT) as store:
        flags = fcntl.fcntl(store._descriptor, fcntl.F_GETFL)
        assert store.is_direct == bool(flags & os.O_DIRECT) == (not caplog.messages)


@needs_direct
def test_where_direct_reads_are_refused_it_is_said_once(
    path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    refuse_direct_reads(monkeypatch)
    with ExpertStore.open(path, LAYOUT) as store:
        assert not store.is_direct
        assert_all_read(store)
    assert len(caplog.messages) == 1
    assert "no direct reads (Invalid argument); experts are read through the" in caplog.text


@needs_direct
def test_where_direct_reads_fail_later_it_is_said_once(
    path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    preadv: RealPreadv = os.preadv
    meet = threading.Barrier(2)

    def refuse(descriptor: int, buffers: Sequence[memoryview], offset: int) -> int:
        if fcntl.fcntl(descriptor, fcntl.F_GETFL) & os.O_DIRECT:
            meet.wait(10)  # both threads are refused
            raise OSError(errno.EINVAL, "Invalid argument")
        return preadv(descriptor, buffers, offset)

    monkeypatch.setattr(os, "preadv", refuse)
    with ExpertStore.open(path, LAYOUT) as store:
        if not store.is_direct:
            pytest.skip("this file system has no direct reads")
        caplog.clear()
        run_at_once([lambda: assert_all_read(store)] * 2)
        assert not store.is_direct
        assert_all_read(store)
    assert len(caplog.messages) == 1


def test_an_error_of_a_buffered_read_is_an_error(
    path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(*_: object) -> int:
        raise OSError(errno.EINVAL, "Invalid argument")

    with ExpertStore.open(path, LAYOUT) as store:
        monkeypatch.setattr(os, "preadv", refuse)
        with pytest.raises(StoreError, match="cannot be read: Invalid argument"):
            store.read(2, 0, slot(8192))


def test_many_threads_read_at_once(path: Path) -> None:
    with ExpertStore.open(path, LAYOUT) as store:
        run_at_once([lambda: assert_all_read(store)] * 6)
        assert store.bytes_read == 6 * sum(record_bytes for _, _, record_bytes in ALL)


def run_at_once(tasks: Sequence[Callable[[], None]]) -> None:
    """Run each task in a thread of its own; raise what one of them raises."""
    errors: list[BaseException] = []

    def guarded(task: Callable[[], None]) -> None:
        try:
            task()
        except BaseException as error:
            errors.append(error)

    threads = [threading.Thread(target=guarded, args=(task,)) for task in tasks]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(30)
        assert not thread.is_alive()
    if errors:
        raise errors[0]


def test_a_closed_store_reads_nothing(path: Path) -> None:
    store = ExpertStore.open(path, LAYOUT)
    store.close()
    store.close()
    with pytest.raises(StoreError, match="cannot be read: Bad file descriptor"):
        store.read(2, 0, slot(8192))


def test_buffers_of_another_kind_are_refused(path: Path) -> None:
    with ExpertStore.open(path, LAYOUT) as store:
        for into in (
            slot(4096),
            slot(8192 + 64)[64:],
            slot(16384)[::2],
            slot(8192).view(torch.int8),
        ):
            with pytest.raises(AssertionError):
                store.read(2, 0, into)


def test_a_store_without_records(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    layout = StoreLayout(bytes(16), "numerics", 0, torch.float32, ())
    with (
        caplog.at_level(logging.ERROR),
        ExpertStore.open(written(tmp_path, layout), layout) as store,
    ):
        assert store.bytes_read == 0
