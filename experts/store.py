"""Expert records on disk: one packed file, read record by record, each checked before it is used.

Reads by preadv, never through a memory map: a file that is cut short under a map kills the process.
They bypass the page cache where the file system lets them (O_DIRECT), so that what a budget of
memory holds is not held a second time. Knows no slots and no order of reads.
"""

from __future__ import annotations

import errno
import fcntl
import logging
import os
import stat
import threading
from pathlib import Path
from types import TracebackType
from typing import Self

import torch
from torch import Tensor

from moe_serve.errors import StoreError
from moe_serve.experts.records import RECORD_ALIGNMENT, RecordHeader
from moe_serve.experts.store_layout import (
    MAX_STORE_HEADER_BYTES,
    StoredLayer,
    StoreLayout,
    record_crc,
)
from moe_serve.kernels.moe.base import HEADER_BYTES

logger = logging.getLogger(__name__)

_REMEDY = "remove the file: it is packed anew at the next start"
_CACHED = "experts are read through the page cache, which takes memory beside the budget"


class ExpertStore:
    """The records of a model's experts in a file that stays open.

    Another file may take its name meanwhile: this one is read on. Any number of threads may read
    at once; `close` only when none does.
    """

    def __init__(self, path: Path, layout: StoreLayout, descriptor: int) -> None:
        """Take over an open file that was checked; use `open`."""
        self.path = path
        self.layout = layout
        self._descriptor = descriptor
        self._layers = {stored.layer: stored for stored in layout.layers}
        self._first_bytes = layout.first_bytes()
        self._lock = threading.Lock()
        self._bytes_read = 0
        self._is_direct = False
        self._read_directly()

    @classmethod
    def open(cls, path: Path, expected: StoreLayout) -> Self:
        """Open the file at `path`, which must be all of `expected`.

        Raises StoreError that says why where it is absent, of another model, numerics or version,
        damaged in its header, or not of its full length; records are checked as they are read.
        """
        try:
            # without waiting, should it be a pipe
            descriptor = os.open(path, os.O_RDONLY | os.O_CLOEXEC | os.O_NONBLOCK)
        except OSError as error:
            raise StoreError(f"{path}: cannot be opened: {error.strerror}") from error
        try:
            problem = _problem(descriptor, expected)
            if problem is not None:
                raise StoreError(f"{path}: {problem}")
            return cls(path, expected, descriptor)
        except BaseException:
            os.close(descriptor)
            raise

    def close(self) -> None:
        """Close the file; to do so twice does no harm."""
        descriptor, self._descriptor = self._descriptor, -1
        if descriptor >= 0:
            os.close(descriptor)

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.close()

    @property
    def bytes_read(self) -> int:
        """How many bytes of records were read so far."""
        return self._bytes_read

    @property
    def is_direct(self) -> bool:
        """Whether reads bypass the page cache."""
        return self._is_direct

    @property
    def descriptor(self) -> int:
        """The open file, -1 once it is closed; another one who reads may do so at any place."""
        return self._descriptor

    def layer(self, layer: int) -> StoredLayer:
        """Return what the file holds of `layer`."""
        return self._layers[layer]

    def record_bytes(self, layer: int) -> int:
        """Return the size of a record of `layer`."""
        return self._layers[layer].record_bytes

    def read(self, layer: int, expert: int, into: Tensor) -> None:
        """Fill `into`, uint8 [record_bytes], with an expert's record, and verify it.

        layer: of the model, counted with those that have no experts. `into` must be contiguous and
        begin at a multiple of 4,096. Raises StoreError naming layer, expert and file; what `into`
        then holds is not to be used.
        """
        self.read_chunk(layer, expert, into, 0, into.shape[0])
        self.verify(layer, expert, into)

    def read_chunk(self, layer: int, expert: int, into: Tensor, begin: int, end: int) -> None:
        """Fill bytes `begin` to `end`, multiples of 4,096, of `into`: a part of what `read` does.

        Raises StoreError. A record that was read in chunks must be verified before it is used.
        """
        stored = self._stored(layer, expert)
        assert into.dtype == torch.uint8, into.dtype
        assert into.shape == (stored.record_bytes,), (into.shape, stored.record_bytes)
        assert into.is_contiguous()
        assert into.data_ptr() % RECORD_ALIGNMENT == 0, into.data_ptr()
        assert 0 <= begin <= end <= stored.record_bytes, (begin, end, stored.record_bytes)
        assert begin % RECORD_ALIGNMENT == end % RECORD_ALIGNMENT == 0, (begin, end)
        first = self._first_bytes[layer] + expert * stored.record_bytes
        data = into.numpy().data
        while begin < end:
            try:
                count = self._read_some(data[begin:end], first + begin)
            except OSError as error:
                problem = f"cannot be read: {error.strerror}; check the disk, or {_REMEDY}"
                raise self._error(layer, expert, problem) from error
            if count == 0:
                problem = f"is cut off: the file had {self.layout.total_bytes} bytes; {_REMEDY}"
                raise self._error(layer, expert, problem)
            begin += count

    def verify(self, layer: int, expert: int, record: Tensor) -> None:
        """Check that `record`, uint8 [record_bytes], is the one wanted, and whole, by its crc32.

        Raises StoreError naming layer, expert and file.
        """
        stored = self._stored(layer, expert)
        data = record.numpy().data
        try:
            found = RecordHeader.unpack(bytes(data[:HEADER_BYTES]))
        except ValueError as error:
            raise self._error(layer, expert, f"is damaged: {error}; {_REMEDY}") from error
        wanted = self.layout.record_header(stored, expert, found.crc32)
        if found != wanted:
            fields = (name for name in RecordHeader.__slots__)
            names = [name for name in fields if getattr(found, name) != getattr(wanted, name)]
            shown = ", ".join(f"{name} {getattr(found, name)}" for name in names)
            raise self._error(layer, expert, f"is another record: it has {shown}; {_REMEDY}")
        crc32 = record_crc(data)
        if crc32 != found.crc32:
            raise self._error(
                layer,
                expert,
                f"is damaged: its crc32 is {crc32:08x}, not {found.crc32:08x}; {_REMEDY}",
            )

    def _stored(self, layer: int, expert: int) -> StoredLayer:
        stored = self._layers[layer]
        assert 0 <= expert < stored.num_experts, (layer, expert)
        return stored

    def _read_some(self, into: memoryview, offset: int) -> int:
        """Read at `offset`; return how many bytes came, 0 at the end. Raises OSError."""
        is_direct = self._is_direct
        try:
            # interrupted by a signal it is called again, by Python itself
            count = os.preadv(self._descriptor, [into], offset)
        except OSError as error:
            if not is_direct or error.errno != errno.EINVAL:
                raise
            self._read_through_page_cache(error)  # there are systems that refuse it only here
            return self._read_some(into, offset)
        if is_direct:  # the next read must begin at a whole block too; less than one is the end
            count -= count % RECORD_ALIGNMENT
        with self._lock:
            self._bytes_read += count
        return count

    def _read_directly(self) -> None:
        """Have reads bypass the page cache, if the system and the file system can do that."""
        flag = getattr(os, "O_DIRECT", 0)
        if not flag:
            logger.warning("%s: this system has no direct reads; %s", self.path, _CACHED)
            return
        try:
            flags = fcntl.fcntl(self._descriptor, fcntl.F_GETFL)
            fcntl.fcntl(self._descriptor, fcntl.F_SETFL, flags | flag)
            self._is_direct = True
        except OSError as error:
            logger.warning("%s: no direct reads (%s); %s", self.path, error.strerror, _CACHED)

    def _read_through_page_cache(self, why: OSError) -> None:
        """Give direct reads up, after one was refused; the first thread that comes here says so."""
        with self._lock:
            if not self._is_direct:
                return
            flags = fcntl.fcntl(self._descriptor, fcntl.F_GETFL)
            fcntl.fcntl(self._descriptor, fcntl.F_SETFL, flags & ~os.O_DIRECT)
            self._is_direct = False
        logger.warning("%s: no direct reads (%s); %s", self.path, why.strerror, _CACHED)

    def _error(self, layer: int, expert: int, problem: str) -> StoreError:
        return StoreError(f"{self.path}: the record of layer {layer}, expert {expert} {problem}")


def _problem(descriptor: int, expected: StoreLayout) -> str | None:
    """Say why an open file is not all of `expected`, or None."""
    status = os.fstat(descriptor)
    if not stat.S_ISREG(status.st_mode):
        return "is no regular file"
    try:
        found = StoreLayout.unpack(os.pread(descriptor, MAX_STORE_HEADER_BYTES, 0))
    except OSError as error:
        return f"cannot be read: {error.strerror}"
    except ValueError as error:
        return str(error)
    difference = expected.difference(found)
    if difference is None and status.st_size != expected.total_bytes:
        return f"has {status.st_size} bytes; by its header it must have {expected.total_bytes}"
    return difference
