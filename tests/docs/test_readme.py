"""The README's Python blocks run one after the other in one namespace, as a reader would type them."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest

README = Path(__file__).parents[2] / "README.md"
BLOCKS = re.findall(r"^```python\n(.*?)^```$", README.read_text(encoding="utf-8"), flags=re.M | re.S)


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore", "error:policy outside")
def test_the_python_blocks_of_the_readme_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    names: dict[str, Any] = {"__name__": "readme"}
    assert len(BLOCKS) >= 2
    for number, block in enumerate(BLOCKS):
        exec(compile(block, f"README.md, block {number}", "exec"), names)

    assert names["steering"].summary()["tokens"] == 800 * 64
    assert len(names["reward"]) == 3
    assert names["ended"]
