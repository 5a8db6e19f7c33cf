"""Programs of the other searches: Optuna's best setting, and Optuna's front, each judged with every seed."""

from __future__ import annotations

from collections.abc import Generator, Sequence

from trainpilot.experiments.compare.bench import Bench
from trainpilot.experiments.compare.comparison import Case
from trainpilot.experiments.compare.front_search import judged, nsga2
from trainpilot.experiments.compare.optuna_search import halving, tpe
from trainpilot.experiments.compare.programs import Program
from trainpilot.experiments.compare.records import RunResult, RunSpec
from trainpilot.experiments.compare.settings import TUNED_SCHEDULES
from trainpilot.experiments.compare.tuning import Trials


def search_program(bench: Bench, case: Case, name: str) -> Program:
    """Carry out `tuned-tpe`, `tuned-halving` or `nsga2` on a case."""
    if name == "nsga2":
        return _front(bench, case)
    return _best_of_tpe(bench, case) if name == "tuned-tpe" else _best_of_halving(bench, case)


def _best_of_tpe(bench: Bench, case: Case) -> Program:
    trials = yield from tpe(case.config, bench.precisions(case), bench.tuning_seeds)
    _note_sweep(bench, case, "tuned-tpe", [trials])
    yield from _judge(bench, case, "tuned-tpe", trials.best_confirmed(TUNED_SCHEDULES).spec)


def _best_of_halving(bench: Bench, case: Case) -> Program:
    found = yield from halving(case.config, bench.precisions(case), bench.tuning_seeds)
    _note_sweep(bench, case, "tuned-halving", found.trials)
    yield from _judge(bench, case, "tuned-halving", found.best.spec)


def _front(bench: Bench, case: Case) -> Program:
    front = yield from nsga2(case.config, bench.precisions(case), bench.tuning_seeds[0], bench.cost_of)
    for spec in front.tried:
        bench.row(case, "nsga2", spec, role="sweep")
    for number, spec in enumerate(front.best, start=1):
        yield from _judge(bench, case, f"nsga2-{number}", spec)


def _judge(bench: Bench, case: Case, name: str, tuned: RunSpec) -> Generator[list[RunSpec], list[RunResult], None]:
    specs = [judged(tuned, seed) for seed in bench.seeds]
    yield specs
    for spec in specs:
        bench.row(case, name, spec)


def _note_sweep(bench: Bench, case: Case, name: str, tried: Sequence[Trials]) -> None:
    for trials in tried:
        for trial in trials.all_trials():
            bench.row(case, name, trial.spec, role="sweep", budget=trials.budget)
