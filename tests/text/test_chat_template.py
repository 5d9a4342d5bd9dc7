"""Templates render as their makers meant, and bombs do not go off."""

from __future__ import annotations

import json
import os
import time
from pathlib import Path

import pytest

from moe_serve.errors import CheckpointError, ConfigError, RequestError
from moe_serve.text import chat_template
from moe_serve.text.chat_template import ChatTemplate, load_chat_template, read_chat_template

MESSAGES = [
    {"role": "system", "content": "Be brief."},
    {"role": "user", "content": "Hi <b>"},
    {"role": "assistant", "content": "Yo"},
    {"role": "user", "content": "Bye"},
]
CHATML = """{{ bos_token }}
{%- for message in messages %}
    {%- if message.role == 'tool' %}{% continue %}{% endif %}
    {{- '<|im_start|>' + message['role'] + '\\n' + message['content'] + '<|im_end|>\\n' }}
{%- endfor %}
{%- if add_generation_prompt %}
    {{- '<|im_start|>assistant\\n' }}
{%- endif %}"""


def test_chatml() -> None:
    template = ChatTemplate(CHATML, {"bos_token": "<s>"})
    text = template.render([*MESSAGES, {"role": "tool", "content": "x"}])
    assert text == (
        "<s><|im_start|>system\nBe brief.<|im_end|>\n<|im_start|>user\nHi <b><|im_end|>\n"
        "<|im_start|>assistant\nYo<|im_end|>\n<|im_start|>user\nBye<|im_end|>\n"
        "<|im_start|>assistant\n"
    )
    assert not template.render(MESSAGES, add_generation_prompt=False).endswith("assistant\n")


def test_what_templates_may_use() -> None:
    source = (
        "{% generation %}a{% endgeneration %}|{{ messages[1] | tojson }}|{{ strftime_now('%Y') }}|"
        "{% set ns = namespace(found=false) %}{% for m in messages %}{% set ns.found = true %}"
        "{% break %}{% endfor %}{{ ns.found }}|{{ 'x' ~ 1 ~ none }}|{{ tools is none }}|"
        "{{ 'a,b'.split(',') | join('-') }}|{{ messages[0].content.strip() | upper }}|"
        "{% macro twice(s) %}{{ s + s }}{% endmacro %}{{ twice('k') }}|{{ 3 * 2 + 1 }}|"
        "{{ '/'.join(messages | map(attribute='role')) }}|{{ messages[::-1][0].content[1:] }}|"
        "{{ messages[0].content is string and 'brief' in messages[0].content }}"
    )
    year = time.strftime("%Y")
    assert ChatTemplate(source).render(MESSAGES) == (
        f'a|{{"role": "user", "content": "Hi <b>"}}|{year}|True|x1None|True|a-b|BE BRIEF.|kk|7|'
        "system/user/assistant/user|ye|True"
    )


def test_a_template_may_refuse() -> None:
    template = ChatTemplate("{{ raise_exception('roles must alternate') }}")
    with pytest.raises(RequestError, match=r"refuses .*roles must alternate"):
        template.render(MESSAGES)


@pytest.mark.parametrize(
    "source",
    [
        "{{ ''.__class__.__mro__ }}",
        "{{ messages.append(1) }}",
        "{{ messages[0].update({'content': 'x'}) }}",
        "{{ (lipsum.__globals__)['os'] }}",
        "{{ cycler.__init__.__globals__ }}",
    ],
)
def test_the_sandbox_gives_nothing_away(source: str) -> None:
    with pytest.raises(RequestError, match="chat template"):
        ChatTemplate(source).render(MESSAGES)


BOMBS = {
    "range": "{% for i in range(10**9) %}x{% endfor %}",
    "nested, silent": (
        "{% for i in range(99999) %}{% for j in range(99999) %}{% endfor %}{% endfor %}"
    ),
    "nested, loud": (
        "{% for i in range(99999) %}{% for j in range(99999) %}xxxxxxxxxxxx{% endfor %}{% endfor %}"
    ),
    "recursive macro": "{% macro f(n) %}{{ f(n) }}{{ f(n) }}{% endmacro %}{{ f(1) }}",
    "macro tree": (
        "{% macro f(n) %}{% if n %}{{ f(n-1) }}{{ f(n-1) }}{% endif %}{% endmacro %}{{ f(60) }}"
    ),
    "times": "{{ 'x' * 10**9 }}",
    "list": "{{ ([0] * 10**9) | length }}",
    "power": "{{ 10 ** 100000000 }}",
    "doubling by ~": (
        "{% set n = namespace(s='xx') %}"
        "{% for i in range(60) %}{% set n.s = n.s ~ n.s %}{% endfor %}"
    ),
    "doubling by +": (
        "{% set n = namespace(s='xx') %}"
        "{% for i in range(60) %}{% set n.s = n.s + n.s %}{% endfor %}"
    ),
    "width": "{{ 'x'.ljust(10**9) }}",
    "replace": "{{ ('x' * 9999).replace('x', 'y' * 9999) }}",
}


@pytest.mark.parametrize("source", BOMBS.values(), ids=BOMBS.keys())
def test_bombs_are_stopped(source: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(chat_template, "MAX_TURNS", 50_000)
    start_s = time.monotonic()
    with pytest.raises(RequestError, match="chat template"):
        ChatTemplate(source, max_output_chars=100_000, max_render_s=2.0).render(MESSAGES)
    assert time.monotonic() - start_s < 8.0


def test_time_is_a_limit_of_its_own() -> None:
    source = "{% for i in range(9999) %}{% for j in range(9999) %}{% endfor %}{% endfor %}"
    start_s = time.monotonic()
    with pytest.raises(RequestError, match="too many seconds"):
        ChatTemplate(source, max_render_s=0.1).render(MESSAGES)
    assert time.monotonic() - start_s < 3.0


def test_a_template_cannot_reach_its_budget() -> None:
    source = "{% set budget = none %}{% for i in range(9) %}{{ budget }}{% endfor %}"
    assert ChatTemplate(source).render(MESSAGES) == "None" * 9


def test_a_broken_template_is_a_broken_checkpoint() -> None:
    with pytest.raises(CheckpointError, match="cannot be compiled"):
        ChatTemplate("{% for %}")
    with pytest.raises(CheckpointError, match="at most"):
        ChatTemplate("x" * 2_000_000)


def test_a_failing_template_is_a_refused_request() -> None:
    with pytest.raises(RequestError, match="chat template"):
        ChatTemplate("{{ messages[99].content.strip() }}").render(MESSAGES)
    with pytest.raises(RequestError, match="TypeError"):
        ChatTemplate("{{ 1 + 'x' }}").render(MESSAGES)


@pytest.mark.parametrize(
    ("file", "content", "text"),
    [
        ("chat_template.jinja", "J{{ messages | length }}", "J4"),
        ("chat_template.json", json.dumps({"chat_template": "N"}), "N"),
        ("tokenizer_config.json", json.dumps({"chat_template": "T"}), "T"),
        (
            "tokenizer_config.json",
            json.dumps(
                {
                    "chat_template": [
                        {"name": "rag", "template": "R"},
                        {"name": "default", "template": "D"},
                    ]
                }
            ),
            "D",
        ),
    ],
)
def test_where_templates_are_found(tmp_path: Path, file: str, content: str, text: str) -> None:
    (tmp_path / file).write_text(content)
    found = load_chat_template(tmp_path)
    assert found is not None
    assert found.render(MESSAGES) == text


def test_the_file_wins_over_the_settings(tmp_path: Path) -> None:
    (tmp_path / "tokenizer_config.json").write_text('{"chat_template": "T"}')
    (tmp_path / "chat_template.jinja").write_text("J")
    found = load_chat_template(tmp_path)
    assert found is not None
    assert found.render(MESSAGES) == "J"


def test_no_template_and_no_default(tmp_path: Path) -> None:
    assert load_chat_template(tmp_path) is None
    (tmp_path / "tokenizer_config.json").write_text('{"chat_template": {"rag": "R"}}')
    with pytest.raises(CheckpointError, match=r"no 'default' among its names \(rag\)"):
        load_chat_template(tmp_path)


def test_a_named_file_that_is_not_there(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="cannot be read"):
        read_chat_template(tmp_path / "none.jinja")


def test_a_pipe_is_not_read(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "chat_template.jinja")
    with pytest.raises(ConfigError, match="not a regular file"):
        read_chat_template(tmp_path / "chat_template.jinja")
    with pytest.raises(CheckpointError, match="not a regular file"):
        load_chat_template(tmp_path)


def test_only_what_a_template_reads_may_be_given() -> None:
    template = ChatTemplate(
        "{{ bos_token }}{{ eos_token }}{% set own = 1 %}{{ own }}{{ range(3) | length }}"
        "{% if enable_thinking is defined and enable_thinking %}think{% endif %}"
        "{% for m in messages %}{{ m.content }}{{ loop.index }}{% endfor %}{{ tools }}",
        {"bos_token": "<s>"},
    )
    assert template.variables == {"enable_thinking"}
