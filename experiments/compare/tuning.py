"""Find the best static setting of a case: a grid, its best point's neighbours until none is better, more seeds.

Searches are programs (see `programs`): they yield the runs that they want tried and return what they found.
"""

from __future__ import annotations

from collections.abc import Collection, Generator, Iterable, Sequence
from dataclasses import dataclass, replace
from statistics import fmean

from trainpilot.experiments.compare.records import RunResult, RunSpec, Steering
from trainpilot.experiments.compare.settings import (
    LEARNING_RATE_STEP,
    RESPECTS,
    TUNED_SCHEDULES,
    WARMUP_SHARES,
    Setting,
    grid,
    neighbours,
)
from trainpilot.llm_runtime.config import Precision, RunConfig
from trainpilot.llm_runtime.schedules import ScheduleName

MAX_MOVES = 8
"""The refinement moves at most so often per step size."""

N_CONFIRMED = 3
"""So many of each schedule's best settings are run again with the other tuning seeds."""
N_RECONFIRMED = 2
"""So many at another budget."""


@dataclass(frozen=True)
class Trial:
    """A setting that was tried, and its run."""

    setting: Setting
    spec: RunSpec
    result: RunResult


Search = Generator[list[RunSpec], list[RunResult], "Trials"]
Moves = Generator[list[RunSpec], list[RunResult], Trial]


class Trials:
    """Everything that was tried on one case at one budget.

    One seed searches; the best settings are then confirmed on the others. Near the largest rate that is stable a
    single run can be lucky, and a baseline picked by luck would be a weak one.

    Args:
        config: The case's own run.
        seeds: Tuning seeds: the first searches, the others confirm.
        budget: Share of the case's budget in tokens.
    """

    def __init__(self, config: RunConfig, seeds: Sequence[int], budget: float = 1.0) -> None:
        self.config, self.budget = config, budget
        self.seed, *self.others = seeds
        self.tried: dict[Setting, Trial] = {}
        self.confirmed: dict[Setting, tuple[Trial, ...]] = {}

    def run(self, settings: Iterable[Setting]) -> Generator[list[RunSpec], list[RunResult], list[Trial]]:
        """Try what has not been tried, and return the trials of all `settings`."""
        wanted = list(dict.fromkeys(settings))
        new = [setting for setting in wanted if setting not in self.tried]
        specs = [self.spec(setting, self.seed) for setting in new]
        results = yield specs
        for setting, spec, result in zip(new, specs, results, strict=True):
            self.tried[setting] = Trial(setting, spec, result)
        return [self.tried[setting] for setting in wanted]

    def confirm(self, settings: Iterable[Setting]) -> Generator[list[RunSpec], list[RunResult], None]:
        """Run settings that have been tried with the other tuning seeds too."""
        new = [setting for setting in dict.fromkeys(settings) if setting not in self.confirmed]
        places = [(setting, self.spec(setting, seed)) for setting in new for seed in self.others]
        results = yield [spec for _, spec in places]
        again = [Trial(setting, spec, result) for (setting, spec), result in zip(places, results, strict=True)]
        for setting in new:
            self.confirmed[setting] = tuple(trial for trial in again if trial.setting == setting)

    def spec(self, setting: Setting, seed: int) -> RunSpec:
        """Return the run that tries a setting. Nobody looks at it on the way, so it is looked at only at its end."""
        config = setting.on(self.config, budget=self.budget, seed=seed)
        return RunSpec(config=config, steering=Steering(evaluate_every=config.decisions))

    def all_trials(self) -> list[Trial]:
        """Return every trial, those that confirmed among them."""
        return [*self.tried.values(), *(trial for found in self.confirmed.values() for trial in found)]

    def ranked(self, schedule: ScheduleName | None = None) -> list[Trial]:
        """Return the trials of the searching seed, of one schedule or of all, the lowest loss first."""
        among = [trial for trial in self.tried.values() if schedule in (None, trial.setting.schedule)]
        return sorted(among, key=lambda trial: final_loss(trial.result))

    def mean_loss(self, setting: Setting) -> float:
        """Return the mean final loss of a confirmed setting over the tuning seeds, in nats/token."""
        return fmean(final_loss(trial.result) for trial in (self.tried[setting], *self.confirmed[setting]))

    def best_confirmed(self, schedules: Collection[ScheduleName]) -> Trial:
        """Return the trial whose setting has the lowest mean loss among those confirmed."""
        among = [setting for setting in self.confirmed if setting.schedule in schedules]
        return self.tried[min(among, key=self.mean_loss)]

    def on_edge(self, best: Trial) -> tuple[str, ...]:
        """Return the settings whose best value is the smallest or largest tried, though more would be possible."""
        names = []
        for name, lowest in (("learning_rate", 0.0), ("batch_size", 1)):
            values = {getattr(trial.setting, name) for trial in self.tried.values()}
            value = getattr(best.setting, name)
            if value in (min(values), max(values)) and value != lowest:
                names.append(name)
        if best.setting.warmup_share == WARMUP_SHARES[-1]:
            names.append("warmup_share")
        return tuple(names)


def final_loss(result: RunResult) -> float:
    """Return the final validation loss in nats/token, infinite for a run without one."""
    loss = result.final_validation_loss
    return float("inf") if loss is None else loss


def tune(
    config: RunConfig, precisions: Sequence[Precision], seeds: Sequence[int], extra: Sequence[ScheduleName] = ()
) -> Search:
    """Search the grid, then the neighbours of its best point; refine each schedule's rate; confirm the best of each.

    Args:
        config: The case's own run.
        precisions: Precisions worth trying.
        seeds: Tuning seeds.
        extra: Schedules besides `TUNED_SCHEDULES` whose best is wanted too.
    """
    trials = Trials(config, seeds)
    yield from trials.run(grid(config, precisions))
    best = trials.ranked()[0]
    best = yield from descend(trials, best, LEARNING_RATE_STEP)
    best = yield from descend(trials, best, LEARNING_RATE_STEP**0.5)
    for schedule in (*TUNED_SCHEDULES, *extra):
        yield from trials.run([replace(best.setting, schedule=schedule)])
        first = trials.ranked(schedule)[0]
        refined = yield from descend(trials, first, LEARNING_RATE_STEP**0.5, ("learning_rate",))
        yield from descend(trials, refined, LEARNING_RATE_STEP**0.25, ("learning_rate",))
        yield from trials.confirm(trial.setting for trial in trials.ranked(schedule)[:N_CONFIRMED])
    return trials


def retune(trials: Trials, setting: Setting, respects: Collection[str]) -> Moves:
    """Return the best trial at another budget, found from the setting that is best at the whole one."""
    [start] = yield from trials.run([setting])
    yield from descend(trials, start, LEARNING_RATE_STEP**0.5, respects)
    yield from trials.confirm(trial.setting for trial in trials.ranked()[:N_RECONFIRMED])
    return trials.best_confirmed([setting.schedule])


def descend(trials: Trials, best: Trial, step: float, respects: Collection[str] = RESPECTS) -> Moves:
    """Move to the best neighbour until no neighbour is better."""
    for _ in range(MAX_MOVES):
        around = yield from trials.run(neighbours(best.setting, step, trials.config, respects))
        winner = min(around, key=lambda trial: final_loss(trial.result))
        if final_loss(winner.result) >= final_loss(best.result):
            break
        best = winner
    return best
