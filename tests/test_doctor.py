"""The doctor's report: its keys, what it says about kernels, its flags."""

from __future__ import annotations

import json
import os
from typing import Any

import pytest
import torch

from moe_serve import cli, doctor
from moe_serve.kernels.native import loader, machine
from moe_serve.kernels.native.machine import Bandwidth

KEYS = {
    "schema": set(),
    "version": set(),
    "python": set(),
    "packages": set(doctor.PACKAGES),
    "kernels": {"name", "reason", "numerics_id", "implementations"},
    "isa": {"supported", "chosen"},
    "cpu": {"model", "cores", "threads"},
    "memory": {
        "total_bytes", "available_bytes", "read_bytes_s", "copy_bytes_s", "measured_bytes",
        "measured_by",
    },
    "gpus": set(),
}  # fmt: skip


@pytest.fixture(autouse=True)
def quick(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Let memory be as fast as it says here; the list is of how many bytes were asked for."""
    asked: list[int] = []

    def measured(native: loader.Native | None, num_bytes: int) -> Bandwidth:
        asked.append(num_bytes)
        by = "torch" if native is None else "native"
        return Bandwidth(50e9, 20e9, num_bytes, torch.get_num_threads(), by)

    monkeypatch.setattr(doctor, "measure_bandwidth", measured)
    return asked


def report_of(capsys: pytest.CaptureFixture[str], *flags: str) -> dict[str, Any]:
    assert cli.run(["doctor", "--json", *flags]) == 0
    report: dict[str, Any] = json.loads(capsys.readouterr().out)
    return report


def test_the_report_has_these_keys(capsys: pytest.CaptureFixture[str], quick: list[int]) -> None:
    report = report_of(capsys)
    assert {key: set(v) if isinstance(v, dict) else set() for key, v in report.items()} == KEYS
    assert report["schema"] == 1
    assert report["packages"]["torch"] == torch.__version__
    assert report["cpu"]["cores"] == len(os.sched_getaffinity(0))
    memory = report["memory"]
    assert 0 < memory["available_bytes"] <= memory["total_bytes"]
    assert quick == [memory["measured_bytes"]]
    assert quick[0] <= min(512 * 2**20, memory["available_bytes"])
    assert len(report["gpus"]) == torch.cuda.device_count()


def test_every_kernel_is_named(capsys: pytest.CaptureFixture[str]) -> None:
    report = report_of(capsys, "--kernels", "reference")
    kernels = report["kernels"]
    assert (kernels["name"], report["isa"]["chosen"]) == ("reference", None)
    assert kernels["numerics_id"].startswith("reference-")
    assert kernels["reason"]
    assert {"linear", "moe", "paged_attention", "rms_norm"} <= set(kernels["implementations"])
    assert all(name.startswith("reference") for name in kernels["implementations"].values())
    assert cli.run(["doctor", "--kernels", "reference"]) == 0
    lines = capsys.readouterr().out.splitlines()
    for operation in kernels["implementations"]:
        assert any(line.split()[:2] == [operation, "reference"] for line in lines), operation
    assert any(line.split()[:2] == ["numerics", kernels["numerics_id"]] for line in lines)
    assert "bandwidth   read 50.0 GB/s, copy 20.0 GB/s" in "\n".join(lines)


def test_triton_is_named_for_every_kernel(capsys: pytest.CaptureFixture[str]) -> None:
    pytest.importorskip("triton")
    report = report_of(capsys, "--kernels", "triton", "--numerics", "fast")
    kernels = report["kernels"]
    assert kernels["name"] == "triton"
    assert kernels["numerics_id"].endswith("-fast")
    operations = {"linear", "moe", "paged_attention", "rms_norm", "rope", "router", "combine"}
    for operation in operations | {"sampling", "exchange"}:
        assert kernels["implementations"][operation] == "triton", operation
    assert kernels["implementations"]["forward"] == "gpu"


@pytest.mark.parametrize("isa", loader.ISAS)
def test_the_instruction_set_is_the_one_asked_for(
    isa: str, capsys: pytest.CaptureFixture[str]
) -> None:
    if loader.built_path() is None:
        pytest.skip("the native library is not built")
    if isa not in loader.supported_isas(loader.open_library()):
        assert cli.run(["doctor", "--isa", isa]) == 2
        assert f"isa is '{isa}'" in capsys.readouterr().err
        return
    report = report_of(capsys, "--kernels", "cpu", "--isa", isa)
    assert report["isa"]["chosen"] == isa
    assert report["isa"]["supported"][-1] == "plain"
    assert report["memory"]["measured_by"] == "native"
    assert report["kernels"]["name"] == "cpu"
    assert isa in report["kernels"]["numerics_id"]
    assert f"cpu ({isa})" in report["kernels"]["implementations"]["linear"]


def test_without_the_library_it_says_what_to_do(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(loader, "built_path", lambda: None)
    loader.open_library.cache_clear()
    try:
        assert cli.run(["doctor", "--kernels", "cpu"]) == 2
        assert "install a C++ compiler" in capsys.readouterr().err
        report = report_of(capsys)
    finally:
        loader.open_library.cache_clear()
    assert report["kernels"]["name"] == "reference"
    assert "install a C++ compiler" in report["kernels"]["reason"]
    assert report["isa"] == {"supported": [], "chosen": None}
    assert report["memory"]["measured_by"] == "torch"


def test_threads_are_those_asked_for(capsys: pytest.CaptureFixture[str]) -> None:
    assert report_of(capsys, "--threads", "3")["cpu"]["threads"] == 3


def test_it_is_quick(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    """Measured for real, and above what the memory could not be."""
    monkeypatch.setattr(doctor, "measure_bandwidth", machine.measure_bandwidth)
    memory = report_of(capsys)["memory"]
    assert memory["read_bytes_s"] > memory["copy_bytes_s"] / 4 > 0


def test_gpus_are_listed(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    class Properties:
        name = "Big\x1b GPU"
        total_memory = 16 * 2**30

    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda index: Properties())
    on_cpu = ("--kernels", "reference")  # a card that is not there runs nothing
    assert report_of(capsys, *on_cpu)["gpus"] == [
        {"name": "Big\x1b GPU", "memory_bytes": 16 * 2**30}
    ]
    assert cli.run(["doctor", *on_cpu]) == 0
    assert "gpu         Big\\x1b GPU, 16.0 GiB" in capsys.readouterr().out
