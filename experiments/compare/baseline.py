"""The tuned static baseline of a case: its search, its judged runs, its curve over budgets, and planted checks."""

from __future__ import annotations

import math
from collections.abc import Collection, Generator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

from trainpilot.experiments.compare.bench import Bench
from trainpilot.experiments.compare.comparison import TUNED, UNTUNED, Case, TunedBaseline
from trainpilot.experiments.compare.methods import CHECKS, PER_SCHEDULE
from trainpilot.experiments.compare.records import Role, RunResult, RunSpec
from trainpilot.experiments.compare.settings import LEARNING_RATE_STEP, TUNED_SCHEDULES, Setting, neighbours
from trainpilot.experiments.compare.tuning import MAX_MOVES, Trial, Trials, retune, tune
from trainpilot.llm_runtime.config import RunConfig
from trainpilot.llm_runtime.schedules import ScheduleName

if TYPE_CHECKING:
    from trainpilot.experiments.compare.methods import Method

CURVE_BUDGETS: Mapping[float, tuple[str, ...]] = {
    0.125: ("learning_rate", "batch_size"),
    0.25: ("learning_rate", "batch_size"),
    0.5: ("learning_rate", "batch_size"),
    2.0: ("learning_rate",),
}
"""Shares of the case's budget at which the tuned baseline is tuned and judged again, and in what it is tuned."""
UNTUNED_CURVE_BUDGETS = (0.25, 0.5, 2.0, 4.0)
COST_AXES = ("time_s", "energy_j")

Steps = Generator[list[RunSpec], list[RunResult], None]


@dataclass
class TunedStatic:
    """Carries one case's tuned static baseline through a comparison."""

    bench: Bench
    case: Case
    wanted: Collection[str]
    """Names of the methods asked for that rest on the search."""
    started: Sequence[Method] = ()
    """Policies that start at a factor of the learning rate found."""

    def program(self) -> Steps:
        """Search, then judge what was found."""
        extra: list[ScheduleName] = ["constant"] if "tuned-constant" in self.wanted else []
        trials = yield from tune(self.case.config, self.bench.precisions(self.case), self.bench.tuning_seeds, extra)
        best = trials.best_confirmed(TUNED_SCHEDULES)
        if math.isinf(trials.mean_loss(best.setting)):
            self._note_sweep(trials)
            self.bench.warn(f"{self.case.name}: every setting of the sweep diverged or failed; there is no baseline")
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

    def _note_sweep(self, trials: Trials) -> None:
        for trial in trials.all_trials():
            self.bench.row(self.case, TUNED, trial.spec, role="sweep")

    def _judge(self, name: str, setting: Setting, *, budget: float = 1.0, counted: float | None = None) -> Steps:
        """Run a setting with every judged seed."""
        role: Role = "method" if budget == 1 or counted is not None else "curve"
        configs = [setting.on(self.case.config, budget=budget, seed=seed) for seed in self.bench.seeds]
        specs = [RunSpec(config=config) for config in configs]
        yield specs
        for spec in specs:
            self.bench.row(self.case, name, spec, role=role, budget=budget, counted=counted or budget)

    def _checks(self, setting: Setting) -> Steps:
        for name, plant in CHECKS.items():
            if name in self.wanted:
                planted, budget = plant(setting)
                yield from self._judge(name, planted, budget=budget, counted=1.0)

    def _started(self, setting: Setting) -> Steps:
        """Run what starts at a factor of the tuned learning rate, all of it in one wave."""
        placed = [(method.note.name, method.placed(setting)) for method in self.started]
        specs = [(name, method.spec(self.case, seed)) for name, method in placed for seed in self.bench.seeds]
        yield [spec for _, spec in specs]
        for name, spec in specs:
            self.bench.row(self.case, name, spec)

    def _curve(self, setting: Setting) -> Generator[list[RunSpec], list[RunResult], list[tuple[float, float]]]:
        """Tune and judge at every other budget; return (budget share, mean loss of the tuning seeds)."""
        points = []
        for budget, respects in CURVE_BUDGETS.items():
            trials = Trials(self.case.config, self.bench.tuning_seeds, budget)
            trial = yield from retune(trials, setting, respects)
            yield from self._judge(TUNED, trial.setting, budget=budget)
            points.append((budget, trials.mean_loss(trial.setting)))
        return points

    def _cost_choices(
        self, trials: Trials, points: list[tuple[float, float]]
    ) -> Generator[list[RunSpec], list[RunResult], dict[str, Trial]]:
        """Find the best settings for equal seconds and joules: equal tokens favour small batches, these need not."""
        choices: dict[str, Trial] = {}
        for axis in COST_AXES:
            yield from self._descend_in_cost(trials, points, axis)
            candidates = self.bench.cheapest(trials, points, axis)
            yield from trials.confirm(trial.setting for trial in candidates)
            if found := self.bench.cheapest(trials, points, axis, among=trials.confirmed):
                choices[axis] = found[0]
        return choices

    def _descend_in_cost(self, trials: Trials, points: list[tuple[float, float]], axis: str) -> Steps:
        """Try the neighbours of the cheapest trial until it stays the cheapest: its batch may be beyond the grid."""
        settled: set[Setting] = set()
        for _ in range(MAX_MOVES):
            first = self.bench.cheapest(trials, points, axis)[:1]
            if not first or first[0].setting in settled:
                return
            settled.add(first[0].setting)
            around = neighbours(
                first[0].setting, LEARNING_RATE_STEP**0.5, self.case.config, ("learning_rate", "batch_size")
            )
            yield from trials.run(around)

    def _judge_cost_choices(self, trials: Trials, best: Trial, choices: dict[str, Trial]) -> Steps:
        known: dict[Setting, str] = {best.setting: TUNED}
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
        self.bench.baseline(self.case, baseline)


def untuned_curve(bench: Bench, case: Case) -> Steps:
    """Run the untuned default at other budgets with the first seed, for multipliers against it."""
    for budget in UNTUNED_CURVE_BUDGETS:
        spec = RunSpec(config=at_budget(case, budget, bench.seeds[0]))
        yield [spec]
        bench.row(case, UNTUNED, spec, role="curve", budget=budget)


def at_budget(case: Case, budget: float, seed: int) -> RunConfig:
    """Return the case's own setting on another budget."""
    config = replace(case.config, schedule="cosine")
    setting = Setting(
        learning_rate=config.base_learning_rate,
        batch_size=config.batch_size,
        schedule="cosine",
        warmup_share=config.warmup() / config.tokens,
        precision=config.precision,
    )
    return setting.on(config, budget=budget, seed=seed)
