"""Measure the simulator's speed in decisions per second on one core, and that results do not depend on the batch.

python benchmarks/simulator_speed.py [--runs 1 64 1024 4096] [--repetitions 7]
"""

from __future__ import annotations

import argparse
import statistics
import time
from collections.abc import Callable
from dataclasses import fields
from typing import Any

import numpy as np
import torch
from _common import write_result
from sb3_contrib.common.maskable.utils import get_action_masks

from trainpilot.agents.sb3_env import ScalarVecEnv
from trainpilot.envs.action import ACTION_FIELDS
from trainpilot.envs.decision import Preference
from trainpilot.envs.vector import VectorSimulatedTraining
from trainpilot.llm_runtime.process import use_threads
from trainpilot.llm_runtime.simulator.records import ControlBatch, Ints, TelemetryBatch
from trainpilot.llm_runtime.simulator.runs import Pool, SimulatedRuns, default_pool

TARGET, TARGET_RUNS = 150_000, 1_024
"""Target speed of the whole environment in decisions per second, and the number of runs for which it is set."""
KEEP_PROBABILITY = 0.7
"""Probability that a random action keeps a control, as with an untrained policy."""
DECISIONS = 50
SEED = 0


def some_actions(n_runs: int, steps: int) -> Ints:
    """Return random actions of shape (steps, n_runs, fields) that mostly keep; masked ones count as keep."""
    random = np.random.default_rng(SEED)
    columns = []
    for field in ACTION_FIELDS:
        drawn = random.integers(len(field.choices), size=(steps, n_runs))
        changes = random.random((steps, n_runs)) > (0.999 if field.name == "finish" else KEEP_PROBABILITY)
        columns.append(np.where(changes, drawn, field.keep))
    return np.stack(columns, axis=2)


def physics_alone(n_runs: int, pool: Pool) -> Callable[[int], None]:
    """Return a function that runs n steps of `SimulatedRuns` at the starting controls, with restarts at the end."""
    runs = SimulatedRuns(n_runs, SEED, pool)
    everyone = np.arange(n_runs)
    controls = runs.limits().start

    def advance(steps: int) -> None:
        nonlocal controls
        for _ in range(steps):
            if runs.advance(controls).finished.any():
                runs.begin(everyone)
                controls = runs.limits().start

    return advance


def whole_environment(n_runs: int, pool: Pool) -> Callable[[int], None]:
    """Return a function that runs n steps of the training environment, from masks to observations and rewards."""
    env = ScalarVecEnv(VectorSimulatedTraining(SimulatedRuns(n_runs, SEED, pool)))
    actions = some_actions(n_runs, DECISIONS)
    env.reset()

    def step(steps: int) -> None:
        for index in range(steps):
            get_action_masks(env)
            env.step(actions[index % DECISIONS])

    return step


def measure(go: Callable[[int], None], n_runs: int, decisions: int, repetitions: int) -> dict[str, Any]:
    """Return best and median decisions per second over repetitions of `decisions`, at least one episode each."""
    steps = max(DECISIONS, -(-decisions // n_runs))
    go(DECISIONS)  # warm-up
    rates = []
    for _ in range(repetitions):
        start = time.perf_counter()
        go(steps)
        rates.append(steps * n_runs / (time.perf_counter() - start))
    return {
        "runs": n_runs,
        "decisions_per_repetition": steps * n_runs,
        "repetitions": repetitions,
        "best_decisions_per_s": max(rates),
        "median_decisions_per_s": statistics.median(rates),
        "least_decisions_per_s": min(rates),
    }


def largest_disagreement(pool: Pool, n_runs: int, rows: int) -> dict[str, Any]:
    """Return the largest difference between runs computed alone and in a batch, over two episodes of random actions."""
    preference = Preference(quality=0.6, energy=0.3, time=0.1)
    together = VectorSimulatedTraining(SimulatedRuns(n_runs, SEED, pool), preference)
    chosen = np.linspace(0, n_runs - 1, min(rows, n_runs)).astype(int).tolist()
    alone = {row: VectorSimulatedTraining(SimulatedRuns(1, SEED, pool, first_row=row), preference) for row in chosen}
    actions = some_actions(n_runs, 2 * DECISIONS)
    together.reset(seed=SEED)
    for env in alone.values():
        env.reset(seed=SEED)
    worst = dict.fromkeys(("observation", "reward", "loss"), 0.0)
    for step in range(2 * DECISIONS):
        observation, reward, _, _, infos = together.step(actions[step])
        for row, env in alone.items():
            one_observation, one_reward, _, _, one_infos = env.step(actions[step, [row]])
            pairs = ((observation, one_observation), (reward, one_reward), (infos["loss"], one_infos["loss"]))
            for name, (here, there) in zip(worst, pairs, strict=True):
                worst[name] = max(worst[name], _apart(here[row], there[0]))
    return {"runs": n_runs, "rows": len(chosen), "decisions": 2 * DECISIONS, **worst}


def telemetry_disagreement(pool: Pool, n_runs: int) -> float:
    """Return the largest difference of any telemetry field, relative to its value if that is above 1."""
    together, worst = SimulatedRuns(n_runs, SEED, pool), 0.0
    row = n_runs // 2
    alone = SimulatedRuns(1, SEED, pool, first_row=row)
    controls = together.limits().start
    for _ in range(DECISIONS):
        here, there = together.advance(controls), alone.advance(ControlBatch.of([controls.row(row)]))
        for field in fields(TelemetryBatch):
            worst = max(worst, _apart(getattr(here, field.name)[row], getattr(there, field.name)[0]))
    return worst


def _apart(here: Any, there: Any) -> float:
    """Return the largest difference, relative to the value if that is above 1; unknown values are equal."""
    one, other = np.asarray(here, dtype=np.float64), np.asarray(there, dtype=np.float64)
    if (np.isnan(one) != np.isnan(other)).any():
        return float("inf")
    return float(np.nan_to_num(np.abs(one - other) / np.maximum(1.0, np.abs(other))).max())


def main() -> None:
    """Measure at the numbers of runs named on the command line and write `results/simulator_speed.json`."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--runs", type=int, nargs="+", default=[1, 64, TARGET_RUNS, 4_096])
    parser.add_argument("--repetitions", type=int, default=7)
    parser.add_argument("--decisions", type=int, default=200_000, help="of all runs, in each repetition")
    parser.add_argument("--instances", type=int, default=256, help="that runs are drawn from")
    options = parser.parse_args()
    use_threads(1)
    pool = default_pool(options.instances)
    parts = {"physics_alone": physics_alone, "whole_environment": whole_environment}
    results: dict[str, list[dict[str, Any]]] = {name: [] for name in parts}
    for n_runs in options.runs:
        decisions = min(options.decisions, 2_000 * n_runs)  # a single run would take minutes
        for name, make in parts.items():
            result = measure(make(n_runs, pool), n_runs, decisions, options.repetitions)
            results[name].append(result)
            print(f"{name}, {n_runs} runs: {result['median_decisions_per_s']:,.0f} decisions/s", flush=True)
    most = max(options.runs)
    apart = largest_disagreement(pool, most, rows=8) | {"telemetry": telemetry_disagreement(pool, most)}
    print(f"largest disagreement of alone and side by side: {apart}")
    at_target = [each for each in results["whole_environment"] if each["runs"] == TARGET_RUNS]
    met = at_target[0]["median_decisions_per_s"] >= TARGET if at_target else None
    target = {"decisions_per_s": TARGET, "runs": TARGET_RUNS, "met": met}
    summary = {"threads": 1, "target": target, "disagreement": apart, **results}
    print(write_result("simulator_speed", summary, torch.device("cpu")))


if __name__ == "__main__":
    main()
