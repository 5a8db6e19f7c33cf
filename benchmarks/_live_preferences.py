"""Steer live test cases under many preferences, by `trainpilot compare`, and read the figures out of its runs."""

from __future__ import annotations

import math
from collections.abc import Sequence
from importlib.resources import files
from pathlib import Path
from statistics import median
from typing import Any

import yaml
from _live_ablations import compare, take_over
from _static_front import front_of
from zero_shot import load

from trainpilot.envs.decision import Preference
from trainpilot.experiments.analysis.modelled_cost import Run, Runs
from trainpilot.experiments.analysis.multiplier import CaseBaselines, case_baselines
from trainpilot.experiments.analysis.pareto import REFERENCE_POINT, Objectives, hypervolume
from trainpilot.experiments.compare.methods import spoken
from trainpilot.experiments.compare.results import TUNED, UNTUNED
from trainpilot.llm_runtime.files import write_json

CASES = ("llama", "gpt2", "qwen2")
WORST = (*REFERENCE_POINT, REFERENCE_POINT[1])


def live(
    policy: str, asked: Sequence[Preference], folder: Path, source: Path, *, seeds: int, jobs: int
) -> dict[str, Any]:
    """Run what is missing, and return the figures; the search for the tuned static is taken over from `source`."""
    take_over(source, folder)
    cases = _write_cases(folder / "cases.json")
    methods = list(dict.fromkeys(_method(policy, each) for each in asked))
    compare(str(cases), [UNTUNED, TUNED, *methods], folder, seeds=seeds, jobs=jobs)
    return figures(load(folder), policy, asked)


def _write_cases(path: Path) -> Path:
    text = files("trainpilot.experiments.compare").joinpath("sets", "test.yaml").read_text(encoding="utf-8")
    content = yaml.safe_load(text)
    content["cases"] = [case for case in content["cases"] if case["name"] in CASES]
    write_json(path, content)
    return path


def _method(policy: str, preference: Preference) -> str:
    return f"policy:{policy}@{spoken(preference).replace(',', '+')}"


def figures(runs: Runs, policy: str, asked: Sequence[Preference]) -> dict[str, Any]:
    """Return loss, quality and costs of every preference on every case, and how they stand to each other."""
    baselines = {case.name: case_baselines(runs, case) for case in runs.comparison.cases}
    told = []
    for preference in asked:
        quality, energy, time = preference.weights()
        method = _method(policy, preference)
        cases = {name: _on_case(runs, found, method) for name, found in baselines.items()}
        place = [median(values) for values in zip(*cases.values(), strict=True)]
        told.append(
            {
                "preference": str(preference),
                "weights": {"quality": float(quality), "energy": float(energy), "time": float(time)},
                "compute_over_worth": round(place[0], 4),
                "energy": round(place[1], 4),
                "time": round(place[2], 4),
                "by_case": {case: [round(value, 4) for value in values] for case, values in cases.items()},
            }
        )
    return {
        "cases": list(baselines),
        "seeds": list(runs.comparison.seeds),
        "objectives": "compute that the loss is worth, joules, seconds; over the tuned static's, less is better",
        "preferences": told,
        "costs": {cost: _front(told, cost) for cost in ("energy", "time")},
    }


def _on_case(runs: Runs, baselines: CaseBaselines, method: str) -> tuple[float, float, float]:
    """Return the objectives, medians over the seeds; a run that failed counts as worst."""
    tuned = runs.of(baselines.case, TUNED)
    found = [_objectives(run, baselines, tuned) for run in runs.of(baselines.case, method)]
    if not found:
        return WORST
    compute, energy, time = (median(values) for values in zip(*found, strict=True))
    return compute, energy, time


def _objectives(run: Run, baselines: CaseBaselines, tuned: Sequence[Run]) -> tuple[float, float, float]:
    baseline = baselines.tuned.get("tokens")
    if run.loss is None or baseline is None:
        return WORST
    # Outside the curve the bound stands for the budget: it is either far off, or a gain that is not claimed.
    needed = baseline.curve.needed(run.loss)
    share = (needed.high if math.isfinite(needed.high) else needed.low) / baseline.curve.whole[0]
    return min(1 / share, WORST[0]), _ratio(run, tuned, "energy_j"), _ratio(run, tuned, "time_s")


def _ratio(run: Run, tuned: Sequence[Run], axis: str) -> float:
    spent, known = run.spent[axis], [value for each in tuned if (value := each.spent[axis]) is not None]
    return WORST[1] if spent is None or not known else min(spent / median(known), WORST[1])


def _front(told: Sequence[dict[str, Any]], cost: str) -> dict[str, Any]:
    """Return how the preferences between quality and one cost stand to each other, medians over the cases."""
    other = "time" if cost == "energy" else "energy"
    family = {one["preference"]: one for one in told if one["weights"][other] == 0}
    points: list[Objectives] = [(one["compute_over_worth"], one[cost]) for one in family.values()]
    kept = front_of(points)
    return {
        "non_dominated": len({points[i] for i in kept}),
        "on_front": [list(family)[i] for i in kept],
        "hypervolume": round(hypervolume(points), 4),
    }
