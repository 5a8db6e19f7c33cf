"""Train the agents of a recipe's simulator stage, side by side, and keep the best."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from concurrent.futures import Future, ProcessPoolExecutor, wait
from concurrent.futures.process import BrokenProcessPool
from multiprocessing import get_context
from pathlib import Path
from typing import Any

from rich.console import Console

from trainpilot.agents.simulator_training import SimulatorAgent, SimulatorStage, train_in_simulator
from trainpilot.experiments.calibrate.calibration import SHIPPED, load_calibrations
from trainpilot.experiments.progress import progress_bar
from trainpilot.experiments.worker_process import begin_work
from trainpilot.llm_runtime.process import available_cores
from trainpilot.llm_runtime.simulator.fitting import FittedPhysics
from trainpilot.llm_runtime.simulator.shipped import shipped_physics

LOOK_EVERY_S = 0.5


def train_agents(stage: SimulatorStage, folder: Path, console: Console) -> list[SimulatorAgent]:
    """Train every agent of the stage, or go on training them, each in its own folder; return them, the best first.

    Raises:
        ValueError: a calibration is not there, or the process of an agent was killed.
    """
    calibrations = physics_of(stage.calibrations)
    jobs = min(stage.seeds, available_cores())
    total = stage.seeds * stage.ppo.total_decisions
    with progress_bar(console, "PPO on simulated runs, decisions", total) as advance:
        train = _in_processes if jobs > 1 else _in_turn
        agents = train(stage, calibrations, folder, jobs, advance)
    return sorted(agents, key=lambda agent: -agent.score)


def physics_of(sources: str | Sequence[str]) -> tuple[FittedPhysics, ...]:
    """Return the physics of calibrations: `shipped`, or files or folders of `trainpilot calibrate`.

    Raises:
        ValueError: there is no calibration in one of them.
    """
    found: list[FittedPhysics] = []
    for source in [sources] if isinstance(sources, str) else sources:
        if source == SHIPPED:
            found += shipped_physics()
        else:
            found += [each.physics for each in load_calibrations(source) if isinstance(each.physics, FittedPhysics)]
    return tuple(found)


def total_cost(costs: Iterable[Mapping[str, float | None]]) -> dict[str, float | None]:
    """Return the sum of what trainings cost; `None` where a part is unknown. Seconds are one after the other."""
    total = {"decisions": 0.0, "episodes": 0.0, "energy_j": 0.0, "time_s": 0.0}
    for cost in costs:
        for name in total:
            part = cost[name]
            total[name] += math.nan if part is None else part
    return {name: value if math.isfinite(value) else None for name, value in total.items()}


Advance = Callable[[int], None]


def _in_turn(
    stage: SimulatorStage, calibrations: Sequence[FittedPhysics], folder: Path, jobs: int, advance: Advance
) -> list[SimulatorAgent]:
    agents: list[SimulatorAgent] = []
    for seed in stage.agents:
        before = len(agents) * stage.ppo.total_decisions

        def progress(done: int, before: int = before) -> None:
            advance(before + min(done, stage.ppo.total_decisions))

        agents.append(train_in_simulator(stage, seed, calibrations, folder / str(seed), progress=progress))
    return agents


def _in_processes(
    stage: SimulatorStage, calibrations: Sequence[FittedPhysics], folder: Path, jobs: int, advance: Advance
) -> list[SimulatorAgent]:
    context = get_context("spawn")
    done = context.Array("q", stage.seeds)
    executor = ProcessPoolExecutor(jobs, mp_context=context, initializer=_prepare, initargs=(done,))
    futures: list[Future[SimulatorAgent]] = []
    whole = False
    try:
        for seed in stage.agents:
            futures.append(executor.submit(_train, stage, seed, calibrations, folder / str(seed), jobs))
        waiting: set[Future[SimulatorAgent]] = set(futures)
        while waiting:
            ended, waiting = wait(waiting, timeout=LOOK_EVERY_S)
            for future in ended:
                future.result()  # the first that failed ends it all
            advance(min(sum(done[:]), stage.seeds * stage.ppo.total_decisions))
        whole = True
    except BrokenProcessPool:
        raise ValueError(
            "simulator: the process of an agent was killed, perhaps for lack of memory; the same command goes on where "
            f"it was, got n_runs {stage.n_runs}; fewer need less"
        ) from None
    finally:
        if not whole:
            for process in (executor._processes or {}).values():
                process.terminate()
        executor.shutdown(wait=whole, cancel_futures=True)
    return [future.result() for future in futures]


# In the process of an agent ---------------------------------------------------------------------------------------

_done: Any = None
"""Decisions so far of every agent, shared with the parent."""


def _prepare(done: Any) -> None:
    global _done  # noqa: PLW0603, a process has no other way to keep what it is started with
    _done = done
    begin_work()


def _train(
    stage: SimulatorStage, seed: int, calibrations: Sequence[FittedPhysics], folder: Path, jobs: int
) -> SimulatorAgent:
    index = stage.agents.index(seed)

    def progress(done: int) -> None:
        _done[index] = done

    return train_in_simulator(stage, seed, calibrations, folder, progress=progress, side_by_side=jobs)
