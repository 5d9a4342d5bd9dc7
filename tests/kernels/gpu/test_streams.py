"""Streams: each in its own order, and among each other only in that which events make."""

from __future__ import annotations

import ctypes
import gc

import pytest
import torch

from moe_serve.errors import CapacityError
from moe_serve.kernels.gpu import streams as gpu_streams
from moe_serve.kernels.gpu.streams import CudaStreams, HostStreams, Streams, streams
from tests.kernels.gpu.late_streams import LateStreams

SIZE = 3 * 4096
CPU = torch.device("cpu")
KINDS = ("host", "late", pytest.param("cuda", marks=pytest.mark.gpu))


def made(kind: str) -> Streams:
    if kind == "late":
        return LateStreams()
    return streams(CPU if kind == "host" else torch.device("cuda"))


@pytest.mark.parametrize("kind", KINDS)
def test_copies_are_there_once_their_event_is_done(kind: str) -> None:
    given = made(kind)
    source = given.pinned(SIZE)
    assert source.shape == (SIZE,)
    assert source.data_ptr() % 4096 == 0
    assert not source.any()
    source[:] = 7
    into = torch.zeros(SIZE, dtype=torch.uint8, device=given.device)
    back = given.pinned(SIZE)
    up, down = given.stream(), given.stream(is_urgent=True)
    up.after(given.current().record())  # `into` is zeros by then
    up.copy(into, source)
    down.after(up.record())
    down.copy(back, into)
    event = down.record()
    event.wait()
    assert event.is_done()
    assert bool(back.eq(7).all())


@pytest.mark.parametrize("kind", KINDS)
def test_a_copy_waits_for_the_kernels_before_it(kind: str) -> None:
    given = made(kind)
    source, seen = given.pinned(SIZE), torch.zeros(SIZE, dtype=torch.uint8, device=given.device)
    slot = torch.full_like(seen, 5)
    source[:] = 9
    if isinstance(given, LateStreams):
        given.kernels.launch(lambda: seen.copy_(slot))
    else:
        seen.copy_(slot)
    stream = given.stream()
    stream.after(given.current().record())
    stream.copy(slot, source)
    stream.record().wait()
    assert bool(seen.cpu().eq(5).all())
    assert bool(slot.cpu().eq(9).all())


@pytest.mark.gpu
def test_memory_is_pinned_by_cuda_and_given_back() -> None:
    given = made("cuda")
    for _ in range(3):
        memory = given.pinned(2**24 + 4096)
        assert memory[4096:].is_pinned()
        memory.fill_(1)
        del memory
        gc.collect()


class FakeDriver:
    """Stands for CUDA's functions that pin memory. calls: what was asked, and of which address."""

    def __init__(self, error: int = 0) -> None:
        self.error = error
        self.calls: list[tuple[str, int]] = []

    def cudart(self) -> FakeDriver:
        return self

    def cudaHostRegister(self, address: int, num_bytes: int, flags: int) -> int:
        assert num_bytes > 0
        self.calls.append(("pin", address))
        return self.error

    def cudaHostUnregister(self, address: int) -> None:
        assert ctypes.c_uint8.from_address(address).value == 7, "it was given back already"
        self.calls.append(("unpin", address))


def test_memory_stays_pinned_for_as_long_as_a_part_of_it_is_held(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    driver = FakeDriver()
    monkeypatch.setattr(gpu_streams, "_cuda", driver)
    given = CudaStreams(torch.device("cuda"))
    memory = given.pinned(3 * SIZE).fill_(7)
    address = memory.data_ptr()
    part = memory.view(3, SIZE)[1]
    del memory
    gc.collect()
    assert driver.calls == [("pin", address)]
    assert bool(part.eq(7).all())
    del part
    gc.collect()
    assert driver.calls == [("pin", address), ("unpin", address)]
    assert given.pinned(0).shape == (0,)
    whole = torch.full((4, 4096), 7, dtype=torch.uint8)
    same = given.pin(whole)
    assert (same.shape, same.data_ptr()) == (whole.shape, whole.data_ptr())
    del same
    gc.collect()
    assert driver.calls[2:] == [("pin", whole.data_ptr()), ("unpin", whole.data_ptr())]


def test_memory_that_cannot_be_pinned_is_an_error(monkeypatch: pytest.MonkeyPatch) -> None:
    driver = FakeDriver(error=2)
    monkeypatch.setattr(gpu_streams, "_cuda", driver)
    monkeypatch.setattr(gpu_streams, "_clear_error", lambda cudart: None)
    with pytest.raises(CapacityError, match="4096 bytes of host memory cannot be pinned"):
        CudaStreams(torch.device("cuda")).pinned(4096)
    gc.collect()
    assert [name for name, _ in driver.calls] == ["pin"]


@pytest.mark.parametrize("has_clear", [True, False])
def test_what_could_not_be_pinned_leaves_no_error_to_torch(
    has_clear: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    driver, errors = FakeDriver(error=2), [2]
    monkeypatch.setattr(gpu_streams, "_cuda", driver)
    if has_clear:
        monkeypatch.setattr(driver, "cudaGetLastError", errors.pop, raising=False)

    def launch(size: int, device: str) -> None:
        assert device == "cuda"
        if errors:
            raise RuntimeError(f"CUDA error {errors.pop()}")

    monkeypatch.setattr(torch, "ones", launch)
    with pytest.raises(CapacityError, match="cannot be pinned"):
        CudaStreams(torch.device("cuda")).pinned(4096)
    assert not errors


@pytest.mark.gpu
def test_a_gpu_goes_on_after_memory_that_could_not_be_pinned() -> None:
    given = CudaStreams(torch.device("cuda"))
    memory = torch.zeros(4096, dtype=torch.uint8)
    pinned = given.pin(memory)
    with pytest.raises(CapacityError, match="cannot be pinned"):
        given.pin(memory)  # it is already
    assert float(torch.ones(3, device="cuda").sum()) == 3
    del pinned


def test_a_cpu_has_streams_that_do_everything_at_once() -> None:
    given = streams(CPU)
    assert isinstance(given, HostStreams)
    assert given.device == CPU
    source, into = torch.ones(8, dtype=torch.uint8), torch.zeros(8, dtype=torch.uint8)
    given.stream().copy(into, source)
    assert bool(into.eq(1).all())
    assert given.current().record().is_done()


# -- that late streams are late --------------------------------------------------------------------


def test_late_streams_do_nothing_until_they_must() -> None:
    late = LateStreams()
    source, into = torch.ones(8, dtype=torch.uint8), torch.zeros(2, 8, dtype=torch.uint8)
    one, other = late.stream(), late.stream()
    one.copy(into[0], source)
    other.copy(into[1], source)
    assert not into.any()
    one.record().wait()
    assert bool(into[0].eq(1).all())
    assert not into[1].any(), "nobody has waited for it"
    late.finish()
    assert bool(into[1].eq(1).all())


def test_late_streams_show_who_forgot_to_wait_for_a_kernel() -> None:
    late = LateStreams()
    slot, source = torch.zeros(4, dtype=torch.uint8), torch.ones(4, dtype=torch.uint8)
    seen: list[int] = []
    late.kernels.launch(lambda: seen.append(int(slot[0])))
    stream = late.stream()
    stream.copy(slot, source)
    stream.record().wait()
    late.finish()
    assert seen == [1]


def test_late_streams_copy_what_is_there_when_it_is_done() -> None:
    late = LateStreams()
    source, into = torch.ones(4, dtype=torch.uint8), torch.zeros(4, dtype=torch.uint8)
    late.stream().copy(into, source)
    source.fill_(3)
    late.finish()
    assert bool(into.eq(3).all())


def test_an_event_that_is_looked_at_often_enough_is_done() -> None:
    late = LateStreams()
    first = late.stream()
    second = late.stream()
    second.after(first.record())
    event = second.record()
    looks = 0
    while not event.is_done():
        looks += 1
        assert looks < 1000
