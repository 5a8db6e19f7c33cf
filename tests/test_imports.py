"""What import-linter and ruff cannot say of imports: what loads without torch, or without extras, and tests' own code.

The layers, the circles and who may import which library are contracts in pyproject.toml (`make lint`).
"""

from __future__ import annotations

import ast
import re
import subprocess
import sys
import tomllib
from collections.abc import Iterable, Iterator
from pathlib import Path

import pytest

from trainpilot.experiments.cli import EXTRAS

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


EXTRA_OF = {
    "agents.steering.steering": None,
    "envs.environments": None,
    "envs.vector": None,
    "experiments.cli": None,
    "experiments.demo": None,
    "experiments.inspect_run": None,
    "experiments.replay": "train",
    "experiments.calibrate.command": "train",
    "experiments.fit_sweep": "train",
    "experiments.cut": "train",
    "experiments.doctor": "train",
    "experiments.report.run_page": "report",
    "experiments.train_agent": "agent",
    "experiments.compare.command": "compare",
    "experiments.export.command": "export",
}
"""Extra of the installation that a module needs to be imported, `None` where the plain installation is enough."""
IMPORT_NAMES = {"pyyaml": "yaml", "ray[tune]": "ray", "transformers": "transformers tokenizers"}
"""Names under which a package is imported, where it is not its own; the tokenizers come with transformers."""


@pytest.mark.parametrize(("module", "extra"), EXTRA_OF.items())
def test_a_module_needs_its_extra_only(module: str, extra: str | None) -> None:
    needed = libraries(f"trainpilot.{module}")

    assert {"numpy"} <= needed
    assert needed <= installed_with(extra)


def test_the_command_line_knows_what_brings_a_package() -> None:
    for package, extra in EXTRAS.items():
        assert package in installed_with(extra), package
        assert package not in installed_with(None), package


def installed_with(extra: str | None) -> set[str]:
    """Return the import names of what an installation with an extra has."""
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    todo, names = list(project["dependencies"]) + [f"trainpilot[{extra}]"] * (extra is not None), set()
    while todo:
        name = re.split(r"[<>=;]", todo.pop())[0].strip()
        if found := re.fullmatch(r"trainpilot\[(.+)\]", name):
            todo += [each for one in found[1].split(",") for each in project["optional-dependencies"][one]]
        else:
            names |= set(IMPORT_NAMES.get(name, name.replace("-", "_")).split())
    return names


def libraries(module: str) -> set[str]:
    """Return the packages of others that importing a module of trainpilot loads."""
    seen: set[str] = set()
    found, todo = set(), [module]
    while todo:
        name = todo.pop()
        if name in seen or (path := path_of(name)) is None:
            continue
        seen.add(name)
        todo += [name.rpartition(".")[0]]
        for imported in imports(ast.parse(path.read_text(encoding="utf-8")).body):
            if imported.startswith("trainpilot."):
                todo.append(imported)
            elif imported == "torch.utils.tensorboard":
                found.add("tensorboard")
            elif (root := imported.partition(".")[0]) not in sys.stdlib_module_names:
                found.add(root)
    return found - {"trainpilot"}


def path_of(module: str) -> Path | None:
    """Return the file of a module of trainpilot, `None` for a name in one."""
    path = ROOT.joinpath(*module.split(".")[1:])
    candidates = (path.with_suffix(".py"), path / "__init__.py")
    return next((each for each in candidates if each.is_file()), None)


def imports(statements: Iterable[ast.stmt]) -> Iterator[str]:
    """Yield what statements import when their module is imported, modules and names in them."""
    for statement in statements:
        if isinstance(statement, ast.Import):
            yield from (alias.name for alias in statement.names)
        elif isinstance(statement, ast.ImportFrom):
            yield str(statement.module)
            yield from (f"{statement.module}.{alias.name}" for alias in statement.names)
        elif isinstance(statement, ast.If | ast.Try) and "TYPE_CHECKING" not in ast.unparse(statement):
            yield from imports([*statement.body, *statement.orelse])
