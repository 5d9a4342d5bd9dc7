"""What fits is settled from what the system says, and before anything is made."""

from __future__ import annotations

import dataclasses
import logging
import os
from pathlib import Path
from typing import Any

import pytest
import torch

from moe_serve.config import EngineConfig
from moe_serve.engine.memory import available_bytes, num_kv_blocks, peak_rss_bytes
from moe_serve.errors import CapacityError
from moe_serve.models.checkpoint import weights_bytes
from moe_serve.models.hf_config import HFConfig
from moe_serve.models.registry import read_spec
from moe_serve.models.spec import ModelSpec
from tests.models.bad_checkpoints import CONFIG

KIB = 2**10
# of CONFIG in float32: 2 layers x (key, value) x 2 heads x 8 x 4 bytes, 16 tokens
BLOCK_BYTES = 2 * 2 * 2 * 8 * 4 * 16


def _system(root: Path, meminfo: str | None, cgroup: str = "0::/\n") -> tuple[Path, Path]:
    (root / "proc" / "self").mkdir(parents=True)
    (root / "proc" / "self" / "cgroup").write_text(cgroup)
    if meminfo is not None:
        (root / "proc" / "meminfo").write_text(meminfo)
    (root / "cgroup").mkdir()
    return root / "proc", root / "cgroup"


def _limit(group: Path, maximum: str, current: int, inactive_file: int = 0) -> None:
    group.mkdir(parents=True, exist_ok=True)
    (group / "memory.max").write_text(f"{maximum}\n")
    (group / "memory.current").write_text(f"{current}\n")
    (group / "memory.stat").write_text(f"anon 5\ninactive_file {inactive_file}\n")


MEMINFO = "MemTotal:  9000 kB\nMemFree:  100 kB\nMemAvailable:  7000 kB\nCached:  6900 kB\n"


def test_the_page_cache_counts_as_available(tmp_path: Path) -> None:
    assert available_bytes(*_system(tmp_path, MEMINFO)) == 7000 * KIB


@pytest.mark.parametrize(
    ("maximum", "current", "inactive_file", "expected"),
    [
        ("max", 50, 0, 7000 * KIB),
        (str(3000 * KIB), 1000 * KIB, 0, 2000 * KIB),
        (str(3000 * KIB), 1000 * KIB, 400 * KIB, 2400 * KIB),
        (str(90000 * KIB), 0, 0, 7000 * KIB),
        (str(10 * KIB), 20 * KIB, 0, 0),
    ],
    ids=["none", "limit", "limit-and-cache", "limit-above-memory", "overdrawn"],
)
def test_a_cgroup_s_limit_bounds_it(
    maximum: str, current: int, inactive_file: int, expected: int, tmp_path: Path
) -> None:
    proc, cgroups = _system(tmp_path, MEMINFO, "9:cpu:/x\n0::/outer/inner\n")
    _limit(cgroups / "outer" / "inner", maximum, current, inactive_file)
    assert available_bytes(proc, cgroups) == expected


def test_the_tightest_group_around_the_process_decides(tmp_path: Path) -> None:
    proc, cgroups = _system(tmp_path, MEMINFO, "0::/outer/inner\n")
    _limit(cgroups / "outer" / "inner", "max", 0)
    _limit(cgroups / "outer", str(500 * KIB), 100 * KIB)
    _limit(cgroups, str(6000 * KIB), 100 * KIB)
    assert available_bytes(proc, cgroups) == 400 * KIB


def test_a_system_without_meminfo_is_asked_otherwise(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    proc, cgroups = _system(tmp_path, None)
    pages = {"SC_AVPHYS_PAGES": 11, "SC_PAGE_SIZE": 4096}
    monkeypatch.setattr(os, "sysconf", pages.__getitem__)
    assert available_bytes(proc, cgroups) == 11 * 4096

    def unknown(name: str) -> int:
        raise ValueError("unrecognized configuration name")

    monkeypatch.setattr(os, "sysconf", unknown)
    assert available_bytes(proc, cgroups) == 4 * 2**30
    assert available_bytes(tmp_path / "none", cgroups) == 4 * 2**30


def test_this_machine_has_memory() -> None:
    assert available_bytes() > 2**20


@pytest.fixture
def spec() -> ModelSpec:
    return read_spec(HFConfig(dict(CONFIG), Path("config.json")))


def _blocks(
    spec: ModelSpec, available: int, max_model_len: int = 64, **options: Any
) -> tuple[int, ...]:
    config = EngineConfig.from_options(options)
    weights = weights_bytes(spec, torch.float32)
    return num_kv_blocks(config, spec, torch.float32, max_model_len, available, weights)


def test_the_default_is_room_for_all_requests(
    spec: ModelSpec, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.INFO)
    assert _blocks(spec, 2**30, max_num_seqs=7) == (7 * 64 // 16,)
    assert not caplog.records


def test_a_quarter_of_the_memory_bounds_the_default_and_is_said(
    spec: ModelSpec, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.INFO)
    (count,) = _blocks(spec, 10 * 2**20, max_num_seqs=1000)
    assert 0.2 * 10 * 2**20 < count * BLOCK_BYTES < 0.25 * 10 * 2**20
    assert "25 % of the free memory" in caplog.text
    assert f"{count} blocks" in caplog.text
    assert len(caplog.records) == 1


def test_gibibytes_are_whole_blocks(spec: ModelSpec) -> None:
    assert _blocks(spec, 2**30, kv_cache_gb=2.5 * BLOCK_BYTES / 2**30) == (2,)
    with pytest.raises(CapacityError, match=r"less than one block .*\(4096 bytes\)"):
        _blocks(spec, 2**30, kv_cache_gb=1e-7)


@pytest.mark.parametrize(
    "options", [{"num_kv_blocks": 5_000_000}, {"kv_cache_gb": 50.0}], ids=["blocks", "gib"]
)
def test_more_blocks_than_memory_are_refused_with_the_most_that_fit(
    options: dict[str, Any], spec: ModelSpec
) -> None:
    available = 2**30
    with pytest.raises(CapacityError) as caught:
        _blocks(spec, available, **options)
    message = str(caught.value)
    assert f"{available} bytes" in message
    most = int(message.partition("num_kv_blocks ")[2].split()[0])
    assert _blocks(spec, available, num_kv_blocks=most) == (most,)
    with pytest.raises(CapacityError):
        _blocks(spec, available, num_kv_blocks=most + 1)


def test_weights_beyond_memory_are_refused(spec: ModelSpec) -> None:
    needed = weights_bytes(spec, torch.float32)
    with pytest.raises(CapacityError, match=f"{needed} bytes .*smaller model or dtype"):
        _blocks(spec, needed - 1)


def test_tables_beyond_memory_are_refused(spec: ModelSpec) -> None:
    with pytest.raises(CapacityError, match=r"2147483647.*lower max_model_len"):
        _blocks(spec, 2**34, max_model_len=2**31 - 1)
    with pytest.raises(CapacityError, match=r"1048576 requests.*lower max_model_len or max_num"):
        _blocks(spec, 2**34, max_model_len=2**17, max_num_seqs=2**20)


def test_groups_get_the_same_number_and_share_the_memory(spec: ModelSpec) -> None:
    first, second = spec.layers
    both = dataclasses.replace(spec, layers=(first, dataclasses.replace(second, window=32)))
    assert len(_blocks(both, 2**30)) == 2
    (one,) = _blocks(spec, 10 * 2**20, max_num_seqs=1000)
    counts = _blocks(both, 10 * 2**20, max_num_seqs=1000)
    assert len(set(counts)) == 1
    assert counts[0] == pytest.approx(one, rel=0.15)


def test_the_peak_is_of_this_program_not_of_what_started_it(tmp_path: Path) -> None:
    status = tmp_path / "status"
    status.write_text("VmPeak:\t  999 kB\nVmHWM:\t  123 kB\nVmRSS:\t  100 kB\n")
    assert peak_rss_bytes(status) == 123 * 1024
    assert peak_rss_bytes(tmp_path / "none") > 2**20
