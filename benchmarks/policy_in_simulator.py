"""Compare a policy with the best static schedule on simulated runs that it was not trained on.

    python benchmarks/policy_in_simulator.py [--policy default] [--instances 512] [--runs 2048]

Every run starts at its own factor of the tuned learning rate, from 1/30 to 10, which the policy does not know. Figures
are compute multipliers: the budget at which the instance's best static schedule, tuned at each budget, reaches the
run's loss, over the budget that the run used. The same is measured in a second physics, the Multi-Power Law, which is
never used for training. It takes about ten minutes, most of them for the static schedules and for planning with the
true physics (model predictive control), which is an upper row. The picture shows the
multipliers by starting learning rate, beside those of untuned and fully tuned static settings.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import matplotlib
import numpy as np
import torch
from _common import write_result
from _simulated import (
    DECISIONS,
    POWERS,
    SHARES,
    TEST_INSTANCES,
    TEST_SEED,
    BatchOutcome,
    ModelPredictive,
    StaticGrid,
    blindly,
    by_policy,
    estimate,
    held,
    line,
    middle,
    needed,
    rounded,
    steer,
    summary,
    unseen_pool,
)
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import FixedFormatter, FixedLocator, NullLocator
from second_physics.runs import MultiPowerRuns

from trainpilot.agents.bundle import BaseSchedule, PolicyBundle, policy_digest, policy_path
from trainpilot.envs.decision import Preference
from trainpilot.llm_runtime.schedules import ScheduleName
from trainpilot.llm_runtime.simulator.records import Floats, Ints
from trainpilot.llm_runtime.simulator.references import ScheduleTable, static_losses
from trainpilot.llm_runtime.simulator.runs import Pool, SimulatedRuns, Start

TITLES = {
    "simulator": ("Simulator", "instances never trained on"),
    "multi_power_law": ("Multi-Power Law", "a physics never trained on"),
}
POLICY, SOFT, RULE = "#0a3d7a", "#62676f", "#e3e0d9"
LINES = {
    "open loop": ("its average schedule, blind", "#c7772b", "s-"),
    "untuned, wsd": ("left alone, WSD", "#8a8f98", "^-"),
    "untuned, cosine": ("left alone, cosine", "#b9bdc4", "v-"),
}
LEVELS = {
    "best single setting": ("best single setting", "#7a9a4f", "--"),
    "tuned rate and batch, wsd": ("tuned rate and batch", "#1d1f23", ":"),
    "tuned rate, wsd": ("tuned rate alone", "#8a8f98", "-."),
}
"""Methods whose result does not depend on the starting learning rate."""
TICKS = (0.125, 0.25, 0.5, 0.7, 1.0, 1.4)
LEAST, MOST = 0.115, 1.6

Figures = Mapping[str, Any]


def draw(result: Figures, path: Path) -> None:
    """Write the picture of a result of `policy_in_simulator`."""
    figure = Figure(figsize=(9.2, 4.0), layout="constrained")
    panels = figure.subplots(1, len(TITLES), sharey=True)
    labels: dict[str, Any] = {}
    for panel, (physics, (title, about)) in zip(panels, TITLES.items(), strict=True):
        _panel(panel, result[physics]["methods"])
        panel.set_title(f"{title}\n", loc="left", fontsize=11, fontweight="bold")
        panel.text(0, 1.03, about, transform=panel.transAxes, fontsize=9.5, color=SOFT)
        labels |= {label: handle for handle, label in zip(*panel.get_legend_handles_labels(), strict=True)}
    panels[0].set_ylabel("compute multiplier", fontsize=9.5)
    figure.legend(list(labels.values()), list(labels), loc="outside lower center", ncols=4, frameon=False, fontsize=9)
    path.parent.mkdir(parents=True, exist_ok=True)
    with matplotlib.rc_context({"svg.hashsalt": "trainpilot"}):
        figure.savefig(path, dpi=160, metadata={"Software": None})


def _panel(panel: Axes, methods: Figures) -> None:
    starts = list(methods["policy"]["starts"])
    panel.set_yscale("log")
    panel.set_ylim(LEAST, MOST)
    panel.set_xlim(-0.4, len(starts) - 0.6)
    panel.yaxis.set_major_locator(FixedLocator(TICKS))
    panel.yaxis.set_major_formatter(FixedFormatter([f"{tick:g}" for tick in TICKS]))
    panel.yaxis.set_minor_locator(NullLocator())
    panel.set_xticks(range(len(starts)), [start.replace("-", "\N{EN DASH}") for start in starts])
    panel.set_xlabel("start over the tuned learning rate", fontsize=9.5)
    panel.grid(axis="y", color=RULE, linewidth=0.7)
    panel.set_axisbelow(True)
    panel.tick_params(length=0, labelsize=9)
    for side in ("top", "right", "left"):
        panel.spines[side].set_visible(False)
    for name, (label, color, style) in LEVELS.items():
        if name in methods:
            level = methods[name]["median"]["value"]
            panel.axhline(_inside(level), color=color, linestyle=style, linewidth=1.3, label=label)
    for name, (label, color, style) in LINES.items():
        if name in methods:
            values = [found["median"]["value"] for found in methods[name]["starts"].values()]
            panel.plot(_all_inside(values), style, color=color, markersize=4, linewidth=1.2, label=label)
    _policy(panel, list(methods["policy"]["starts"].values()))


def _policy(panel: Axes, starts: Sequence[Figures]) -> None:
    middles = _all_inside([found["median"]["value"] for found in starts])
    tenths = _all_inside([found["p10"] for found in starts])
    panel.fill_between(range(len(starts)), tenths, middles, color=POLICY, alpha=0.12, linewidth=0)
    panel.plot(tenths, "-", color=POLICY, linewidth=0.8, alpha=0.6, label="policy, 10th percentile")
    for x, found in enumerate(starts):
        ends = [_inside(found["median"][end]) for end in ("low", "high")]
        panel.plot([x, x], ends, color=POLICY, linewidth=1.6, zorder=4)
    panel.plot(middles, "o-", color=POLICY, linewidth=1.8, markersize=6, zorder=5, label="policy, median")


def _all_inside(values: Sequence[float]) -> list[float]:
    return [_inside(value) for value in values]


def _inside(value: float) -> float:
    return min(max(value, LEAST), MOST)


IMAGE = Path(__file__).parent.parent / "docs" / "images" / "policy_in_simulator.png"
RUNS_SEED = 7
QUALITY = Preference(quality=1, energy=0, time=0)
RATE_POWERS = np.arange(-6, 7) / 2
"""Learning rates to try around the tuned one, as log2 of the factor."""
NO_BASE = BaseSchedule(schedule="wsd", warmup_share=0.1)
"""Base schedule for a policy whose bundle has none."""


@dataclass(frozen=True, kw_only=True)
class RunSet:
    """A reproducible set of simulated runs to test methods on, with the baseline that their losses are compared to."""

    fresh: Callable[[], SimulatedRuns | MultiPowerRuns]
    shares: tuple[float, ...]
    curve: Floats
    """Losses of the static baseline at `shares`, shape (n_runs, budgets)."""
    group: Ints
    """Index of each run's instance; the bootstrap resamples runs by instance."""
    start: Floats
    """Starting learning rate relative to the tuned one."""

    def multiplier(self, loss: Floats, used: Floats | float = 1.0) -> Floats:
        """Return the compute multipliers of the runs."""
        return needed(loss, self.shares, self.curve) / used

    def summarise(self, multiplier: Floats) -> dict[str, Any]:
        """Return the figures of a method; with several seeds, the multipliers have shape (seeds, n_runs)."""
        n_seeds = multiplier.size // len(self.group)
        return summary(multiplier.ravel(), np.tile(self.group, n_seeds), np.tile(self.start, n_seeds))


def main() -> None:
    """Steer, compare, and write `results/policy_in_simulator.json` and the picture."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--policy", default="default", help="a bundle's file, or the name of one that is shipped")
    parser.add_argument("--instances", type=int, default=TEST_INSTANCES)
    parser.add_argument("--runs", type=int, default=2048)
    options = parser.parse_args()
    torch.set_num_threads(1)
    path = policy_path(options.policy)
    bundle = PolicyBundle.load(path)
    pool = unseen_pool(options.instances)
    grid = StaticGrid.search(pool.instances)
    base = bundle.base_schedule or NO_BASE
    result = {
        "policy": {"name": options.policy, "digest": policy_digest(path)},
        "runs": {"n": options.runs, "instances": options.instances, "seed": TEST_SEED, "preference": str(QUALITY)},
        "static_grid": grid.describe(),
        "simulator": in_simulator(bundle, base, pool, grid, options.runs),
        "multi_power_law": in_multi_power_law(bundle, options.runs),
    }
    draw(result, IMAGE)
    print(write_result("policy_in_simulator", result, torch.device("cpu")))
    for physics in ("simulator", "multi_power_law"):
        print(f"\n{physics}: median, 95 % interval, 10th percentile | median by starting rate, lowest first")
        for name, figures in result[physics]["methods"].items():
            print(line(name, figures))


def simulator_run_set(pool: Pool, grid: StaticGrid, base: BaseSchedule, n_runs: int) -> RunSet:
    """Return a set of runs in the physics that policies are trained on."""
    start = Start(decisions=DECISIONS, schedule=base.schedule, warmup_share=base.warmup_share)
    runs = SimulatedRuns(n_runs, RUNS_SEED, pool, start)
    return RunSet(
        fresh=lambda: SimulatedRuns(n_runs, RUNS_SEED, pool, start),
        shares=SHARES,
        curve=grid.best[runs.index],
        group=runs.index.copy(),
        start=runs.start_rate / runs.best_learning_rate,
    )


def in_simulator(bundle: PolicyBundle, base: BaseSchedule, pool: Pool, grid: StaticGrid, n_runs: int) -> dict[str, Any]:
    """Return the figures of every method in the physics that policies are trained on."""
    run_set = simulator_run_set(pool, grid, base, n_runs)
    policy, blind, closed = _closed_and_open(run_set, bundle)
    single, losses = grid.best_single()
    methods = {
        "policy": policy,
        "open loop": blind,
        f"untuned, {base.schedule}": run_set.multiplier(_untuned(run_set, base.schedule, base.warmup_share)),
        "untuned, cosine": run_set.multiplier(_untuned(run_set, "cosine", 0.1)),
        "MPC with the true physics": _planned(run_set),
        "best single setting": run_set.multiplier(losses[run_set.group]),
        "tuned rate and batch, wsd": run_set.multiplier(grid.of_base(("wsd", 0.1))[run_set.group]),
    }
    return {
        "best_single_setting": single,
        "methods": {name: run_set.summarise(found) for name, found in methods.items()},
        **_closed_against_open(run_set, policy, blind),
        "steered": _describe(run_set, closed),
    }


def in_multi_power_law(bundle: PolicyBundle, n_runs: int) -> dict[str, Any]:
    """Return the figures of every method in the Multi-Power Law, which is never used for training."""
    run_set = multi_power_run_set(n_runs)
    policy, blind, closed = _closed_and_open(run_set, bundle)
    methods = {
        "policy": policy,
        "open loop": blind,
        "untuned, wsd": run_set.multiplier(steer(run_set.fresh(), held()).loss),
        "tuned rate, wsd": run_set.multiplier(steer(run_set.fresh(), held(1 / run_set.start)).loss),
        "tuned rate and batch, wsd": run_set.multiplier(best_held(run_set)),
    }
    return {
        "methods": {name: run_set.summarise(found) for name, found in methods.items()},
        **_closed_against_open(run_set, policy, blind),
        "steered": _describe(run_set, closed),
    }


def multi_power_run_set(n_runs: int) -> RunSet:
    """Return a set of runs under the Multi-Power Law."""
    runs = MultiPowerRuns(n_runs, RUNS_SEED, decisions=DECISIONS)
    return RunSet(
        fresh=lambda: MultiPowerRuns(n_runs, RUNS_SEED, decisions=DECISIONS),
        shares=SHARES,
        curve=multi_power_curve(runs),
        group=np.arange(n_runs),
        start=runs.start_learning_rate / runs.best_learning_rate,
    )


def multi_power_curve(runs: MultiPowerRuns) -> Floats:
    """Return the loss of the base schedule at the starting batch, with its rate tuned at each budget of `SHARES`."""
    cases, best = runs.cases, runs.best_learning_rate / runs.cases.unit

    def tuned(share: float) -> Floats:
        factors, steps = cases.base_factors(share, DECISIONS), share * cases.n_steps
        losses = [cases.law.base_loss(best * 2.0**power, factors, steps) for power in RATE_POWERS]
        lowest: Floats = np.minimum.reduce(losses)
        return lowest

    return np.minimum.accumulate(np.stack([tuned(share) for share in SHARES], axis=1), axis=1)


def best_held(run_set: RunSet) -> Floats:
    """Return the lowest loss of each run over learning rates and batches that stay constant."""
    tried = ((1 / run_set.start * 2.0**power, batch) for power in RATE_POWERS[::2] for batch in 2.0**POWERS)
    lowest: Floats = np.minimum.reduce([steer(run_set.fresh(), held(scale, batch)).loss for scale, batch in tried])
    return lowest


def _closed_and_open(run_set: RunSet, bundle: PolicyBundle) -> tuple[Floats, Floats, BatchOutcome]:
    """Return the multipliers of the policy and of its own average schedule, and the outcome of the policy's runs."""
    closed = steered(run_set, bundle)
    blind = steer(run_set.fresh(), blindly(closed.average(run_set.fresh().limits())))
    return run_set.multiplier(closed.loss, closed.used), run_set.multiplier(blind.loss, blind.used), closed


def steered(run_set: RunSet, bundle: PolicyBundle) -> BatchOutcome:
    """Return the outcome of a policy's runs with all preference on quality."""
    return steer(run_set.fresh(), by_policy(bundle, QUALITY))


def _planned(run_set: RunSet) -> Floats:
    """Return the multipliers of runs that are planned with their own physics."""
    runs = run_set.fresh()
    assert isinstance(runs, SimulatedRuns)
    outcome = steer(runs, lambda limits: ModelPredictive(runs, limits))
    return run_set.multiplier(outcome.loss, outcome.used)


def _untuned(run_set: RunSet, schedule: ScheduleName, warmup_share: float) -> Floats:
    """Return the losses of runs without control changes."""
    runs = run_set.fresh()
    assert isinstance(runs, SimulatedRuns)
    batch = runs.instances.start_batch.astype(np.float64)
    return static_losses(runs.instances, runs.start_rate, batch, ScheduleTable.of(schedule, warmup_share, DECISIONS))


def _closed_against_open(run_set: RunSet, policy: Floats, blind: Floats) -> dict[str, Any]:
    with np.errstate(divide="ignore", invalid="ignore"):
        ratio = np.where(policy == blind, 1.0, policy / blind)
    comparison = {
        "share_of_runs_better": rounded(float((policy > blind).mean())),
        "share_of_runs_worse": rounded(float((policy < blind).mean())),
        "median_ratio": estimate(ratio, run_set.group),
    }
    return {"closed_against_open": comparison}


def _describe(run_set: RunSet, outcome: BatchOutcome) -> dict[str, Any]:
    """Return medians over the policy's runs, with learning rate and batch at every fifth decision."""
    limits = run_set.fresh().limits()
    shown = range(0, DECISIONS, 5)
    scales = [outcome.controls[i].learning_rate_scale for i in shown]
    batches = [outcome.controls[i].batch_size / limits.start.batch_size for i in shown]
    return {
        "diverged": rounded(outcome.diverged),
        "budget_used": rounded(middle(outcome.used)),
        "energy_over_reference": rounded(middle(outcome.energy)),
        "time_over_reference": rounded(middle(outcome.time)),
        "decisions": list(shown),
        "learning_rate_over_tuned": [rounded(middle(run_set.start * scale)) for scale in scales],
        "batch_over_start": [rounded(middle(batch)) for batch in batches],
        "spread_of_learning_rate_over_tuned": [rounded(float(np.log(run_set.start * scale).std())) for scale in scales],
    }


if __name__ == "__main__":
    main()
