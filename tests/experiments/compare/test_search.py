"""The search finds the best setting of a surface that is known, wherever it lies, and does not believe in luck."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import pytest
from comparison_runs import CONFIG, TUNING_SEEDS, Bowl, Run, drive, made_result

from trainpilot.experiments.compare.cases import TUNED_SCHEDULES, StaticSetting
from trainpilot.experiments.compare.execute import failed
from trainpilot.experiments.compare.search import (
    MAX_MOVES,
    N_CONFIRMED,
    N_RECONFIRMED,
    Trials,
    final_loss,
    retune,
    tune,
)
from trainpilot.experiments.results import RunResult, RunSpec
from trainpilot.llm_runtime.schedules import ScheduleName

SETTING = StaticSetting(learning_rate=1e-2, batch_size=8, schedule="linear", warmup_share=0.1, precision="fp32")
HALF_A_STEP = 1 / 16
"""Half of the last step of the learning rate, in decades."""


def search(run: Run, **options: Any) -> tuple[Trials, list[list[RunSpec]]]:
    return drive(tune(CONFIG, options.pop("precisions", ["fp32"]), TUNING_SEEDS, **options), run)


def best_of(trials: Trials, schedules: Sequence[ScheduleName] = TUNED_SCHEDULES) -> StaticSetting:
    return trials.best_confirmed(schedules).setting


def rate_error(found: StaticSetting, wanted: float) -> float:
    return abs(math.log10(found.learning_rate / wanted))


@pytest.mark.parametrize(
    "bowl",
    [
        Bowl(),
        Bowl(learning_rate=3.7e-3, schedule="cosine"),
        Bowl(learning_rate=2.1e-3, batch_size=1, warmup_share=0.02, schedule="wsd"),
        Bowl(learning_rate=2e-5, batch_size=16),  # below the grid
        Bowl(learning_rate=0.5, batch_size=32, warmup_share=0.4, schedule="cosine"),  # above the grid
    ],
)
def test_the_search_finds_the_best_setting_also_beyond_its_grid(bowl: Bowl) -> None:
    trials, _ = search(bowl)
    found = best_of(trials)

    assert rate_error(found, bowl.learning_rate) <= HALF_A_STEP + 1e-3
    assert (found.batch_size, found.schedule) == (bowl.batch_size, bowl.schedule)
    assert found.warmup_share == bowl.warmup_share


def test_every_schedule_gets_its_own_best_rate() -> None:
    """Here a cosine wants three times the rate of the others."""

    def run(spec: RunSpec) -> RunResult:
        cosine = spec.config.schedule == "cosine"
        return Bowl(learning_rate=3e-2 if cosine else 1e-2)(spec)

    trials, _ = search(run, extra=["constant"])

    assert rate_error(best_of(trials, ["linear"]), 1e-2) <= HALF_A_STEP + 1e-3
    assert rate_error(best_of(trials, ["cosine"]), 3e-2) <= HALF_A_STEP + 1e-3
    assert rate_error(best_of(trials, ["constant"]), 1e-2) <= HALF_A_STEP + 1e-3


def test_an_extra_schedule_is_searched_but_never_the_tuned_static() -> None:
    trials, _ = search(Bowl(schedule="constant"), extra=["constant"])

    assert best_of(trials).schedule != "constant"
    best = trials.mean_loss(best_of(trials, ["constant"]))
    assert best < trials.mean_loss(best_of(trials))
    assert "constant" not in {setting.schedule for setting in search(Bowl())[0].tried}


def test_the_better_precision_wins() -> None:
    trials, _ = search(Bowl(precision="bf16"), precisions=["fp32", "bf16"])

    assert best_of(trials).precision == "bf16"


def test_every_run_is_asked_for_once() -> None:
    trials, waves = search(Bowl(learning_rate=0.5, batch_size=1), extra=["constant"])
    configs = [spec.config for wave in waves for spec in wave]

    assert len(set(configs)) == len(configs) == len(trials.all_trials())
    assert len(waves[0]) == 45
    tried = [config for config in configs if config.seed == TUNING_SEEDS[0]]
    assert len(tried) == len(trials.tried)
    assert len(configs) - len(tried) == 2 * len(trials.confirmed) == 2 * 4 * N_CONFIRMED


def test_a_trial_is_looked_at_only_at_its_end() -> None:
    _, waves = search(Bowl())

    for spec in (spec for wave in waves for spec in wave):
        assert spec.steering.evaluate_every == spec.config.decisions
        assert spec.steering.kind == "keep"


def test_the_search_is_the_same_every_time() -> None:
    bowl = Bowl(learning_rate=3.7e-3, batch_size=2)

    assert search(bowl)[1] == search(bowl)[1]


# What diverges, fails or was lucky


def test_a_run_without_a_loss_counts_as_infinite() -> None:
    spec = RunSpec(config=CONFIG)

    assert final_loss(made_result(spec, 2.5)) == 2.5
    assert final_loss(made_result(spec, None)) == math.inf
    assert final_loss(failed(spec, "ab", "killed")) == math.inf


def test_the_search_goes_up_to_where_runs_diverge_and_not_beyond() -> None:
    trials, _ = search(Bowl(learning_rate=0.1, diverges_from=5e-2))
    found = best_of(trials)

    assert 5e-2 / 10**0.125 <= found.learning_rate < 5e-2
    assert trials.on_edge(trials.tried[found]) == ()


def test_where_everything_diverges_the_search_ends_with_an_infinite_loss() -> None:
    trials, waves = search(lambda spec: made_result(spec, None))

    assert trials.mean_loss(best_of(trials)) == math.inf
    assert len(waves) < 30


def test_a_setting_that_was_lucky_once_is_not_chosen() -> None:
    lucky = {3.16e-2, 3.16e-3}

    def run(spec: RunSpec) -> RunResult:
        result = Bowl()(spec)
        if spec.config.base_learning_rate not in lucky or spec.config.schedule != "linear":
            return result
        loss = 1.5 if spec.config.seed == TUNING_SEEDS[0] else None  # best of all, or diverged
        return made_result(spec, loss)

    trials, _ = search(run)

    assert trials.ranked()[0].setting.learning_rate in lucky
    assert best_of(trials).learning_rate not in lucky


def test_the_mean_is_taken_over_all_tuning_seeds() -> None:
    trials, _ = search(Bowl())

    # 1 + 1, and 0, 0.003 and 0.006 for the three seeds
    assert trials.mean_loss(SETTING) == pytest.approx(2.003)
    assert [trial.spec.config.seed for trial in trials.confirmed[SETTING]] == [1_001, 1_002]


# Edges


def test_a_best_value_inside_what_was_tried_is_on_no_edge() -> None:
    trials, _ = search(Bowl())

    assert trials.on_edge(trials.best_confirmed(TUNED_SCHEDULES)) == ()


def test_the_smallest_batch_there_can_be_is_no_edge() -> None:
    trials, _ = search(Bowl(batch_size=1))

    assert best_of(trials).batch_size == 1
    assert trials.on_edge(trials.best_confirmed(TUNED_SCHEDULES)) == ()


def test_the_largest_batch_that_leaves_enough_steps_is_an_edge() -> None:
    trials, _ = search(Bowl(batch_size=32))

    assert trials.on_edge(trials.best_confirmed(TUNED_SCHEDULES)) == ("batch_size",)


def test_the_longest_warm_up_is_an_edge() -> None:
    trials, _ = search(Bowl(warmup_share=0.4))

    assert trials.on_edge(trials.best_confirmed(TUNED_SCHEDULES)) == ("warmup_share",)


@pytest.mark.parametrize("rate", [1e20, 1e-20])
def test_a_rate_beyond_the_last_move_is_an_edge(rate: float) -> None:
    trials, waves = search(Bowl(learning_rate=rate))

    assert trials.on_edge(trials.best_confirmed(TUNED_SCHEDULES)) == ("learning_rate",)
    assert len(waves) <= 1 + 2 * MAX_MOVES + 3 * (2 + 2 * MAX_MOVES)


# Other budgets


def test_tuning_again_starts_from_the_best_setting_on_its_own_budget() -> None:
    trials = Trials(CONFIG, TUNING_SEEDS, 0.25)
    best, waves = drive(
        retune(trials, SETTING, ["learning_rate", "batch_size"]), Bowl(learning_rate=3e-2, batch_size=4)
    )

    assert waves[0] == [trials.spec(SETTING, TUNING_SEEDS[0])]
    assert {spec.config.tokens for wave in waves for spec in wave} == {3_200}
    assert rate_error(best.setting, 3e-2) <= 0.125 + 1e-3
    assert best.setting.batch_size == 4
    assert len(trials.confirmed) == N_RECONFIRMED


def test_tuning_again_leaves_alone_what_it_shall_not_respect() -> None:
    trials = Trials(CONFIG, TUNING_SEEDS, 0.5)
    bowl = Bowl(learning_rate=3e-2, batch_size=1, warmup_share=0.4, schedule="wsd")
    best, _ = drive(retune(trials, SETTING, ["learning_rate"]), bowl)

    assert best.setting == replace(SETTING, learning_rate=best.setting.learning_rate)
    assert {replace(setting, learning_rate=1e-2) for setting in trials.tried} == {SETTING}


def test_ranked_begins_with_the_lowest_loss_and_the_first_of_equals() -> None:
    trials = Trials(CONFIG, TUNING_SEEDS)
    settings = [
        replace(SETTING, learning_rate=rate, schedule=name) for rate in (1e-3, 1e-2) for name in TUNED_SCHEDULES
    ]
    drive(trials.run(settings), lambda spec: made_result(spec, 2.0 + (spec.config.base_learning_rate < 5e-3)))

    assert [trial.setting for trial in trials.ranked()] == [*settings[3:], *settings[:3]]
    assert [trial.setting.learning_rate for trial in trials.ranked("wsd")] == [1e-2, 1e-3]
