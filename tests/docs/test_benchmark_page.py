"""The page of baselines is in step with its results, and the example in one file learns."""

from __future__ import annotations

import importlib.util
import re
from pathlib import Path

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


def test_the_example_in_one_file_runs(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    few = default_pool(8)  # the usual pool takes seconds
    monkeypatch.setattr("trainpilot.envs.environments._pool", lambda: few)
    spec = importlib.util.spec_from_file_location("ppo_example", DOCS / "examples" / "ppo.py")
    assert spec is not None
    assert spec.loader is not None
    example = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(example)
    monkeypatch.setattr(example, "N_ENVS", 4)
    monkeypatch.setattr("sys.argv", ["ppo.py", "--decisions", "200", "--preference", "quality=1"])
    example.main()

    assert re.fullmatch(
        r" +200 decisions, +\d+ s: return -?\d\.\d{3}\n"
        r"new runs, keeping the base schedule: \d\.\d{3}\n"
        r"new runs, the agent's likeliest action: -?\d\.\d{3}\n",
        capsys.readouterr().out,
    )
