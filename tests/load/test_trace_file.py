"""Files of real arrivals."""

from __future__ import annotations

from pathlib import Path

import pytest

from moe_serve.errors import ConfigError
from moe_serve.load.trace_file import TraceRow, read_trace_file

HEAD = "TIMESTAMP,ContextTokens,GeneratedTokens\n"
GOOD = "2023-11-16 18:17:03.9799600,4808,10\n"


def test_times_count_from_the_first_row_and_columns_may_be_in_any_order(tmp_path: Path) -> None:
    path = tmp_path / "t.csv"
    path.write_text(
        "\ufeffGeneratedTokens,other,ContextTokens,TIMESTAMP\r\n"
        "10,x,4808,2023-12-31 23:59:59.9\r\n\r\n8,y,3180,2024-01-01 00:00:00.0319600\r\n"
        "0,z,0,2024-01-01 00:01:00",
        encoding="utf-8",
    )
    first, second, third = read_trace_file(path)
    assert first == TraceRow(0.0, 4808, 10)
    assert (second.input_len, second.output_len) == (3180, 8)
    assert second.offset_s == pytest.approx(0.13196, abs=1e-6)
    assert third.offset_s == pytest.approx(60.1, abs=1e-6)
    assert read_trace_file(path, 1) == [first]


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("", r"t\.csv:1: has no column TIMESTAMP nor ContextTokens nor GeneratedTokens"),
        ("TIMESTAMP,ContextTokens\n" + GOOD, r"t\.csv:1: has no column GeneratedTokens"),
        (HEAD, "has no rows"),
        (HEAD + GOOD + "2023-11-16 18:17:04.1,12\n", r"t\.csv:3: column GeneratedTokens is missi"),
        (HEAD + "yesterday,1,2\n", r"t\.csv:2: TIMESTAMP is 'yesterday'"),
        (HEAD + "2023-11-16 18:17:03.1e3,1,2\n", r"t\.csv:2: TIMESTAMP is"),
        (HEAD + GOOD + "2023-11-16 18:17:04,-1,2\n", r"t\.csv:3: ContextTokens is '-1'"),
        (HEAD + "2023-11-16 18:17:04,1,2.5\n", r"t\.csv:2: GeneratedTokens is '2\.5'"),
        (HEAD + "2023-11-16 18:17:04,1,99999999\n", r"t\.csv:2: GeneratedTokens is '99999999'"),
        (HEAD + GOOD + "2023-11-16 18:17:03,1,2\n", r"t\.csv:3: TIMESTAMP is 0\.97996 s before"),
        (HEAD + '"a"b,1,2\n', r"t\.csv:2: not CSV"),
    ],
)
def test_bad_files_name_line_and_column(tmp_path: Path, text: str, says: str) -> None:
    (tmp_path / "t.csv").write_text(text)
    with pytest.raises(ConfigError, match=says):
        read_trace_file(tmp_path / "t.csv")


def test_files_that_cannot_be_read(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="cannot be read"):
        read_trace_file(tmp_path / "none.csv")
    (tmp_path / "t.csv").write_bytes(HEAD.encode() + b"\xff\xff,1,2\n")
    with pytest.raises(ConfigError, match="not UTF-8"):
        read_trace_file(tmp_path / "t.csv")


def test_the_trace_of_shared_data_is_read(shared_data: Path) -> None:
    rows = read_trace_file(shared_data / "arrivals" / "AzureLLMInferenceTrace_code.csv")
    assert len(rows) == 8819
    assert (rows[0].input_len, rows[0].output_len) == (4808, 10)
    assert 3000 < rows[-1].offset_s < 3600
