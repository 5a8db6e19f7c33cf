"""Steer live test cases with the policies of the ablations, by `trainpilot compare`, and read the figures."""

from __future__ import annotations

import shutil
import subprocess
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from zero_shot import load, told

from trainpilot.experiments.analysis.method_figures import MethodOnCase, method_on_case
from trainpilot.experiments.analysis.modelled_cost import Runs
from trainpilot.experiments.analysis.multiplier import case_baselines
from trainpilot.experiments.analysis.statistics import over_cases
from trainpilot.experiments.compare.results import TUNED, UNTUNED

STARTS = ("0.1", "1", "10")
"""Starting learning rates over the tuned static's."""
PREFERENCE = "quality=1"


def live(
    files: Mapping[str, Sequence[Path]], cases: str, folder: Path, source: Path, *, seeds: int, jobs: int
) -> dict[str, Any]:
    """Run what is missing, and return every variant's figures; the tuned static's search comes from `source`."""
    there = {name: [path for path in paths if path.is_file()] for name, paths in files.items()}
    if missing := [name for name, paths in there.items() if not paths]:
        raise SystemExit(f"--live needs trained policies, got none of {missing[0]}; run without --live first")
    take_over(source, folder)
    methods = [method(path, start) for paths in there.values() for path in paths for start in STARTS]
    compare(cases, [UNTUNED, TUNED, *methods], folder, seeds=seeds, jobs=jobs)
    runs = load(folder)
    return {name: figures(runs, [method(path, start) for path in paths for start in STARTS]) for name, paths in
            there.items()}  # fmt: skip


def take_over(source: Path, folder: Path) -> None:
    """Copy the runs and the cost tables of another comparison, so that what they hold is not run again."""
    for part in ("runs", "costs"):
        if (source / part).is_dir():
            shutil.copytree(source / part, folder / part, dirs_exist_ok=True)


def compare(cases: str, methods: Sequence[str], folder: Path, *, seeds: int, jobs: int) -> None:
    """Run `trainpilot compare`."""
    command = ["compare", "--cases", cases, "--methods", ",".join(methods), "--out", str(folder)]
    command += ["--seeds", str(seeds), "--jobs", str(jobs)]
    subprocess.run([sys.executable, "-m", "trainpilot.experiments.cli", *command], check=True)


def method(path: Path, start: str) -> str:
    """Return the name of a policy's runs from one starting rate."""
    return f"policy:{path}@{PREFERENCE}@start={start}"


def figures(runs: Runs, methods: Sequence[str]) -> dict[str, Any]:
    """Return what several methods, taken together, are worth in tokens against both baselines."""
    baselines = [case_baselines(runs, case) for case in runs.comparison.cases]
    cases: list[list[MethodOnCase]] = [[method_on_case(runs, each, name) for name in methods] for each in baselines]
    judged = [run for found in cases for one in found for run in one.runs]
    return {
        "n_runs": len(judged),
        "n_without_loss": sum(run.loss is None for run in judged),
        **{
            baseline: told(
                over_cases([[v for one in found for v in one.multipliers[baseline]["tokens"]] for found in cases])
            )
            for baseline in ("untuned", "tuned")
        },
    }
