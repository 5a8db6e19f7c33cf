"""Optuna's searches on a known surface: the same every time, as dear as they say, with fronts that are fronts."""

from __future__ import annotations

import json
import math
from collections import Counter
from dataclasses import replace
from pathlib import Path
from statistics import fmean, median

import optuna
import pytest
from comparison_runs import CASE, CONFIG, TUNING_SEEDS, Bowl, drive, made_ledger, made_result, made_table, with_config

from trainpilot.experiments.compare.cases import TUNED_SCHEDULES, WARMUP_SHARES, all_sizes
from trainpilot.experiments.compare.programs import search_program
from trainpilot.experiments.compare.search import (
    GENERATIONS,
    HALVING_TRIALS,
    N_JUDGED,
    POPULATION,
    TPE_CONFIRMED,
    TPE_GENERATION,
    TPE_TRIALS,
    Front,
    Halved,
    Trials,
    final_loss,
    halving,
    judged,
    nsga2,
    suggest,
    tpe,
)
from trainpilot.experiments.results import RunResult, RunSpec, SteeringSpec, cost_key
from trainpilot.llm_runtime.models import PRESETS

OTHER_SEEDS = (2_000, 2_001, 2_002)
Waves = list[list[RunSpec]]


def diverges(spec: RunSpec) -> RunResult:
    return made_result(spec, None)


# What may be suggested


def test_suggestions_stay_within_the_grid_and_repeat() -> None:
    study = optuna.create_study(sampler=optuna.samplers.RandomSampler(seed=0))
    for trial in (study.ask() for _ in range(200)):
        setting = suggest(trial, CONFIG, ["fp32", "bf16"])

        assert suggest(trial, CONFIG, ["fp32", "bf16"]) == setting
        assert 3.16e-4 <= setting.learning_rate <= 3.17e-2
        assert setting.batch_size in (2, 4, 8, 16)
        assert setting.schedule in TUNED_SCHEDULES
        assert setting.warmup_share in WARMUP_SHARES
        assert setting.precision in ("fp32", "bf16")
        assert setting.on(CONFIG, seed=0).tokens == CONFIG.tokens


# TPE


def tpe_search(seeds: tuple[int, ...] = TUNING_SEEDS) -> tuple[Trials, Waves]:
    return drive(tpe(CONFIG, ["fp32"], seeds), Bowl())


def test_tpe_is_the_same_every_time_and_another_with_another_seed() -> None:
    assert tpe_search()[1] == tpe_search()[1] != tpe_search(OTHER_SEEDS)[1]


def test_tpe_asks_in_generations_and_confirms_its_best() -> None:
    trials, waves = tpe_search()
    *generations, confirmation = waves

    assert len(generations) == TPE_TRIALS // TPE_GENERATION
    assert all(len(wave) <= TPE_GENERATION for wave in generations)
    assert len(trials.confirmed) == TPE_CONFIRMED
    assert Counter(spec.config.seed for spec in confirmation) == {1_001: TPE_CONFIRMED, 1_002: TPE_CONFIRMED}
    assert set(trials.confirmed) == {trial.setting for trial in trials.ranked()[:TPE_CONFIRMED]}


def test_tpe_learns_from_what_it_is_told() -> None:
    trials, _ = tpe_search()
    losses = [final_loss(trial.result) for trial in trials.tried.values()]

    assert median(losses[len(losses) // 2 :]) < median(losses[: TPE_TRIALS // 4])
    assert trials.mean_loss(trials.best_confirmed(TUNED_SCHEDULES).setting) < 2.15  # 2.003 is the best there is


def test_tpe_bears_that_everything_diverges() -> None:
    trials, _ = drive(tpe(CONFIG, ["fp32"], TUNING_SEEDS), diverges)

    assert trials.mean_loss(trials.best_confirmed(TUNED_SCHEDULES).setting) == math.inf


# Successive halving


def halving_search(seeds: tuple[int, ...] = TUNING_SEEDS) -> tuple[Halved, Waves]:
    return drive(halving(CONFIG, ["fp32"], seeds), Bowl())


def test_halving_is_the_same_every_time_and_another_with_another_seed() -> None:
    assert halving_search()[1] == halving_search()[1] != halving_search(OTHER_SEEDS)[1]


def test_halving_gives_the_better_ones_twice_the_budget_again_and_again() -> None:
    found, waves = halving_search()

    assert [{spec.config.tokens for spec in wave} for wave in waves] == [{1_600}, {3_200}, {6_400}, {12_800}]
    assert len(waves[0]) == HALVING_TRIALS
    assert [len(wave) for wave in waves] == sorted((len(wave) for wave in waves), reverse=True)
    for shorter, longer in zip(found.trials, found.trials[1:], strict=False):
        assert set(longer.tried) <= set(shorter.tried)
        assert shorter.ranked()[0].setting in longer.tried  # the best of a rung always goes on
    assert found.best == found.trials[-1].ranked()[0]


def test_halving_takes_about_eight_runs() -> None:
    def runs(seed: int) -> float:
        _, waves = halving_search((seed, seed + 1))
        return sum(spec.config.tokens for wave in waves for spec in wave) / CONFIG.tokens

    # Sixteen eighths, and as much again on each of three rungs, if half of them goes on.
    taken = [runs(seed) for seed in range(1_000, 1_030)]
    assert fmean(taken) == pytest.approx(8, rel=0.2)
    assert max(taken) < 16


def test_halving_bears_that_everything_diverges() -> None:
    found, _ = drive(halving(CONFIG, ["fp32"], TUNING_SEEDS), diverges)

    assert final_loss(found.best.result) == math.inf


# NSGA-II


def size_of(spec: RunSpec) -> int:
    model = spec.config.model
    content = PRESETS[model] if model in PRESETS else json.loads(Path(model).read_text())
    return int(content["hidden_size"] * content["num_hidden_layers"])


def larger_is_better(spec: RunSpec) -> RunResult:
    """The bowl, and a little less loss for a larger model."""
    return made_result(spec, (Bowl().loss(spec.config) or 0) + 20 / size_of(spec))


def cost(result: RunResult) -> float:
    """Larger models and smaller batches cost more."""
    return size_of(result.spec) * (1 + 4 / result.spec.config.batch_size)


def front_search(seed: int = 1_000) -> tuple[Front, Waves]:
    return drive(nsga2(CONFIG, ["fp32"], seed, cost), larger_is_better)


def test_nsga2_is_the_same_every_time_and_another_with_another_seed() -> None:
    assert front_search()[1] == front_search()[1] != front_search(2_000)[1]


def test_nsga2_runs_generations_of_one_size() -> None:
    front, waves = front_search()

    assert [len(wave) for wave in waves] == [POPULATION] * GENERATIONS
    assert list(front.tried) == [spec for wave in waves for spec in wave]
    assert {spec.config.seed for spec in front.tried} == {1_000}
    assert {spec.steering.evaluate_every for spec in front.tried} == {10}
    assert len({spec.config.model for spec in front.tried}) > 3  # width and depth vary


def test_nothing_that_was_tried_beats_a_judged_point_in_both() -> None:
    for seed in (1_000, 1_005, 2_000):
        front, _ = front_search(seed)
        tried = [(final_loss(larger_is_better(spec)), cost(larger_is_better(spec))) for spec in front.tried]
        points = [(final_loss(larger_is_better(spec)), cost(larger_is_better(spec))) for spec in front.best]

        assert 2 <= len(points) == len({spec.config for spec in front.best}) <= N_JUDGED
        assert not [(a, b) for a in tried for b in points if a != b and a[0] <= b[0] and a[1] <= b[1]]
        assert [price for _, price in points] == sorted(price for _, price in points)
        assert min(price for _, price in tried) == points[0][1]
        assert min(loss for loss, _ in tried) == points[-1][0]


def test_what_diverged_is_not_on_the_front() -> None:
    def run(spec: RunSpec) -> RunResult:
        return diverges(spec) if spec.config.batch_size > 4 else larger_is_better(spec)

    front, _ = drive(nsga2(CONFIG, ["fp32"], 1_000, cost), run)
    assert {spec.config.batch_size for spec in front.best} <= {2, 4}


def test_nsga2_bears_that_everything_diverges() -> None:
    front, _ = drive(nsga2(CONFIG, ["fp32"], 1_000, cost), diverges)

    assert 1 <= len(front.best) <= N_JUDGED


def test_a_model_of_fixed_size_is_searched_over_settings_alone() -> None:
    config = replace(CONFIG, model="owner/name")
    front, _ = drive(nsga2(config, ["fp32"], 1_000, lambda result: 1 / result.spec.config.batch_size), Bowl())

    assert {spec.config.model for spec in front.tried} == {"owner/name"}


def test_a_judged_point_is_its_run_with_another_seed_and_looks_on_the_way() -> None:
    front, _ = front_search()
    spec = judged(front.best[0], 3)

    assert spec == RunSpec(config=replace(front.best[0].config, seed=3), steering=SteeringSpec())


# Their rows


@pytest.mark.parametrize(
    ("name", "tokens"), [("tuned-tpe", {12_800}), ("tuned-halving", {1_600, 3_200, 6_400, 12_800})]
)
def test_a_search_notes_its_sweep_and_judges_its_best(name: str, tokens: set[int]) -> None:
    ledger = made_ledger(seeds=(0, 1))
    _, waves = drive(search_program(ledger, CASE, name), Bowl())
    sweep = [row for row in ledger.rows if row.role == "sweep"]
    methods = [row for row in ledger.rows if row.role == "method"]

    assert {row.method for row in ledger.rows} == {name}
    assert {round(row.budget * CONFIG.tokens) for row in sweep} == tokens
    assert len(sweep) == sum(len(wave) for wave in waves[:-1])
    assert [row.seed for row in methods] == [0, 1]
    assert [spec.steering for spec in waves[-1]] == [RunSpec(config=CONFIG).steering] * 2 or name == "tuned-tpe"


def test_nsga2_needs_a_cost_table_for_every_size_and_judges_its_front() -> None:
    case = with_config(model="llama-nano")
    ledger = made_ledger(case=case)
    ledger.tables = {cost_key(sized): made_table() for sized in all_sizes(case.config)}
    drive(search_program(ledger, case, "nsga2"), larger_is_better)
    judged_rows = Counter(row.method for row in ledger.rows if row.role == "method")

    assert set(judged_rows.values()) == {2}
    assert list(judged_rows) == [f"nsga2-{number}" for number in range(1, len(judged_rows) + 1)]
    assert {row.method for row in ledger.rows if row.role == "sweep"} == {"nsga2"}
