"""The notebook runs from top to bottom, uses public names only, and was saved with its outputs."""

from __future__ import annotations

import ast
import contextlib
import importlib
import io
import json
import re
from pathlib import Path
from typing import Any

import pytest

NOTEBOOK = Path(__file__).parents[2] / "docs" / "examples" / "steer_a_loop.ipynb"
TEXT = NOTEBOOK.read_text(encoding="utf-8")
CELLS = json.loads(TEXT)["cells"]
CODE = [cell for cell in CELLS if cell["cell_type"] == "code"]


@pytest.mark.filterwarnings("ignore:policy outside", "ignore:decisions")
def test_its_cells_run_one_after_the_other(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MPLBACKEND", "agg")
    pyplot = pytest.importorskip("matplotlib.pyplot")
    monkeypatch.setattr(pyplot, "show", lambda: pyplot.close("all"))
    sources = ["".join(cell["source"]) for cell in CODE]
    assert "SEQUENCES = 800 " in sources[0]
    sources[0] = sources[0].replace("SEQUENCES = 800 ", "SEQUENCES = 96 ")
    known: dict[str, Any] = {"__name__": "notebook"}
    for number, (source, cell) in enumerate(zip(sources, CODE, strict=True)):
        with contextlib.redirect_stdout(io.StringIO()) as output:
            exec(compile(source, f"cell {number}", "exec"), known)
        kept = [each for each in cell["outputs"] if each["output_type"] == "stream"]
        assert bool(output.getvalue()) == bool(kept), source


def test_it_was_run_in_its_order_without_a_warning_or_a_machine_s_paths() -> None:
    assert [cell["execution_count"] for cell in CODE] == list(range(1, len(CODE) + 1))
    outputs = [output for cell in CODE for output in cell["outputs"]]
    assert {output.get("name", "a chart") for output in outputs} == {"stdout", "a chart"}
    assert not re.search(r"/(home|root|tmp|usr|work|Users)/|site-packages", TEXT)


def test_it_uses_public_names_only() -> None:
    tree = ast.parse("\n".join("".join(cell["source"]) for cell in CODE))
    imports = [node for node in ast.walk(tree) if isinstance(node, ast.ImportFrom)]
    ours = [node for node in imports if (node.module or "").startswith("trainpilot")]
    assert ours
    for node in ours:
        public = importlib.import_module(str(node.module)).__all__
        assert {alias.name for alias in node.names} <= set(public)
