"""The page of baselines is in step with its results, and the example in one file learns."""

from __future__ import annotations

import importlib.util
import re
from pathlib import Path
from typing import Any

import pytest

from docs.generate import benchmark
from trainpilot.llm_runtime.simulator.runs import default_pool

DOCS = Path(__file__).parents[2] / "docs"


def test_the_page_is_in_step_with_its_results(capsys: pytest.CaptureFixture[str]) -> None:
    benchmark.main()
    assert (DOCS / "benchmark.md").read_text(encoding="utf-8") == capsys.readouterr().out, (
        "docs/benchmark.md is old; write it anew: python -m docs.generate.benchmark > docs/benchmark.md"
    )


def test_curves_are_means_over_seeds() -> None:
    runs = [{"curve": [(64, 0.1), (128, 0.5)]}, {"curve": [(64, 0.3), (128, 0.7)]}]
    assert benchmark._means(runs) == ["0.20", "0.60"]


@pytest.fixture
def _few_instances(monkeypatch: pytest.MonkeyPatch) -> None:
    """Draw from few instances: the usual pool takes seconds."""
    few = default_pool(8)
    monkeypatch.setattr("trainpilot.envs.environments._pool", lambda: few)


def loaded(name: str) -> Any:
    """Return an example as a module."""
    spec = importlib.util.spec_from_file_location(name, DOCS / "examples" / f"{name}.py")
    assert spec is not None
    assert spec.loader is not None
    example = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(example)
    return example


@pytest.mark.usefixtures("_few_instances")
def test_the_example_in_one_file_runs(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    example = loaded("ppo")
    monkeypatch.setattr(example, "N_ENVS", 4)
    monkeypatch.setattr("sys.argv", ["ppo.py", "--decisions", "200", "--preference", "quality=1"])
    example.main()

    assert re.fullmatch(
        r" +200 decisions, +\d+ s: return -?\d\.\d{3}\n"
        r"new runs, keeping the base schedule: \d\.\d{3}\n"
        r"new runs, the agent's likeliest action: -?\d\.\d{3}\n",
        capsys.readouterr().out,
    )


@pytest.mark.usefixtures("_few_instances")
def test_the_example_of_rllib_learns(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    pytest.importorskip("ray.rllib", reason="RLlib is installed in an environment of its own")
    example = loaded("rllib_ppo")
    monkeypatch.setattr(example, "N_ENVS", 4)
    monkeypatch.setattr("sys.argv", ["rllib_ppo.py", "--iterations", "2", "--preference", "quality=1"])
    example.main()

    first, second = re.findall(r"^ +(\d+) decisions: return -?\d\.\d{3}$", capsys.readouterr().out, flags=re.M)
    assert int(first) == 4 * 50
    assert int(second) == 2 * int(first)
