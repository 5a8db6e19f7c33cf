"""Choose the best agent of a recipe's simulator stage by steering live runs of the calibrated models.

    python benchmarks/agent_choice.py --agents runs/default [--calibrations runs/calibrations]

Agents that differ in live runs hardly differ in simulated ones. The test cases must not be used for the choice, so the
models and texts of the calibrations are used: from a tenth, one and ten times the best rate of their grids, under both
preferences of the test. A loss is converted to a budget by a factor of two per 0.2 nats, which is about what the
calibrations' runs of a doubled budget show. This takes about four minutes per agent on two cores.
"""

from __future__ import annotations

import argparse
import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from statistics import fmean
from typing import Any

import numpy as np
import torch
from _common import write_result
from rich.console import Console
from zero_shot import PREFERENCES

from trainpilot.agents.bundle import PolicyBundle
from trainpilot.agents.controller import Controller
from trainpilot.envs.decision import Preference
from trainpilot.experiments.calibrate.calibration import Calibration, load_calibrations
from trainpilot.experiments.calibrate.design import design
from trainpilot.experiments.calibrate.runs import RunFile
from trainpilot.experiments.progress import progress_bar
from trainpilot.experiments.recipe import load_recipe
from trainpilot.experiments.train_agent import train_agents
from trainpilot.experiments.workers import Workers
from trainpilot.llm_runtime.drive import drive
from trainpilot.llm_runtime.live_run import LiveRun
from trainpilot.llm_runtime.process import use_threads
from trainpilot.llm_runtime.schedules import neutral_factor

STARTS = (0.1, 1.0, 10.0)
NATS_PER_DOUBLING = 0.2
DIGITS = 4


@dataclass(frozen=True, kw_only=True)
class Static:
    """The best setting of a calibration's grid at one batch size."""

    batch_size: int
    learning_rate: float
    loss: float
    time_s: float
    """Modelled time of the whole run."""


@dataclass(frozen=True, kw_only=True)
class Job:
    """One live run."""

    agent: int
    policy: Path
    calibration: Calibration
    statics: tuple[Static, ...]
    axis: str
    start: float


@dataclass(frozen=True, kw_only=True)
class Result:
    """Result of one live run."""

    job: Job
    loss: float
    time_s: float

    @property
    def multiplier(self) -> float:
        """Compute multiplier: the budget that the best static of the grid needs for the loss, over the budget used."""
        return max(least_budget(self.job.statics, self.loss, self.job.axis), 0.0) / self.used

    @property
    def used(self) -> float:
        """Budget used: 1 (the whole token budget) or seconds."""
        return 1.0 if self.job.axis == "tokens" else self.time_s


def least_budget(statics: Iterable[Static], loss: float, axis: str) -> float:
    """Return the smallest budget that a static setting needs for a loss: a share of the token budget, or seconds."""
    return min(
        (1.0 if axis == "tokens" else each.time_s) * 2 ** ((each.loss - loss) / NATS_PER_DOUBLING) for each in statics
    )


def statics(calibration: Calibration, folder: Path) -> tuple[Static, ...]:
    """Return the best setting of each batch of the grid."""
    best: dict[int, Static] = {}
    config = calibration.config
    for setting in design(config, "standard"):
        file = RunFile.read(folder / "runs" / f"{setting.name}.json") if setting.grid else None
        if file is None or file.run.diverged:
            continue
        batch = setting.config.batch_size
        time_s = calibration.cost_table.step(batch, "fp32").time_s * setting.config.n_sequences() / batch
        found = Static(
            batch_size=batch, learning_rate=setting.config.base_learning_rate, loss=file.run.final_loss, time_s=time_s
        )
        if batch not in best or found.loss < best[batch].loss:
            best[batch] = found
    return tuple(best.values())


def steer(job: Job) -> Result:
    """Steer one live run of a calibrated model."""
    use_threads(1)
    config, table = job.calibration.config, job.calibration.cost_table
    best = min(job.statics, key=lambda each: each.loss)
    rate = best.learning_rate * neutral_factor(config.batch_size, best.batch_size) * job.start
    bundle = PolicyBundle.load(job.policy)
    base = bundle.base_schedule
    assert base is not None
    run = LiveRun(
        replace(
            config, base_learning_rate=rate, schedule=base.schedule, warmup_tokens=base.warmup_tokens(config.tokens)
        )
    )
    controller = Controller.of_bundle(bundle, run.limits(), Preference.parse(PREFERENCES[job.axis].replace("+", ",")))
    loss, time_s = math.inf, 0.0
    for interval in drive(run, controller.decide, config.decisions):
        telemetry = interval.telemetry
        time_s += table.step(telemetry.batch_size, telemetry.precision).time_s * telemetry.steps
        if run.sequences_probed:
            time_s += table.probe(run.sequences_probed, telemetry.batch_size).time_s
        loss = math.inf if telemetry.diverged else interval.loss
    return Result(job=job, loss=loss, time_s=time_s)


def main() -> None:
    """Write `results/agent_choice.json`."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--agents", type=Path, default=Path("runs/default"), help="folder of trainpilot train-agent")
    parser.add_argument("--recipe", default="default")
    parser.add_argument("--calibrations", type=Path, default=Path("runs/calibrations"))
    parser.add_argument("--jobs", type=int, default=2)
    options = parser.parse_args()
    folders = sorted(path.parent for path in options.calibrations.glob("*/calibration.json"))
    if not folders:
        raise SystemExit(f"--calibrations must hold MODEL-TEXT/calibration.json, got {options.calibrations}")
    made = [(load_calibrations(folder)[0], folder) for folder in folders]
    console = Console()
    jobs = [
        Job(
            agent=seed,
            policy=path,
            calibration=calibration,
            statics=statics(calibration, folder),
            axis=axis,
            start=start,
        )
        for seed, path in bundles(options, console).items()
        for calibration, folder in made
        for axis in ("tokens", "time_s")
        for start in STARTS
    ]
    found: dict[int, Result] = {}
    with (
        progress_bar(console, "live runs", len(jobs)) as advance,
        Workers(_steer, options.jobs) as workers,
    ):
        for (number, _), result in workers.run(enumerate(jobs)):
            found[number] = result
            advance(len(found))
    results = [found[number] for number in range(len(jobs))]
    by_agent = {
        str(seed): figures([r for r in results if r.job.agent == seed]) for seed in {j.agent: None for j in jobs}
    }
    best = max(by_agent, key=lambda seed: float(by_agent[seed]["score"]))
    content = {
        "nats_per_doubling": NATS_PER_DOUBLING,
        "preferences": PREFERENCES,
        "agents": by_agent,
        "best": int(best),
    }
    print(write_result("agent_choice", content, torch.device("cpu")))
    for seed, found in by_agent.items():
        print(seed, found["score"], found["tokens"]["median_by_start"], found["time_s"]["median_by_start"])


def bundles(options: argparse.Namespace, console: Console) -> dict[int, Path]:
    """Return a file of each agent's best weights, by its seed."""
    stage = load_recipe(options.recipe, ()).simulator
    assert stage is not None
    found = {}
    for agent in train_agents(stage, options.agents / "simulator", console):
        found[agent.seed] = options.agents / "simulator" / str(agent.seed) / "policy.safetensors"
        provenance = {"decisions": stage.decisions, "base_schedule": vars(stage.base_schedule)}
        replace(agent.bundle, provenance=provenance).save(found[agent.seed])
    return found


def _steer(number: int, job: Job) -> Result:
    """Steer a run in a worker process and return the result with the run's number."""
    return steer(job)


def figures(results: Sequence[Result]) -> dict[str, Any]:
    """Return one agent's medians by axis and start, and its score: the geometric mean of all multipliers."""
    axes: dict[str, Any] = {}
    for axis in dict.fromkeys(result.job.axis for result in results):
        here = [result for result in results if result.job.axis == axis]
        by_start = {start: [r.multiplier for r in here if r.job.start == start] for start in STARTS}
        axes[axis] = {
            "median_by_start": {str(start): _rounded(float(np.median(found))) for start, found in by_start.items()},
            "multipliers_by_start": {str(start): [_rounded(m) for m in found] for start, found in by_start.items()},
        }
    logs = [np.log(max(result.multiplier, 0.05)) for result in results]
    return {"score": _rounded(float(np.exp(fmean(logs)))), **axes}


def _rounded(value: float) -> float:
    return float(f"{value:.{DIGITS}g}")


if __name__ == "__main__":
    main()
