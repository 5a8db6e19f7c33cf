"""Measure what each part of the design contributes, by training policies without it.

    python benchmarks/ablations.py [--decisions 4000000] [--seeds 2] [--jobs 2] [--variants full,no-probe]
    python benchmarks/ablations.py --live [--cases test] [--from runs/baselines]

Every variant is a shortened simulator stage of the recipe with one change. It is tested on simulated runs that are not
used for training: around the shipped calibrations, on plants of a published model that was left out, and under budgets
in seconds; and in a second physics (the Multi-Power Law) that no training uses. The first command takes about
half an hour on two cores; if it is interrupted, the same command resumes it. The second command steers live test cases
with the policies of the first, by means of `trainpilot compare`.
"""

from __future__ import annotations

import argparse
import shutil
import subprocess
import sys
from collections.abc import Mapping, Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from _common import write_result
from _simulated import TEST_INSTANCES, TEST_SEED, StaticGrid, estimate, line, rounded, unseen_pool
from policy_at_scale import EDGES, LEFT_OUT, at_scale
from policy_in_simulator import RunSet, multi_power_run_set, simulator_run_set, steered
from zero_shot import estimate_record, load

from trainpilot.agents.bundle import BaseSchedule, PolicyBundle
from trainpilot.agents.simulator_training import SimulatorStage, train_in_simulator
from trainpilot.experiments.analysis.method_figures import MethodOnCase, method_on_case
from trainpilot.experiments.analysis.modelled_cost import Runs
from trainpilot.experiments.analysis.multiplier import case_baselines
from trainpilot.experiments.analysis.statistics import over_cases
from trainpilot.experiments.recipe import load_recipe
from trainpilot.experiments.results import TUNED, UNTUNED
from trainpilot.experiments.run_store import claim_folder
from trainpilot.experiments.train_agent import physics_of
from trainpilot.experiments.workers import Workers
from trainpilot.llm_runtime.budget import Currency
from trainpilot.llm_runtime.process import use_threads
from trainpilot.llm_runtime.schedules import BUDGET_SHARES
from trainpilot.llm_runtime.simulator.fitting import FittedPhysics
from trainpilot.llm_runtime.simulator.instances import Widening
from trainpilot.llm_runtime.simulator.records import Floats, Ints
from trainpilot.llm_runtime.simulator.runs import Pool, SimulatedRuns, Start
from trainpilot.llm_runtime.simulator.shipped import shipped_physics

STARTS = ("0.1", "1", "10")
"""Starting learning rates relative to that of the tuned static."""
PREFERENCE = "quality=1"


def live(
    files: Mapping[str, Sequence[Path]], cases: str, folder: Path, source: Path, *, seeds: int, jobs: int
) -> dict[str, Any]:
    """Run the missing live runs and return every variant's figures; the tuned static's search comes from `source`."""
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
    """Copy the runs and cost tables of another comparison, so that they are not run again."""
    for part in ("runs", "costs"):
        if (source / part).is_dir():
            shutil.copytree(source / part, folder / part, dirs_exist_ok=True)


def compare(cases: str, methods: Sequence[str], folder: Path, *, seeds: int, jobs: int) -> None:
    """Run `trainpilot compare`."""
    command = ["compare", "--cases", cases, "--methods", ",".join(methods), "--out", str(folder)]
    command += ["--seeds", str(seeds), "--jobs", str(jobs)]
    subprocess.run([sys.executable, "-m", "trainpilot.experiments.cli", *command], check=True)


def method(path: Path, start: str) -> str:
    """Return the method name of a policy started at one learning rate."""
    return f"policy:{path}@{PREFERENCE}@start={start}"


def figures(runs: Runs, methods: Sequence[str]) -> dict[str, Any]:
    """Return the compute multipliers of several methods, pooled, in tokens against both baselines."""
    baselines = [case_baselines(runs, case) for case in runs.comparison.cases]
    cases: list[list[MethodOnCase]] = [[method_on_case(runs, each, name) for name in methods] for each in baselines]
    judged = [run for found in cases for one in found for run in one.runs]
    return {
        "n_runs": len(judged),
        "n_without_loss": sum(run.loss is None for run in judged),
        **{
            baseline: estimate_record(
                over_cases([[v for one in found for v in one.multipliers[baseline]["tokens"]] for found in cases])
            )
            for baseline in ("untuned", "tuned")
        },
    }


FULL = "full"
VARIANTS: Mapping[str, str] = {
    FULL: "the recipe as it stands",
    "no-probe": "without the curvature probe and the size of the last update",
    "no-noise-scale": "without the gradient noise scale",
    "no-stack": "the newest observation alone",
    "no-randomisation": "one calibration as it was fitted, always the same physics",
    "no-law": "without a scaling law's advice",
    "no-prices": "without the price list",
    "no-history": "without the summaries of the whole run",
    "no-edges": "no instance has an edge",
    "no-privileged-critic": "the value network sees what the policy sees",
}
POLICY = "policy.safetensors"
WIDE_SEED = 20_243
"""Seed of the test instances of other scales and under budgets in seconds."""


def main() -> None:
    """Train the missing policies, test all, and write `results/ablations.json` (or `ablations_live.json`)."""
    options = _options()
    wanted = options.variants.split(",")
    if unknown := sorted(set(wanted) - set(VARIANTS)):
        raise SystemExit(f"--variants must be among {', '.join(VARIANTS)}, got {unknown[0]!r}")
    recipe = load_recipe(options.recipe, options.set).simulator
    if recipe is None:
        raise SystemExit(f"--recipe must have a simulator stage, got {options.recipe}, which has none")
    stage = replace(recipe, ppo=replace(recipe.ppo, total_decisions=options.decisions))
    seeds = range(stage.ppo.seed, stage.ppo.seed + options.seeds)
    files = {name: [options.out / name / str(seed) / POLICY for seed in seeds] for name in wanted}
    if options.live:
        found = live(files, options.cases, options.out / "live", options.source, seeds=1, jobs=options.jobs)
        print(write_result("ablations_live", {"variants": found}, torch.device("cpu")))
        return
    _train_all(stage, wanted, seeds, options)
    result = _tested(files, options)
    print(write_result("ablations", result, torch.device("cpu")))
    print("\n" + table(result))


def _options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--recipe", default="default")
    parser.add_argument("--set", action="append", default=[], help="key=value, as of train-agent")
    parser.add_argument("--decisions", type=int, default=4_000_000)
    parser.add_argument("--seeds", type=int, default=2)
    parser.add_argument("--variants", default=",".join(VARIANTS))
    parser.add_argument("--instances", type=int, default=TEST_INSTANCES)
    parser.add_argument("--runs", type=int, default=2048)
    parser.add_argument("--out", type=Path, default=Path("runs/ablations"))
    parser.add_argument("--jobs", type=int, default=1, help="policies trained side by side")
    parser.add_argument("--live", action="store_true", help="steer live test cases with the trained policies")
    parser.add_argument("--cases", default="test", help="cases of --live")
    parser.add_argument("--from", dest="source", type=Path, default=Path("runs/baselines"))
    return parser.parse_args()


# Training -------------------------------------------------------------------------------------------------------


def changed(stage: SimulatorStage, variant: str) -> SimulatorStage:
    """Return the simulator stage of a variant; its calibrations are chosen by `calibrations_of`."""
    changes: dict[str, dict[str, Any]] = {
        "no-probe": {"hide": ("curvature", "relative_update")},
        "no-noise-scale": {"hide": ("noise_scale",)},
        "no-stack": {"stack": 1},
        "no-randomisation": {"widening": replace(stage.widening, spread=0.0)},
        "no-law": {"observe": without(stage.observe, "law")},
        "no-prices": {"observe": without(stage.observe, "prices")},
        "no-history": {"observe": without(stage.observe, "history")},
        "no-edges": {"widening": replace(stage.widening, edges=0.0)},
        "no-privileged-critic": {"privileged_critic": False},
    }
    return replace(stage, **changes.get(variant, {}))


def without(groups: Sequence[str], group: str) -> tuple[str, ...]:
    """Return groups of observation fields less one of them."""
    return tuple(each for each in groups if each != group)


def calibrations_of(stage: SimulatorStage, variant: str) -> tuple[FittedPhysics, ...]:
    """Return the calibrations around which a variant's instances are drawn."""
    found = physics_of(stage.calibrations)
    return found[:1] if variant == "no-randomisation" else found


def _train_all(stage: SimulatorStage, wanted: Sequence[str], seeds: range, options: argparse.Namespace) -> None:
    tasks = [(changed(stage, name), name, seed, options.out / name) for seed in seeds for name in wanted]
    with Workers(_train, options.jobs) as workers:
        for _, (_, name, seed, score) in workers.run((task,) for task in tasks):
            print(f"{name}, seed {seed}: {score}", flush=True)


def _train(task: tuple[SimulatorStage, str, int, Path]) -> tuple[Path, str, int, str]:
    """Train one policy, unless its file exists."""
    stage, name, seed, folder = task
    folder = folder / str(seed)
    path = folder / POLICY
    claim_folder(folder, "stage.json", {"variant": name, **asdict(replace(stage, seeds=1))})
    if path.is_file():
        return path, name, seed, "is there"
    use_threads(1)
    agent = train_in_simulator(stage, seed, calibrations_of(stage, name), folder)
    provenance = {
        "variant": name,
        "decisions": stage.decisions,
        "base_schedule": asdict(stage.base_schedule),
        "simulator": asdict(stage),
        "scores": dict(agent.scores),
        "training_cost": {key: value if np.isfinite(value) else None for key, value in agent.cost.items()},
    }
    replace(agent.bundle, provenance=provenance).save(path)
    return path, name, seed, f"multiplier {agent.scores['multiplier']:.3f} on validation runs"


# Testing --------------------------------------------------------------------------------------------------------


def _tested(files: Mapping[str, Sequence[Path]], options: argparse.Namespace) -> dict[str, Any]:
    """Return the figures of every variant, pooled over its seeds, and their ratios to those of the full variant."""
    use_threads(1)
    pool = unseen_pool(options.instances)
    bundles = {name: [PolicyBundle.load(path) for path in paths] for name, paths in files.items()}
    base = next(iter(bundles.values()))[0].base_schedule
    assert base is not None  # every policy trained here has one
    run_sets = {
        "simulator": simulator_run_set(pool, StaticGrid.search(pool.instances), base, options.runs),
        "multi_power_law": multi_power_run_set(options.runs),
        "at_scale": wide_run_set(at_scale(LEFT_OUT, (EDGES[0], EDGES[-1])), base, options),
        "seconds": wide_run_set(Widening(spread=1.0, scratch=0.4, edges=0.5), base, options, "time_s"),
    }
    result: dict[str, Any] = {
        "training": {"decisions": options.decisions, "seeds": options.seeds, "recipe": options.recipe},
        "runs": {"n": options.runs, "instances": options.instances, "seed": TEST_SEED},
        "variants": {name: {"about": VARIANTS[name]} for name in files},
    }
    for physics, run_set in run_sets.items():
        found = {name: np.stack([_multipliers(run_set, one) for one in each]) for name, each in bundles.items()}
        for name, multiplier in found.items():
            result["variants"][name][physics] = _figures(run_set, multiplier, found.get(FULL))
            print(f"{physics:16}", line(name, result["variants"][name][physics]), flush=True)
    return result


def wide_run_set(
    widening: Widening, base: BaseSchedule, options: argparse.Namespace, currency: Currency = "tokens"
) -> RunSet:
    """Return runs of other scales or under budgets in another currency, against statics tuned for it."""
    pool = Pool.draw(
        options.instances, WIDE_SEED, shipped_physics(), widening, schedule=base.schedule,
        warmup_share=base.warmup_share, currencies=(currency,),
    )  # fmt: skip
    start = Start(schedule=base.schedule, warmup_share=base.warmup_share, rates=(0.1, 10.0), currencies=(currency,))
    runs = SimulatedRuns(options.runs, WIDE_SEED, pool, start)
    return RunSet(
        fresh=lambda: SimulatedRuns(options.runs, WIDE_SEED, pool, start),
        shares=BUDGET_SHARES,
        curve=np.minimum.accumulate(runs.reference_losses, axis=1),
        group=runs.index.copy(),
        start=runs.start_rate / runs.best_learning_rate,
    )


def _multipliers(run_set: RunSet, bundle: PolicyBundle) -> Floats:
    outcome = steered(run_set, bundle)
    return run_set.multiplier(outcome.loss, outcome.used)


def _figures(run_set: RunSet, multiplier: Floats, full: Floats | None) -> dict[str, Any]:
    """Return a variant's figures; `multiplier` has shape (seeds, n_runs)."""
    summary = run_set.summarise(multiplier)
    summary["diverged"] = rounded(float(np.mean(multiplier == 0)))
    summary["median_by_seed"] = [rounded(float(np.median(each))) for each in multiplier]
    if full is not None and full is not multiplier:
        summary["over_full"] = _over(multiplier, full, run_set.group)
    return summary


def _over(multiplier: Floats, full: Floats, group: Ints) -> dict[str, Any]:
    """Return the median ratio to the full policy on the same runs, after averaging over seeds."""
    with np.errstate(divide="ignore"):
        logs = [np.log(np.maximum(each, 1e-3)).mean(axis=0) for each in (multiplier, full)]
    return estimate(np.exp(logs[0] - logs[1]), group)


def table(result: Mapping[str, Any]) -> str:
    """Return the figures as a Markdown table."""
    physics = ("simulator", "multi_power_law", "at_scale", "seconds")
    rows = [
        f"| Variant | {' | '.join(f'{name} | over full' for name in physics)} |",
        "|---" * (1 + 2 * len(physics)) + "|",
    ]
    for name, figures in result["variants"].items():
        cells = []
        for each in physics:
            found = figures[each]
            p10, diverged = found["p10"]["value"], found["diverged"]
            cells += [f"{found['median']['value']:.2f}, p10 {p10:.2f}, diverged {diverged:.1%}"]
            cells += [_cell(found.get("over_full"))]
        rows.append(f"| {name}: {figures['about']} | {' | '.join(cells)} |")
    return "\n".join(rows)


def _cell(estimate: Mapping[str, float] | None) -> str:
    return "" if estimate is None else f"{estimate['value']:.2f} [{estimate['low']:.2f}, {estimate['high']:.2f}]"


if __name__ == "__main__":
    main()
