"""Memory for weights: aligned, zero, and refused with a number where there is none."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest
import torch

from moe_serve.errors import CapacityError
from moe_serve.kernels.native import memory as memory_module
from moe_serve.kernels.native.memory import GrowingMemory, allocate

HUGE_PAGE = 2**21
PAGE = 4096


@pytest.mark.parametrize(
    ("num_bytes", "alignment"), [(1, 4096), (3 * 4096 + 5, 4096), (5 * HUGE_PAGE + 5, HUGE_PAGE)]
)
def test_memory_is_aligned_and_zero(num_bytes: int, alignment: int) -> None:
    memory = allocate(num_bytes)
    assert memory.shape == (num_bytes,)
    assert memory.dtype == torch.uint8
    assert memory.data_ptr() % alignment == 0
    assert not memory.any()
    memory.fill_(1)  # it can be written


def test_no_bytes_are_no_error() -> None:
    assert allocate(0).shape == (0,)


def test_no_memory_is_a_capacity_error() -> None:
    with pytest.raises(CapacityError, match=f"no memory for {2**60} bytes of weights"):
        allocate(2**60)


needs_proc = pytest.mark.skipif(
    not Path("/proc/self/status").exists(), reason="this system does not tell resident memory"
)


@pytest.mark.parametrize(("most", "sizes"), [(3, (1, 3, 2, 0, 3)), (5000, (10, 5000, 2500, 4000))])
def test_what_stays_in_use_stays_where_it_is(most: int, sizes: tuple[int, ...]) -> None:
    memory = GrowingMemory(most * PAGE, 0)
    assert memory.tensor.shape == (most * PAGE,)
    assert memory.tensor.data_ptr() % (HUGE_PAGE if most > 2048 else PAGE) == 0
    pages = memory.tensor.view(most, PAGE)
    first = memory.tensor.data_ptr()
    known: dict[int, int] = {}
    for step, size in enumerate(sizes):
        memory.resize(size * PAGE)
        known = {page: value for page, value in known.items() if page < size}
        for page, value in known.items():
            assert bool(pages[page].eq(value).all())
        for page in range(size):
            if page not in known:
                assert not pages[page].any(), "what was given back comes back as zeros"
                known[page] = (page + step) % 250 + 1
                pages[page] = known[page]
    assert memory.tensor.data_ptr() == first


def test_it_lives_as_long_as_a_view_of_it() -> None:
    pages = GrowingMemory(4 * PAGE, 4 * PAGE).tensor.view(4, PAGE)[1:]
    others = [GrowingMemory(4 * PAGE, 4 * PAGE) for _ in range(8)]
    for other in others:
        other.tensor.fill_(9)
    assert not pages.any()
    pages.fill_(7)
    assert bool(pages.eq(7).all())


RESIDENT = """
from pathlib import Path
from moe_serve.kernels.native.memory import GrowingMemory

def resident():
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith("VmRSS:")) * 1024

size = 2**26
start = resident()
memory = GrowingMemory(64 * size, size)  # far more addresses than there is memory to fill
for num_bytes in (size, size // 4, 0, size):
    memory.resize(num_bytes)
    memory.tensor[:num_bytes].fill_(1)
    print((resident() - start) / size)
"""


@needs_proc
def test_only_what_is_in_use_counts_as_memory(repository: Path) -> None:
    done = subprocess.run(
        [sys.executable, "-c", RESIDENT], cwd=repository, capture_output=True, text=True
    )
    assert done.stderr == ""
    shares = [float(line) for line in done.stdout.splitlines()]
    assert shares == pytest.approx([1.0, 0.25, 0.0, 1.0], abs=0.1)


def test_without_addresses_for_the_most_it_stays_as_it_is_at_first() -> None:
    memory = GrowingMemory(2**60, 3 * PAGE)
    assert memory.tensor.numel() == 3 * PAGE
    memory.tensor.fill_(7)
    with pytest.raises(CapacityError):
        GrowingMemory(2**60, 2**59)


def test_sizes_beyond_the_most_are_a_fault() -> None:
    memory = GrowingMemory(2 * PAGE, PAGE)
    for size in (3 * PAGE, -1):
        with pytest.raises(AssertionError):
            memory.resize(size)


def test_a_system_that_cannot_reserve_gives_all_of_it(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(memory_module, "_mprotect", lambda: None)
    memory = GrowingMemory(4 * PAGE, PAGE)
    memory.tensor.fill_(3)
    memory.resize(2 * PAGE)
    assert memory.tensor.shape == (4 * PAGE,)
    assert bool(memory.tensor.eq(3).all())


LIMITED = """
import resource
from moe_serve.errors import CapacityError
from moe_serve.kernels.native.memory import GrowingMemory

used = next(int(line.split()[1]) for line in open("/proc/self/status") if "VmData" in line) * 1024
limit = used + 96 * 2**20
resource.setrlimit(resource.RLIMIT_DATA, (limit, limit))
memory = GrowingMemory(2**33, 2**25)
memory.tensor[: 2**25] = 5
try:
    memory.resize(2**28)
except CapacityError as error:
    print(error)
assert bool(memory.tensor[: 2**25].eq(5).all())
memory.resize(2**26)
memory.tensor[: 2**26] = 6
memory.resize(0)
memory.resize(2**26)
print(int(memory.tensor[: 2**26].count_nonzero()))
"""


@needs_proc
def test_a_limit_of_the_process_counts_what_is_in_use_only(repository: Path) -> None:
    done = subprocess.run(
        [sys.executable, "-c", LIMITED], cwd=repository, capture_output=True, text=True
    )
    assert done.stderr == ""
    message, left = done.stdout.splitlines()
    assert message.startswith(f"no memory for {2**28} bytes of experts (Cannot allocate memory); ")
    assert "lower expert_cache_slots or expert_cache_gb" in message
    assert left == "0"


@needs_proc
def test_what_is_not_in_use_cannot_be_read(repository: Path) -> None:
    program = (
        "from moe_serve.kernels.native.memory import GrowingMemory\n"
        "memory = GrowingMemory(8192, 8192)\n"
        "memory.resize(4096)\n"
        "print(int(memory.tensor[4095]), flush=True)\n"
        "print(int(memory.tensor[4096]), flush=True)\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", program], cwd=repository, capture_output=True, text=True
    )
    assert (done.returncode, done.stdout) == (-11, "0\n")
