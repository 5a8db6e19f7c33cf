"""Search for static settings with Optuna: TPE, successive halving, and NSGA-II for loss against cost.

Settings are asked for in generations of a fixed size and told in their order, so that the number of processes changes
nothing.
"""

from __future__ import annotations

from collections.abc import Generator, Sequence
from dataclasses import dataclass
from random import Random

import optuna

from trainpilot.experiments.compare.records import RunResult, RunSpec
from trainpilot.experiments.compare.settings import (
    BATCH_GRID,
    LEARNING_RATE_GRID,
    LEARNING_RATE_STEP,
    TUNED_SCHEDULES,
    WARMUP_SHARES,
    Setting,
    batch_near,
    rounded,
)
from trainpilot.experiments.compare.tuning import Search, Trial, Trials, final_loss
from trainpilot.llm_runtime.config import Precision, RunConfig
from trainpilot.llm_runtime.schedules import ScheduleName

TPE_TRIALS, TPE_GENERATION = 60, 6
TPE_CONFIRMED = 9
HALVING_TRIALS = 16
HALVING_RUNGS = (1, 2, 4, 8)
"""Eighths of the budget; every rung is a run with a whole schedule of its own."""
WORST_LOSS = 20.0
"""What a diverged run is told as, in nats/token; far above the loss of guessing."""

optuna.logging.set_verbosity(optuna.logging.WARNING)


def tpe(config: RunConfig, precisions: Sequence[Precision], seeds: Sequence[int]) -> Search:
    """Search with the tree-structured Parzen estimator, and confirm its best settings as the grid's are."""
    study = optuna.create_study(sampler=optuna.samplers.TPESampler(seed=seeds[0], constant_liar=True))
    trials = Trials(config, seeds)
    for _ in range(TPE_TRIALS // TPE_GENERATION):
        asked = [study.ask() for _ in range(TPE_GENERATION)]
        done = yield from trials.run([suggest(trial, config, precisions) for trial in asked])
        by_setting = {found.setting: found for found in done}
        for trial in asked:
            study.tell(trial, _told(by_setting[suggest(trial, config, precisions)]))
    yield from trials.confirm(trial.setting for trial in trials.ranked()[:TPE_CONFIRMED])
    return trials


@dataclass(frozen=True)
class Halved:
    """What successive halving found, and all it ran on the way."""

    best: Trial
    trials: tuple[Trials, ...]
    """One for each rung."""


def halving(
    config: RunConfig, precisions: Sequence[Precision], seeds: Sequence[int]
) -> Generator[list[RunSpec], list[RunResult], Halved]:
    """Try random settings on an eighth of the budget, and those that do well on more and more of it.

    The whole search uses about as many tokens as eight runs.
    """
    pruner = optuna.pruners.SuccessiveHalvingPruner(min_resource=1, reduction_factor=2)
    study = optuna.create_study(sampler=optuna.samplers.RandomSampler(seed=seeds[0]), pruner=pruner)
    survivors = [study.ask() for _ in range(HALVING_TRIALS)]
    order = Random(seeds[0])
    rungs: list[Trials] = []
    done: list[Trial] = []
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
            survivors = [trial for trial in order.sample(survivors, len(survivors)) if not trial.should_prune()]
    return Halved(min(done, key=lambda trial: final_loss(trial.result)), tuple(rungs))


def suggest(trial: optuna.Trial, config: RunConfig, precisions: Sequence[Precision]) -> Setting:
    """Return the setting that a trial stands for; asked twice, it is the same."""
    low, high = (config.base_learning_rate * LEARNING_RATE_STEP ** LEARNING_RATE_GRID[end] for end in (0, -1))
    batches = [batch_near(config.batch_size * factor, config) for factor in (BATCH_GRID[0] / 2, *BATCH_GRID)]
    sizes = list(dict.fromkeys(batch for batch in batches if batch is not None))
    schedule: ScheduleName = trial.suggest_categorical("schedule", TUNED_SCHEDULES)  # type: ignore[assignment]
    precision: Precision = trial.suggest_categorical("precision", list(precisions))  # type: ignore[assignment]
    return Setting(
        learning_rate=rounded(trial.suggest_float("learning_rate", low, high, log=True)),
        batch_size=trial.suggest_categorical("batch_size", sizes),
        schedule=schedule,
        warmup_share=trial.suggest_categorical("warmup_share", WARMUP_SHARES),
        precision=precision,
    )


def _told(trial: Trial) -> float:
    return min(final_loss(trial.result), WORST_LOSS)
