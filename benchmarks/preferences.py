"""Measure how a policy trades quality against energy and time, by steering the same runs under many preferences.

    python benchmarks/preferences.py [--policy default] [--runs 1024]
    python benchmarks/preferences.py --live [--from runs/baselines] [--out runs/preferences] [--jobs 0]

The first command uses simulated instances that are not used for training, and takes one or two minutes. It compares the
policy with two kinds of static settings: one for all instances, found by NSGA-II with as many simulated runs, and the
best one for each instance, chosen with full knowledge. The second command steers three live test cases by means of
`trainpilot compare`, and takes about twenty minutes on two cores; if it is interrupted, the same command resumes it.
"""

from __future__ import annotations

import argparse
import math
from collections.abc import Mapping, Sequence
from functools import partial
from importlib.resources import files
from pathlib import Path
from statistics import median
from typing import Any

import matplotlib
import numpy as np
import torch
import yaml
from _common import write_result
from _simulated import (
    TEST_INSTANCES,
    TEST_SEED,
    RunsAndReferences,
    by_policy,
    estimate,
    front_of,
    interval,
    medians,
    nsga2_settings,
    rounded,
    steer,
    try_settings,
    tuned_for_each,
    unseen_pool,
)
from ablations import compare, take_over
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from zero_shot import load

from trainpilot.agents.bundle import PolicyBundle, policy_digest, policy_path
from trainpilot.envs.decision import Preference
from trainpilot.experiments.analysis.modelled_cost import Run, Runs
from trainpilot.experiments.analysis.multiplier import CaseBaselines, case_baselines
from trainpilot.experiments.analysis.pareto import REFERENCE_POINT, Objectives, hypervolume
from trainpilot.experiments.compare.methods import spoken
from trainpilot.experiments.results import TUNED, UNTUNED
from trainpilot.llm_runtime.files import write_json
from trainpilot.llm_runtime.simulator.records import Floats, Ints
from trainpilot.llm_runtime.simulator.runs import Pool, SimulatedRuns

CASES = ("llama", "gpt2", "qwen2")
WORST = (*REFERENCE_POINT, REFERENCE_POINT[1])


def live(
    policy: str, asked: Sequence[Preference], folder: Path, source: Path, *, seeds: int, jobs: int
) -> dict[str, Any]:
    """Run the missing live runs and return the figures; the tuned static's search is copied from `source`."""
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
    """Return loss, quality and costs of every preference on every case, with the fronts that they form."""
    baselines = {case.name: case_baselines(runs, case) for case in runs.comparison.cases}
    by_preference = []
    for preference in asked:
        quality, energy, time = preference.weights()
        method = _method(policy, preference)
        cases = {name: _on_case(runs, found, method) for name, found in baselines.items()}
        place = [median(values) for values in zip(*cases.values(), strict=True)]
        by_preference.append(
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
        "preferences": by_preference,
        "costs": {cost: _front(by_preference, cost) for cost in ("energy", "time")},
    }


def _on_case(runs: Runs, baselines: CaseBaselines, method: str) -> tuple[float, float, float]:
    """Return the objectives as medians over the seeds; a failed run counts as the worst."""
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
    # Outside the curve its bound is used as the budget, so that no gain beyond the curve is claimed.
    needed = baseline.curve.needed(run.loss)
    share = (needed.high if math.isfinite(needed.high) else needed.low) / baseline.curve.whole[0]
    return min(1 / share, WORST[0]), _ratio(run, tuned, "energy_j"), _ratio(run, tuned, "time_s")


def _ratio(run: Run, tuned: Sequence[Run], axis: str) -> float:
    spent, known = run.spent[axis], [value for each in tuned if (value := each.spent[axis]) is not None]
    return WORST[1] if spent is None or not known else min(spent / median(known), WORST[1])


def _front(by_preference: Sequence[dict[str, Any]], cost: str) -> dict[str, Any]:
    """Return the front of the preferences between quality and one cost, from medians over the cases."""
    other = "time" if cost == "energy" else "energy"
    family = {one["preference"]: one for one in by_preference if one["weights"][other] == 0}
    points: list[Objectives] = [(one["compute_over_worth"], one[cost]) for one in family.values()]
    kept = front_of(points)
    return {
        "non_dominated": len({points[i] for i in kept}),
        "on_front": [list(family)[i] for i in kept],
        "hypervolume": round(hypervolume(points), 4),
    }


POLICY, SOFT, RULE = "#0a3d7a", "#62676f", "#e3e0d9"
STATIC = {
    "one_setting_for_all": ("one static setting for all (NSGA-II)", "#c7772b", "s--"),
    "tuned_for_each": ("static, tuned on every instance", "#8a8f98", "^:"),
}

Figures = Mapping[str, Any]


def draw(result: Figures, path: Path) -> None:
    """Write the picture of a result of `preferences`."""
    figure = Figure(figsize=(9.2, 4.0), layout="constrained")
    panels = figure.subplots(1, len(result["costs"]), sharey=True, squeeze=False)[0]
    for panel, (cost, figures) in zip(panels, result["costs"].items(), strict=True):
        _panel(panel, cost, figures)
    panels[0].set_ylabel("compute-equivalent of the loss", fontsize=9.5)
    figure.legend(
        *panels[0].get_legend_handles_labels(), loc="outside lower center", ncols=3, frameon=False, fontsize=9
    )
    path.parent.mkdir(parents=True, exist_ok=True)
    with matplotlib.rc_context({"svg.hashsalt": "trainpilot"}):
        figure.savefig(path, dpi=160, metadata={"Software": None})


def _panel(panel: Axes, cost: str, figures: Figures) -> None:
    panel.set_title(f"Quality against {cost}", loc="left", fontsize=11, fontweight="bold")
    panel.set_xlabel(f"{cost} over the reference's", fontsize=9.5)
    panel.grid(color=RULE, linewidth=0.7)
    panel.set_axisbelow(True)
    panel.tick_params(length=0, labelsize=9)
    for side in ("top", "right", "left"):
        panel.spines[side].set_visible(False)
    for name, (label, color, style) in STATIC.items():
        points = figures[name]
        x, y = [point["cost"] for point in points], [point["quality"] for point in points]
        panel.plot(x, y, style, color=color, markersize=3.5, linewidth=1.1, label=label)
    _policy(panel, cost, figures["preferences"])
    panel.set_xlim(left=0)
    panel.set_ylim(bottom=0)


def _policy(panel: Axes, cost: str, preferences: Sequence[Figures]) -> None:
    x = [one[cost]["value"] for one in preferences]
    y = [one["quality"]["value"] for one in preferences]
    for one in preferences:
        panel.plot([one[cost]["value"]] * 2, [one["quality"]["low"], one["quality"]["high"]], color=POLICY, linewidth=1)
        panel.plot([one[cost]["low"], one[cost]["high"]], [one["quality"]["value"]] * 2, color=POLICY, linewidth=1)
    panel.plot(x, y, "o-", color=POLICY, markersize=5, linewidth=1.6, zorder=4, label="policy, by its preference")
    for one, place in ((preferences[0], "quality alone"), (preferences[-1], "half and half")):
        at = (one[cost]["value"], one["quality"]["value"])
        panel.annotate(place, at, textcoords="offset points", xytext=(6, -11), fontsize=8.5, color=SOFT)


IMAGE = Path(__file__).parent.parent / "docs" / "images" / "preferences.png"
RUNS_SEED = 11
COSTS = ("energy", "time")
WEIGHTS = tuple(i / 16 for i in range(9))
"""Weights on the cost. Quality has the remaining weight, at least a half as in training."""


def main() -> None:
    """Steer under every preference, and write `results/preferences.json` (or `preferences_live.json`)."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--policy", default="default", help="a bundle's file, or the name of one that is shipped")
    parser.add_argument("--instances", type=int, default=TEST_INSTANCES)
    parser.add_argument("--runs", type=int, default=1024)
    parser.add_argument("--costs", nargs="+", default=COSTS, choices=COSTS, help="of --live; on a CPU one serves both")
    parser.add_argument("--live", action="store_true", help="steer live test cases instead of simulated runs")
    parser.add_argument("--out", type=Path, default=Path("runs/preferences"))
    parser.add_argument("--from", dest="source", type=Path, default=Path("runs/baselines"))
    parser.add_argument("--seeds", type=int, default=1)
    parser.add_argument("--jobs", type=int, default=0)
    options = parser.parse_args()
    path = policy_path(options.policy)
    policy = {"name": options.policy, "digest": policy_digest(path)}
    if options.live:
        asked = [preference(cost, weight) for cost in options.costs for weight in WEIGHTS]
        found = live(options.policy, asked, options.out, options.source, seeds=options.seeds, jobs=options.jobs)
        print(write_result("preferences_live", {"policy": policy, **found}, torch.device("cpu")))
        return
    torch.set_num_threads(1)
    result = {"policy": policy, **in_simulator(PolicyBundle.load(path), options.instances, options.runs)}
    draw(result, IMAGE)
    print(write_result("preferences", result, torch.device("cpu")))
    for cost in COSTS:
        say(cost, result["costs"][cost])


def preference(cost: str, weight: float) -> Preference:
    """Return a preference between quality and one cost."""
    weights = {"energy": 0.0, "time": 0.0, cost: weight}
    return Preference(quality=1 - weight, **weights)


def in_simulator(bundle: PolicyBundle, n_instances: int, n_runs: int) -> dict[str, Any]:
    """Return the figures of every preference on simulated runs."""
    pool = unseen_pool(n_instances)
    fresh = SimulatedRuns(n_runs, RUNS_SEED, pool)
    runs = RunsAndReferences(instances=fresh.instances, references=fresh.references)
    return {
        "runs": {"n": n_runs, "instances": n_instances, "seed": TEST_SEED},
        "reference_point": list(REFERENCE_POINT),
        "costs": {cost: _one_cost(bundle, cost, pool, runs, fresh.index) for cost in COSTS},
    }


def _one_cost(bundle: PolicyBundle, cost: str, pool: Pool, runs: RunsAndReferences, group: Ints) -> dict[str, Any]:
    quality, spent = _steered(bundle, cost, pool, runs)
    n_simulated = len(WEIGHTS) * len(runs)
    settings = nsga2_settings(runs, cost, n_simulated)
    single = try_settings(settings, runs, cost)
    single = _rows(single, front_of(medians(*single)))
    each = tuned_for_each(runs, cost, WEIGHTS)
    points = medians(quality, spent[cost])
    return {
        "preferences": [
            {
                "preference": str(preference(cost, weight)),
                "weight": weight,
                "quality": estimate(quality[i], group),
                **{name: estimate(values[i], group) for name, values in spent.items()},
                "on_front": i in front_of(points),
            }
            for i, weight in enumerate(WEIGHTS)
        ],
        "monotone": _monotone(quality, spent[cost], group),
        "non_dominated": interval(lambda rows: len(front_of(medians(quality[:, rows], spent[cost][:, rows]))), group),
        "hypervolume": {
            "policy": _volume(quality, spent[cost], group),
            "one_setting_for_all": {"simulated_runs": n_simulated, **_volume(single[0], single[1], group)},
            "tuned_for_each": _volume(each[0], each[1], group),
        },
        "one_setting_for_all": _points(*single),
        "tuned_for_each": _points(*each),
    }


def _steered(bundle: PolicyBundle, cost: str, pool: Pool, runs: RunsAndReferences) -> tuple[Floats, dict[str, Floats]]:
    """Return quality and costs under each weight, each of shape (weights, n_runs)."""
    asked = [preference(cost, weight) for weight in WEIGHTS]
    outcomes = [steer(SimulatedRuns(len(runs), RUNS_SEED, pool), by_policy(bundle, each)) for each in asked]
    quality = np.stack([runs.quality(each.loss) for each in outcomes])
    return quality, {name: np.stack([getattr(each, name) for each in outcomes]) for name in COSTS}


def _monotone(quality: Floats, spent: Floats, group: Ints) -> dict[str, Any]:
    """Return how well medians follow the weight: rank correlation, and the number of neighbours in the wrong order."""
    return {
        name: {
            "spearman": interval(partial(_spearman, values), group),
            "violations": interval(partial(_violations, values), group),
            "of": len(WEIGHTS) - 1,
        }
        for name, values in (("cost", spent), ("quality", quality))
    }


def _spearman(values: Floats, rows: Ints) -> float:
    """Return the rank correlation of weight and median: -1 is ideal for cost and quality alike, 0 if all are equal."""
    from scipy.stats import spearmanr

    middles = np.median(values[:, rows], axis=1)
    return 0.0 if np.ptp(middles) == 0 else float(spearmanr(WEIGHTS, middles).statistic)


def _violations(values: Floats, rows: Ints) -> float:
    return float((np.diff(np.median(values[:, rows], axis=1)) > 1e-9).sum())


def _volume(quality: Floats, spent: Floats, group: Ints) -> dict[str, Any]:
    return interval(lambda rows: hypervolume(_medians(quality, spent, rows)), group)


def _medians(quality: Floats, spent: Floats, rows: Ints) -> list[tuple[float, float]]:
    """Return the objectives of each preference, clipped at the reference point."""
    found = medians(quality[:, rows], spent[:, rows])
    return [(min(one, REFERENCE_POINT[0]), min(other, REFERENCE_POINT[1])) for one, other in found]


def _rows(values: tuple[Floats, Floats], rows: list[int]) -> tuple[Floats, Floats]:
    return values[0][rows], values[1][rows]


def _points(quality: Floats, spent: Floats) -> list[dict[str, float]]:
    """Return medians by ascending cost."""
    found = zip(np.median(spent, axis=1), np.median(quality, axis=1), strict=True)
    return [{"cost": rounded(cost), "quality": rounded(worth)} for cost, worth in sorted(found)]


def say(cost: str, figures: dict[str, Any]) -> None:
    """Print the figures of one cost."""
    print(f"\n{cost}: weight, quality, {cost} over the reference's (medians)")
    for one in figures["preferences"]:
        front = "*" if one["on_front"] else " "
        print(f"  {one['weight']:.3f}  {one['quality']['value']:.3f}  {one[cost]['value']:.3f} {front}")
    for name, found in figures["monotone"].items():
        print(f"  {name}: Spearman {found['spearman']}, violations {found['violations']} of {found['of']}")
    print(f"  non-dominated {figures['non_dominated']}")
    for name, found in figures["hypervolume"].items():
        print(f"  hypervolume, {name}: {found}")


if __name__ == "__main__":
    main()
