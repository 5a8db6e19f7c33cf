"""What a stranger's file says is bounded before it is looked at, and harmless where it is printed."""

from __future__ import annotations

import json
import os
import re
from pathlib import Path

import pytest

from trainpilot.llm_runtime.plain_values import check_plain, one_line, parse_json, printable, read_json, shown


@pytest.mark.parametrize(
    ("text", "printed"),
    [
        ("plain, 100 % \u00fc \u4e2d", "plain, 100 % \u00fc \u4e2d"),
        ("\x1b]0;TITLE\x07\x1b[2J", "\\x1b]0;TITLE\\x07\\x1b[2J"),
        ("\x1b]8;;http://x\x1b\\", "\\x1b]8;;http://x\\x1b\\"),
        ("a\u202eb\u2066c", "a\\u202eb\\u2066c"),
        ("\ud800", "\\ud800"),
        ("one\ntwo\tthree\r", "one\\ntwo\\tthree\\r"),
        ("\x9b31m", "\\x9b31m"),
    ],
)
def test_nothing_acts_on_a_terminal(text: str, printed: str) -> None:
    assert printable(text) == printed


def test_one_line_has_single_spaces() -> None:
    assert one_line(" a\n  b\t\x1b[0m ") == "a b \\x1b[0m"


def test_values_are_shown_short() -> None:
    assert shown("x") == "'x'"
    assert len(shown(["long"] * 1_000)) == 300
    deep: list[object] = []
    for _ in range(100_000):
        deep = [deep]
    assert shown(deep) == "list that is too large to be shown"
    assert shown(10**5_000) == "int that is too large to be shown"


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("[" * 3_000 + "]" * 3_000, "nested more than 32 levels"),
        ("[" * 100_000, "nested more than 32 levels"),
        (json.dumps([0] * 100_001), "more than 100,000 values"),
        (json.dumps({str(key): 0 for key in range(60_000)}), "more than 100,000 values"),
        ("1" + "0" * 400, "whole numbers must be at most 9223372036854775807, got one of 1329 bits"),
        ("1" + "0" * 5_000, "Exceeds the limit"),
        (json.dumps("x" * 100_001), "texts must have at most 100,000 characters, got one of 100,001"),
        ('"\\udfff"', "lone surrogate in '\\udfff'"),
    ],
)
def test_json_is_bounded(text: str, message: str) -> None:
    with pytest.raises(ValueError, match=re.escape(message)):
        parse_json(text)


def test_references_to_references_count_each_time() -> None:
    content: list[object] = ["x"]
    for _ in range(12):
        content = [content] * 9
    with pytest.raises(ValueError, match="more than 100,000 values"):
        check_plain(content)


def test_other_types_are_no_plain_values() -> None:
    with pytest.raises(ValueError, match="it holds a set, which is no plain value"):
        check_plain({"a": {1}})


def test_a_file_has_a_largest_size(tmp_path: Path) -> None:
    path = tmp_path / "large.json"
    with path.open("wb") as file:
        file.truncate(2**30)
    with pytest.raises(ValueError, match="it is larger than 16 MiB"):
        read_json(path)


@pytest.mark.skipif(not hasattr(os, "mkfifo"), reason="pipes have no names here")
def test_a_pipe_is_refused_and_not_waited_for(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe")

    with pytest.raises(ValueError, match="it is a pipe"):
        read_json(tmp_path / "pipe")
