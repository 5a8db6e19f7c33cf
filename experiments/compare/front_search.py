"""Search a front of loss against cost with Optuna's NSGA-II: over settings, and over the model's width and depth."""

from __future__ import annotations

from collections.abc import Callable, Generator, Sequence
from dataclasses import dataclass, replace

import optuna

from trainpilot.experiments.compare.optuna_search import WORST_LOSS, suggest
from trainpilot.experiments.compare.records import RunResult, RunSpec, Steering
from trainpilot.experiments.compare.tuning import final_loss
from trainpilot.experiments.compare.variants import DEPTHS, WIDTHS, can_vary, with_size
from trainpilot.llm_runtime.config import Precision, RunConfig

POPULATION, GENERATIONS = 12, 5
N_JUDGED = 4
"""So many points of the front are judged with every seed."""

Cost = Callable[[RunResult], float]


@dataclass(frozen=True)
class Front:
    """What NSGA-II found."""

    best: tuple[RunSpec, ...]
    """Evenly picked points of the front, the cheapest first."""
    tried: tuple[RunSpec, ...]


def nsga2(
    config: RunConfig, precisions: Sequence[Precision], seed: int, cost: Cost
) -> Generator[list[RunSpec], list[RunResult], Front]:
    """Search settings, width and depth for low loss and low modelled cost of one run.

    Args:
        config: The case's own run.
        precisions: Precisions worth trying.
        seed: Of the search and of its runs.
        cost: Modelled joules, or seconds, of a run.
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
    front = sorted(study.best_trials, key=lambda trial: trial.values[1])
    points = {specs[trial.number].config: specs[trial.number] for trial in front}  # it may ask for a run twice
    return Front(_evenly(list(points.values())), tuple(specs.values()))


def _spec(trial: optuna.Trial, config: RunConfig, precisions: Sequence[Precision], seed: int) -> RunSpec:
    setting = suggest(trial, config, precisions)
    sized = config
    if can_vary(config):
        width = trial.suggest_categorical("width", WIDTHS)
        depth = trial.suggest_categorical("depth", DEPTHS)
        sized = with_size(config, width, depth)
    chosen = setting.on(sized, seed=seed)
    return RunSpec(config=chosen, steering=Steering(evaluate_every=chosen.decisions))


def judged(spec: RunSpec, seed: int) -> RunSpec:
    """Return the run of a point of the front with a judged seed."""
    return RunSpec(config=replace(spec.config, seed=seed))


def _evenly(specs: Sequence[RunSpec]) -> tuple[RunSpec, ...]:
    """Pick points along the front, both ends among them."""
    if len(specs) <= N_JUDGED:
        return tuple(specs)
    places = [round(i * (len(specs) - 1) / (N_JUDGED - 1)) for i in range(N_JUDGED)]
    return tuple(specs[place] for place in places)
