"""Schedule the runs of a comparison: execute the waves of all programs in parallel worker processes.

A program is a generator: it yields a list of specs (a wave), receives their results, then yields the next list, and so
on. Results of stored runs are returned immediately, so that an interrupted comparison repeats the same steps without
repeating a run, with any number of processes.
"""

from __future__ import annotations

from collections.abc import Callable, Generator, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path

from trainpilot.agents.bundle import policy_digest
from trainpilot.experiments import elsewhere
from trainpilot.experiments.compare.execute import check_files, execute, failed
from trainpilot.experiments.elsewhere import check_same
from trainpilot.experiments.engines import Engine
from trainpilot.experiments.results import POPULATION, RunResult, RunSpec
from trainpilot.experiments.run_store import RunStore, run_key
from trainpilot.experiments.workers import Workers

Program = Generator[list[RunSpec], list[RunResult], None]
OnResult = Callable[[RunResult, bool], None]
"""Called with every result, and whether it was stored before."""

ATTEMPTS = 2
"""Attempts per run: a run whose process died is tried once more."""


def run_workers(jobs: int, threads: int, engine: Engine | None = None) -> Workers[RunResult]:
    """Return `jobs` processes of `threads` torch threads that execute runs; start one by its spec and its key.

    Args:
        jobs: Runs side by side.
        threads: Torch threads of each.
        engine: Where they run, if not on this machine.
    """
    attempts = ATTEMPTS if engine is None else elsewhere.ATTEMPTS
    reason = f"its process was killed {attempts} times, perhaps for lack of memory"
    shared = jobs > 1 if engine is None else engine.share_meter != 1
    run: Callable[[RunSpec, str], RunResult] = partial(execute, energy_shared=shared)
    if engine is not None:
        run = partial(execute_elsewhere, energy_shared=shared, threads=threads, gpus=engine.gpus)
    return Workers(
        run,
        jobs,
        threads,
        attempts=attempts,
        on_death=lambda spec, key: failed(spec, key, reason),
        executor=engine,
    )


def execute_elsewhere(
    spec: RunSpec, key: str, *, energy_shared: bool, threads: int = 1, gpus: float = 0.0
) -> RunResult:
    """Execute a run on another machine than that of the command, as `execute` does, or a population on several.

    Args:
        spec: The run.
        key: Name of the run's file.
        energy_shared: Whether other runs share the energy meter and the cores.
        threads: Torch threads of each member of a population.
        gpus: GPUs of each member of a population.

    Raises:
        ValueError: the run's text, model or policy is not the same on this machine.
    """
    settings = spec.steering.settings
    check_files(spec, key)
    if spec.steering.kind == POPULATION:
        from trainpilot.experiments.compare.population_ray import train_population

        return train_population(spec, key, energy_shared=energy_shared, threads=threads, gpus=gpus)
    if spec.steering.kind == "policy":
        path = Path(settings["path"])
        check_same(lambda: policy_digest(path), settings["digest"], f"the policy {path}")
    return execute(spec, key, energy_shared=energy_shared)


@dataclass(eq=False)
class _Active:
    """A program with the wave that it waits for."""

    program: Program
    begun: bool = False
    keys: list[str] = field(default_factory=list)
    results: dict[str, RunResult] = field(default_factory=dict)

    @property
    def complete(self) -> bool:
        return all(key in self.results for key in self.keys)


class Scheduler:
    """Executes programs. Earlier programs have priority, so that an interrupted comparison has complete cases.

    Args:
        workers: Processes for the missing runs; `None` to use stored runs only.
        store: Store of the finished runs.
        on_result: Called with every result.
    """

    def __init__(self, workers: Workers[RunResult] | None, store: RunStore, on_result: OnResult) -> None:
        self.workers, self.store, self.on_result = workers, store, on_result
        self._active: list[_Active] = []
        self._waiting: dict[str, RunSpec] = {}
        self._started: set[str] = set()
        self._failed: dict[str, RunResult] = {}
        self._told: set[str] = set()

    def run(self, programs: Sequence[Program]) -> None:
        """Run every program to its end."""
        self._active = [_Active(program) for program in programs]
        for active in list(self._active):
            self._go_on(active)
        while self.workers is not None and (self._waiting or self.workers.busy):
            self._fill(self.workers)
            for result in self.workers.finished():
                self._take_in(result)

    def _go_on(self, active: _Active) -> None:
        """Send a program its results and take its next wave, as long as waves are complete."""
        while active.complete:
            wave = [active.results[key] for key in active.keys]
            try:
                specs = active.program.send(wave) if active.begun else next(active.program)
            except StopIteration:
                self._active.remove(active)
                return
            active.begun = True
            active.keys = [run_key(spec) for spec in specs]
            active.results = {}
            for key, spec in zip(active.keys, specs, strict=True):
                self._want(active, key, spec)

    def _want(self, active: _Active, key: str, spec: RunSpec) -> None:
        result = self.store.get(key) or self._failed.get(key)
        if result is not None:
            result = replace(result, spec=spec)  # a kept run's model may have had its file in another place
            active.results[key] = result
            self._tell(result, kept=True)
        elif key not in self._started:
            self._waiting.setdefault(key, spec)

    def _fill(self, workers: Workers[RunResult]) -> None:
        order = [key for active in self._active for key in active.keys if key in self._waiting]
        for key in dict.fromkeys(order):
            if not workers.free:
                return
            self._started.add(key)
            workers.start(self._waiting.pop(key), key)

    def _take_in(self, result: RunResult) -> None:
        self.store.put(result)
        if result.failure is not None:
            self._failed[result.key] = result
        self._started.discard(result.key)
        self._tell(result, kept=False)
        for active in list(self._active):
            if result.key in active.keys:
                active.results[result.key] = result
                self._go_on(active)

    def _tell(self, result: RunResult, *, kept: bool) -> None:
        if result.key not in self._told:
            self._told.add(result.key)
            self.on_result(result, kept)
