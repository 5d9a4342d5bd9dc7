"""What a model's name stands for. Nothing here reaches the network: the download is replaced."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import huggingface_hub
import pytest
from huggingface_hub.errors import LocalEntryNotFoundError
from huggingface_hub.utils._paths import filter_repo_objects

from moe_serve.errors import CheckpointError
from moe_serve.hub import resolve_config, resolve_model
from tests.models.bad_checkpoints import SHARDS, write_checkpoint

Download = Callable[..., str]


@pytest.fixture
def downloads(monkeypatch: pytest.MonkeyPatch) -> Callable[[Download], list[dict[str, Any]]]:
    """Replace the hub's download; the calls that it gets are listed."""

    def replace(download: Download) -> list[dict[str, Any]]:
        calls: list[dict[str, Any]] = []

        def recorded(name: str, **options: Any) -> str:
            calls.append({"name": name, **options})
            return download(name, **options)

        monkeypatch.setattr(huggingface_hub, "snapshot_download", recorded)
        return calls

    return replace


def test_embedded_model_has_its_weights() -> None:
    assert (resolve_model("demo-moe") / "model.safetensors").is_file()


def test_a_folder_is_itself(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write_checkpoint(tmp_path / "org" / "name")
    assert resolve_model(str(tmp_path / "org" / "name")) == tmp_path / "org" / "name"
    monkeypatch.chdir(tmp_path)
    assert resolve_model("org/name") == Path("org/name")
    monkeypatch.setenv("HOME", str(tmp_path))
    assert resolve_model("~/org/name") == tmp_path / "org" / "name"


@pytest.mark.parametrize(
    "name", ["./absent", "/absent/model", "a/b/c", "~/absent", "..", "a b", ""]
)
def test_what_looks_like_a_path_never_reaches_the_hub(
    name: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    downloads: Callable[[Download], list[dict[str, Any]]],
) -> None:
    calls = downloads(lambda *args, **options: str(tmp_path))
    (tmp_path / "empty").mkdir()
    monkeypatch.chdir(tmp_path / "empty")
    monkeypatch.setenv("HOME", str(tmp_path))
    if name == "..":
        assert resolve_model(name) == Path("..")
    else:
        with pytest.raises(CheckpointError, match=r"no such model folder|empty"):
            resolve_model(name)
    assert calls == []


def test_a_plan_needs_the_config_alone(
    tmp_path: Path, downloads: Callable[[Download], list[dict[str, Any]]]
) -> None:
    def download(name: str, **options: Any) -> str:
        if options.get("local_files_only"):
            raise LocalEntryNotFoundError("not there")
        (tmp_path / "config.json").write_text("{}")
        return str(tmp_path)

    calls = downloads(download)
    assert resolve_config("org/name") == tmp_path
    assert calls[-1]["allow_patterns"] == ["config.json"]
    calls = downloads(lambda *args, **options: str(tmp_path))
    assert resolve_config("org/name") == tmp_path
    assert [call.get("local_files_only") for call in calls] == [True]
    assert resolve_config("demo-moe") == resolve_model("demo-moe")


def test_a_complete_cache_is_used_without_the_network(
    tmp_path: Path, downloads: Callable[[Download], list[dict[str, Any]]]
) -> None:
    write_checkpoint(tmp_path, is_sharded=True)
    calls = downloads(lambda *args, **options: str(tmp_path))
    assert resolve_model("org/name", "main") == tmp_path
    assert calls == [{"name": "org/name", "revision": "main", "local_files_only": True}]


@pytest.mark.parametrize("absent", ["config.json", SHARDS[1], "model.safetensors.index.json"])
def test_an_incomplete_cache_is_completed_with_data_only(
    tmp_path: Path, absent: str, downloads: Callable[[Download], list[dict[str, Any]]]
) -> None:
    write_checkpoint(tmp_path, is_sharded=True)
    (tmp_path / absent).unlink()
    calls = downloads(lambda *args, **options: str(tmp_path))
    assert resolve_model("org/name") == tmp_path
    assert len(calls) == 2
    offered = [
        "config.json", "model-00001-of-00002.safetensors", "tokenizer.json", "tokenizer.model",
        "merges.txt", "chat_template.jinja", "pytorch_model.bin", "modeling.py", "tokenizer.py",
        "original/model.safetensors", "consolidated.safetensors", "model.onnx",
    ]  # fmt: skip
    taken = filter_repo_objects(
        offered,
        allow_patterns=calls[1]["allow_patterns"],
        ignore_patterns=calls[1]["ignore_patterns"],
    )
    assert list(taken) == offered[:6]


@pytest.mark.parametrize("name", ["a--b", "foo..bar", "org/a--b", "n" * 97, "ends-"])
def test_a_name_that_no_hub_model_can_have_is_one_line(
    name: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.chdir(tmp_path)
    with pytest.raises(CheckpointError, match="no folder here") as caught:
        resolve_model(name)
    assert name in str(caught.value)
    assert "\n" not in str(caught.value)


def test_without_network_or_cache_the_error_is_one_line(
    downloads: Callable[[Download], list[dict[str, Any]]],
) -> None:
    def fail(name: str, **options: Any) -> str:
        if options.get("local_files_only"):
            raise LocalEntryNotFoundError("not here")
        raise ConnectionError("Name or service not known\nand much more")

    downloads(fail)
    with pytest.raises(CheckpointError) as caught:
        resolve_model("demo-mo", "v1")
    message = str(caught.value)
    assert "\n" not in message
    for word in ("demo-mo", "v1", "Name or service not known", "folder", "did you mean 'demo-moe'"):
        assert word in message
