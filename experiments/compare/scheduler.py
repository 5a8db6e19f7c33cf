"""Let methods say which runs they need, wave after wave, and carry the waves of all of them out side by side.

A program is a generator: it yields a list of specs and gets their results back, then yields the next list, and so on.
Everything that was run before comes from the store at once, so that a comparison that was killed takes the same way
again without repeating a run, whatever the number of processes.
"""

from __future__ import annotations

from collections.abc import Callable, Generator, Sequence
from dataclasses import dataclass, field, replace
from functools import partial

from trainpilot.experiments.compare.execute import execute, failed
from trainpilot.experiments.compare.results import RunResult, RunSpec
from trainpilot.experiments.run_store import RunStore, run_key
from trainpilot.experiments.workers import Workers

Program = Generator[list[RunSpec], list[RunResult], None]
OnResult = Callable[[RunResult, bool], None]
"""Called with every result that comes in, and whether it was kept from before."""

ATTEMPTS = 2
"""A run whose process died is tried again once."""


def run_workers(jobs: int, threads: int) -> Workers[RunResult]:
    """Return `jobs` processes of `threads` torch threads that execute runs; start one by its spec and its key."""
    reason = f"its process was killed {ATTEMPTS} times, perhaps for lack of memory"
    return Workers(
        partial(execute, energy_shared=jobs > 1),
        jobs,
        threads,
        attempts=ATTEMPTS,
        on_death=lambda spec, key: failed(spec, key, reason),
    )


@dataclass(eq=False)
class _Active:
    """A program, and the wave that it waits for."""

    program: Program
    begun: bool = False
    keys: list[str] = field(default_factory=list)
    results: dict[str, RunResult] = field(default_factory=dict)

    @property
    def complete(self) -> bool:
        return all(key in self.results for key in self.keys)


class Scheduler:
    """Carries programs out. Earlier programs go first, so that an interrupted comparison holds whole cases.

    Args:
        workers: Run what is missing; `None` to go only as far as what has been run before.
        store: Where the runs are kept.
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
        """Hand a program its results and take its next wave, as long as the waves are complete."""
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
