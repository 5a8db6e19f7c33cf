"""Search the best static setting of a case by a refined grid, TPE, successive halving, or NSGA-II.

Every search is a generator that yields the runs to try, receives their results, and returns the settings found. The
searches with Optuna use generations of a fixed size and report results in order, so that the outcome does not depend on
the number of worker processes.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Generator, Iterable, Sequence
from dataclasses import dataclass, replace
from random import Random
from statistics import fmean

import optuna

from trainpilot.experiments.compare.cases import (
    BATCH_GRID,
    DEPTHS,
    LEARNING_RATE_GRID,
    LEARNING_RATE_STEP,
    RESPECTS,
    TUNED_SCHEDULES,
    WARMUP_SHARES,
    WIDTHS,
    StaticSetting,
    batch_near,
    can_vary,
    grid,
    neighbours,
    rounded,
    with_size,
)
from trainpilot.experiments.results import RunResult, RunSpec, SteeringSpec
from trainpilot.llm_runtime.config import Precision, RunConfig
from trainpilot.llm_runtime.schedules import ScheduleName

MAX_MOVES = 8
"""Largest number of moves of the refinement per step size."""

N_CONFIRMED = 3
"""Number of each schedule's best settings that are run again with the other tuning seeds."""
N_RECONFIRMED = 2
"""The same number at another budget."""


@dataclass(frozen=True)
class Trial:
    """A setting with its run."""

    setting: StaticSetting
    spec: RunSpec
    result: RunResult


Search = Generator[list[RunSpec], list[RunResult], "Trials"]
Moves = Generator[list[RunSpec], list[RunResult], Trial]


class Trials:
    """All trials on one case at one budget.

    The search uses one seed; the best settings are then confirmed with the others, since near the largest stable rate a
    single run can be good by chance, and a baseline selected by chance would be too weak.

    Args:
        config: The case's own run.
        seeds: Tuning seeds: the first searches, the others confirm.
        budget: Share of the case's budget in tokens.
    """

    def __init__(self, config: RunConfig, seeds: Sequence[int], budget: float = 1.0) -> None:
        self.config, self.budget = config, budget
        self.seed, *self.others = seeds
        self.tried: dict[StaticSetting, Trial] = {}
        self.confirmed: dict[StaticSetting, tuple[Trial, ...]] = {}

    def run(self, settings: Iterable[StaticSetting]) -> Generator[list[RunSpec], list[RunResult], list[Trial]]:
        """Run the settings that have not been tried, and return the trials of all `settings`."""
        wanted = list(dict.fromkeys(settings))
        new = [setting for setting in wanted if setting not in self.tried]
        specs = [self.spec(setting, self.seed) for setting in new]
        results = yield specs
        for setting, spec, result in zip(new, specs, results, strict=True):
            self.tried[setting] = Trial(setting, spec, result)
        return [self.tried[setting] for setting in wanted]

    def confirm(self, settings: Iterable[StaticSetting]) -> Generator[list[RunSpec], list[RunResult], None]:
        """Run settings that have been tried with the other tuning seeds too."""
        new = [setting for setting in dict.fromkeys(settings) if setting not in self.confirmed]
        places = [(setting, self.spec(setting, seed)) for setting in new for seed in self.others]
        results = yield [spec for _, spec in places]
        again = [Trial(setting, spec, result) for (setting, spec), result in zip(places, results, strict=True)]
        for setting in new:
            self.confirmed[setting] = tuple(trial for trial in again if trial.setting == setting)

    def spec(self, setting: StaticSetting, seed: int) -> RunSpec:
        """Return the run of a setting; it is evaluated only at its end, since no controller needs more."""
        config = setting.on(self.config, budget=self.budget, seed=seed)
        return RunSpec(config=config, steering=SteeringSpec(evaluate_every=config.decisions))

    def all_trials(self) -> list[Trial]:
        """Return every trial, including the confirming ones."""
        return [*self.tried.values(), *(trial for found in self.confirmed.values() for trial in found)]

    def ranked(self, schedule: ScheduleName | None = None) -> list[Trial]:
        """Return the trials of the searching seed, of one schedule or of all, the lowest loss first."""
        among = [trial for trial in self.tried.values() if schedule in (None, trial.setting.schedule)]
        return sorted(among, key=lambda trial: final_loss(trial.result))

    def mean_loss(self, setting: StaticSetting) -> float:
        """Return the mean final loss of a confirmed setting over the tuning seeds, in nats/token."""
        return fmean(final_loss(trial.result) for trial in (self.tried[setting], *self.confirmed[setting]))

    def best_confirmed(self, schedules: Collection[ScheduleName]) -> Trial:
        """Return the trial whose setting has the lowest mean loss among those confirmed."""
        among = [setting for setting in self.confirmed if setting.schedule in schedules]
        return self.tried[min(among, key=self.mean_loss)]

    def on_edge(self, best: Trial) -> tuple[str, ...]:
        """Return the fields whose best value is the smallest or largest one tried, although others are possible."""
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
        extra: Further schedules besides `TUNED_SCHEDULES` whose best setting is needed.
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


def retune(trials: Trials, setting: StaticSetting, respects: Collection[str]) -> Moves:
    """Return the best trial at another budget, found by descent from the best setting at the whole budget."""
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


TPE_TRIALS, TPE_GENERATION = 60, 6
TPE_CONFIRMED = 9
HALVING_TRIALS = 16
HALVING_RUNGS = (1, 2, 4, 8)
"""Budgets of the rungs in eighths; every rung is a new run with a complete schedule."""
WORST_LOSS = 20.0
"""Loss reported to Optuna for a diverged run, in nats/token; far above the loss of random guessing."""

optuna.logging.set_verbosity(optuna.logging.WARNING)


Keep = Callable[[optuna.Study], None]
"""Called with a study that has ended."""


def not_kept(study: optuna.Study) -> None:
    """Keep nothing of a study."""


@dataclass(frozen=True)
class StudyStorage:
    """Where studies are kept, so that optuna-dashboard opens them.

    A study is copied there when it has ended: what a search tries does not depend on where it is kept.

    Args:
        url: A storage of Optuna, such as `sqlite:///optuna.db`; `None` keeps nothing.

    Raises:
        ValueError: the storage cannot be opened.
    """

    url: str | None = None

    def __post_init__(self) -> None:
        if self.url is not None:
            try:
                optuna.storages.get_storage(self.url)
            except Exception as error:  # SQLAlchemy and its drivers raise many kinds
                reason = " ".join(str(error).split())[:200]
                raise ValueError(
                    f"optuna_storage must be a storage of Optuna, such as sqlite:///optuna.db, got {self.url!r}, "
                    f"which it does not open: {reason}"
                ) from error

    def keep(self, name: str) -> Keep:
        """Return a function that keeps a study under a name, in place of an earlier one of that name."""
        url = self.url
        if url is None:
            return not_kept

        def keep(study: optuna.Study) -> None:
            if name in optuna.get_all_study_names(url):
                optuna.delete_study(study_name=name, storage=url)
            optuna.create_study(study_name=name, storage=url, directions=study.directions).add_trials(study.trials)

        return keep


def tpe(config: RunConfig, precisions: Sequence[Precision], seeds: Sequence[int], keep: Keep = not_kept) -> Search:
    """Search with the tree-structured Parzen estimator, and confirm its best settings like those of the grid."""
    study = optuna.create_study(sampler=optuna.samplers.TPESampler(seed=seeds[0], constant_liar=True))
    trials = Trials(config, seeds)
    for _ in range(TPE_TRIALS // TPE_GENERATION):
        asked = [study.ask() for _ in range(TPE_GENERATION)]
        done = yield from trials.run([suggest(trial, config, precisions) for trial in asked])
        by_setting = {found.setting: found for found in done}
        for trial in asked:
            study.tell(trial, _told(by_setting[suggest(trial, config, precisions)]))
    keep(study)
    yield from trials.confirm(trial.setting for trial in trials.ranked()[:TPE_CONFIRMED])
    return trials


@dataclass(frozen=True)
class Halved:
    """Result of successive halving, with all its trials."""

    best: Trial
    trials: tuple[Trials, ...]
    """Trials of each rung."""


def halving(
    config: RunConfig, precisions: Sequence[Precision], seeds: Sequence[int], keep: Keep = not_kept
) -> Generator[list[RunSpec], list[RunResult], Halved]:
    """Try random settings at an eighth of the budget, and the best of them at larger and larger budgets.

    The whole search uses about as many tokens as eight runs.
    """
    pruner = optuna.pruners.SuccessiveHalvingPruner(min_resource=1, reduction_factor=2)
    study = optuna.create_study(sampler=optuna.samplers.RandomSampler(seed=seeds[0]), pruner=pruner)
    survivors = [study.ask() for _ in range(HALVING_TRIALS)]
    order = Random(seeds[0])
    rungs: list[Trials] = []
    done: list[Trial] = []
    found: dict[StaticSetting, Trial] = {}
    pruned: list[optuna.Trial] = []
    for rung in HALVING_RUNGS:
        rungs.append(Trials(config, seeds, rung / HALVING_RUNGS[-1]))
        settings = [suggest(trial, config, precisions) for trial in survivors]
        done = yield from rungs[-1].run(settings)
        found = {trial.setting: trial for trial in done}
        for asked, setting in zip(survivors, settings, strict=True):
            asked.report(_told(found[setting]), rung)
        if rung != HALVING_RUNGS[-1]:
            # Optuna judges each by those that came before it. Survivors stand with the better ones last, and nearly all
            # of them would pass.
            judged_in_turn = [(trial, trial.should_prune()) for trial in order.sample(survivors, len(survivors))]
            survivors = [trial for trial, dropped in judged_in_turn if not dropped]
            pruned += [trial for trial, dropped in judged_in_turn if dropped]
    for trial in pruned:
        study.tell(trial, state=optuna.trial.TrialState.PRUNED)
    for trial in survivors:
        study.tell(trial, _told(found[suggest(trial, config, precisions)]))
    keep(study)
    return Halved(min(done, key=lambda trial: final_loss(trial.result)), tuple(rungs))


def suggest(trial: optuna.Trial, config: RunConfig, precisions: Sequence[Precision]) -> StaticSetting:
    """Return the setting of a trial; repeated calls return the same setting."""
    low, high = (config.base_learning_rate * LEARNING_RATE_STEP ** LEARNING_RATE_GRID[end] for end in (0, -1))
    batches = [batch_near(config.batch_size * factor, config) for factor in (BATCH_GRID[0] / 2, *BATCH_GRID)]
    sizes = list(dict.fromkeys(batch for batch in batches if batch is not None))
    schedule: ScheduleName = trial.suggest_categorical("schedule", TUNED_SCHEDULES)  # type: ignore[assignment]
    precision: Precision = trial.suggest_categorical("precision", list(precisions))  # type: ignore[assignment]
    return StaticSetting(
        learning_rate=rounded(trial.suggest_float("learning_rate", low, high, log=True)),
        batch_size=trial.suggest_categorical("batch_size", sizes),
        schedule=schedule,
        warmup_share=trial.suggest_categorical("warmup_share", WARMUP_SHARES),
        precision=precision,
    )


def _told(trial: Trial) -> float:
    return min(final_loss(trial.result), WORST_LOSS)


POPULATION, GENERATIONS = 12, 5
N_JUDGED = 4
"""Number of points of the front that are judged with every seed."""

Cost = Callable[[RunResult], float]


@dataclass(frozen=True)
class Front:
    """Result of NSGA-II."""

    best: tuple[RunSpec, ...]
    """Evenly picked points of the front, the cheapest first."""
    tried: tuple[RunSpec, ...]


def nsga2(
    config: RunConfig, precisions: Sequence[Precision], seed: int, cost: Cost, keep: Keep = not_kept
) -> Generator[list[RunSpec], list[RunResult], Front]:
    """Search settings, width and depth for low loss and low modelled cost of one run.

    Args:
        config: The case's own run.
        precisions: Precisions worth trying.
        seed: Seed of the search and of its runs.
        cost: Returns the modelled joules, or seconds, of a run.
        keep: Called with the study at the end.
    """
    sampler = optuna.samplers.NSGAIISampler(population_size=POPULATION, seed=seed)
    study = optuna.create_study(directions=["minimize", "minimize"], sampler=sampler)
    specs: dict[int, RunSpec] = {}
    for _ in range(GENERATIONS):
        asked = [study.ask() for _ in range(POPULATION)]
        wave = [_spec(trial, config, precisions, seed) for trial in asked]
        results = yield wave
        for trial, spec, result in zip(asked, wave, results, strict=True):
            specs[trial.number] = spec
            worst = not result.usable
            study.tell(trial, (WORST_LOSS, float("1e12")) if worst else (final_loss(result), cost(result)))
    keep(study)
    front = sorted(study.best_trials, key=lambda trial: trial.values[1])
    points = {specs[trial.number].config: specs[trial.number] for trial in front}  # it may request a run twice
    return Front(_evenly(list(points.values())), tuple(specs.values()))


def _spec(trial: optuna.Trial, config: RunConfig, precisions: Sequence[Precision], seed: int) -> RunSpec:
    setting = suggest(trial, config, precisions)
    sized = config
    if can_vary(config):
        width = trial.suggest_categorical("width", WIDTHS)
        depth = trial.suggest_categorical("depth", DEPTHS)
        sized = with_size(config, width, depth)
    chosen = setting.on(sized, seed=seed)
    return RunSpec(config=chosen, steering=SteeringSpec(evaluate_every=chosen.decisions))


def judged(spec: RunSpec, seed: int) -> RunSpec:
    """Return the run of a point of the front with a judged seed."""
    return RunSpec(config=replace(spec.config, seed=seed))


def _evenly(specs: Sequence[RunSpec]) -> tuple[RunSpec, ...]:
    """Pick evenly spaced points of the front, including both ends."""
    if len(specs) <= N_JUDGED:
        return tuple(specs)
    places = [round(i * (len(specs) - 1) / (N_JUDGED - 1)) for i in range(N_JUDGED)]
    return tuple(specs[place] for place in places)
