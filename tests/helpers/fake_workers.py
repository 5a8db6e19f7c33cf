"""Workers without processes: a run is a function call, and runs end in a chosen order."""

from __future__ import annotations

from types import TracebackType
from typing import Any

from comparison_runs import Run

from trainpilot.experiments.results import RunResult, RunSpec
from trainpilot.experiments.run_store import run_key
from trainpilot.experiments.workers import Workers


class FakeWorkers(Workers[RunResult]):
    """Ends the runs in the order in which they began, or in the opposite one.

    Args:
        run: What a run is.
        jobs: Runs side by side.
        last_first: Whether the run that began last ends first.
    """

    def __init__(self, run: Run, jobs: int = 1, *, last_first: bool = False) -> None:
        self.outcome, self.jobs, self.last_first = run, jobs, last_first
        self.under_way: list[RunSpec] = []
        self.started: list[RunSpec] = []

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.under_way.clear()

    @property
    def seeds(self) -> list[int]:
        """Seeds of the runs that were started, in order."""
        return [spec.config.seed for spec in self.started]

    @property
    def free(self) -> bool:
        return len(self.under_way) < self.jobs

    @property
    def busy(self) -> bool:
        return bool(self.under_way)

    def start(self, *arguments: Any) -> None:
        spec, key = arguments
        assert self.free
        assert key == run_key(spec)
        self.under_way.append(spec)
        self.started.append(spec)

    def finished(self) -> list[RunResult]:
        return [self.outcome(self.under_way.pop(-1 if self.last_first else 0))]
