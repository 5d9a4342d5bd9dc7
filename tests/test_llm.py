"""Prompts to texts through an engine that has no model."""

from __future__ import annotations

import itertools
import re
import signal
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

import moe_serve.llm
from moe_serve.config import EngineConfig
from moe_serve.engine.model_runner import ModelRunner
from moe_serve.errors import CheckpointError, ConfigError, RequestError
from moe_serve.launch import named_model
from moe_serve.llm import LLM
from moe_serve.models.hf_config import GenerationDefaults
from moe_serve.text.chat_template import ChatTemplate
from moe_serve.text.request_output import RequestState
from moe_serve.text.tokenizer import load_tokenizer
from moe_serve.types import Request, SamplingParams, StepOutput, StructuredOutputs
from tests.bad_requests import BAD_PROMPTS
from tests.fake_engine import FakeEngine
from tests.models.bad_checkpoints import write_checkpoint

EMBEDDED = Path(__file__).resolve().parents[1] / "moe_serve" / "assets" / "demo-moe"


def make(engine: FakeEngine, template: str | None = None) -> LLM:
    return LLM.from_parts(
        engine,
        load_tokenizer(EMBEDDED),
        GenerationDefaults(eos_token_ids=frozenset({0}), temperature=0.7),
        None if template is None else ChatTemplate(template),
    )


@pytest.fixture
def engine() -> FakeEngine:
    return FakeEngine()


def test_outputs_come_in_the_order_of_the_prompts(engine: FakeEngine) -> None:
    prompts: list[Any] = ["a long first prompt that goes on", "Hi", {"prompt": "you"}, [41, 74]]
    params = [SamplingParams(max_tokens=limit) for limit in (30, 2, 7, 3)]
    outputs = make(engine).generate(prompts, params)
    assert [o.prompt for o in outputs] == [prompts[0], "Hi", "you", None]
    assert [len(o.outputs[0].token_ids) for o in outputs] == [30, 2, 7, 3]
    assert outputs[1].outputs[0].text == "Hi"
    assert outputs[3].outputs[0].text == "HiH"
    assert all(o.finished and o.outputs[0].finish_reason == "length" for o in outputs)
    assert engine.most_at_once == 4


def test_one_bare_prompt(engine: FakeEngine) -> None:
    llm = make(engine)
    params = SamplingParams(max_tokens=2)
    for prompt in ("Hi", [41, 74], {"prompt": "Hi"}, {"prompt_token_ids": (41, 74)}):
        (output,) = llm.generate(prompt, params)  # type: ignore[arg-type]
        assert output.outputs[0].text == "Hi"
    assert llm.generate([]) == []


def test_without_params_the_models_own_are_used(engine: FakeEngine) -> None:
    make(engine).generate("Hi")
    assert engine.added[0].sampling == SamplingParams(temperature=0.7)
    assert engine.added[0].eos_token_ids == {0}


@pytest.mark.parametrize(
    ("prompt", "options", "says"), [b[1:] for b in BAD_PROMPTS], ids=[b[0] for b in BAD_PROMPTS]
)
def test_one_bad_prompt_and_nothing_runs(
    engine: FakeEngine, prompt: Any, options: dict[str, Any], says: tuple[str, ...]
) -> None:
    llm = make(engine)
    params = [SamplingParams(), SamplingParams(), SamplingParams(**options)]
    with pytest.raises(RequestError) as caught:
        llm.generate(["Hi", "you", prompt], params)
    message = str(caught.value)
    assert message.startswith("prompt 2: ")
    assert all(part in message for part in says)
    assert engine.added == []


def test_what_the_engine_refuses_is_named_and_nothing_stays() -> None:
    engine = FakeEngine(capacity=3)
    llm = make(engine)
    with pytest.raises(RequestError, match="prompt 1: 5 tokens"):
        llm.generate([[41], [41] * 5, [41]])
    assert not engine.has_unfinished
    assert llm.generate([41], SamplingParams(max_tokens=1))[0].finished


@pytest.mark.parametrize(
    ("prompts", "params", "says"),
    [
        (["a", "b"], [SamplingParams()], "1 sampling_params for 2 prompts"),
        ("a", {"temperature": 0}, "sampling_params is of type dict"),
        ("a", ["greedy"], "sampling_params is of type str"),
        (7, None, "prompts is of type int"),
    ],
)
def test_wrong_arguments(engine: FakeEngine, prompts: Any, params: Any, says: str) -> None:
    with pytest.raises(RequestError, match=says):
        make(engine).generate(prompts, params)


@pytest.mark.parametrize(
    ("priority", "says"),
    [
        ([1], r"priority is \[1\] for 2 prompts"),
        ("ab", "priority is 'ab' for 2 prompts"),
        (1.5, "prompt 0: priority is 1.5; it must be an integer"),
        ([1, None], "prompt 1: priority is None"),
    ],
)
def test_wrong_priorities(engine: FakeEngine, priority: Any, says: str) -> None:
    with pytest.raises(RequestError, match=says):
        make(engine).generate(["a", "b"], priority=priority)
    assert engine.added == []


def test_stop_strings_end_one_output_only(engine: FakeEngine) -> None:
    llm = make(engine)
    text = "one two three four five"
    (output,) = llm.generate(text, SamplingParams(n=2, max_tokens=40, stop=["three"]))
    first, second = output.outputs
    assert first.text == "one two "
    assert second.text.startswith(" two ")
    assert {o.finish_reason for o in output.outputs} == {"stop"}
    assert sorted(engine.stopped) == [("request-0", 0), ("request-0", 1)]


def test_an_end_token_ends_the_text() -> None:
    def reply(request: Request, index: int) -> Sequence[int]:
        return [*request.prompt_ids, 0, *request.prompt_ids]

    (output,) = make(FakeEngine(reply=reply)).generate("Hi", SamplingParams(max_tokens=50))
    assert (output.outputs[0].text, output.outputs[0].finish_reason) == ("Hi", "stop")
    assert output.outputs[0].token_ids[-1] == 0


def test_one_requests_error_leaves_the_others() -> None:
    llm = make(FakeEngine(error_id=5))
    good, bad = llm.generate([[41, 74], [5, 5]], SamplingParams(max_tokens=2))
    assert good.outputs[0].text == "Hi"
    assert bad.outputs[0].finish_reason == "error"
    assert bad.outputs[0].error == "a NaN in its logits"


def test_seeds_repeat_with_the_program_and_differ_between_prompts() -> None:
    def seeds(seed: int) -> list[int]:
        engine = FakeEngine(EngineConfig.from_options({"seed": seed}))
        llm = make(engine)
        llm.generate(["a", "a"])
        llm.generate("a")
        return [request.seed for request in engine.added]

    assert seeds(0) == seeds(0)
    assert len(set(seeds(0) + seeds(1))) == 6


def test_chat(engine: FakeEngine) -> None:
    llm = make(engine, "{% for m in messages %}[{{ m.content }}]{% endfor %}")
    one = [{"role": "user", "content": "Hi"}]
    two = [*one, {"role": "assistant", "content": "you"}]
    (alone,) = llm.chat(one, SamplingParams(max_tokens=4))
    assert alone.outputs[0].token_ids == alone.prompt_token_ids
    assert llm.tokenizer is not None
    shown = [llm.tokenizer.decode(output.prompt_token_ids) for output in llm.chat([one, two])]
    assert shown == ["[Hi]", "[Hi][you]"]
    with pytest.raises(RequestError, match=r"conversation 1: messages is \[\]"):
        llm.chat([one, []])
    with pytest.raises(RequestError, match="no chat template"):
        make(engine).chat(one)


def test_stream_grows_to_what_generate_gives(engine: FakeEngine) -> None:
    llm = make(engine)
    params = SamplingParams(max_tokens=20, stop=["zzz"])
    text = "h\N{GRINNING FACE}llo \u4f60\u597d and on"
    whole = llm.generate(text, params)[0].outputs[0]
    seen = [output.outputs[0] for output in llm.stream(text, params)]
    assert len(seen) == len(whole.token_ids)
    assert (seen[-1].text, seen[-1].token_ids) == (whole.text, whole.token_ids)
    for earlier, later in itertools.pairwise(seen):
        assert later.text.startswith(earlier.text)
    assert "".join(llm.stream_text(text, params)) == whole.text


def test_streams_may_be_read_in_turns(engine: FakeEngine) -> None:
    llm = make(engine)
    first = llm.stream("one two three", SamplingParams(max_tokens=9))
    second = llm.stream("four five", SamplingParams(max_tokens=4))
    next(first)
    longest = [output.outputs[0] for output in second][-1]
    inside = llm.generate("Hi", SamplingParams(max_tokens=2))[0].outputs[0]
    rest = [output.outputs[0] for output in first][-1]
    assert (len(rest.token_ids), len(longest.token_ids), inside.text) == (9, 4, "Hi")
    assert rest.text.startswith("one two three")


def test_a_stream_is_checked_at_once_and_aborted_when_closed(engine: FakeEngine) -> None:
    llm = make(engine)
    with pytest.raises(RequestError, match="prompt is empty"):
        llm.stream("")
    with pytest.raises(RequestError, match="n is 2"):
        llm.stream_text("a", SamplingParams(n=2))
    stream = llm.stream("one two three", SamplingParams(max_tokens=50))
    next(stream)
    stream.close()  # type: ignore[attr-defined]
    assert not engine.has_unfinished
    assert len(engine.aborted) == 1


def test_an_interrupt_aborts_everything(
    engine: FakeEngine, monkeypatch: pytest.MonkeyPatch
) -> None:
    llm = make(engine)
    steps = iter(range(3))
    step = engine.step

    def interrupted() -> Any:
        if next(steps, None) is None:
            raise KeyboardInterrupt
        return step()

    monkeypatch.setattr(engine, "step", interrupted)
    with pytest.raises(KeyboardInterrupt):
        llm.generate(["a", "b"], SamplingParams(max_tokens=30))
    assert not engine.has_unfinished
    monkeypatch.undo()
    assert len(llm.generate(["a", "b"], SamplingParams(max_tokens=2))) == 2


def test_an_interrupt_leaves_the_other_streams(
    engine: FakeEngine, monkeypatch: pytest.MonkeyPatch
) -> None:
    llm = make(engine)
    params = SamplingParams(max_tokens=6)
    whole = llm.generate("one two three", params)[0].outputs[0]
    stream = llm.stream("one two three", params)
    next(stream)
    monkeypatch.setattr(engine, "step", interrupt)
    with pytest.raises(KeyboardInterrupt):
        llm.generate(["a", "b"], params)
    monkeypatch.undo()
    assert sorted(engine.aborted) == ["request-2", "request-3"]
    assert [output.outputs[0] for output in stream][-1] == whole
    assert not engine.has_unfinished


def interrupt(*_: object) -> Any:
    raise KeyboardInterrupt


@pytest.mark.parametrize("num_tokens", [2, 9])
def test_an_interrupt_while_a_step_is_told_loses_nothing(
    engine: FakeEngine, monkeypatch: pytest.MonkeyPatch, num_tokens: int
) -> None:
    """What the step gave to another stream is told to it later; it may have been its last."""
    llm = make(engine)
    first = llm.stream([41], SamplingParams(n=2, max_tokens=50))
    other = llm.stream([74, 41], SamplingParams(max_tokens=num_tokens))
    next(first)
    next(other)
    next(first)  # what the other's step gave it: the next one steps again
    with monkeypatch.context() as patch:
        patch.setattr(RequestState, "update", interrupt)
        with pytest.raises(KeyboardInterrupt):
            next(first)
    # a request with the id of the interrupted one gets nothing of what was left for that
    again = llm.prepare([5, 6], SamplingParams(max_tokens=3), index=0)
    assert next(llm.serve([again])).outputs[0].token_ids == (5, 6, 5)
    tokens = [output.outputs[0].token_ids for output in other][-1]
    assert tokens == tuple([74, 41] * 5)[:num_tokens]


def test_a_refused_duplicate_leaves_the_live_request(engine: FakeEngine) -> None:
    llm = make(engine)
    params = SamplingParams(max_tokens=5)
    stream = llm.stream([41, 74], params)
    next(stream)
    twins = [llm.prepare([5], params, index=0), llm.prepare([41], params, index=1)] * 2
    outputs = [(o.request_id, o.outputs[0].finish_reason) for o in llm.serve(twins)]
    assert sorted(outputs) == [
        ("request-0", "error"), ("request-0", "error"), ("request-1", "error"),
        ("request-1", "length"),
    ]  # fmt: skip
    assert len([output.outputs[0] for output in stream][-1].token_ids) == 5


def test_priority_and_salt_reach_the_engine(engine: FakeEngine) -> None:
    llm = make(engine, "{{ messages[0].content }}")
    params = SamplingParams(max_tokens=1)
    prompts: list[Any] = ["a", {"prompt": "b", "cache_salt": "s"}]
    llm.generate(prompts, params, priority=[2, -1])
    llm.generate(["a", "b"], params, priority=5)
    llm.chat([{"role": "user", "content": "Hi"}], params, priority=3, cache_salt="t")
    list(llm.stream("a", params, priority=4))
    assert [(r.priority, r.cache_salt) for r in engine.added] == [
        (2, ""), (-1, "s"), (5, ""), (5, ""), (3, "t"), (4, ""),
    ]  # fmt: skip


def test_serve_takes_requests_as_they_come() -> None:
    engine = FakeEngine(capacity=4)
    llm = make(engine)
    given = []

    def source() -> Any:
        for index in range(6):
            given.append(index)
            ids = [41] * (9 if index == 3 else 1)
            yield llm.prepare(ids, SamplingParams(max_tokens=2 + index), index=index)
            yield None

    outputs = {o.request_id: o.outputs[0] for o in llm.serve(source())}
    assert len(outputs) == 6
    assert outputs["request-3"].finish_reason == "error"
    assert "at most 4" in (outputs["request-3"].error or "")
    assert len(outputs["request-5"].token_ids) == 7


def test_figures_of_a_run(engine: FakeEngine) -> None:
    llm = make(engine)
    assert llm.last_run is None
    outputs = llm.generate(["a", "b"], SamplingParams(max_tokens=5))
    run = llm.last_run
    assert run is not None
    assert run.ttft_s is not None
    assert run.tpot_s is not None
    assert run.output_tok_s == pytest.approx(5 * run.requests_s)
    assert (run.model_bytes, run.kv_bytes) == (2**20, 2**21)
    assert run.peak_rss_bytes > 2**24
    assert all(o.metrics.e2e_s is not None for o in outputs)
    for part in (
        "first token",
        "per token",
        "tokens/s",
        "requests/s",
        "model 1.0 MiB",
        "KV reserved 2",
    ):
        assert part in run.line()
    llm.generate([5], SamplingParams(max_tokens=1))
    assert "per token - |" in llm.last_run.line()  # one token has no time between tokens


def test_a_progress_bar_only_when_asked(
    engine: FakeEngine, capsys: pytest.CaptureFixture[str]
) -> None:
    llm = make(engine)
    llm.generate("Hi", SamplingParams(max_tokens=2))
    assert capsys.readouterr().err == ""
    llm.generate("Hi", SamplingParams(max_tokens=2), use_tqdm=True)
    captured = capsys.readouterr()
    assert "1/1" in captured.err
    assert captured.out == ""


def test_a_tokenizer_of_another_model_is_refused() -> None:
    with pytest.raises(CheckpointError, match="vocab_size is 512"):
        make(FakeEngine(vocab_size=512))


def test_what_does_not_go_with_the_model_is_seen_before_its_weights(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def read(*args: Any, **options: Any) -> None:
        raise AssertionError("the weights are read")

    monkeypatch.setattr(moe_serve.llm, "open_engine", read)
    write_checkpoint(tmp_path)
    with pytest.raises(CheckpointError, match=r"ids up to 6143.*vocab_size is 32"):
        LLM(tmp_path, tokenizer=str(EMBEDDED))
    (tmp_path / "generation_config.json").write_text('{"top_p": 1e-12}')
    with pytest.raises(CheckpointError, match=r"generation_config\.json: top_p is 1e-12"):
        LLM(tmp_path)
    (tmp_path / "chat_template.jinja").write_text("{% for %}")
    with pytest.raises(CheckpointError, match=r"chat_template\.jinja: .*cannot be compiled"):
        LLM(tmp_path)
    (tmp_path / "mine.jinja").write_text("{% if %}")
    with pytest.raises(ConfigError, match=r"mine\.jinja: .*cannot be compiled"):
        LLM(tmp_path, chat_template=tmp_path / "mine.jinja")


@pytest.mark.parametrize("is_shown", [True, False])
def test_reading_weights_shows_progress_when_asked(
    tmp_path: Path, is_shown: bool, capsys: pytest.CaptureFixture[str]
) -> None:
    write_checkpoint(tmp_path)
    LLM(tmp_path, num_kv_blocks=4, use_tqdm=is_shown)
    captured = capsys.readouterr()
    assert captured.out == ""
    assert ("weights" in captured.err) == is_shown
    assert ("bytes" in captured.err or "kB" in captured.err) == is_shown


def test_config_and_options_are_not_mixed() -> None:
    with pytest.raises(ConfigError, match=r"config and block_size, model are both given"):
        LLM("x", config=EngineConfig(), block_size=8)
    with pytest.raises(ConfigError, match=r"no option 'blok_size'; did you mean 'block_size'"):
        LLM(blok_size=8)
    with pytest.raises(ConfigError, match="block_size is '8'"):
        LLM(block_size="8")


@pytest.fixture(scope="module")
def embedded() -> LLM:
    return LLM(num_kv_blocks=64, threads=1, max_model_len=256)


def test_the_embedded_model_writes(embedded: LLM) -> None:
    """The real engine: text, greedy, the same streamed."""
    llm = embedded
    params = SamplingParams(temperature=0.0, max_tokens=12)
    (output,) = llm.generate("Once upon a time", params)
    assert output.outputs[0].text.isascii()
    assert len(output.outputs[0].token_ids) == 12
    assert "".join(llm.stream_text("Once upon a time", params)) == output.outputs[0].text


@pytest.mark.parametrize(
    ("prompt_ids", "options"),
    [
        ([], {}),
        ([5] * 256, {}),
        ([5, 6144], {}),
        ([5], {"stop_token_ids": [9999]}),
        ([5], {"logit_bias": {6144: 1.0}}),
    ],
    ids=["empty", "too long", "id", "stop id", "bias id"],
)
def test_the_engine_refuses_in_the_same_words(
    embedded: LLM, prompt_ids: list[int], options: dict[str, Any]
) -> None:
    sampling = SamplingParams(**options)
    with pytest.raises(RequestError) as here:
        embedded.stream(prompt_ids, sampling)
    request = Request(request_id="r", prompt_ids=tuple(prompt_ids), sampling=sampling)
    with pytest.raises(RequestError) as there:
        embedded.engine.add(request)
    assert str(there.value).removeprefix("request 'r': ") == str(here.value)
    assert type(there.value) is type(here.value)


@pytest.mark.parametrize(
    "options",
    [{"temperature": 1e-30}, {"top_p": 1e-9}, {"repetition_penalty": 1e-3}, {"min_p": 1.0}],
    ids=lambda options: next(iter(options)),
)
def test_the_least_values_leave_a_token_to_choose(embedded: LLM, options: dict[str, Any]) -> None:
    everything = {"temperature": 1.0, **options}
    (output,) = embedded.generate("Once upon", SamplingParams(max_tokens=8, **everything))
    assert output.outputs[0].finish_reason == "length"
    if "repetition_penalty" not in options:
        (best,) = embedded.generate("Once upon", SamplingParams(max_tokens=8, temperature=0.0))
        assert output.outputs[0].token_ids == best.outputs[0].token_ids


def test_an_interrupted_step_of_the_model_is_run_again(
    embedded: LLM, monkeypatch: pytest.MonkeyPatch
) -> None:
    params = SamplingParams(temperature=0.0, max_tokens=6)
    whole = embedded.generate("Once upon a time", params)[0].outputs[0]
    stream = embedded.stream("Once upon a time", params)
    next(stream)
    with monkeypatch.context() as patch:
        patch.setattr(ModelRunner, "run", interrupt)
        with pytest.raises(KeyboardInterrupt):
            embedded.generate(["There was a dog", "One day"], params)
    assert [output.outputs[0] for output in stream][-1] == whole
    assert not embedded.engine.has_unfinished


def test_an_interrupt_within_a_step_leaves_the_engine_whole(
    engine: FakeEngine, monkeypatch: pytest.MonkeyPatch
) -> None:
    llm = make(engine)
    step = engine.step

    def interrupted() -> list[StepOutput]:
        signal.raise_signal(signal.SIGINT)
        done.append(0)
        return step()

    done: list[int] = []
    monkeypatch.setattr(engine, "step", interrupted)
    with pytest.raises(KeyboardInterrupt):
        llm.generate(["a"])
    assert done == [0]  # the step went to its end
    monkeypatch.undo()
    assert not engine.has_unfinished
    assert llm.generate(["a"])[0].finished


def test_end_tokens_beyond_the_vocabulary_are_told(caplog: pytest.LogCaptureFixture) -> None:
    for eos_token_ids in (frozenset({5, 7000}), frozenset({6144, 7000})):
        LLM.from_parts(FakeEngine(), None, GenerationDefaults(eos_token_ids=eos_token_ids))
    (record,) = caplog.records
    assert "(6144, 7000) is in its vocabulary of 6144" in record.getMessage()


def test_a_run_that_served_nothing_has_no_rates(engine: FakeEngine) -> None:
    llm = make(engine)
    assert llm.generate([]) == []
    assert llm.last_run is not None
    assert llm.last_run.line().startswith("model 1.0 MiB | KV reserved 2.0 MiB | peak memory")


def test_text_of_a_form(embedded_model: Path) -> None:
    form = StructuredOutputs(regex="[a-z]{2,6}: [0-9]{1,3}")
    params = SamplingParams(structured_outputs=form, temperature=1.0, n=2, max_tokens=30)
    with LLM(tokenizer=str(embedded_model), max_num_seqs=8) as llm:
        output, plain = llm.generate(["Lily", "Tom"], [params, SamplingParams()], use_tqdm=False)
        for one in output.outputs:
            assert one.finish_reason == "stop"
            assert re.fullmatch("[a-z]{2,6}: [0-9]{1,3}", one.text), "to its last character"
        assert plain.outputs[0].finish_reason
        pieces = "".join(llm.stream_text("Lily", replace(params, n=1)))
        assert re.fullmatch("[a-z]{2,6}: [0-9]{1,3}", pieces)
        wrong = SamplingParams(structured_outputs=StructuredOutputs(regex="((("))
        (refused,) = llm.generate(["Lily"], wrong, use_tqdm=False)
        assert refused.outputs[0].is_refused
        assert "unclosed group" in str(refused.outputs[0].error)


def test_a_tokenizer_s_name_is_resolved_for_the_engine_alone(
    embedded_model: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def resolved(name: str, revision: str | None = None) -> Path:
        return embedded_model

    monkeypatch.setattr(named_model, "resolve_model", resolved)
    with LLM(tokenizer="someone/something", max_num_seqs=8) as llm:
        assert llm.config.weights.tokenizer == "someone/something"
        assert llm.engine.config.weights.tokenizer == str(embedded_model)
        params = SamplingParams(structured_outputs=StructuredOutputs(choice=["yes"]))
        assert llm.generate("Lily", params, use_tqdm=False)[0].outputs[0].text == "yes"
