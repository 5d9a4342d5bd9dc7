from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from moe_serve.errors import CapacityError, ConfigError, TraceError
from moe_serve.experts.trace import read_trace
from moe_serve.study.replay import cache_shape, without_prefix
from moe_serve.study.simulate import SimulateOptions, default_slots, simulate
from moe_serve.study.states import learned_state
from moe_serve.study.tables import tables
from tests.experts.routing import synthetic_trace

FIELDS = {
    "policy", "predictor", "scope", "slots", "batch", "split", "events", "logical", "union",
    "hits", "misses", "miss", "belady", "belady_forced", "gap_closed", "bytes_per_token",
}  # fmt: skip


def test_default_sizes_are_shares_of_the_experts() -> None:
    assert default_slots(64, 6) == (9, 13, 19, 26, 32, 48)
    assert default_slots(8, 2) == (2, 3, 4, 6)


def test_rows_have_the_promised_fields_and_are_json() -> None:
    options = SimulateOptions(slots=(4, 6), batches=(1, 2), record_bytes=100)

    result = json.loads(json.dumps(simulate(synthetic_trace(), options)))

    assert result["trace"] == "synthetic"
    assert result["definitions"] == 1
    assert len(result["rows"]) == 6 * 2 * 2
    for row in result["rows"]:
        assert set(row) >= FIELDS
        assert row["belady"] <= row["belady_forced"]
        assert row["belady"] <= row["miss"] == row["misses"] / row["logical"]
        assert row["bytes_per_token"] == pytest.approx(row["miss"] * 3 * 2 * 100)


def test_gap_is_measured_from_the_best_simple_policy() -> None:
    rows = simulate(
        synthetic_trace(),
        SimulateOptions(
            policies=("lru", "lfu", "lfru", "heat", "belady"), slots=(5,), batches=(1,)
        ),
    )["rows"]
    by_name = {row["policy"]: row for row in rows}
    best = min(by_name[name]["miss"] for name in ("lru", "lfu", "lfru"))
    bound = rows[0]["belady"]

    assert max(by_name[name]["gap_closed"] for name in ("lru", "lfu", "lfru")) == 0
    for row in rows:
        assert row["gap_closed"] == pytest.approx((best - row["miss"]) / (best - bound))


def test_where_everything_fits_there_is_no_gap() -> None:
    rows = simulate(
        synthetic_trace(), SimulateOptions(policies=("lru",), slots=(16,), batches=(1,))
    )["rows"]

    assert rows[0]["gap_closed"] is None
    assert rows[0]["miss"] == rows[0]["belady"]
    assert "  -  " in tables({"trace": "synthetic", "rows": rows})


def test_in_domain_measures_the_last_sequences_only() -> None:
    trace = synthetic_trace(num_seqs=10)
    rows = simulate(
        trace,
        SimulateOptions(policies=("lru", "learned"), slots=(5,), batches=(1,), split="in-domain"),
    )["rows"]
    alone = simulate(
        trace.sequences(7, 10), SimulateOptions(policies=("lru",), slots=(5,), batches=(1,))
    )["rows"]

    assert rows[0]["logical"] == 3 * 30 * 3 * 2
    assert rows[0]["misses"] == alone[0]["misses"], "lru keeps no state"


def test_transfer_starts_from_the_other_trace() -> None:
    options = SimulateOptions(
        policies=("static",),
        slots=(8,),
        batches=(1,),
        split="transfer",
        learn_from=synthetic_trace(seed=1),
    )
    own = SimulateOptions(
        policies=("static",), slots=(8,), batches=(1,), split="transfer",
        learn_from=synthetic_trace(seed=0),
    )  # fmt: skip

    other_task = simulate(synthetic_trace(seed=0), options)["rows"][0]["misses"]

    assert simulate(synthetic_trace(seed=0), own)["rows"][0]["misses"] < other_task


def test_a_trace_of_another_model_is_refused() -> None:
    options = SimulateOptions(split="transfer", learn_from=synthetic_trace(num_experts=8))
    with pytest.raises(TraceError, match="another model"):
        simulate(synthetic_trace(), options)


def test_as_recorded_takes_the_steps_of_the_trace() -> None:
    trace = synthetic_trace(num_seqs=2, seq_len=20)
    recorded = replace(trace, step=np.tile(np.arange(20), 2))
    rows = simulate(recorded, SimulateOptions(policies=("lru",), slots=(6,), as_recorded=True))[
        "rows"
    ]

    assert [row["batch"] for row in rows] == [None]
    assert rows[0]["events"] == 20 * 3
    assert "rec." in tables({"trace": "t", "rows": rows})


def test_the_template_can_be_dropped() -> None:
    trace = synthetic_trace(num_seqs=6)
    for begin in trace.seq_offsets[:-1]:
        trace.ids[begin : begin + 10] = trace.ids[:10]
    options = SimulateOptions(policies=("lru",), slots=(5,), batches=(1,), keep_template=False)

    rows = simulate(trace, options)["rows"]

    assert rows[0]["logical"] == 6 * 20 * 3 * 2
    assert (
        rows[0]["misses"]
        == simulate(
            without_prefix(trace, 10), SimulateOptions(policies=("lru",), slots=(5,), batches=(1,))
        )["rows"][0]["misses"]
    )


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"policies": ("lruu",)}, "did you mean 'lru'"),
        ({"scopes": ("rank",)}, "layer, shared, global"),
        ({"split": "indomain"}, "did you mean 'in-domain'"),
        ({"batches": (0,)}, "batch is 0"),
        ({"split": "transfer"}, "needs a trace to learn from"),
        ({"predictors": ("learned_id",)}, "did you mean 'learned_ids'"),
        ({"sequences": 0}, "give at least 1"),
        ({"record_bytes": -1}, "record_bytes is -1"),
        ({"layer_s": 1e-3}, "give all three"),
        ({"layer_s": 1e-3, "link_bytes_s": 1e9}, "the bytes of an expert"),
        ({"layer_s": 0.0, "link_bytes_s": 1e9, "record_bytes": 1}, "layer_s is 0.0"),
        ({"layer_s": float("nan"), "link_bytes_s": 1e9, "record_bytes": 1}, "layer_s is nan"),
    ],
)
def test_bad_options_are_refused(options: dict[str, object], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        SimulateOptions(**options)  # type: ignore[arg-type]


def test_too_few_slots_are_refused() -> None:
    with pytest.raises(CapacityError, match="at least expert_cache_slots 2"):
        simulate(synthetic_trace(), SimulateOptions(slots=(1,)))


def test_progress_names_each_replay() -> None:
    seen: list[str] = []
    simulate(
        synthetic_trace(),
        SimulateOptions(policies=("heat",), slots=(5,), batches=(1,)),
        seen.append,
    )

    assert [line.split(",")[0] for line in seen] == ["heat", "lru", "lfu", "lfru", "belady"]


def test_with_a_clock_every_predictor_has_a_row() -> None:
    options = SimulateOptions(
        policies=("lru", "belady"), slots=(5,), batches=(1, 3), predictors=("popularity", "oracle"),
        record_bytes=1000, layer_s=2e-4, link_bytes_s=1e7,
    )  # fmt: skip

    result = json.loads(json.dumps(simulate(synthetic_trace(num_seqs=20), options)))

    rows = {(row["policy"], row["predictor"], row["batch"]): row for row in result["rows"]}
    assert len(rows) == 2 * 3 * 2 == len(result["rows"])
    for (policy, predictor, batch), row in rows.items():
        assert row["hits"] + row["misses"] == row["union"]
        assert row["ms_per_token"] >= row["stall_ms_per_token"] > 0
        if predictor is None:
            assert row["bytes_per_token"] == pytest.approx(row["misses"] * 1000 / row["num_tokens"])
        else:
            assert row["gap_closed"] is None
            assert row["predictor_us"] > 0
        if predictor == "oracle":
            demand = rows[policy, None, batch]
            assert row["stall_ms_per_token"] < demand["stall_ms_per_token"]
            assert row["misses"] < demand["misses"]
            assert row["useful"] > 0 == row["wasted"]
    assert "virtual clock" in tables(result)


def test_guesses_have_a_row_for_each_distance() -> None:
    options = SimulateOptions(
        policies=("lru",), slots=(5,), batches=(1, 2), predictors=("oracle", "popularity")
    )

    result = json.loads(json.dumps(simulate(synthetic_trace(), options)))

    found = result["predictions"]
    assert [(row["predictor"], row["batch"], row["distance"]) for row in found] == [
        (name, batch, distance)
        for name in ("oracle", "popularity")
        for batch in (1, 2)
        for distance in range(3)
    ], "there are three layers, so none is three ahead"
    assert all(row["recall"] == 1 for row in found[:6])
    assert all(0 < row["recall"] < 1 for row in found[6:])
    assert all(row["first_token"] == 0 and row["last_token"] is None for row in found)
    assert all(row["predictor"] is None for row in result["rows"]), "nothing guessed there"
    shown = tables(result)
    for word in ("start", "predictor  oracle", "policy     lru"):
        assert word in shown


def test_a_new_task_is_summed_up_in_two_ranges() -> None:
    trace = synthetic_trace(num_seqs=70, num_layers=1)  # 2,100 tokens
    options = SimulateOptions(
        policies=("lru",), slots=(5,), batches=(1,), split="prequential", predictors=("popularity",)
    )

    result = simulate(trace, options)

    assert [(row["first_token"], row["last_token"]) for row in result["predictions"]] == [
        (0, 2000),
        (2000, None),
    ]
    assert result["rows"][0]["num_tokens"] == 2100


def test_only_the_first_sequences() -> None:
    options = SimulateOptions(policies=("lru",), slots=(5,), batches=(1,), sequences=2)
    assert simulate(synthetic_trace(), options)["rows"][0]["num_tokens"] == 60
    more = replace(options, sequences=99)
    assert simulate(synthetic_trace(), more)["rows"][0]["num_tokens"] == 180


def test_what_a_predictor_lacks_is_said_before_anything_runs() -> None:
    seen: list[str] = []
    options = SimulateOptions(policies=("lru",), slots=(5,), predictors=("token_table",))
    with pytest.raises(TraceError, match="token_table needs token_ids"):
        simulate(synthetic_trace(), options, seen.append)
    assert not seen


def test_learning_closes_the_gap_on_the_same_task(shared_data: Path) -> None:
    """On two layers of a real trace, from the state of its first seven tenths."""
    trace = read_trace(shared_data / "traces" / "intent.npz")
    two = replace(
        trace,
        ids=trace.ids[:, [8, 17]],
        weights=trace.weights[:, [8, 17]],
        layer_ids=trace.layer_ids[[8, 17]],
    )
    rows = simulate(
        two,
        SimulateOptions(
            policies=("learned", "adaptive"), slots=(26,), batches=(1,), split="in-domain"
        ),
    )["rows"]

    assert [row["gap_closed"] > 0.4 for row in rows] == [True, True], rows


def test_state_is_learned_without_a_cache() -> None:
    trace = synthetic_trace()
    shape = cache_shape(trace, 5, "layer")

    assert learned_state("lru", trace, 1, shape) == {}
    assert learned_state("static", trace, 1, shape)["counts"].sum() == trace.ids.size
