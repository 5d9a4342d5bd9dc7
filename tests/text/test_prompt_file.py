"""Files of prompts, in each of their forms."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from moe_serve.errors import ConfigError, RequestError
from moe_serve.text.chat_template import ChatTemplate
from moe_serve.text.prompt_file import prompt_of, read_prompt_file
from moe_serve.text.prompts import RequestMaker
from moe_serve.text.tokenizer import load_tokenizer

ROOT = Path(__file__).resolve().parents[2]
PLAIN = RequestMaker(vocab_size=10, max_model_len=10, tokenizer=None)


def test_forms_limits_and_blank_lines(tmp_path: Path) -> None:
    entries: list[dict[str, Any]] = [{"prompt": "a", "id": 1}, {"prompt_token_ids": [1]}]
    path = tmp_path / "p.jsonl"
    path.write_text("\n\n".join(map(json.dumps, entries)))
    read = read_prompt_file(path)
    assert [line.entry for line in read] == entries
    assert [line.where for line in read] == [f"{path}:1", f"{path}:3"]
    assert read_prompt_file(path, 1) == read[:1]
    assert [prompt_of(entry, PLAIN) for entry in entries] == [
        {"prompt": "a"},
        {"prompt_token_ids": [1]},
    ]


@pytest.mark.parametrize(
    ("text", "error", "says"),
    [
        ("", ConfigError, "has no prompts"),
        ('{"prompt": "a"}\n{"prompt"', RequestError, r"p\.jsonl:2: not JSON: .* at column 10"),
        ('\n{"prompt": ""}', RequestError, r"p\.jsonl:2: prompt is empty"),
        ('{"prompt_token_ids": []}', RequestError, r"p\.jsonl:1: prompt_token_ids is empty"),
        (
            '{"prompts": "a"}',
            RequestError,
            r"p\.jsonl:1: no field 'prompts'; did you mean 'prompt'",
        ),
        ('{"prompt": "a", "max_tokens": 3}', RequestError, "'max_tokens' has no effect"),
        ('\n{"prompt": "\xff"}', RequestError, r"p\.jsonl:2: not JSON: not UTF-8 at byte 12"),
        ("[1]", RequestError, r"p\.jsonl:1: not a JSON object"),
        ('{"text": "a"}', RequestError, "it has none"),
        ('{"prompt": "a", "messages": []}', RequestError, "it has prompt and messages"),
    ],
)
def test_bad_files(tmp_path: Path, text: str, error: type[Exception], says: str) -> None:
    (tmp_path / "p.jsonl").write_text(text, encoding="latin-1")
    with pytest.raises(error, match=says):
        read_prompt_file(tmp_path / "p.jsonl")


def test_the_files_of_shared_data_are_read(shared_data: Path) -> None:
    for name in ("gsm8k_test", "humaneval", "mt_bench"):
        for line in read_prompt_file(shared_data / "prompts" / f"{name}.jsonl", 20):
            prompt = prompt_of(line.entry, PLAIN)
            assert isinstance(prompt, dict)
            assert prompt.get("prompt")


def test_a_conversation_stops_where_an_answer_is_due() -> None:
    tokenizer = load_tokenizer(ROOT / "moe_serve" / "assets" / "demo-moe")
    assert tokenizer is not None
    template = ChatTemplate("{% for m in messages %}[{{ m.content }}]{% endfor %}")
    maker = RequestMaker(
        vocab_size=6144, max_model_len=99, tokenizer=tokenizer, chat_template=template
    )
    turns = [{"role": "user", "content": "one"}, {"role": "user", "content": "two"}]
    one = tokenizer.encode("[one]")
    assert prompt_of({"messages": turns}, maker) == {"prompt_token_ids": one}
    assert prompt_of({"messages": turns}, PLAIN) == {"prompt": "one"}
