"""The public names: each package lists what it offers, and importing the package itself stays cheap."""

from __future__ import annotations

import subprocess
import sys
from importlib import import_module

import pytest

PACKAGES = (
    "trainpilot",
    "trainpilot.llm_runtime",
    "trainpilot.llm_runtime.data",
    "trainpilot.llm_runtime.energy",
    "trainpilot.envs",
    "trainpilot.agents",
    "trainpilot.agents.steering",
    "trainpilot.agents.integrations",
)


def run(program: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=False)


@pytest.mark.parametrize("package", PACKAGES)
def test_every_public_name_can_be_imported(package: str) -> None:
    module = import_module(package)

    missing = [name for name in module.__all__ if getattr(module, name, None) is None]

    assert not missing
    assert set(module.__all__) <= set(dir(module))


@pytest.mark.parametrize("package", PACKAGES[1:])  # the first takes its names from trainpilot.agents
def test_lazy_names_are_the_public_ones(package: str) -> None:
    module = import_module(package)
    lazy = [name for names in module._NAMES.values() for name in names]

    assert len(lazy) == len(set(lazy))
    assert set(lazy) <= set(module.__all__)
    with pytest.raises(AttributeError, match="has no attribute 'Unknown'"):
        module.Unknown  # noqa: B018


def test_importing_the_packages_loads_no_large_library() -> None:
    lines = ["import sys", *(f"import {package}" for package in PACKAGES)]
    lines += [f"assert {name!r} not in sys.modules" for name in ("torch", "transformers", "lightning", "accelerate")]

    outcome = run("\n".join(lines))

    assert outcome.returncode == 0, outcome.stderr


@pytest.mark.parametrize(
    ("missing", "name", "way_out"),
    [
        ("lightning", "LightningSteering", "pip install lightning"),
        ("accelerate", "SteeredTrainer", "pip install accelerate"),
        ("accelerate", "SteeringCallback", "pip install accelerate"),
    ],
)
def test_a_missing_library_is_named_with_its_way_out(missing: str, name: str, way_out: str) -> None:
    outcome = run(f"import sys; sys.modules[{missing!r}] = None\nfrom trainpilot.agents.integrations import {name}")

    assert outcome.returncode == 1
    assert outcome.stderr.splitlines()[-1].startswith("ImportError: steering a ")
    assert way_out in outcome.stderr.splitlines()[-1]


def test_an_adapter_does_not_need_the_library_of_another() -> None:
    without = "import sys; sys.modules['lightning'] = sys.modules['accelerate'] = None"

    outcome = run(f"{without}\nfrom trainpilot.agents.integrations import ProcessGroupRanks")

    assert outcome.returncode == 0, outcome.stderr
