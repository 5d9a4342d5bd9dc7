"""Outputs have the form that was asked for; what is asked for harms nobody else."""

from __future__ import annotations

import gc
import json
import re
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from moe_serve.config import EngineConfig
from moe_serve.engine import engine as engine_module
from moe_serve.engine import grammar, grammar_compiler
from moe_serve.engine.build import build_engine
from moe_serve.engine.engine import Engine
from moe_serve.engine.grammar import Compiled, Grammars, Matcher, Trial
from moe_serve.engine.grammar_compiler import GrammarError
from moe_serve.errors import RequestError
from moe_serve.structured_outputs import read_structured_outputs
from moe_serve.text.tokenizer import load_tokenizer
from moe_serve.types import Request, SamplingParams, StepOutput, StructuredOutputs
from tests.engine.hard_grammars import HARD
from tests.models import tiny

ROOT = Path(__file__).resolve().parents[2]
MODEL = ROOT / "moe_serve" / "assets" / "demo-moe"
TOKENIZER = load_tokenizer(MODEL)
assert TOKENIZER is not None
EOS, VOCAB_SIZE = 0, 6144
PROMPTS = [tuple(TOKENIZER.encode(text)) for text in ("Once upon a time", "def f(", "{")]

PERSON = {
    "type": "object",
    "properties": {
        "name": {"type": "string", "maxLength": 12},
        "age": {"type": "integer", "minimum": 0, "maximum": 150},
        "kind": {"enum": ["a", "b"]},
        "tags": {"type": "array", "items": {"type": "boolean"}, "maxItems": 3},
    },
    "required": ["name", "age", "kind", "tags"],
    "additionalProperties": False,
}


def is_person(text: str) -> bool:
    found = json.loads(text)
    return (
        list(found) == ["name", "age", "kind", "tags"]
        and isinstance(found["name"], str)
        and len(found["name"]) <= 12
        and isinstance(found["age"], int)
        and 0 <= found["age"] <= 150
        and found["kind"] in ("a", "b")
        and len(found["tags"]) <= 3
        and all(isinstance(tag, bool) for tag in found["tags"])
    )


FORMS: dict[str, tuple[StructuredOutputs, Callable[[str], object]]] = {
    "json": (StructuredOutputs(json=PERSON), is_person),
    "regex": (
        StructuredOutputs(regex="[a-z]{3,8}-[0-9]{2}( \N{SNOWMAN}){1,2}"),
        re.compile("[a-z]{3,8}-[0-9]{2}( \N{SNOWMAN}){1,2}").fullmatch,
    ),
    "choice": (
        StructuredOutputs(choice=['re"d', "gr\\een\n", "\N{GRINNING FACE}!"]),
        ['re"d', "gr\\een\n", "\N{GRINNING FACE}!"].__contains__,
    ),
    "grammar": (
        StructuredOutputs(
            grammar='start: "(" part ("," part){0,2} ")"\npart: /[0-9]{1,3}/ | "[" WORD "]"\n'
            "WORD: /[a-z]{1,5}/"
        ),
        re.compile(r"\(([0-9]{1,3}|\[[a-z]{1,5}\])(,([0-9]{1,3}|\[[a-z]{1,5}\])){0,2}\)").fullmatch,
    ),
}


@pytest.fixture
def make_engine() -> Iterator[Callable[..., Engine]]:
    """Make engines of the embedded model that are closed at the end."""
    made: list[Engine] = []

    def make(**options: object) -> Engine:
        config = EngineConfig.from_options({"max_num_seqs": 16, **options})
        made.append(build_engine(config, MODEL))
        return made[-1]

    yield make
    for engine in made:
        engine.close()


def request(name: str, prompt: tuple[int, ...] = PROMPTS[0], **sampling: Any) -> Request:
    sampling = {"max_tokens": 200, "temperature": 0.0, **sampling}
    return Request(
        request_id=name,
        prompt_ids=prompt,
        sampling=SamplingParams(**sampling),
        seed=len(name),
        eos_token_ids=frozenset({EOS}),
    )


Outputs = dict[tuple[str, int], tuple[tuple[int, ...], StepOutput]]


def drain(engine: Engine) -> Outputs:
    """Run what the engine has; return each output's tokens and its last step."""
    found: Outputs = {}
    end_s = time.monotonic() + 60
    while engine.has_unfinished:
        assert time.monotonic() < end_s, "the engine does not come to an end"
        for step in engine.step():
            tokens, _ = found.get((step.request_id, step.index), ((), step))
            found[step.request_id, step.index] = tokens + step.token_ids, step
    return found


def run(engine: Engine, *requests: Request) -> Outputs:
    for one in requests:
        engine.add(one)
    return drain(engine)


def tokens_of(outputs: Outputs) -> dict[tuple[str, int], tuple[tuple[int, ...], str | None]]:
    return {key: (tokens, last.finish_reason) for key, (tokens, last) in outputs.items()}


def text_of(tokens: tuple[int, ...]) -> str:
    assert TOKENIZER is not None
    return TOKENIZER.decode(tokens)


def plain_requests() -> list[Request]:
    return [
        request(f"plain{i}", PROMPTS[i % 3], temperature=0.9 * (i % 2), max_tokens=30, n=1 + i // 3)
        for i in range(4)
    ]


def structured_requests() -> list[Request]:
    return [
        request(
            f"{name}-{temperature:g}",
            PROMPTS[place % 3],
            structured_outputs=asked,
            temperature=temperature,
            n=3,
        )
        for place, (name, (asked, _)) in enumerate(FORMS.items())
        for temperature in (0.0, 1.0)
    ]


def test_outputs_have_their_form_whatever_runs_beside_them(
    make_engine: Callable[..., Engine],
) -> None:
    engine = make_engine(enable_prefix_caching=False)
    plain, structured = plain_requests(), structured_requests()
    want = tokens_of(run(engine, *plain))
    for one in structured:
        want |= tokens_of(run(engine, one))
    texts = set()
    for one in structured:
        for index in range(3):
            tokens, reason = want[one.request_id, index]
            text = text_of(tokens)
            assert reason == "stop"
            assert EOS not in tokens, "nothing could follow, so it ended at once"
            assert FORMS[one.request_id.partition("-")[0]][1](text), text
            texts.add(text)
    assert len(texts) > 12
    mixed = [*structured, *plain]
    assert tokens_of(run(engine, *mixed)) == want
    small = make_engine(num_kv_blocks=28, block_size=8, max_prefill_chunk=3, admission_horizon=0)
    assert tokens_of(run(small, *mixed[::-1])) == want
    assert small.stats().num_preemptions > 3
    assert tokens_of(run(small, *mixed)) == want, "with a cache of prefixes"


def test_a_form_that_may_go_on_ends_with_an_end_token(make_engine: Callable[..., Engine]) -> None:
    engine = make_engine()
    asked = StructuredOutputs(regex="a{2,}")
    likely = {EOS: 9.0}
    found = run(
        engine, request("r", structured_outputs=asked, temperature=2.0, n=8, logit_bias=likely)
    )
    for tokens, last in found.values():
        assert last.finish_reason == "stop"
        assert tokens[-1] == EOS
        assert re.fullmatch("a{2,}", text_of(tokens))
    assert len({tokens for tokens, _ in found.values()}) > 2


@pytest.mark.parametrize(
    ("regex", "sampling", "says"),
    [
        # before min_tokens there is no end token, but the end of what can be said is the end
        ("a{1,40}", {"min_tokens": 6}, lambda text, num, last: num >= 6),
        ("a|b", {"min_tokens": 6}, lambda text, num, last: num == 1 and last.error is None),
        ("(a|b)?", {"min_tokens": 6}, lambda text, num, last: num == 1 and last.error is None),
        # nothing but the end could follow, but that is told only where one looks
        ("a*", {"ignore_eos": True, "max_tokens": 9}, lambda text, num, last: num == 9),
        ("ab", {"ignore_eos": True}, lambda text, num, last: text == "ab"),
        ("", {"ignore_eos": True}, lambda text, num, last: "no token is left" in last.error),
        ("ab", {"allowed_token_ids": [70]}, lambda text, num, last: "no token" in last.error),
        ("[0-9]{2}", {"stop_token_ids": [17 + 1]}, lambda text, num, last: num in (1, 2)),
        (
            "[ab]{3}",
            {"logit_bias": {66: -100.0, 437: -100.0}},
            lambda text, num, last: text == "bbb",
        ),
    ],
)
def test_where_it_meets_other_options(
    make_engine: Callable[..., Engine],
    regex: str,
    sampling: dict[str, Any],
    says: Callable[[str, int, StepOutput], bool],
) -> None:
    asked = StructuredOutputs(regex=regex) if regex else StructuredOutputs(grammar='start: ""')
    engine = make_engine()
    for temperature in (0.0, 1.0):
        given = request("r", structured_outputs=asked, temperature=temperature, **sampling)
        tokens, last = run(engine, given)["r", 0]
        assert says(text_of(tokens), len(tokens), last), (text_of(tokens), last)
        is_error = last.error is not None
        assert last.is_refused == is_error
        if not is_error and "max_tokens" not in sampling:
            assert last.finish_reason == "stop"


def test_the_mask_comes_before_the_penalties_and_leaves_the_logprobs(
    make_engine: Callable[..., Engine],
) -> None:
    engine = make_engine()
    plain = run(engine, request("p", max_tokens=1, logprobs=3))["p", 0][1]
    asked = StructuredOutputs(choice=["q"])
    step = run(engine, request("s", logprobs=3, structured_outputs=asked))["s", 0][1]
    assert step.logprobs[0].top == plain.logprobs[0].top
    assert step.logprobs[0].token_id == step.token_ids[0] != plain.token_ids[0]
    assert step.logprobs[0].logprob < plain.logprobs[0].logprob


class SlowTrial:
    """Lets no grammar through until it is told to."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.may_go = threading.Event()
        run_trial = Trial.run

        def slow(trial: Trial, kind: str, text: str) -> Any:
            assert self.may_go.wait(30)
            return run_trial(trial, kind, text)

        monkeypatch.setattr(Trial, "run", slow)


def test_nobody_waits_for_a_grammar_but_its_request(
    make_engine: Callable[..., Engine], monkeypatch: pytest.MonkeyPatch
) -> None:
    trial = SlowTrial(monkeypatch)
    engine = make_engine()
    plain = request("plain", max_tokens=20)
    want = run(engine, plain)["plain", 0][0]
    structured = request("s", structured_outputs=StructuredOutputs(regex="[0-9]{4}"), n=2)
    engine.add(structured)
    engine.add(plain)
    assert engine.stats().num_waiting == 2
    tokens: list[int] = []
    while len(tokens) < 20:
        for step in engine.step():
            assert step.request_id == "plain"
            tokens += step.token_ids
    assert tuple(tokens) == want
    assert engine.has_unfinished
    # nothing else to do: a step waits a little, and uses no processor meanwhile
    used_s, begun_s = time.process_time(), time.monotonic()
    for _ in range(40):
        assert engine.step() == []
    took_s = time.monotonic() - begun_s
    assert took_s >= 40 * engine_module.GRAMMAR_WAIT_S
    assert took_s / 40 < 0.02
    assert time.process_time() - used_s < took_s / 2
    trial.may_go.set()
    assert {last.finish_reason for _, last in drain(engine).values()} == {"stop"}


@pytest.mark.parametrize("end", ["abort", "close"])
def test_a_request_that_waits_for_its_grammar_can_go(
    make_engine: Callable[..., Engine], monkeypatch: pytest.MonkeyPatch, end: str
) -> None:
    trial = SlowTrial(monkeypatch)
    engine = make_engine()
    asked = StructuredOutputs(regex="[0-9]{4}")
    engine.add(request("s", structured_outputs=asked))
    assert engine.step() == []
    if end == "close":
        trial.may_go.set()
        engine.close()
        return
    assert engine.abort("s")
    assert not engine.has_unfinished
    assert engine.stats().num_waiting == 0
    assert engine.step() == []
    engine.add(request("s", structured_outputs=StructuredOutputs(regex="[a-z]{5}")))
    trial.may_go.set()
    tokens, _ = drain(engine)["s", 0]
    assert re.fullmatch("[a-z]{5}", text_of(tokens)), "not the grammar of its namesake"


def test_a_grammar_that_is_wrong_ends_all_outputs_of_its_request(
    make_engine: Callable[..., Engine],
) -> None:
    engine = make_engine()
    want = run(engine, request("plain"))
    wrong = request("wrong", structured_outputs=StructuredOutputs(regex="((("), n=3)
    for _ in range(2):
        found = run(engine, wrong, request("plain"))
        assert [found["wrong", i][1].finish_reason for i in range(3)] == ["error"] * 3
        for index in range(3):
            _, last = found["wrong", index]
            assert last.is_refused
            assert "structured_outputs.regex: " in (last.error or "")
            assert "unclosed group" in (last.error or "")
        assert found["plain", 0] == want["plain", 0]
    assert not engine.has_unfinished


def test_an_interrupt_loses_no_refusal(
    make_engine: Callable[..., Engine], monkeypatch: pytest.MonkeyPatch
) -> None:
    engine = make_engine()
    engine.add(request("wrong", structured_outputs=StructuredOutputs(regex="(((")))
    engine.add(request("plain", max_tokens=3))
    engine.grammars.wait(30)

    def interrupted(step: object) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patched:
        patched.setattr(engine.runner, "run", interrupted)
        with pytest.raises(KeyboardInterrupt):
            engine.step()
    assert engine.has_unfinished
    found = drain(engine)
    assert found["wrong", 0][1].is_refused
    assert len(found["plain", 0][0]) == 3


def test_hard_grammars_are_refused_or_run_within_the_limits(
    make_engine: Callable[..., Engine], monkeypatch: pytest.MonkeyPatch
) -> None:
    """A whole engine meets each; the tests of the trial know which must be refused."""
    assert len(HARD) > 40
    monkeypatch.setattr(grammar, "MAX_GRAMMAR_S", 1.0)
    engine = make_engine()
    engine.grammars = Grammars(MODEL, VOCAB_SIZE, limit_s=1.0)
    plain = request("plain", max_tokens=8)
    want = run(engine, plain)["plain", 0][0]
    longest_s = 0.0
    for kind, text, expected in HARD:
        try:
            asked = read_structured_outputs({kind: text})
        except RequestError:
            assert expected == "error"
            continue
        engine.add(plain)
        engine.add(request("hard", structured_outputs=asked, temperature=1.0, max_tokens=20))
        found: Outputs = {}
        begun_s = time.monotonic()
        while engine.has_unfinished:
            step_s = time.monotonic()
            for step in engine.step():
                tokens, _ = found.get((step.request_id, 0), ((), step))
                found[step.request_id, 0] = tokens + step.token_ids, step
            longest_s = max(longest_s, time.monotonic() - step_s)
        assert time.monotonic() - begun_s < 6
        assert found["plain", 0][0] == want
        last = found["hard", 0][1]
        assert (last.finish_reason == "error") == last.is_refused, (text[:80], last.error)
        assert expected == "any" or last.is_refused, text[:80]
        assert len(last.error or "") < 500
        assert "/etc" not in (last.error or "") or "/etc" in text
    assert longest_s < 0.5, "a step waited for a grammar"


def matcher_of(
    asked: StructuredOutputs, vocab_size: int = VOCAB_SIZE, **of_request: Any
) -> Matcher:
    compiler = grammar_compiler.GrammarCompiler(MODEL / grammar_compiler.TOKENIZER_FILE)
    given = replace(request("m", structured_outputs=asked), **of_request)
    compiled = compiler.compile(asked.kind, asked.text)
    return Matcher(compiled, given, vocab_size, compiler.num_ids, compiler.end_id)


@pytest.mark.parametrize(
    ("asked", "says"),
    [
        (StructuredOutputs(choice=["a<|endoftext|>b", "b"]), "is a special token"),
        (StructuredOutputs(regex="<|end of structured output|>"), "is a special token"),
        (StructuredOutputs(json={"const": "x <|endoftext|>"}), "is a special token"),
        (StructuredOutputs(regex=r"a[^\s\S]b"), "no text can satisfy it"),
        (StructuredOutputs(grammar="start: start"), "no text can satisfy it"),
    ],
    ids=["choice", "our own", "json", "empty", "endless"],
)
def test_what_no_text_can_satisfy_is_said_plainly(asked: StructuredOutputs, says: str) -> None:
    compiler = grammar_compiler.GrammarCompiler(MODEL / grammar_compiler.TOKENIZER_FILE)
    assert says in grammar_compiler.trial(compiler, asked.kind, asked.text)["error"]


def test_a_matcher_depends_on_the_tokens_alone() -> None:
    """Token by token, or all at once as after a crash: the same may follow."""
    assert TOKENIZER is not None
    asked = FORMS["json"][0]
    output = TOKENIZER.encode('{"name": "Bob", "age": 14, "kind": "a", "tags": [true]}')
    tokens = list(PROMPTS[0])
    stepwise = matcher_of(asked)
    for place, token in enumerate(output):
        allowed = stepwise.allowed(tokens)
        assert allowed[token]
        assert not stepwise.is_complete(tokens)
        if place % 4 == 0:
            assert (matcher_of(asked).allowed(tokens) == allowed).all()
        tokens.append(token)
    assert stepwise.is_complete(tokens)
    assert matcher_of(asked).is_complete(tokens)


def test_ids_that_the_tokenizer_lacks_are_never_allowed_and_end_ids_only_at_an_end() -> None:
    asked = StructuredOutputs(regex="[^x]*b")
    larger = matcher_of(asked, 7000, eos_token_ids=frozenset({0, 1, 6999, 8000}))
    tokens = list(PROMPTS[0])
    allowed = larger.allowed(tokens)
    assert allowed.shape == (7000,)
    assert allowed[2:VOCAB_SIZE].sum() > 3000
    assert not allowed[VOCAB_SIZE:].any()
    assert not allowed[[0, 1]].any()
    tokens.append(67)  # "b"
    allowed = larger.allowed(tokens)
    assert allowed[[0, 1, 6999]].all()
    assert allowed[VOCAB_SIZE:].sum() == 1
    assert not larger.is_complete(tokens)
    smaller = matcher_of(asked, 5000)
    assert smaller.allowed(list(PROMPTS[0])).shape == (5000,)


def test_an_end_token_that_is_a_letter_ends_nothing_too_early() -> None:
    matcher = matcher_of(StructuredOutputs(regex="[abc]{2}"), eos_token_ids=frozenset({66}))
    tokens = list(PROMPTS[0])
    allowed = matcher.allowed(tokens)
    assert allowed[67]
    assert not allowed[66]


def test_what_exceeds_a_limit_fails_alone_and_always_alike(
    make_engine: Callable[..., Engine], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(grammar_compiler, "MAX_LEXER_STATES", 300)  # the trial's are as ever
    engine = make_engine()
    asked = StructuredOutputs(regex="[a-z ]{100,400}")
    greedy = request("long", structured_outputs=asked)
    found = run(engine, greedy, request("plain"), request("x", structured_outputs=asked, n=2))
    tokens, last = found["long", 0]
    assert 3 < len(tokens) < 199
    assert last.finish_reason == "error"
    assert last.is_refused
    assert "states" in (last.error or "")
    assert found["plain", 0][1].error is None
    assert run(engine, greedy)["long", 0] == (tokens, last), "whoever used the grammar before"


def test_verdicts_are_kept_and_bounded(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(grammar, "MOST_VERDICTS", 5)
    tried: list[str] = []
    run_trial = Trial.run

    def counted(trial: Trial, kind: str, text: str) -> Any:
        tried.append(text)
        return run_trial(trial, kind, text)

    monkeypatch.setattr(Trial, "run", counted)
    grammars = Grammars(MODEL, VOCAB_SIZE)
    for number in (*range(8), 7, 6, 0):
        regex = f"a{{{number}}}" if number else "((("
        compiled = compiled_of(
            grammars, request("r", structured_outputs=StructuredOutputs(regex=regex))
        )
        assert (compiled.error is None) == bool(number)
    assert [text[2] for text in tried] == [*"(1234567", "("]
    assert len(grammars._shop._verdicts) == 5
    grammars.close()


def compiled_of(grammars: Grammars, given: Request) -> Compiled:
    grammars.begin(given)
    while not (found := grammars.take()):
        grammars.wait(30)
    return found[0]


def test_matchers_have_only_so_much_room(
    make_engine: Callable[..., Engine], monkeypatch: pytest.MonkeyPatch
) -> None:
    room = 2 * (grammar.GROWTH_BYTES + 2**20)
    monkeypatch.setattr(grammar, "ROOM_BYTES", room)
    engine = make_engine()
    asked = StructuredOutputs(regex="[0-9]{8}")
    too_many = run(engine, request("n", structured_outputs=asked, n=9))["n", 0][1]
    assert too_many.is_refused
    assert "n = 9" in (too_many.error or "")
    names = [f"r{i}" for i in range(7)]
    found = run(engine, *(request(name, structured_outputs=asked, n=2) for name in names))
    assert {last.finish_reason for _, last in found.values()} == {"stop"}
    gc.collect()
    assert engine.grammars._shop._free_bytes == room, "what has ended has given it back"


def test_a_trial_that_was_killed_is_started_again(monkeypatch: pytest.MonkeyPatch) -> None:
    trial = Trial(MODEL / "tokenizer.json", 1.0)
    assert trial.run("regex", "a")[0].error is None
    process = trial._process
    assert process is not None
    process.kill()
    process.wait()
    assert trial.run("regex", "b")[0].error is None
    again = trial._process
    assert again is not process
    trial.close()
    assert trial._process is None
    assert again is not None
    assert again.returncode is not None
    with pytest.raises(RuntimeError, match="closed"):
        trial.run("regex", "c")


def children() -> list[str]:
    lists = Path("/proc/self/task").glob("*/children")  # of each thread its own
    return [child for path in lists for child in path.read_text().split()]


def test_nothing_is_left_of_an_engine_that_is_closed_or_gone(
    make_engine: Callable[..., Engine],
) -> None:
    before = children()
    num_threads = threading.active_count()
    asked = request("r", structured_outputs=StructuredOutputs(regex="ab"))
    engine = make_engine()
    run(engine, asked)
    assert len(children()) > len(before)
    engine.close()
    assert children() == before
    grammars = Grammars(MODEL, VOCAB_SIZE)
    assert compiled_of(grammars, asked).error is None
    del grammars
    gc.collect()
    assert children() == before
    assert threading.active_count() == num_threads


def test_what_is_missing_is_said_at_once(
    make_engine: Callable[..., Engine], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked = request("r", (1, 2), structured_outputs=StructuredOutputs(regex="ab"))
    tiny.save_checkpoint(tmp_path, "qwen3_moe")
    bare = build_engine(EngineConfig.from_options({"max_num_seqs": 8}), tmp_path)
    with pytest.raises(RequestError, match=r"needs a tokenizer\.json, .* as tokenizer"):
        bare.add(asked)
    assert not bare.has_unfinished
    bare.close()
    (tmp_path / "tokenizer.json").write_text('{"model": {"vocab": {}}}')
    broken = build_engine(EngineConfig.from_options({"max_num_seqs": 8}), tmp_path)
    last = run(broken, asked)["r", 0][1]
    assert "cannot be used with this model's tokenizer" in (last.error or "")
    broken.close()
    options = {"max_num_seqs": 8, "tokenizer": str(MODEL)}
    other = build_engine(EngineConfig.from_options(options), tmp_path)
    last = run(other, asked)["r", 0][1]
    assert last.error is None or "no token is left" in last.error  # of so few ids none is a letter
    other.close()
    monkeypatch.setattr(grammar, "is_installed", lambda: False)
    engine = make_engine()
    with pytest.raises(RequestError, match="pip install llguidance"):
        engine.add(asked)
    assert not engine.has_unfinished


def test_a_library_that_is_not_there_is_missed_only_by_those_who_need_it() -> None:
    program = (
        "import sys; sys.modules['llguidance'] = None\n"
        "from moe_serve.engine import build, grammar, grammar_compiler\n"
        "from pathlib import Path\n"
        "try:\n"
        "    grammar_compiler.GrammarCompiler(Path('x'))\n"
        "except ImportError:\n"
        "    print('missed')\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", program], capture_output=True, text=True, check=True
    )
    assert done.stdout == "missed\n"


def test_grammar_errors_are_short() -> None:
    with pytest.raises(GrammarError) as raised:
        matcher_of(StructuredOutputs(regex="(" * 5000))
    assert len(str(raised.value)) <= 300
