"""The glossary is short, and each word is defined in the file that it names."""

from __future__ import annotations

import ast
import re
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
GLOSSARY = ROOT / "docs" / "glossary.md"
ROW = re.compile(r"^\| ([a-z][a-z -]*) \| (.+) \| (?:`(\w+)` in )?`([\w/]+\.py)` \|$", flags=re.M)
ROWS = ROW.findall(GLOSSARY.read_text(encoding="utf-8"))


def test_the_glossary_has_at_most_25_words() -> None:
    lines = [line for line in GLOSSARY.read_text(encoding="utf-8").splitlines() if line.startswith("| ")]
    words = [word for word, *_ in ROWS]

    assert len(lines) - 2 == len(words), "two lines of titles, and every other line of the tables has the regular form"
    assert 0 < len(words) <= 25
    assert len(set(words)) == len(words)


@pytest.mark.parametrize(("word", "name", "path"), [(word, name, path) for word, _, name, path in ROWS])
def test_a_word_is_defined_where_the_glossary_says(word: str, name: str, path: str) -> None:
    tree = ast.parse((ROOT / path).read_text(encoding="utf-8"))
    defined: set[str] = set()
    for node in tree.body:
        if isinstance(node, ast.ClassDef | ast.FunctionDef):
            defined.add(node.name)
        elif isinstance(node, ast.Assign):
            defined |= {target.id for target in node.targets if isinstance(target, ast.Name)}

    assert not name or name in defined, f"{word}: {path} defines no {name}"
