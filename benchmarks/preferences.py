"""Steer the same runs under many preferences: does asking for less energy, or less time, bring less, and at what price?

    python benchmarks/preferences.py [--policy default] [--runs 1024]
    python benchmarks/preferences.py --live [--from runs/baselines] [--out runs/preferences] [--jobs 0]

The first is done in the simulator in a minute or two, on instances that were never trained on, and set against static
settings: one for all, found by NSGA-II with as many simulated runs, and one for each instance, found knowing all. The
second steers three live test cases, in twenty minutes or so on two cores; killed at any moment, it goes on.
"""

from __future__ import annotations

import argparse
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from _common import write_result
from _live_preferences import live
from _preferences_chart import draw
from _simulated import (
    TEST_INSTANCES,
    TEST_SEED,
    by_policy,
    estimate,
    interval,
    rounded,
    steer,
    unseen_pool,
)
from _static_front import RunsAndReferences, front_of, medians, nsga2_settings, try_settings, tuned_for_each

from trainpilot.agents.bundle import PolicyBundle, policy_digest, policy_path
from trainpilot.envs.decision import Preference
from trainpilot.experiments.analysis.pareto import REFERENCE_POINT, hypervolume
from trainpilot.llm_runtime.simulator.records import Floats, Ints
from trainpilot.llm_runtime.simulator.runs import Pool, SimulatedRuns

IMAGE = Path(__file__).parent.parent / "docs" / "images" / "preferences.png"
RUNS_SEED = 11
COSTS = ("energy", "time")
WEIGHTS = tuple(i / 16 for i in range(9))
"""On the cost; quality weighs the rest, at least the half that policies are trained with."""


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
    """Return how well medians follow the weight: rank correlation, and neighbours that go the wrong way."""
    return {
        name: {
            "spearman": interval(partial(_spearman, values), group),
            "violations": interval(partial(_violations, values), group),
            "of": len(WEIGHTS) - 1,
        }
        for name, values in (("cost", spent), ("quality", quality))
    }


def _spearman(values: Floats, rows: Ints) -> float:
    """Return the rank correlation of weight and median; -1 is right for cost and quality alike, 0 where all is one."""
    from scipy.stats import spearmanr

    middles = np.median(values[:, rows], axis=1)
    return 0.0 if np.ptp(middles) == 0 else float(spearmanr(WEIGHTS, middles).statistic)


def _violations(values: Floats, rows: Ints) -> float:
    return float((np.diff(np.median(values[:, rows], axis=1)) > 1e-9).sum())


def _volume(quality: Floats, spent: Floats, group: Ints) -> dict[str, Any]:
    return interval(lambda rows: hypervolume(_medians(quality, spent, rows)), group)


def _medians(quality: Floats, spent: Floats, rows: Ints) -> list[tuple[float, float]]:
    """Return the objectives of each preference; what is worse than the reference point counts as just as bad."""
    found = medians(quality[:, rows], spent[:, rows])
    return [(min(one, REFERENCE_POINT[0]), min(other, REFERENCE_POINT[1])) for one, other in found]


def _rows(told: tuple[Floats, Floats], rows: list[int]) -> tuple[Floats, Floats]:
    return told[0][rows], told[1][rows]


def _points(quality: Floats, spent: Floats) -> list[dict[str, float]]:
    """Return medians, the cheapest first."""
    found = zip(np.median(spent, axis=1), np.median(quality, axis=1), strict=True)
    return [{"cost": rounded(cost), "quality": rounded(worth)} for cost, worth in sorted(found)]


def say(cost: str, told: dict[str, Any]) -> None:
    """Print one cost's figures."""
    print(f"\n{cost}: weight, quality, {cost} over the reference's (medians)")
    for one in told["preferences"]:
        front = "*" if one["on_front"] else " "
        print(f"  {one['weight']:.3f}  {one['quality']['value']:.3f}  {one[cost]['value']:.3f} {front}")
    for name, found in told["monotone"].items():
        print(f"  {name}: Spearman {found['spearman']}, violations {found['violations']} of {found['of']}")
    print(f"  non-dominated {told['non_dominated']}")
    for name, found in told["hypervolume"].items():
        print(f"  hypervolume, {name}: {found}")


if __name__ == "__main__":
    main()
