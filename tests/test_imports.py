"""The rules of who may import whom: between the four folders, and of third-party libraries."""

from __future__ import annotations

import ast
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]

FLOORS = ("llm_runtime", "envs", "agents", "experiments")
"""From the ground up: a file may import from its own floor and from those below."""

NOT_PACKAGES = ("tests", "benchmarks")

ONLY_IN = {
    "torch": (
        "llm_runtime/",
        "agents/ppo",
        "agents/bundle",
        "agents/logging/run_log.py",
        "agents/steering/",
        "agents/integrations/",
        "experiments/costs/",
        "experiments/doctor.py",
    ),
    "transformers": ("llm_runtime/", "agents/integrations/huggingface"),
    "lightning": ("agents/integrations/lightning",),
    "accelerate": ("agents/integrations/",),
    "peft": (),
    "trl": (),
    "pynvml": ("llm_runtime/energy/nvml.py",),
    "gymnasium": ("envs/", "agents/"),
    "stable_baselines3": ("agents/",),
    "sb3_contrib": ("agents/",),
    "tyro": ("experiments/",),
    "schedulefree": ("llm_runtime/optimizer.py",),
    "prodigyopt": ("llm_runtime/optimizer.py",),
    "optuna": ("experiments/compare/",),
    "pymoo": ("experiments/analysis/",),
    "jinja2": ("experiments/report/",),
    "scipy": ("llm_runtime/", "experiments/"),
}
"""Where a library may be imported at all, by the beginning of the path."""

TORCH_FREE = (
    "llm_runtime/config.py",
    "llm_runtime/telemetry.py",
    "experiments/costs/table.py",
    "llm_runtime/energy/meter.py",
    "llm_runtime/files.py",
    "llm_runtime/schedules.py",
    "llm_runtime/simulator/shipped/__init__.py",
    *sorted(str(path.relative_to(ROOT)) for path in ROOT.glob("llm_runtime/simulator/[!_]*.py")),
    "envs/observation.py",
    "envs/action.py",
    "envs/reward.py",
    "envs/environments.py",
    "agents/steering/guardrails.py",
    "agents/steering/contract.py",
    "agents/steering/domain.py",
    "agents/steering/guarded_controller.py",
)
"""Can be imported, read and tested without loading torch."""


@dataclass(frozen=True, kw_only=True)
class Import:
    """One imported name, as in `trainpilot.envs.reward`."""

    name: str
    line: int
    on_load: bool
    """Runs when the module is loaded: neither inside a function nor for type checkers only."""

    @property
    def top(self) -> str:
        return self.name.partition(".")[0]

    @property
    def floor(self) -> str | None:
        parts = self.name.split(".")
        return parts[1] if parts[0] == "trainpilot" and len(parts) > 1 else None


def imports_of(source: str) -> list[Import]:
    return list(_walk(ast.parse(source), on_load=True))


def _walk(node: ast.AST, *, on_load: bool) -> Iterator[Import]:
    for name in _names(node):
        yield Import(name=name, line=getattr(node, "lineno", 0), on_load=on_load)
    later = isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.Lambda)
    never = node.body if isinstance(node, ast.If) and _asks_for_type_checker(node.test) else []
    for child in ast.iter_child_nodes(node):
        yield from _walk(child, on_load=on_load and not later and child not in never)


def _asks_for_type_checker(test: ast.expr) -> bool:
    return ast.unparse(test) in {"TYPE_CHECKING", "typing.TYPE_CHECKING"}


def _names(node: ast.AST) -> list[str]:
    match node:
        case ast.Import(names=names):
            return [alias.name for alias in names]
        case ast.ImportFrom(level=0, module=str(module), names=names):
            # The last part may be a module (`from trainpilot import envs`) or something in one.
            return [f"{module}.{alias.name}" for alias in names]
        case ast.ImportFrom(level=level, module=module):
            return ["." * level + (module or "")]
        case ast.Call(func=ast.Attribute(attr="import_module"), args=[ast.Constant(value=str(name)), *_]):
            return [name]
        case ast.Call(func=ast.Name(id="import_module" | "__import__"), args=[ast.Constant(value=str(name)), *_]):
            return [name]
    return []


def violations(path: str, source: str) -> list[str]:
    """Return one line for each import in `source` that a file at `path` may not have."""
    return [f"{path}:{found.line}: {why}" for found in imports_of(source) if (why := _forbidden(path, found))]


def _forbidden(path: str, found: Import) -> str | None:
    if found.name.startswith("."):
        return f"relative import {found.name}; write it with the trainpilot. prefix"
    if found.top in (*FLOORS, *NOT_PACKAGES):
        return f"{found.name} without the trainpilot. prefix"
    folder = path.partition("/")[0]
    if folder in NOT_PACKAGES:
        return None
    if found.top == "trainpilot":
        return _wrong_floor(folder, found)
    if found.top in ONLY_IN and not path.startswith(ONLY_IN[found.top]):
        return f"{found.top} belongs in {', '.join(ONLY_IN[found.top])}"
    return None


def _wrong_floor(folder: str, found: Import) -> str | None:
    if found.floor not in FLOORS:
        return f"{found.name} is none of {', '.join(FLOORS)}"
    if FLOORS.index(found.floor) > FLOORS.index(folder):
        return f"{folder} may not import {found.name}: imports run {' -> '.join(reversed(FLOORS))}"
    return None


def loaded_with(path: str) -> dict[str, str]:
    """Map each top-level name imported when the file at `path` is loaded to the file that asks for it."""
    loaded: dict[str, str] = {}
    waiting, seen = [path], set[str]()
    while waiting:
        current = waiting.pop()
        if current in seen or not (ROOT / current).is_file():
            continue
        seen.add(current)
        waiting.append(f"{Path(current).parent}/__init__.py")
        for found in imports_of((ROOT / current).read_text(encoding="utf-8")):
            if found.on_load:
                loaded.setdefault(found.top, current)
                waiting += _files_of(found)
    return loaded


def _files_of(found: Import) -> list[str]:
    if found.floor is None:
        return []
    parts = found.name.split(".")[1:]
    heads = ["/".join(parts[: n + 1]) for n in range(len(parts))]
    return [f"{head}{end}" for head in heads for end in (".py", "/__init__.py")]


def files_in(*folders: str) -> list[str]:
    return sorted(str(path.relative_to(ROOT)) for folder in folders for path in (ROOT / folder).rglob("*.py"))


@pytest.mark.parametrize("path", files_in(*FLOORS, *NOT_PACKAGES))
def test_every_import_is_allowed(path: str) -> None:
    found = violations(path, (ROOT / path).read_text(encoding="utf-8"))

    assert not found, "\n".join(found)


@pytest.mark.parametrize("path", TORCH_FREE)
def test_records_and_tables_do_not_load_torch(path: str) -> None:
    loaded = loaded_with(path)

    assert "__future__" in loaded, f"{path} does not exist"
    assert "torch" not in loaded, f"{path} loads torch by way of {loaded['torch']}"
    assert "transformers" not in loaded, f"{path} loads transformers by way of {loaded['transformers']}"


@pytest.mark.parametrize("folder", ["llm_runtime", "envs"])
def test_records_and_tables_leave_torch_out_of_a_fresh_interpreter(folder: str) -> None:
    paths = [path.removesuffix(".py").removesuffix("/__init__") for path in TORCH_FREE if path.startswith(folder)]
    lines = [f"import trainpilot.{path.replace('/', '.')}" for path in paths]
    program = "\n".join([*lines, "import sys", "assert 'torch' not in sys.modules"])

    outcome = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=False)

    assert outcome.returncode == 0, outcome.stderr


@pytest.mark.parametrize(
    ("path", "source"),
    [
        ("llm_runtime/live.py", "from trainpilot.envs.reward import RewardTerms"),
        ("llm_runtime/live.py", "from trainpilot import envs"),
        ("envs/action.py", "def f():\n    import trainpilot.agents.ppo"),
        ("agents/ppo.py", "from trainpilot.experiments.cli import main"),
        ("agents/ppo.py", "from trainpilot.tests.fakes import FakeRun"),
        ("agents/ppo.py", "import importlib\nimportlib.import_module('trainpilot.experiments.cli')"),
        ("experiments/cli.py", "from envs.reward import RewardTerms"),
        ("tests/test_reward.py", "import envs"),
        ("benchmarks/overhead.py", "from llm_runtime import controls"),
        ("envs/action.py", "from .reward import RewardTerms"),
        ("envs/action.py", "from . import reward"),
        ("envs/reward.py", "import torch.nn.functional as F"),
        ("envs/reward.py", "if TYPE_CHECKING:\n    from torch import Tensor"),
        ("agents/controller.py", "import transformers"),
        ("llm_runtime/energy/meter.py", "import pynvml"),
        ("llm_runtime/live.py", "import gymnasium as gym"),
        ("envs/environments.py", "from stable_baselines3 import PPO"),
        ("agents/ppo.py", "import tyro"),
    ],
)
def test_a_forbidden_import_is_found(path: str, source: str) -> None:
    assert len(violations(path, source)) == 1


@pytest.mark.parametrize(
    ("path", "source"),
    [
        ("experiments/cli.py", "import tyro\nfrom trainpilot.llm_runtime.config import Controls"),
        ("experiments/demo.py", "from trainpilot.experiments.cli import main"),
        ("agents/ppo.py", "import torch\nfrom sb3_contrib import MaskablePPO"),
        ("llm_runtime/energy/nvml.py", "def f():\n    import pynvml"),
        ("tests/test_ppo.py", "import torch\nimport gymnasium\nfrom trainpilot.experiments.cli import main"),
    ],
)
def test_an_allowed_import_passes(path: str, source: str) -> None:
    assert violations(path, source) == []


def test_a_module_in_a_nested_folder_is_found_with_the_packages_on_the_way() -> None:
    found = Import(name="trainpilot.llm_runtime.simulator.runs.Pool", line=1, on_load=True)
    files = [path for path in _files_of(found) if (ROOT / path).is_file()]

    assert files == ["llm_runtime/__init__.py", "llm_runtime/simulator/__init__.py", "llm_runtime/simulator/runs.py"]
    assert loaded_with("llm_runtime/simulator/runs.py")["scipy"] == "llm_runtime/simulator/fitting.py"


def test_only_what_runs_at_load_time_counts_as_loaded() -> None:
    source = "\n".join(
        [
            "import a",
            "def f():\n    import b",
            "if TYPE_CHECKING:\n    import c\nelse:\n    import d",
            "try:\n    import e\nexcept ImportError:\n    pass",
        ]
    )

    assert {found.name for found in imports_of(source) if found.on_load} == {"a", "d", "e"}
