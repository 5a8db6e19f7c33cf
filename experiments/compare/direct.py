"""Programs of the methods that need no search: one wave of paired seeds; and a policy's average schedule, replayed."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from trainpilot.agents.heuristics import SteeredRun, average_schedule, schedule_to_json
from trainpilot.experiments.compare.bench import Bench
from trainpilot.experiments.compare.comparison import Case, MethodNote
from trainpilot.experiments.compare.methods import Method, open_loop_method
from trainpilot.experiments.compare.programs import Program
from trainpilot.experiments.compare.records import RunResult
from trainpilot.llm_runtime.config import Controls


def direct_program(bench: Bench, case: Case, method: Method) -> Program:
    """Run a method with every judged seed."""
    specs = [method.spec(case, seed) for seed in bench.seeds]
    yield specs
    for spec in specs:
        bench.row(case, method.note.name, spec)


def open_loop_program(bench: Bench, cases: Sequence[Case], closed: Method, note: MethodNote) -> Program:
    """Run the policy on every case, average what it did, and run that average without looking."""
    results = yield [closed.spec(case, seed) for case in cases for seed in bench.seeds]
    usable = [result for result in results if result.usable]
    if not usable:
        bench.warn(f"{note.name}: no closed-loop run ended with a finite loss; there is nothing to average")
        return
    method = open_loop_method(note, closed, _average(usable))
    for case in cases:
        yield from direct_program(bench, case, method)


def _average(results: Sequence[RunResult]) -> list[dict[str, Any]]:
    """Return the average schedule of the runs, as JSON values."""
    decisions = max(result.spec.config.decisions for result in results)
    return schedule_to_json(average_schedule([_steered(result) for result in results], decisions))


def _steered(result: RunResult) -> SteeredRun:
    controls = [
        Controls(
            learning_rate_scale=interval.learning_rate_scale,
            batch_size=max(1, round(interval.batch_size)),
            precision=interval.precision,  # type: ignore[arg-type]
            sparsity=interval.sparsity,
            finish=interval.finishing,
        )
        for interval in result.intervals
    ]
    return SteeredRun(start_batch_size=result.spec.config.batch_size, controls=controls)
