"""A batch answers every line, in order, once, whatever happens to the process."""

from __future__ import annotations

import fcntl
import json
import re
import resource
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from moe_serve.batch import BatchReport, run_batch
from moe_serve.config import EngineConfig
from moe_serve.errors import ConfigError, MoeServeError
from moe_serve.llm import LLM
from moe_serve.models.hf_config import GenerationDefaults
from moe_serve.text.chat_template import ChatTemplate
from moe_serve.text.tokenizer import load_tokenizer
from tests.fake_engine import FakeEngine

ROOT = Path(__file__).resolve().parents[1]
EMBEDDED = ROOT / "moe_serve" / "assets" / "demo-moe"


def line(custom_id: object, url: str = "/v1/completions", **body: Any) -> dict[str, Any]:
    body = body or {"prompt": "Hi you", "max_tokens": 3}
    return {"custom_id": custom_id, "method": "POST", "url": url, "body": body}


# 38 tokens of the embedded model's, more than two blocks of the prefix cache
SHARED_BEGINNING = (
    "Once upon a time, there was a little girl named Lily. She liked to play in the park with "
    "her dog. One day, she saw a big red ball under a tree and "
)


def lines_of_many_lengths(
    count: int, longest: int = 40, beginning: str = ""
) -> list[dict[str, Any]]:
    """Later lines often end before earlier ones."""
    limits = [1 + (i * 37) % longest for i in range(count)]
    return [
        line(f"id-{i}", prompt=f"{beginning}{i} one two", max_tokens=limit, temperature=0.8)
        for i, limit in enumerate(limits)
    ]


def make(engine: FakeEngine | None = None) -> LLM:
    return LLM.from_parts(
        engine or FakeEngine(EngineConfig.from_options({"max_num_seqs": 4}), error_id=5),
        load_tokenizer(EMBEDDED),
        GenerationDefaults(temperature=0.7),
        ChatTemplate("<{{ messages[0].content }}>"),
    )


def write(path: Path, lines: list[Any]) -> Path:
    path.write_text("".join((x if isinstance(x, str) else json.dumps(x)) + "\n" for x in lines))
    return path


def read(path: Path) -> list[dict[str, Any]]:
    answers = [json.loads(text) for text in path.read_text().splitlines()]
    for answer in answers:
        answer["response"]["body"].pop("created", None)
        assert re.fullmatch(r"batch_req_\d+(_[0-9a-f]{8}){3}", answer.pop("id"))
    return answers


def test_form_of_an_answer(tmp_path: Path) -> None:
    messages = [{"role": "user", "content": "Hi"}]
    source = write(
        tmp_path / "in.jsonl",
        [
            line("a"),
            line("b", "/v1/chat/completions", messages=messages, max_tokens=2, n=2),
        ],
    )
    report = run_batch(make(), source, tmp_path / "out.jsonl")
    assert report == BatchReport(num_lines=2, num_resumed=0, num_failed=0)
    first, second = read(tmp_path / "out.jsonl")
    assert first == {
        "custom_id": "a",
        "response": {
            "status_code": 200,
            "request_id": "request-0",
            "body": {
                "id": "cmpl-0",
                "object": "text_completion",
                "model": "demo-moe",
                "choices": [
                    {"text": "Hi you", "logprobs": None, "index": 0, "finish_reason": "length"}
                ],
                "usage": {"prompt_tokens": 3, "completion_tokens": 3, "total_tokens": 6},
            },
        },
        "error": None,
    }
    choices = second["response"]["body"]["choices"]
    assert [choice["message"]["content"] for choice in choices] == ["<H", "Hi"]


def test_order_is_the_inputs_and_the_window_is_bounded(tmp_path: Path) -> None:
    engine = FakeEngine(EngineConfig.from_options({"max_num_seqs": 4}))
    source = write(tmp_path / "in.jsonl", lines_of_many_lengths(50))
    run_batch(make(engine), source, tmp_path / "out.jsonl")
    answers = read(tmp_path / "out.jsonl")
    assert [answer["custom_id"] for answer in answers] == [f"id-{i}" for i in range(50)]
    counts = [answer["response"]["body"]["usage"]["completion_tokens"] for answer in answers]
    assert counts == [1 + (i * 37) % 40 for i in range(50)]
    assert engine.most_at_once == 8
    assert len({request.seed for request in engine.added}) == 50


BAD_LINES: tuple[tuple[Any, str | None, str], ...] = (
    ("{not json", None, "line 3: not JSON: Expecting property name"),
    ("[1, 2]", None, "line 4: not a JSON object"),
    (
        {"method": "POST", "url": "/v1/completions", "body": {}},
        None,
        "line 5: the field custom_id is missing",
    ),
    ({"custom_id": "x", "url": "/v1/completions", "body": {}}, "x", "method is missing"),
    ({"custom_id": "x", "method": "POST", "body": {}}, "x", "url is missing"),
    ({"custom_id": "x", "method": "POST", "url": "/v1/completions"}, "x", "body is missing"),
    (line(7), None, "line 9: custom_id is 7"),
    ({**line("x"), "method": "GET"}, "x", "method is 'GET'"),
    ({**line("x"), "priority": 1}, "x", "'priority' is unknown"),
    ({**line("x"), "body": [1]}, "x", "body must be an object"),
    (line("x", "/v1/embeddings"), "x", "/v1/embeddings"),
    (line("x", prompt="a", tools=[]), "x", "'tools' is not supported"),
    (line("x", prompt="a", temperature=-1), "x", "temperature is -1"),
    (line("x", prompt=""), "x", "prompt is empty"),
    (line("x", prompt=[9999]), "x", "9999"),
    (line("x", prompt="a", temperature=10**400), "x", "temperature is 1000"),
    (line("x", prompt="a", top_p=10**400), "x", "top_p is 1000"),
    (line("x", prompt="a", seed=10**400), "x", "seed is 1000"),
    (line("x", prompt="a", priority=10**400), "x", "priority is"),
    (line("x", prompt="a", logit_bias={"5": 10**400}), "x", "logit_bias[5] is 1000"),
    (line("x", prompt="a", logit_bias={"9" * 5000: 1}), "x", "names are token ids"),
    (line("x", prompt="a", bad_words=["\ud800"]), "x", "bad_words has a lone surrogate"),
    (line("x", prompt="a", cache_salt="\ud800"), "x", "cache_salt has a lone surrogate"),
    (line("x", prompt="word " * 300), "x", "256"),
    (line("first"), "first", "is there twice"),
)  # fmt: skip


def test_bad_lines_are_answered_and_stop_nothing(tmp_path: Path) -> None:
    bad = [{**b[0], "custom_id": f"x{i}"} if b[1] == "x" else b[0] for i, b in enumerate(BAD_LINES)]
    source = write(tmp_path / "in.jsonl", [line("first"), "", *bad, line("last")])
    report = run_batch(make(), source, tmp_path / "out.jsonl")
    assert report == BatchReport(len(bad) + 2, 0, len(bad))
    answers = read(tmp_path / "out.jsonl")
    assert [answers[0]["custom_id"], answers[-1]["custom_id"]] == ["first", "last"]
    assert answers[-1]["response"]["status_code"] == 200
    for i, ((_, custom_id, says), answer) in enumerate(zip(BAD_LINES, answers[1:-1], strict=True)):
        assert answer["custom_id"] == (f"x{i}" if custom_id == "x" else custom_id)
        assert answer["response"]["status_code"] == 400
        error = answer["response"]["body"]["error"]
        assert says in error["message"]
        assert error["type"] == "invalid_request_error"


def test_engine_faults_are_500_and_refusals_400(tmp_path: Path) -> None:
    engine = FakeEngine(error_id=5, capacity=10)
    source = write(
        tmp_path / "in.jsonl",
        [line("nan", prompt=[5]), line("big", prompt=[41] * 20), line("good", prompt=[41])],
    )
    report = run_batch(make(engine), source, tmp_path / "out.jsonl")
    assert report.num_failed == 2
    codes = [answer["response"]["status_code"] for answer in read(tmp_path / "out.jsonl")]
    assert codes == [500, 400, 200]


def test_forms_are_kept_to_and_wrong_ones_are_400(tmp_path: Path) -> None:
    wanted = {"type": "json_schema", "json_schema": {"name": "n", "schema": {"enum": ["a", "b"]}}}
    source = write(
        tmp_path / "in.jsonl",
        [
            line("form", prompt="x", response_format=wanted),
            line("wrong", prompt="x", structured_outputs={"regex": "((("}),
            line("plain", prompt="x"),
        ],
    )
    with LLM(max_num_seqs=8) as llm:
        run_batch(llm, source, tmp_path / "out.jsonl")
    form, wrong, plain = (answer["response"] for answer in read(tmp_path / "out.jsonl"))
    assert json.loads(form["body"]["choices"][0]["text"]) in ("a", "b")
    assert wrong["status_code"] == 400
    assert "structured_outputs.regex" in wrong["body"]["error"]["message"]
    assert wrong["body"]["error"]["type"] == "invalid_request_error"
    assert plain["status_code"] == 200


@pytest.mark.parametrize("torn", ["", "{", '{"id": "batch_req_7", "custom_id": "id-7", "resp'])
def test_resume_at_any_line_gives_the_same_file(tmp_path: Path, torn: str) -> None:
    source = write(tmp_path / "in.jsonl", ["junk", *lines_of_many_lengths(12)])
    whole = tmp_path / "whole.jsonl"
    run_batch(make(), source, whole)
    texts = whole.read_text().splitlines(keepends=True)
    for num_done in (0, 1, 7, 13):
        target = tmp_path / f"{num_done}.jsonl"
        target.write_text("".join(texts[:num_done]) + (torn if num_done else ""))
        report = run_batch(make(), source, target)
        assert report.num_lines == 13
        assert report.num_resumed == num_done
        assert read(target) == read(whole)


@pytest.mark.parametrize(
    ("torn", "is_foreign"),
    [('{"id": "batch_req_2", "cus', True), ("my notes", False), ('{"id": "x"}\n', False)],
)
def test_nothing_is_cut_off_an_output_that_is_not_ours(
    tmp_path: Path, torn: str, is_foreign: bool
) -> None:
    """A last line is cut only if it is torn, and only after the lines before it proved ours."""
    source = write(tmp_path / "in.jsonl", [line("a"), line("b"), line("c")])
    target = tmp_path / "out.jsonl"
    run_batch(make(), source, target)
    target.write_text("".join(target.read_text().splitlines(keepends=True)[:2]) + torn)
    before = target.read_bytes()
    other = write(tmp_path / "other.jsonl", [line("a"), line("x"), line("c")])
    with pytest.raises(ConfigError, match="another input" if is_foreign else "line 3 is no answer"):
        run_batch(make(), other if is_foreign else source, target)
    assert target.read_bytes() == before


def test_an_answer_of_another_place_is_no_answer(tmp_path: Path) -> None:
    source = write(tmp_path / "in.jsonl", [line("a"), line("a2")])
    target = tmp_path / "out.jsonl"
    run_batch(make(), source, target)
    target.write_text(target.read_text().replace("batch_req_1", "batch_req_9"))
    with pytest.raises(ConfigError, match="line 2 is no answer of a batch"):
        run_batch(make(), source, target)


def test_priority_and_salt_reach_the_engine(tmp_path: Path) -> None:
    engine = FakeEngine()
    lines = [
        line("a", prompt="Hi", priority=3, cache_salt="s"),
        line("b"),
        line("c", prompt="Hi", priority="high"),
    ]
    source = write(tmp_path / "in.jsonl", lines)
    run_batch(make(engine), source, tmp_path / "out.jsonl")
    assert [(r.priority, r.cache_salt) for r in engine.added] == [(3, "s"), (0, "")]
    error = read(tmp_path / "out.jsonl")[2]["response"]["body"]["error"]["message"]
    assert error == "priority is 'high'; it must be an integer"


def test_a_duplicate_is_seen_across_a_resume(tmp_path: Path) -> None:
    source = write(tmp_path / "in.jsonl", [line("a"), line("b"), line("a")])
    whole = tmp_path / "whole.jsonl"
    run_batch(make(), source, whole)
    half = tmp_path / "half.jsonl"
    half.write_text("".join(whole.read_text().splitlines(keepends=True)[:1]))
    run_batch(make(), source, half)
    assert read(half) == read(whole)
    assert read(half)[2]["response"]["status_code"] == 400


def test_an_output_of_another_input_is_left_alone(tmp_path: Path) -> None:
    target = tmp_path / "out.jsonl"
    seeded = EngineConfig.from_options({"seed": 7})
    run_batch(make(), write(tmp_path / "in.jsonl", [line("a"), line("b")]), target)
    before = target.read_bytes()
    other = write(tmp_path / "other.jsonl", [line("a"), line("c"), line("d")])
    with pytest.raises(ConfigError, match=r"custom_id 'b', but .* has 'c' there"):
        run_batch(make(), other, target)
    shorter = write(tmp_path / "shorter.jsonl", [line("a")])
    changed = write(tmp_path / "changed.jsonl", ["", line("a"), "", line("b", prompt="Ho")])
    with pytest.raises(ConfigError, match=r"answer 2: .*changed\.jsonl:4 has changed"):
        run_batch(make(), changed, target)
    with pytest.raises(ConfigError, match=r"answer 1 .*in\.jsonl:1\) was given with another model"):
        run_batch(make(FakeEngine(seeded)), tmp_path / "in.jsonl", target)
    engine = FakeEngine()
    engine.numerics_id = "other"
    with pytest.raises(ConfigError, match="other kernels"):
        run_batch(make(engine), tmp_path / "in.jsonl", target)
    with pytest.raises(ConfigError, match="2 answers for the 1 lines"):
        run_batch(make(), shorter, target)
    assert target.read_bytes() == before


@pytest.mark.parametrize("text", ["my notes\n", "my notes", "a\nb\nc\n", '{"a": 1}\n'])
def test_a_file_that_is_no_output_is_left_alone(tmp_path: Path, text: str) -> None:
    source = write(tmp_path / "in.jsonl", [line("a")])
    target = tmp_path / "out.jsonl"
    target.write_text(text)
    with pytest.raises(ConfigError, match=r"no (output|answer) of a batch"):
        run_batch(make(), source, target)
    assert target.read_text() == text


def test_files_that_cannot_be_used(tmp_path: Path) -> None:
    source = write(tmp_path / "in.jsonl", [line("a")])
    with pytest.raises(ConfigError, match="is the input"):
        run_batch(make(), source, source)
    with pytest.raises(ConfigError, match=r"none\.jsonl: no such file"):
        run_batch(make(), tmp_path / "none.jsonl", tmp_path / "out.jsonl")
    assert not (tmp_path / "out.jsonl").exists()
    with pytest.raises(ConfigError, match="cannot be opened"):
        run_batch(make(), source, tmp_path / "no" / "out.jsonl")


def test_two_runs_do_not_share_an_output(tmp_path: Path) -> None:
    source = write(tmp_path / "in.jsonl", [line("a")])
    target = tmp_path / "out.jsonl"
    with target.open("ab") as held:
        fcntl.flock(held, fcntl.LOCK_EX)
        with pytest.raises(ConfigError, match="another run is writing it"):
            run_batch(make(), source, target)
    assert run_batch(make(), source, target).num_lines == 1


def test_a_fault_of_ours_is_one_lines(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    llm = make()
    prepare = llm.prepare

    def broken(prompt: Any, *args: Any, **named: Any) -> Any:
        if prompt == {"prompt": "two"}:
            raise OverflowError("int too large")
        return prepare(prompt, *args, **named)

    monkeypatch.setattr(llm, "prepare", broken)
    source = write(tmp_path / "in.jsonl", [line("a"), line("b", prompt="two"), line("c")])
    assert run_batch(llm, source, tmp_path / "out.jsonl").num_failed == 1
    answers = [answer["response"] for answer in read(tmp_path / "out.jsonl")]
    assert [answer["status_code"] for answer in answers] == [200, 500, 200]
    assert "OverflowError: int too large" in answers[1]["body"]["error"]["message"]
    assert "in.jsonl:2" in caplog.text


def test_another_models_name_is_told_once(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    names = ["demo-moe", "gpt-4", "gpt-5"]
    lines = [line(name, prompt="Hi", model=name) for name in names]
    run_batch(make(), write(tmp_path / "in.jsonl", lines), tmp_path / "out.jsonl")
    (record,) = caplog.records
    assert "in.jsonl:2 asks for model 'gpt-4'" in record.getMessage()


def test_a_full_disk_names_the_output(tmp_path: Path) -> None:
    source = write(tmp_path / "in.jsonl", [line("a")])
    target = tmp_path / "out.jsonl"
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (100, limits[1]))
    try:
        with pytest.raises(MoeServeError, match=r"out\.jsonl: cannot be written \(File too large"):
            run_batch(make(), source, target)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert run_batch(make(), source, target) == BatchReport(1, 0, 0)  # the torn line is cut
    with pytest.raises(ConfigError, match="not a regular file"):
        run_batch(make(), source, Path("/dev/null"))


@pytest.mark.parametrize(("engine", "count", "longest"), [("fake", 150, 40), ("real", 200, 8)])
def test_killed_ten_times_and_resumed(
    tmp_path: Path, engine: str, count: int, longest: int
) -> None:
    """No line is lost or repeated, and all answers are those of a run that nobody killed.

    The prompts begin alike, so that after each kill other lines find the prefix cache empty.
    """
    lines = lines_of_many_lengths(count, longest, SHARED_BEGINNING)
    source = write(tmp_path / "in.jsonl", lines)
    killed, whole = tmp_path / "killed.jsonl", tmp_path / "whole.jsonl"
    command = [sys.executable, "-m", "tests.batch_killer", source, killed, whole, "10", engine]
    done = subprocess.run(
        list(map(str, command)), cwd=ROOT, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    answers_left = [int(word) for word in done.stdout.split()]
    assert len(answers_left) == 10
    assert len(set(answers_left)) > 3  # kills fell in different places
    assert len(read(whole)) == count
    assert read(killed) == read(whole)
