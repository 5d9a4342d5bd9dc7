"""Tokenizers from folders as they are found in the wild."""

from __future__ import annotations

import json
import os
import random
import shutil
import threading
import time
from pathlib import Path
from typing import Any

import pytest

from moe_serve.errors import CheckpointError
from moe_serve.text.tokenizer import Tokenizer, load_tokenizer

ROOT = Path(__file__).resolve().parents[2]
EMBEDDED = ROOT / "moe_serve" / "assets" / "demo-moe"


def folder_with(tmp_path: Path, source: Path, **settings: Any) -> Path:
    shutil.copy(source / "tokenizer.json", tmp_path)
    (tmp_path / "tokenizer_config.json").write_text(json.dumps(settings))
    return tmp_path


def loaded(folder: Path) -> Tokenizer:
    tokenizer = load_tokenizer(folder)
    assert tokenizer is not None
    return tokenizer


def test_embedded_tokenizer() -> None:
    tokenizer = loaded(EMBEDDED)
    assert (tokenizer.num_ids, tokenizer.eos_id, tokenizer.bos_id) == (6144, 0, None)
    assert tokenizer.special_ids == {0, 1}
    assert tokenizer.decode(tokenizer.encode("Hi you")) == "Hi you"
    assert tokenizer.decode([41, 0, 74]) == "Hi"
    assert tokenizer.decode([41, 0, 74], skip_special_tokens=False) == "H<|endoftext|>i"


def test_old_and_new_forms_of_special_tokens(tmp_path: Path, shared_data: Path) -> None:
    old = {"content": "<s>", "lstrip": False, "__type": "AddedToken"}
    stories = shared_data / "models" / "stories260k"
    tokenizer = loaded(folder_with(tmp_path, stories, bos_token=old, eos_token="</s>"))
    assert (tokenizer.bos_id, tokenizer.eos_id) == (1, 2)
    assert tokenizer.special_tokens == {"bos_token": "<s>", "eos_token": "</s>"}


@pytest.mark.parametrize(
    ("settings", "begins", "ends"),
    [
        ({}, True, False),  # tokenizer.json's own template adds <s>
        ({"add_bos_token": True}, True, False),
        ({"add_bos_token": False}, False, False),
        ({"add_bos_token": True, "add_eos_token": True}, True, True),
    ],
)
def test_settings_decide_on_start_and_end_tokens(
    tmp_path: Path, shared_data: Path, settings: dict[str, bool], begins: bool, ends: bool
) -> None:
    stories = shared_data / "models" / "stories260k"
    folder = folder_with(tmp_path, stories, bos_token="<s>", eos_token="</s>", **settings)
    tokenizer = loaded(folder)
    ids = tokenizer.encode("Once")
    assert (ids.count(1), ids[0] == 1) == (begins, begins)
    assert (ids.count(2), ids[-1] == 2) == (ends, ends)
    assert not {1, 2} & set(tokenizer.encode("Once", add_special_tokens=False))


def test_a_missing_tokenizer_is_none(tmp_path: Path) -> None:
    assert load_tokenizer(tmp_path) is None


@pytest.mark.parametrize("text", ["", "{}", "[1]", '{"model": {"type": "NoSuch"}}'])
def test_a_broken_tokenizer_names_its_file(tmp_path: Path, text: str) -> None:
    (tmp_path / "tokenizer.json").write_text(text)
    with pytest.raises(CheckpointError, match=r"tokenizer\.json: not a tokenizer"):
        load_tokenizer(tmp_path)


def test_a_setting_of_the_wrong_type_is_refused(tmp_path: Path) -> None:
    folder = folder_with(tmp_path, EMBEDDED, add_bos_token="yes")
    with pytest.raises(CheckpointError, match="add_bos_token is 'yes'"):
        load_tokenizer(folder)


def test_a_vocabulary_larger_than_the_model_is_refused() -> None:
    tokenizer = loaded(EMBEDDED)
    tokenizer.check_fits(6144)
    tokenizer.check_fits(7000)
    with pytest.raises(CheckpointError, match=r"up to 6143, .*vocab_size is 6000"):
        tokenizer.check_fits(6000)


@pytest.mark.filterwarnings("ignore")  # of transformers, at its import
def test_vocab_and_merges_are_read_through_transformers(tmp_path: Path) -> None:
    model = json.loads((EMBEDDED / "tokenizer.json").read_text())["model"]
    (tmp_path / "vocab.json").write_text(json.dumps(model["vocab"]))
    merges = [m if isinstance(m, str) else " ".join(m) for m in model["merges"]]
    (tmp_path / "merges.txt").write_text("#version: 0.2\n" + "\n".join(merges) + "\n")
    settings = {"tokenizer_class": "GPT2Tokenizer", "eos_token": "<|endoftext|>"}
    (tmp_path / "tokenizer_config.json").write_text(json.dumps(settings))
    (tmp_path / "config.json").write_text('{"model_type": "gpt2"}')
    tokenizer = loaded(tmp_path)
    assert tokenizer.decode(tokenizer.encode("Once upon a time")) == "Once upon a time"
    assert tokenizer.eos_id == 0
    assert tokenizer.decoder_kind == "byte_level"


@pytest.mark.parametrize("name", ["tokenizer.json", "tokenizer.model"])
def test_a_pipe_is_not_read(tmp_path: Path, name: str) -> None:
    os.mkfifo(tmp_path / name)
    with pytest.raises(CheckpointError, match="not a regular file"):
        load_tokenizer(tmp_path)


def test_a_long_text_leaves_other_threads_their_turn() -> None:
    tokenizer = loaded(EMBEDDED)
    chance = random.Random(1)
    text = " ".join("".join(chance.choices("abcdefghij", k=7)) for _ in range(40_000))
    is_over = threading.Event()

    def encode() -> None:
        tokenizer.encode(text)
        is_over.set()

    thread = threading.Thread(target=encode)
    thread.start()
    num_turns = 0
    while not is_over.is_set():
        time.sleep(0.001)
        num_turns += 1
    thread.join()
    # it takes more than 50 ms; with the lock kept there would be hardly a turn
    assert num_turns > 8
