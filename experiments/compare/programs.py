"""Define the programs of a comparison: generators that yield the runs they need and record rows and baselines.

* `TunedStatic`: the tuned static baseline of a case, with its search, judged runs, curve over budgets and checks.
* `direct_program`: a method that needs no search, with every judged seed.
* `compressed_program`: methods that make the model cheaper, after that search where there is one.
* `open_loop_program`: the average schedule of a policy's runs, replayed without observations.
* `search_program`: Optuna's best setting, or Optuna's front, judged with every seed.

`ComparisonLedger` holds their shared state: seeds, cost tables, rows and baselines.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Collection, Generator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from trainpilot.agents.heuristics import ControlledRun, average_schedule, schedule_to_json
from trainpilot.envs.reward import budget_for_loss
from trainpilot.experiments.analysis.modelled_cost import modelled_cost
from trainpilot.experiments.compare.cases import LEARNING_RATE_STEP, TUNED_SCHEDULES, StaticSetting, neighbours
from trainpilot.experiments.compare.compression import CompressedMethod
from trainpilot.experiments.compare.methods import CHECKS, PER_SCHEDULE, Method, open_loop_method
from trainpilot.experiments.compare.scheduler import Program
from trainpilot.experiments.compare.search import (
    MAX_MOVES,
    N_CONFIRMED,
    StudyStorage,
    Trial,
    Trials,
    final_loss,
    halving,
    judged,
    nsga2,
    retune,
    tpe,
    tune,
)
from trainpilot.experiments.costs.table import CostTable
from trainpilot.experiments.results import (
    TUNED,
    UNTUNED,
    Case,
    MethodNote,
    Role,
    Row,
    RunResult,
    RunSpec,
    TunedBaseline,
    cost_key,
)
from trainpilot.experiments.run_store import run_key
from trainpilot.llm_runtime.config import Precision, RunConfig
from trainpilot.llm_runtime.schedules import ScheduleName


class ComparisonLedger:
    """Shared state of one comparison: seeds, cost tables, result rows and tuned baselines.

    Args:
        seeds: Judged seeds, paired over methods.
        tuning_seeds: Seeds of the searches, disjoint from the judged ones to avoid selection bias.
        tables: Cost tables by `cost_key`.
        precisions: Precisions worth trying, by case.
        warn: Called with a line about what goes on without a part.
        studies: Where Optuna's studies are kept; by default nowhere.
    """

    def __init__(
        self,
        seeds: Sequence[int],
        tuning_seeds: Sequence[int],
        tables: Mapping[str, CostTable],
        precisions: Mapping[str, Sequence[Precision]],
        warn: Callable[[str], None],
        *,
        studies: StudyStorage | None = None,
    ) -> None:
        if both := set(tuning_seeds) & set(seeds):
            raise ValueError(f"seeds must leave the tuning seeds out, got {min(both)} in both; take fewer seeds")
        self.seeds, self.tuning_seeds = tuple(seeds), tuple(tuning_seeds)
        self.tables = tables
        self.warn = warn
        self.studies = studies if studies is not None else StudyStorage()
        self._precisions = precisions
        self._rows: dict[Row, None] = {}
        self.baselines: dict[str, list[TunedBaseline]] = {}

    @property
    def rows(self) -> tuple[Row, ...]:
        """All rows recorded so far, in the order of case, method, role, budget and seed."""
        return tuple(
            sorted(self._rows, key=lambda row: (row.case, row.method, row.role, row.budget, row.seed, row.key))
        )

    def precisions(self, case: Case) -> Sequence[Precision]:
        """Return the precisions that a search on this case tries: the case's own, and faster ones on this device."""
        return self._precisions[case.name]

    def row(
        self,
        case: Case,
        method: str,
        spec: RunSpec,
        *,
        role: Role = "method",
        budget: float = 1.0,
        counted: float | None = None,
    ) -> None:
        """Record that a run belongs to a method on a case."""
        row = Row(
            case=case.name,
            method=method,
            role=role,
            seed=spec.config.seed,
            budget=budget,
            counted_budget=budget if counted is None else counted,
            key=run_key(spec),
        )
        self._rows[row] = None

    def baseline(self, case: Case, baseline: TunedBaseline) -> None:
        """Record a tuned setting."""
        self.baselines.setdefault(case.name, []).append(baseline)

    def cost_of(self, result: RunResult) -> float:
        """Return the modelled joules of a run, or seconds if the joules are unknown.

        Raises:
            ValueError: there is no cost table for its model.
        """
        key = cost_key(result.spec.config)
        if key not in self.tables:
            raise ValueError(f"there is no cost table for {key}")
        cost = modelled_cost(result, self.tables[key])
        return cost.time_s if cost.energy_j is None else cost.energy_j

    def cheapest(
        self,
        trials: Trials,
        curve: Sequence[tuple[float, float]],
        axis: str,
        among: Collection[StaticSetting] | None = None,
    ) -> list[Trial]:
        """Return the trials by the modelled cost (`axis`) at which they would reach the same loss, the lowest first.

        A trial whose loss the tuned baseline reaches at a share n of the budget needs about 1/n of its own cost to
        reach the baseline's loss at the whole budget.

        Args:
            trials: Runs of the whole budget.
            curve: (budget share, loss) of the tuned baseline, ascending in budget, over the same seeds.
            axis: `time_s` or `energy_j`.
            among: Confirmed settings, compared by their mean loss; by default all trials, by the loss of one seed.
        """
        scored: list[tuple[float, int, Trial]] = []
        for setting, trial in trials.tried.items():
            if among is None or setting in among:
                loss = final_loss(trial.result) if among is None else trials.mean_loss(setting)
                if (score := self._score(trial, loss, curve, axis)) is not None:
                    scored.append((score, len(scored), trial))
        return [trial for _, _, trial in sorted(scored)[:N_CONFIRMED]]

    def _score(self, trial: Trial, loss: float, curve: Sequence[tuple[float, float]], axis: str) -> float | None:
        table = self.tables.get(cost_key(trial.spec.config))
        if not math.isfinite(loss) or table is None:
            return None
        cost: float | None = getattr(modelled_cost(trial.result, table), axis)
        return None if cost is None else cost / share_needed(loss, curve)


def share_needed(loss: float, curve: Sequence[tuple[float, float]]) -> float:
    """Return the budget share at which a curve reaches `loss`, without extrapolation.

    The multipliers of a report are extrapolated a little (`analysis.multiplier`). Here settings are selected, and a
    cheap setting with a loss beyond the curve should not be selected by an extrapolation.

    Args:
        loss: Loss in nats/token.
        curve: (budget share, loss), ascending in budget. A point that is not better than all smaller budgets, or whose
            loss is not finite, is ignored.
    """
    falling: list[tuple[float, float]] = []
    for share, reached in curve:
        if math.isfinite(reached) and (not falling or reached < falling[-1][1]):
            falling.append((share, reached))
    shares, losses = zip(*falling, strict=True)
    return float(budget_for_loss(loss, shares, losses, limits=(shares[0], shares[-1])))


CURVE_BUDGETS: Mapping[float, tuple[str, ...]] = {
    0.125: ("learning_rate", "batch_size"),
    0.25: ("learning_rate", "batch_size"),
    0.5: ("learning_rate", "batch_size"),
    2.0: ("learning_rate",),
}
"""Shares of the case's budget at which the tuned baseline is tuned and judged again, with the fields that are tuned."""
UNTUNED_CURVE_BUDGETS = (0.25, 0.5, 2.0, 4.0)
COST_AXES = ("time_s", "energy_j")

Steps = Generator[list[RunSpec], list[RunResult], None]


@dataclass
class TunedStatic:
    """Program of one case's tuned static baseline."""

    ledger: ComparisonLedger
    case: Case
    wanted: Collection[str]
    """Names of the requested methods that need the search."""
    started: Sequence[Method] = ()
    """Policies that start at a factor of the tuned learning rate."""
    compressed: Sequence[CompressedMethod] = ()
    """Methods that take the tuned setting and make the model cheaper."""

    def program(self) -> Steps:
        """Run the search, then the judged runs of its results."""
        extra: list[ScheduleName] = ["constant"] if "tuned-constant" in self.wanted else []
        trials = yield from tune(self.case.config, self.ledger.precisions(self.case), self.ledger.tuning_seeds, extra)
        best = trials.best_confirmed(TUNED_SCHEDULES)
        if math.isinf(trials.mean_loss(best.setting)):
            self._note_sweep(trials)
            self.ledger.warn(f"{self.case.name}: every setting of the sweep diverged or failed; there is no baseline")
            return
        yield from self._judge(TUNED, best.setting)
        for name, schedule in PER_SCHEDULE.items():
            if name in self.wanted:
                yield from self._judge(name, trials.best_confirmed([schedule]).setting)
        yield from self._checks(best.setting)
        curve = yield from self._curve(best.setting)
        points = sorted([*curve, (1.0, trials.mean_loss(best.setting))])
        choices = yield from self._cost_choices(trials, points)
        self._note_sweep(trials)
        self._remember(TUNED, "tokens", best, trials)
        yield from self._judge_cost_choices(trials, best, choices)
        yield from self._started(best.setting)
        yield from compressed_program(self.ledger, self.case, self.compressed, best.setting)

    def _note_sweep(self, trials: Trials) -> None:
        for trial in trials.all_trials():
            self.ledger.row(self.case, TUNED, trial.spec, role="sweep")

    def _judge(self, name: str, setting: StaticSetting, *, budget: float = 1.0, counted: float | None = None) -> Steps:
        """Run a setting with every judged seed."""
        role: Role = "method" if budget == 1 or counted is not None else "curve"
        configs = [setting.on(self.case.config, budget=budget, seed=seed) for seed in self.ledger.seeds]
        specs = [RunSpec(config=config) for config in configs]
        yield specs
        for spec in specs:
            self.ledger.row(self.case, name, spec, role=role, budget=budget, counted=counted or budget)

    def _checks(self, setting: StaticSetting) -> Steps:
        for name, plant in CHECKS.items():
            if name in self.wanted:
                planted, budget = plant(setting)
                yield from self._judge(name, planted, budget=budget, counted=1.0)

    def _started(self, setting: StaticSetting) -> Steps:
        """Run all policies that start at a factor of the tuned learning rate, in one wave."""
        placed = [(method.note.name, method.placed(setting)) for method in self.started]
        specs = [(name, method.spec(self.case, seed)) for name, method in placed for seed in self.ledger.seeds]
        yield [spec for _, spec in specs]
        for name, spec in specs:
            self.ledger.row(self.case, name, spec)

    def _curve(self, setting: StaticSetting) -> Generator[list[RunSpec], list[RunResult], list[tuple[float, float]]]:
        """Tune and judge at every other budget; return (budget share, mean loss of the tuning seeds)."""
        points = []
        for budget, respects in CURVE_BUDGETS.items():
            trials = Trials(self.case.config, self.ledger.tuning_seeds, budget)
            trial = yield from retune(trials, setting, respects)
            yield from self._judge(TUNED, trial.setting, budget=budget)
            points.append((budget, trials.mean_loss(trial.setting)))
        return points

    def _cost_choices(
        self, trials: Trials, points: list[tuple[float, float]]
    ) -> Generator[list[RunSpec], list[RunResult], dict[str, Trial]]:
        """Find the best settings for equal seconds and joules, which may differ from those for equal tokens."""
        choices: dict[str, Trial] = {}
        for axis in COST_AXES:
            yield from self._descend_in_cost(trials, points, axis)
            candidates = self.ledger.cheapest(trials, points, axis)
            yield from trials.confirm(trial.setting for trial in candidates)
            if found := self.ledger.cheapest(trials, points, axis, among=trials.confirmed):
                choices[axis] = found[0]
        return choices

    def _descend_in_cost(self, trials: Trials, points: list[tuple[float, float]], axis: str) -> Steps:
        """Try the neighbours of the cheapest trial until none is cheaper; its batch may lie outside of the grid."""
        settled: set[StaticSetting] = set()
        for _ in range(MAX_MOVES):
            first = self.ledger.cheapest(trials, points, axis)[:1]
            if not first or first[0].setting in settled:
                return
            settled.add(first[0].setting)
            around = neighbours(
                first[0].setting, LEARNING_RATE_STEP**0.5, self.case.config, ("learning_rate", "batch_size")
            )
            yield from trials.run(around)

    def _judge_cost_choices(self, trials: Trials, best: Trial, choices: dict[str, Trial]) -> Steps:
        known: dict[StaticSetting, str] = {best.setting: TUNED}
        for axis, choice in choices.items():
            if choice.setting not in known:
                name = known[choice.setting] = f"tuned-{axis.partition('_')[0]}"
                yield from self._judge(name, choice.setting)
                for budget in CURVE_BUDGETS:
                    yield from self._judge(name, choice.setting, budget=budget)
            self._remember(known[choice.setting], axis, choice, trials)

    def _remember(self, name: str, axis: str, trial: Trial, trials: Trials) -> None:
        baseline = TunedBaseline(
            method=name,
            axis=axis,
            config=trial.spec.config,
            search="grid",
            n_trials=len(trials.all_trials()),
            on_edge=trials.on_edge(trial),
        )
        self.ledger.baseline(self.case, baseline)


def untuned_curve(ledger: ComparisonLedger, case: Case) -> Steps:
    """Run the untuned default at other budgets with the first seed, for multipliers against it."""
    for budget in UNTUNED_CURVE_BUDGETS:
        spec = RunSpec(config=at_budget(case, budget, ledger.seeds[0]))
        yield [spec]
        ledger.row(case, UNTUNED, spec, role="curve", budget=budget)


def at_budget(case: Case, budget: float, seed: int) -> RunConfig:
    """Return the case's own setting on another budget."""
    config = replace(case.config, schedule="cosine")
    setting = StaticSetting(
        learning_rate=config.base_learning_rate,
        batch_size=config.batch_size,
        schedule="cosine",
        warmup_share=config.warmup() / config.tokens,
        precision=config.precision,
    )
    return setting.on(config, budget=budget, seed=seed)


def direct_program(ledger: ComparisonLedger, case: Case, method: Method) -> Program:
    """Run a method with every judged seed."""
    specs = [method.spec(case, seed) for seed in ledger.seeds]
    yield specs
    for spec in specs:
        ledger.row(case, method.note.name, spec)


def compressed_program(
    ledger: ComparisonLedger, case: Case, methods: Sequence[CompressedMethod], setting: StaticSetting | None = None
) -> Program:
    """Run methods that make the model cheaper, with the tuned static's setting, or else the case's own."""
    specs = [(method.note.name, method.spec(case, setting, seed)) for method in methods for seed in ledger.seeds]
    yield [spec for _, spec in specs]
    for name, spec in specs:
        ledger.row(case, name, spec)


def open_loop_program(ledger: ComparisonLedger, cases: Sequence[Case], closed: Method, note: MethodNote) -> Program:
    """Run the policy on every case, average its controls, and replay that average without observations."""
    results = yield [closed.spec(case, seed) for case in cases for seed in ledger.seeds]
    usable = [result for result in results if result.usable]
    if not usable:
        ledger.warn(f"{note.name}: no closed-loop run ended with a finite loss; there is nothing to average")
        return
    method = open_loop_method(note, closed, _average(usable))
    for case in cases:
        yield from direct_program(ledger, case, method)


def _average(results: Sequence[RunResult]) -> list[dict[str, Any]]:
    """Return the average schedule of the runs, as JSON values."""
    decisions = max(result.spec.config.decisions for result in results)
    return schedule_to_json(average_schedule([_steered(result) for result in results], decisions))


def _steered(result: RunResult) -> ControlledRun:
    controls = [interval.controls() for interval in result.intervals if not interval.rolled_back]
    return ControlledRun(start_batch_size=result.spec.config.batch_size, controls=controls)


def search_program(ledger: ComparisonLedger, case: Case, name: str) -> Program:
    """Carry out `tuned-tpe`, `tuned-halving` or `nsga2` on a case."""
    if name == "nsga2":
        return _front(ledger, case)
    return _best_of_tpe(ledger, case) if name == "tuned-tpe" else _best_of_halving(ledger, case)


def _best_of_tpe(ledger: ComparisonLedger, case: Case) -> Program:
    keep = ledger.studies.keep(f"{case.name} tuned-tpe")
    trials = yield from tpe(case.config, ledger.precisions(case), ledger.tuning_seeds, keep)
    _note_sweep(ledger, case, "tuned-tpe", [trials])
    yield from _judge(ledger, case, "tuned-tpe", trials.best_confirmed(TUNED_SCHEDULES).spec)


def _best_of_halving(ledger: ComparisonLedger, case: Case) -> Program:
    keep = ledger.studies.keep(f"{case.name} tuned-halving")
    found = yield from halving(case.config, ledger.precisions(case), ledger.tuning_seeds, keep)
    _note_sweep(ledger, case, "tuned-halving", found.trials)
    yield from _judge(ledger, case, "tuned-halving", found.best.spec)


def _front(ledger: ComparisonLedger, case: Case) -> Program:
    keep = ledger.studies.keep(f"{case.name} nsga2")
    front = yield from nsga2(case.config, ledger.precisions(case), ledger.tuning_seeds[0], ledger.cost_of, keep)
    for spec in front.tried:
        ledger.row(case, "nsga2", spec, role="sweep")
    for number, spec in enumerate(front.best, start=1):
        yield from _judge(ledger, case, f"nsga2-{number}", spec)


def _judge(
    ledger: ComparisonLedger, case: Case, name: str, tuned: RunSpec
) -> Generator[list[RunSpec], list[RunResult], None]:
    specs = [judged(tuned, seed) for seed in ledger.seeds]
    yield specs
    for spec in specs:
        ledger.row(case, name, spec)


def _note_sweep(ledger: ComparisonLedger, case: Case, name: str, tried: Sequence[Trials]) -> None:
    for trials in tried:
        for trial in trials.all_trials():
            ledger.row(case, name, trial.spec, role="sweep", budget=trials.budget)
