"""What disks, files, options and users do wrong: the request that is hit says so, others go on."""

from __future__ import annotations

import errno
import json
import logging
import os
import shutil
import threading
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from moe_serve.engine.engine import Engine
from moe_serve.errors import CapacityError, CheckpointError, StoreError, TraceError
from moe_serve.experts import native_transfer, packing
from moe_serve.experts.native_transfer import NativeTransfers
from moe_serve.experts.profile import UsageProfile, write_profile
from moe_serve.experts.transfer import Transfers
from moe_serve.kernels.native.loader import Native, NotBuilt
from moe_serve.llm import LLM
from moe_serve.types import RequestOutput
from tests.models.bad_checkpoints import CONFIG
from tests.offloaded import (
    GREEDY,
    HALF,
    LEAST,
    NUM_EXPERTS,
    QUARTER,
    TEXTS,
    comparable,
    generate,
    make,
    report,
    transfer_threads,
)

DENSE = {**CONFIG, "model_type": "qwen3", "architectures": ["Qwen3ForCausalLM"]}


@pytest.fixture(scope="module")
def packed(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A store of the embedded model's experts."""
    folder = tmp_path_factory.mktemp("store")
    make(folder, expert_cache_slots=LEAST).close()
    return folder


@pytest.fixture(scope="module")
def whole() -> list[Any]:
    """What all experts in memory give."""
    with make(Path("unused")) as llm:
        return generate(llm)


@pytest.fixture
def store(packed: Path, tmp_path: Path) -> Path:
    """A copy of the store that a test may harm."""
    return Path(shutil.copytree(packed, tmp_path / "store"))


def file_of(store: Path) -> Path:
    (path,) = store.glob("*.experts")
    return path


def flip(path: Path, place: int) -> None:
    with path.open("r+b") as file:
        file.seek(place)
        byte = file.read(1)
        file.seek(place)
        file.write(bytes([byte[0] ^ 16]))


def run_each(llm: LLM) -> list[RequestOutput]:
    """Run the prompts one after the other."""
    return [llm.generate(text, GREEDY, use_tqdm=False)[0] for text in TEXTS]


def errors(outputs: list[RequestOutput]) -> list[str]:
    return [part.error for output in outputs for part in output.outputs if part.error is not None]


# -- budgets -----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "options",
    [
        {"expert_cache_slots": LEAST - 1},
        {"expert_cache_gb": 1e-4},
        {"expert_cache_gb": 1e-4, "expert_cache_scope": "global"},
        {"expert_cache_slots": 1, "emulate_link": 1.0},
    ],
    ids=str,
)
def test_less_than_a_token_needs_is_refused_with_what_is_enough(
    packed: Path, options: dict[str, Any]
) -> None:
    with pytest.raises(CapacityError, match="a token uses 4 experts of each layer") as caught:
        make(packed, **options)
    message = str(caught.value)
    given = "expert_cache_gb" if "expert_cache_gb" in options else "expert_cache_slots"
    named = message.partition("expert_cache_gb ")[2].split()[0].rstrip(";")
    least = float(named) if given == "expert_cache_gb" else LEAST
    with make(packed, **{**options, given: least}) as llm:
        assert report(llm)["slots"] == LEAST * 6
        assert errors(run_each(llm)[:1]) == []


@pytest.mark.parametrize(
    "options", [{"expert_cache_slots": NUM_EXPERTS}, {"expert_cache_gb": 50.0}], ids=str
)
def test_a_budget_above_the_model_needs_no_cache_and_says_so(
    packed: Path, options: dict[str, Any], caplog: pytest.LogCaptureFixture, whole: list[Any]
) -> None:
    caplog.set_level(logging.INFO)
    threads = transfer_threads()
    with make(packed, **options) as llm:
        assert "all 32 experts of each layer are held" in caplog.text
        assert report(llm) == {}
        assert transfer_threads() == threads
        assert generate(llm) == whole


def test_a_dense_model_says_that_there_is_nothing_to_cache(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    (tmp_path / "config.json").write_text(json.dumps(DENSE))
    given: dict[str, Any] = {
        "expert_cache_slots": 2, "eviction": "lru", "record_trace": str(tmp_path / "a.npz"),
        "usage_profile": str(tmp_path / "a.profile"),
    }  # fmt: skip
    with LLM(str(tmp_path), load_format="dummy", **given) as llm:
        (output,) = llm.generate([[1, 2, 3]], GREEDY)
    assert output.outputs[0].error is None
    (record,) = (r for r in caplog.records if r.levelno == logging.WARNING)
    assert "there is nothing to cache or to record" in record.getMessage()
    assert all(name in record.getMessage() for name in given)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["config.json"]


# -- files -------------------------------------------------------------------------------------


@pytest.mark.parametrize("break_it", [lambda p: flip(p, 40), lambda p: os.truncate(p, 9000)])
def test_a_store_that_is_no_longer_one_is_packed_anew(
    store: Path, break_it: Callable[[Path], None], whole: list[Any]
) -> None:
    data = file_of(store).read_bytes()
    break_it(file_of(store))
    with make(store, expert_cache_slots=QUARTER) as llm:
        assert generate(llm) == whole
    assert file_of(store).read_bytes() == data


def test_one_damaged_record_fails_the_requests_that_need_it(store: Path, whole: list[Any]) -> None:
    """And no other: with it in the file, what does not need it gives the same bits."""
    path = file_of(store)
    record_bytes = (path.stat().st_size - 4096) // (6 * NUM_EXPERTS)
    expected = _alone(store)
    num_failed = 0
    for layer, expert in ((0, 3), (2, 17), (5, 30)):
        place = (
            path.stat().st_size - (6 * NUM_EXPERTS - layer * NUM_EXPERTS - expert) * record_bytes
        )
        flip(path, place + 5000)
        with make(store, expert_cache_slots=QUARTER) as llm:
            outputs = run_each(llm)
            for output, wanted in zip(outputs, expected, strict=True):
                if output.outputs[0].error is None:
                    assert comparable([output]) == [wanted]
                    continue
                num_failed += 1
                assert output.outputs[0].finish_reason == "error"
                assert f"layer {layer}, expert {expert} is damaged: its crc32" in (
                    output.outputs[0].error
                )
                assert "remove the file" in output.outputs[0].error
        flip(path, place + 5000)
    assert 0 < num_failed < 12
    with make(store, expert_cache_slots=QUARTER) as llm:
        assert generate(llm) == whole


def _alone(store: Path) -> list[Any]:
    with make(store, expert_cache_slots=QUARTER) as llm:
        return comparable(run_each(llm))


def test_a_file_cut_while_serving_fails_requests_and_a_mended_one_serves_on(store: Path) -> None:
    expected = _alone(store)
    path = file_of(store)
    data = path.read_bytes()
    with make(store, expert_cache_slots=LEAST) as llm:
        assert comparable(run_each(llm)) == expected
        os.truncate(path, len(data) // 2)
        outputs = run_each(llm)
        assert all("is cut off" in error for error in errors(outputs))
        assert len(errors(outputs)) == len(TEXTS), "every prompt needs most experts"
        with path.open("r+b") as file:  # the same file, as it was
            file.write(data)
        assert comparable(run_each(llm)) == expected


def test_a_file_replaced_while_serving_is_read_on(store: Path) -> None:
    expected = _alone(store)
    path = file_of(store)
    with make(store, expert_cache_slots=LEAST) as llm:
        other = path.with_name("other")
        other.write_bytes(b"another file altogether")
        other.replace(path)
        assert comparable(run_each(llm)) == expected
        path.unlink()
        assert comparable(run_each(llm)) == expected


@pytest.fixture
def python_queue(monkeypatch: pytest.MonkeyPatch) -> None:
    """Have records read by Python's threads, whose reads a test can make fail."""

    def none() -> Native:
        raise NotBuilt("not for this test")

    monkeypatch.setattr(native_transfer, "load", none)


Preadv = Callable[[int, Sequence[memoryview], int], int]


@pytest.mark.parametrize("fused", [True, False])
@pytest.mark.usefixtures("python_queue")
def test_a_read_error_in_mid_run_ends_what_took_part_and_no_more(
    packed: Path, whole: list[Any], monkeypatch: pytest.MonkeyPatch, fused: bool
) -> None:
    with make(packed, expert_cache_slots=QUARTER, fused=fused) as llm:
        stream = llm.stream(TEXTS[0], GREEDY)
        next(stream)
        with monkeypatch.context() as patch:
            patch.setattr(os, "preadv", _broken)
            rest = list(stream)
        assert rest[-1].outputs[0].finish_reason == "error"
        assert "cannot be read: Input/output error" in str(rest[-1].outputs[0].error)
        assert generate(llm) == whole


def _broken(*_: object) -> int:
    raise OSError(errno.EIO, os.strerror(errno.EIO))


@pytest.mark.usefixtures("python_queue")
def test_now_and_then_a_read_error(
    packed: Path, whole: list[Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Requests fail or give the right bits; at the end all slots and transfers are in order."""
    preadv: Preadv = os.preadv
    lock = threading.Lock()
    calls = [0]

    def sometimes(descriptor: int, buffers: Sequence[memoryview], offset: int) -> int:
        with lock:
            calls[0] += 1
            fails = calls[0] % 700 == 0
        if fails:
            _broken()
        return preadv(descriptor, buffers, offset)

    with make(packed, expert_cache_slots=QUARTER, prefetch="on") as llm:
        with monkeypatch.context() as patch:
            patch.setattr(os, "preadv", sometimes)
            outputs = [output for _ in range(3) for output in run_each(llm)]
        failed = errors(outputs)
        assert 0 < len(failed) < len(outputs)
        assert all("Input/output error" in error for error in failed)
        good = {c[0] for c in comparable(outputs) if c[3] is None}
        assert len(good) <= len(TEXTS), "one right answer to each prompt"
        assert generate(llm) == whole


def test_a_full_disk_is_said_before_anything_is_written(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(packing, "_free_bytes", lambda _: 1000)
    threads = transfer_threads()
    with pytest.raises(StoreError, match=r"needs \d+ bytes .* of disk, but 1000 bytes .* are free"):
        make(tmp_path / "new", expert_cache_slots=QUARTER)
    assert list((tmp_path / "new").iterdir()) == []
    assert transfer_threads() == threads


def test_a_disk_that_fills_while_packing_leaves_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, whole: list[Any]
) -> None:
    write = os.write
    written = [0]

    def fills(descriptor: int, data: memoryview) -> int:
        written[0] += len(data)
        if written[0] > 5_000_000:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        return write(descriptor, data)

    store = tmp_path / "new"
    with monkeypatch.context() as patch:
        patch.setattr(os, "write", fills)
        with pytest.raises(StoreError, match=r"No space left on device; it needs \d+ bytes"):
            make(store, expert_cache_slots=QUARTER)
    assert list(store.iterdir()) == []
    with make(store, expert_cache_slots=QUARTER) as llm:
        assert generate(llm) == whole


def test_a_folder_that_cannot_be_written_to_is_refused(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    for folder in (tmp_path / "file", tmp_path / "file" / "sub", Path("/proc/nowhere")):
        with pytest.raises(StoreError, match=r"another folder|can be written to") as caught:
            make(folder, expert_cache_slots=QUARTER)
        assert str(folder) in str(caught.value)


# -- weights, profiles -------------------------------------------------------------------------


def test_nan_in_one_expert_is_refused_wherever_it_is_to_be_held(
    tmp_path: Path, embedded_model: Path
) -> None:
    threads = transfer_threads()
    folder = Path(shutil.copytree(embedded_model, tmp_path / "model"))
    weights = load_file(folder / "model.safetensors")
    name = "model.layers.3.mlp.experts.11.down_proj.weight"
    weights[name][2, 3] = float("nan")
    save_file(weights, folder / "model.safetensors", {"format": "pt"})
    for options in (
        {},
        {"expert_cache_slots": LEAST},
        {"expert_cache_slots": 8, "emulate_link": 1.0},
    ):
        with pytest.raises(CheckpointError, match=f"{name} holds nan.*must be finite"):
            make(tmp_path / "store", model=str(folder), **options)
    assert list((tmp_path / "store").iterdir()) == []
    assert transfer_threads() == threads


def test_a_profile_of_another_model_is_refused(packed: Path, tmp_path: Path) -> None:
    path = tmp_path / "profile"
    write_profile(path, UsageProfile("0" * 16, torch.ones(6, NUM_EXPERTS).double().numpy()))
    for options in ({"expert_cache_slots": QUARTER}, {}):
        with pytest.raises(TraceError, match="a usage profile of another model"):
            make(packed, usage_profile=str(path), **options)
    path.write_text("{}")
    with pytest.raises(TraceError, match="not a usage profile"):
        make(packed, usage_profile=str(path), expert_cache_slots=QUARTER)


# -- interrupts --------------------------------------------------------------------------------


class Interrupting:
    """Raise KeyboardInterrupt in one of the waits of a queue.

    A fused pass waits by itself, and an interrupt is raised when it comes back: there at any look.
    """

    def __init__(self, queue: Transfers, at: int, is_any: bool) -> None:
        self._ended = queue.ended
        self._left = at
        self._is_any = is_any
        self.has_raised = False

    def __call__(self, wait: bool = False) -> Any:
        if wait or self._is_any:
            self._left -= 1
            if self._left == 0:
                self.has_raised = True
                raise KeyboardInterrupt
        return self._ended(wait)


@pytest.mark.parametrize("at", [1, 2, 20])
@pytest.mark.parametrize(
    "options",
    [{}, {"fused": False}, {"emulate_link": 0.5, "miss": "copy"}],
    ids=str,
)
def test_an_interrupt_in_a_wait_loses_nothing(
    packed: Path,
    whole: list[Any],
    monkeypatch: pytest.MonkeyPatch,
    at: int,
    options: dict[str, Any],
) -> None:
    with make(packed, expert_cache_slots=QUARTER, **options) as llm:
        assert isinstance(llm.engine, Engine)
        experts: Any = llm.engine.runner.model.experts
        stream = llm.stream(TEXTS[0], GREEDY)
        next(stream)
        others = [
            llm.prepare(text, GREEDY, index=index + 1) for index, text in enumerate(TEXTS[1:])
        ]
        for other in others:
            llm.engine.add(other.request)
        is_any = options.get("fused", True) and isinstance(experts.queue, NativeTransfers)
        interrupting = Interrupting(experts.queue, at, is_any)
        kept: list[BaseException] = []
        with monkeypatch.context() as patch:
            patch.setattr(experts.queue, "ended", interrupting)
            for _ in range(8):
                try:
                    llm.engine.step()
                except KeyboardInterrupt as error:
                    kept.append(error)  # with its frames, as a debugger would
        assert interrupting.has_raised
        assert len(kept) == 1
        for other in others:
            llm.engine.abort(other.request.request_id)
        llm.engine.abort("request-0")
        assert generate(llm) == whole
        kept.clear()
        assert generate(llm) == whole


@pytest.mark.parametrize("fused", [True, False])
def test_an_interrupt_while_experts_run_in_place_loses_nothing(
    packed: Path, whole: list[Any], monkeypatch: pytest.MonkeyPatch, fused: bool
) -> None:
    """Between two calls of the kernels; whoever keeps the exception keeps the step's frames."""
    with make(packed, expert_cache_slots=QUARTER, emulate_link=0.02, fused=fused) as llm:
        assert isinstance(llm.engine, Engine)
        experts: Any = llm.engine.runner.model.experts
        serve = experts.serve
        calls = [0]

        def interrupted(stopped: Any, **how: Any) -> Any:
            calls[0] += 1
            for step in serve(stopped, **how):
                yield step
                if calls[0] == 5 or calls[0] == 9:
                    raise KeyboardInterrupt

        stream = llm.stream(TEXTS[0], GREEDY)
        next(stream)
        kept = []
        with monkeypatch.context() as patch:
            patch.setattr(experts, "serve", interrupted)
            for _ in range(4):
                try:
                    llm.engine.step()
                except KeyboardInterrupt as error:
                    kept.append(error)
        assert kept
        llm.engine.abort("request-0")
        first = generate(llm)
        kept.clear()
        assert first == whole
        assert generate(llm) == whole


def test_a_pass_that_waits_ends_when_the_engine_is_closed(packed: Path) -> None:
    """By another thread: the step fails, and nobody waits for what no thread brings any more."""
    llm = make(packed, expert_cache_slots=LEAST, emulate_link=0.02, miss="copy")
    ended: list[BaseException | None] = []

    def run() -> None:
        try:
            generate(llm)
            ended.append(None)
        except BaseException as error:
            ended.append(error)

    thread = threading.Thread(target=run, daemon=True)
    thread.start()
    time.sleep(0.3)
    llm.close()
    thread.join(20)
    assert not thread.is_alive(), "the pass waits for ever"
    assert len(ended) == 1


def test_a_resize_after_an_interrupt_begins_anew(packed: Path, whole: list[Any]) -> None:
    """Transfers that an interrupt took away are not waited for."""
    with make(packed, expert_cache_slots=QUARTER, prefetch="on") as llm:
        assert isinstance(llm.engine, Engine)
        experts: Any = llm.engine.runner.model.experts
        assert generate(llm) == whole
        experts.preload((layer, expert) for layer in range(6) for expert in range(NUM_EXPERTS))
        for layer in range(6):
            expert = experts.cache.residents(layer)[0]
            experts.cache.drop(layer, expert)
            slot = experts.cache.guess(layer, expert)
            experts.queue.guess(layer, expert, slot)
        while experts.queue.is_busy:
            time.sleep(1e-3)
        experts.queue.ended()  # what a Ctrl-C behind it leaves
        llm.engine.resize_expert_cache(HALF)
        assert generate(llm) == whole
