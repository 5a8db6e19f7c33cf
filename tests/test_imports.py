"""What import-linter and ruff cannot say of imports: which modules load without torch, and how tests share code.

The layers, the circles and who may import which library are contracts in pyproject.toml (`make lint`).
"""

from __future__ import annotations

import ast
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]

TORCH_FREE = (
    "llm_runtime/busy",
    "llm_runtime/config",
    "llm_runtime/data/",
    "llm_runtime/energy/meter",
    "llm_runtime/files",
    "llm_runtime/json_records",
    "llm_runtime/schedules",
    "llm_runtime/simulator/",
    "llm_runtime/telemetry",
    "envs/",
    "agents/bundle",
    "agents/controller",
    "agents/explain",
    "agents/heuristics",
    "agents/logging/tags",
    "agents/steering/contract",
    "agents/steering/domain",
    "agents/steering/guard",
    "agents/steering/throughput",
    "experiments/analysis/",
    "experiments/costs/table",
    "experiments/options",
    "experiments/results",
)
"""Beginnings of the paths of what can be imported, read and tested without loading torch or transformers."""

WATCH = """
import sys, importlib
for name in sys.argv[1:]:
    importlib.import_module(name)
    for library in ("torch", "transformers"):
        assert library not in sys.modules, f"{name} loads {library}"
"""


def torch_free(beginning: str) -> list[str]:
    """Return the modules whose paths begin so."""
    paths = sorted(str(path.relative_to(ROOT)) for path in ROOT.glob(f"{beginning}*") if path.suffix == ".py")
    if beginning.endswith("/"):
        paths = sorted(str(path.relative_to(ROOT)) for path in (ROOT / beginning).rglob("*.py"))
    return ["trainpilot." + path.removesuffix(".py").removesuffix("/__init__").replace("/", ".") for path in paths]


def test_records_and_tables_load_without_torch() -> None:
    modules = {beginning: torch_free(beginning) for beginning in TORCH_FREE}
    assert not [beginning for beginning, found in modules.items() if not found], "nothing there"
    names = [name for found in modules.values() for name in found]

    outcome = subprocess.run([sys.executable, "-c", WATCH, *names], capture_output=True, text=True, check=False)

    assert outcome.returncode == 0, outcome.stderr


def test_the_watch_sees_torch() -> None:
    command = [sys.executable, "-c", WATCH, "trainpilot.llm_runtime.telemetry", "trainpilot.llm_runtime.precision"]
    outcome = subprocess.run(command, capture_output=True, text=True, check=False)

    assert "trainpilot.llm_runtime.precision loads torch" in outcome.stderr


def test_tests_share_code_by_helpers_only_and_have_short_names() -> None:
    found = [f"{path.relative_to(ROOT)}:{line}" for path in ROOT.glob("tests/**/*.py") for line in complaints(path)]

    assert not found, "\n".join(found)


def complaints(path: Path) -> Iterator[str]:
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.ImportFrom):
            module = node.module or ""
            if module.startswith("test") and not module.startswith("tests.attack"):  # a package of its own
                yield f"{node.lineno}: {module} is a test file; what is shared belongs in tests/helpers"
        if isinstance(node, ast.FunctionDef) and node.name.startswith("test_") and len(node.name) > 70:
            yield f"{node.lineno}: the name has more than 70 characters: {node.name}"
