"""The verbs of studies: a run is recorded, replayed, learned from, and served with what it gave."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from moe_serve import cli
from moe_serve.experts.predictor_state import read_state, write_state
from moe_serve.experts.trace import DECODE, PREFILL, read_trace, write_trace
from tests.experts.routing import synthetic_trace

PROMPTS = ("Once upon a time, there was a little girl", "def add(a, b):", "The capital of France")
SMALL = ("--num-kv-blocks", "256", "--max-model-len", "128", "--threads", "1")
NUM_LAYERS, NUM_EXPERTS, TOP_K = 6, 32, 4  # of the embedded model
MAX_TOKENS = 24


def run(*arguments: str | Path) -> int:
    return cli.run([str(argument) for argument in arguments])


@pytest.fixture(scope="module")
def store(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("store")


@pytest.fixture(scope="module")
def recorded(tmp_path_factory: pytest.TempPathFactory, store: Path) -> Path:
    """A trace of three prompts, served together, with half of the experts held."""
    path = tmp_path_factory.mktemp("trace") / "run.npz"
    code = run(
        "trace", path, *PROMPTS, *SMALL, "--max-tokens", str(MAX_TOKENS), "--ignore-eos",
        "--temperature", "0", "--expert-store", store, "--expert-cache-slots", "16",
        "--eviction", "lfru", "--prefetch", "off",
    )  # fmt: skip
    assert code == 0
    return path


def simulated(capsys: pytest.CaptureFixture[str], *arguments: str | Path) -> dict[str, Any]:
    capsys.readouterr()
    assert run("simulate", *arguments, "--json") == 0
    result: dict[str, Any] = json.loads(capsys.readouterr().out)
    return result


# -- trace -------------------------------------------------------------------------------------


def test_every_token_that_ran_is_recorded_at_its_step(recorded: Path) -> None:
    trace = read_trace(recorded)
    assert trace.num_seqs == len(PROMPTS)
    assert trace.ids.shape[1:] == (NUM_LAYERS, TOP_K)
    assert trace.step is not None
    assert trace.phase is not None
    assert trace.token_ids is not None
    assert trace.model_id is not None
    for begin, end in zip(trace.seq_offsets[:-1], trace.seq_offsets[1:], strict=True):
        phase = trace.phase[begin:end]
        # the last token is sampled and never run
        assert (phase == DECODE).sum() == MAX_TOKENS - 1
        assert (phase[: -MAX_TOKENS + 1] == PREFILL).all()
        steps = trace.step[begin:end]
        assert (np.diff(steps[phase == DECODE]) == 1).all(), "one token a step"
    decoding = trace.step[trace.phase == DECODE]
    assert np.bincount(decoding).max() == len(PROMPTS), "they ran together"


def test_the_recorded_batches_are_replayed(
    recorded: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    trace = read_trace(recorded)
    result = simulated(capsys, recorded, "--as-recorded", "--policy", "lfru", "--slots", "16")

    (row,) = result["rows"]
    assert row["batch"] is None
    assert row["num_tokens"] == trace.num_tokens
    assert trace.step is not None
    assert row["events"] == NUM_LAYERS * len(np.unique(trace.step))


def test_a_dense_model_has_nothing_to_record(
    shared_data: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    model = shared_data / "models" / "stories260k"
    code = run("trace", tmp_path / "t.npz", "Once", "--model", model, *SMALL, "--max-tokens", "2")
    assert code == 2
    assert "is dense: it has no experts" in capsys.readouterr().err
    assert not (tmp_path / "t.npz").exists()


def test_the_file_is_named_once(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    code = run("trace", tmp_path / "a.npz", "Once", "--record-trace", tmp_path / "b.npz")
    assert code == 2
    assert "give OUT.npz alone" in capsys.readouterr().err


# -- simulate ----------------------------------------------------------------------------------


def test_a_table_names_what_it_counts(recorded: Path, capsys: pytest.CaptureFixture[str]) -> None:
    code = run(
        "simulate", recorded, "--policy", "lru", "--policy", "lfru", "--slots", "8", "--batch", "1",
        "--predictor", "token_table", "--layer-ms", "0.2", "--link-gb-s", "4",
        "--record-bytes", "100000", "--limit", "2",
    )  # fmt: skip
    shown = capsys.readouterr()
    assert code == 0, shown.err
    for title in ("misses: ", "virtual clock: ", "guesses: ", "costs: "):
        assert title in shown.out
    assert "policy     lfru" in shown.out
    assert "predictor  token_table" in shown.out
    assert "lru, 8 slots, batch 1, layer" in shown.err, "progress is no part of the answer"


def test_plots_are_written_and_named(
    recorded: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = tmp_path / "plots"
    simulated(
        capsys, recorded, "--policy", "lru", "--slots", "8", "--batch", "1", "--plots", folder
    )
    assert sorted(path.name for path in folder.iterdir()) == ["experts.png", "misses.png"]


@pytest.mark.parametrize(
    ("arguments", "code", "message"),
    [
        (("--policy", "lruu"), 2, "did you mean 'lru'"),
        (("--predictor", "orcale"), 2, "did you mean 'oracle'"),
        (("--predictor", "gate_lookahead"), 3, "gate_lookahead needs gates, hidden"),
        (("--slots", "3"), 2, "at least expert_cache_slots 4"),
        (("--layer-ms", "1"), 2, "give all three"),
        (("--split", "transfer"), 2, "needs a trace to learn from"),
        (("--split", "transfer", "--learn-from", "missing.npz"), 3, "missing.npz: not a trace"),
    ],
)
def test_what_cannot_be_simulated_is_refused(
    recorded: Path,
    arguments: tuple[str, ...],
    code: int,
    message: str,
    capsys: pytest.CaptureFixture[str],
) -> None:
    assert run("simulate", recorded, *arguments) == code
    assert message in capsys.readouterr().err


def test_a_missing_file_is_named(capsys: pytest.CaptureFixture[str]) -> None:
    assert run("simulate", "missing.npz") == 3
    assert "missing.npz: not a trace" in capsys.readouterr().err


# -- train-predictor ---------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["token_table", "learned_ids"])
def test_what_is_learned_serves_the_same_tokens(
    name: str, recorded: Path, store: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    state = tmp_path / "learned.safetensors"
    assert run("train-predictor", recorded, state, "--predictor", name) == 0
    assert f"--predictor {name} --predictor-state {state}" in capsys.readouterr().err
    outputs = []
    for options in ((), ("--expert-cache-slots", "8", "--expert-store", store, "--prefetch", "on",
                         "--predictor", name, "--predictor-state", state)):  # fmt: skip
        arguments = ("generate", PROMPTS[0], "--max-tokens", "8", "--temperature", "0", "--json")
        assert run(*arguments, *SMALL, *options) == 0
        outputs.append(json.loads(capsys.readouterr().out))
    resident, started = outputs
    assert started["outputs"] == resident["outputs"]
    assert "prefetch" in started["experts"]


def test_epochs_change_what_is_learned(recorded: Path, tmp_path: Path) -> None:
    states: list[dict[str, Any]] = []
    for epochs in ("1", "3", "3"):
        path = tmp_path / f"{len(states)}.safetensors"
        assert (
            run("train-predictor", recorded, path, "--predictor", "learned_ids", "--epochs", epochs)
            == 0
        )
        states.append(read_state(path, "learned_ids"))
    once, thrice, again = states
    assert any((once[key] != thrice[key]).any() for key in once)
    assert all((again[key] == thrice[key]).all() for key in again)
    default = tmp_path / "default.safetensors"
    assert run("train-predictor", recorded, default, "--predictor", "learned_ids") == 0
    of_default = read_state(default, "learned_ids")
    assert all((of_default[key] == thrice[key]).all() for key in thrice)


def test_a_predictor_that_keeps_nothing_is_not_trained(
    recorded: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run("train-predictor", recorded, tmp_path / "p", "--predictor", "oracle") == 2
    assert "oracle keeps nothing" in capsys.readouterr().err
    assert not (tmp_path / "p").exists()


def test_a_trace_without_token_ids_cannot_train_all(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    write_trace(tmp_path / "t.npz", synthetic_trace())
    code = run("train-predictor", tmp_path / "t.npz", tmp_path / "p", "--predictor", "learned_hash")
    assert code == 3
    assert "learned_hash needs token_ids" in capsys.readouterr().err


def served_with(state: Path, predictor: str, store: Path) -> int:
    return run(
        "generate", PROMPTS[0], *SMALL, "--max-tokens", "2", "--expert-cache-slots", "8",
        "--expert-store", store, "--predictor", predictor, "--predictor-state", state,
    )  # fmt: skip


def test_another_predictor_s_file_is_refused(
    store: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    write_state(tmp_path / "p", "transition", {"counts": np.zeros(3, np.float32)})
    assert served_with(tmp_path / "p", "learned_ids", store) == 3
    shown = capsys.readouterr().err
    assert "holds what transition learned, but the predictor is learned_ids" in shown


def test_another_model_s_file_is_refused(
    store: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    write_trace(tmp_path / "t.npz", synthetic_trace())
    for name in ("learned_ids", "transition"):
        state = tmp_path / f"{name}.safetensors"
        assert run("train-predictor", tmp_path / "t.npz", state, "--predictor", name) == 0
        assert served_with(state, name, store) == 3
        assert "train one for this model" in capsys.readouterr().err


def test_a_file_that_is_none_is_refused(
    store: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "p").write_text("nothing learned")
    assert served_with(tmp_path / "p", "learned_ids", store) == 3
    assert "not a predictor's file" in capsys.readouterr().err


# -- the flags ---------------------------------------------------------------------------------


def test_flags_are_these(capsys: pytest.CaptureFixture[str]) -> None:
    flags = {
        "simulate": {
            "--policy", "--predictor", "--slots", "--batch", "--scope", "--split", "--learn-from",
            "--limit", "--as-recorded", "--keep-template", "--no-keep-template", "--record-bytes",
            "--layer-ms", "--link-gb-s", "--plots", "--json", "--debug", "--help",
        },
        "train-predictor": {"--predictor", "--epochs", "--debug", "--help"},
    }  # fmt: skip
    for verb, expected in flags.items():
        assert run(verb, "--help") == 0
        shown = re.findall(r"^  (--\S+)(?:, (--\S+))?| / (--\S+)", capsys.readouterr().out, re.M)
        assert {flag for flags in shown for flag in flags if flag} == expected, verb
