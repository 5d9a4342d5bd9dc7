"""Rounds of random prompts become rows."""

from __future__ import annotations

import pytest

from moe_serve.bench import bench_latency, bench_report, bench_throughput
from moe_serve.errors import RequestError
from moe_serve.figures import Row
from moe_serve.llm import LLM
from tests.fake_engine import FakeEngine


def test_every_round_has_new_prompts_of_the_same_shape() -> None:
    engine = FakeEngine(vocab_size=100)
    llm = LLM.from_parts(engine)
    rows = bench_latency(llm, input_len=6, output_len=3, batch_size=2, num_iters=4)
    assert len(engine.added) == 2 * 5  # one round before the four that count
    assert {len(request.prompt_ids) for request in engine.added} == {6}
    assert len({request.prompt_ids for request in engine.added}) == 10
    assert all(request.sampling.ignore_eos for request in engine.added)
    # that, and no end string, gives the length; min_tokens would edit every row of logits
    assert all(request.sampling.min_tokens == 0 for request in engine.added)
    assert [row.n for row in rows] == [4, 4, 4]
    latency, _, output = rows
    assert latency.min <= latency.median == latency.value <= latency.max
    assert output.max == pytest.approx(2 * 3 / latency.min)


def test_throughput_rows_agree_with_each_other() -> None:
    llm = LLM.from_parts(FakeEngine(vocab_size=100))
    rows = bench_throughput(llm, input_len=6, output_len=3, num_prompts=4, num_iters=5)
    requests, output, total = rows
    assert output.median == pytest.approx(3 * requests.median)
    assert total.median == pytest.approx(9 * requests.median)
    assert "requests 4x6/3" in requests.line()


def test_report_form() -> None:
    llm = LLM.from_parts(FakeEngine())
    report = bench_report(llm, "a command", [Row.of("x", [3.0, 1.0, 2.0], "s")])
    assert list(report) == [
        "schema", "command", "commit", "dirty", "machine", "numerics_id", "rows",
    ]  # fmt: skip
    assert report["rows"] == [
        {
            "name": "x", "value": 2.0, "unit": "s", "median": 2.0, "min": 1.0, "max": 3.0, "n": 3,
            "limit": None, "ratio": None,
        }
    ]  # fmt: skip


@pytest.mark.parametrize(
    ("sizes", "says"),
    [
        ((0, 1, 1, 1), "input_len is 0"),
        ((1, 0, 1, 1), "output_len is 0"),
        ((1, 1, 0, 1), "number of prompts is 0"),
        ((1, 1, 1, 0), "num_iters is 0"),
        ((200, 57, 1, 1), "257 tokens; the context holds 256"),
    ],
)
def test_bad_sizes(sizes: tuple[int, int, int, int], says: str) -> None:
    input_len, output_len, batch_size, num_iters = sizes
    with pytest.raises(RequestError, match=says):
        bench_latency(
            LLM.from_parts(FakeEngine()),
            input_len=input_len,
            output_len=output_len,
            batch_size=batch_size,
            num_iters=num_iters,
        )
