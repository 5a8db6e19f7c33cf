"""What a static baseline may choose, worked out by hand: the grid, the neighbours, the run of a setting."""

from __future__ import annotations

import math
from collections import Counter
from dataclasses import replace

import pytest
from comparison_runs import CONFIG

from trainpilot.experiments.compare.cases import (
    LEARNING_RATE_STEP,
    RESPECTS,
    TUNED_SCHEDULES,
    WARMUP_SHARES,
    StaticSetting,
    batch_near,
    grid,
    neighbours,
    rounded,
)

SETTING = StaticSetting(learning_rate=1e-2, batch_size=8, schedule="linear", warmup_share=0.1, precision="fp32")


# The grid


def test_the_grid_leans_upwards_from_the_cases_own_rate() -> None:
    settings = grid(CONFIG, ["fp32"])

    assert len(settings) == len(set(settings)) == 5 * 3 * 3
    assert {setting.learning_rate for setting in settings} == {3.16e-4, 1e-3, 3.16e-3, 1e-2, 3.16e-2}
    assert {setting.batch_size for setting in settings} == {4, 8, 16}
    assert {setting.schedule for setting in settings} == set(TUNED_SCHEDULES)
    assert {setting.warmup_share for setting in settings} == {0.1}


def test_every_precision_that_pays_is_in_the_grid() -> None:
    settings = grid(CONFIG, ["fp32", "bf16"])

    assert Counter(setting.precision for setting in settings) == {"fp32": 45, "bf16": 45}


@pytest.mark.parametrize(("batch_size", "batches"), [(1, {1, 2}), (2, {1, 2, 4}), (3, {3, 6}), (40, {20, 40})])
def test_batches_of_the_grid_are_whole_and_leave_sixteen_steps(batch_size: int, batches: set[int]) -> None:
    config = replace(CONFIG, batch_size=batch_size, decisions=5)

    assert {setting.batch_size for setting in grid(config, ["fp32"])} == batches


def test_a_budget_of_a_few_steps_has_no_grid() -> None:
    assert grid(replace(CONFIG, tokens=15 * 16, batch_size=1, decisions=1), ["fp32"]) == []


def test_a_batch_leaves_sixteen_steps() -> None:
    assert batch_near(50, CONFIG) == 50  # 50 x 16 tokens x 16 steps = 12,800
    assert batch_near(51, CONFIG) is None
    assert batch_near(1, CONFIG) == 1
    assert batch_near(0.5, CONFIG) is None
    assert batch_near(1.5, CONFIG) is None


def test_rates_are_rounded_to_three_digits() -> None:
    assert rounded(0.0123456) == 0.0123
    assert rounded(1e-3 * math.sqrt(10) * math.sqrt(10)) == 1e-2


# Neighbours


def test_neighbours_differ_by_one_step_in_one_respect() -> None:
    found = neighbours(SETTING, LEARNING_RATE_STEP, CONFIG)

    assert found == [
        replace(SETTING, learning_rate=3.16e-2),
        replace(SETTING, learning_rate=3.16e-3),
        replace(SETTING, batch_size=4),
        replace(SETTING, batch_size=16),
        replace(SETTING, warmup_share=0.05),
        replace(SETTING, warmup_share=0.2),
        replace(SETTING, schedule="cosine"),
        replace(SETTING, schedule="wsd"),
    ]


@pytest.mark.parametrize("respect", RESPECTS)
def test_neighbours_in_one_respect_differ_in_nothing_else(respect: str) -> None:
    found = neighbours(SETTING, 2.0, CONFIG, [respect])

    assert len(found) == 2
    assert all(replace(one, **{respect: getattr(SETTING, respect)}) == SETTING != one for one in found)


def test_neighbours_at_the_ends() -> None:
    smallest = replace(SETTING, batch_size=1, warmup_share=WARMUP_SHARES[0])
    largest = replace(SETTING, batch_size=32, warmup_share=WARMUP_SHARES[-1])

    assert neighbours(smallest, 2.0, CONFIG, ["batch_size"]) == [replace(smallest, batch_size=2)]
    assert neighbours(largest, 2.0, CONFIG, ["batch_size"]) == [replace(largest, batch_size=16)]
    assert neighbours(smallest, 2.0, CONFIG, ["warmup_share"]) == [replace(smallest, warmup_share=0.05)]
    assert neighbours(largest, 2.0, CONFIG, ["warmup_share"]) == [replace(largest, warmup_share=0.2)]


def test_a_schedule_that_is_not_tuned_has_the_tuned_ones_for_neighbours() -> None:
    constant = replace(SETTING, schedule="constant")

    assert [one.schedule for one in neighbours(constant, 2.0, CONFIG, ["schedule"])] == list(TUNED_SCHEDULES)


# Runs


def test_a_setting_on_the_whole_budget() -> None:
    config = replace(SETTING, batch_size=4, precision="bf16").on(CONFIG, seed=7)

    assert config == replace(
        CONFIG, base_learning_rate=1e-2, batch_size=4, schedule="linear", precision="bf16", warmup_tokens=1_280, seed=7
    )


@pytest.mark.parametrize(
    ("budget", "batch_size", "tokens", "decisions", "warmup_tokens"),
    [
        (0.25, 8, 3_200, 3, 320),  # 2.5 decisions, rounded up
        (1.25, 8, 16_000, 10, 1_600),
        (4.0, 8, 51_200, 10, 5_120),
        (0.125, 32, 1_600, 2, 160),  # 1,600 tokens hold three steps of 512
        (0.01, 8, 128, 1, 13),  # one step at least
        (0.01, 32, 512, 1, 51),
    ],
)
def test_a_setting_on_another_budget(
    budget: float, batch_size: int, tokens: int, decisions: int, warmup_tokens: int
) -> None:
    config = replace(SETTING, batch_size=batch_size).on(CONFIG, budget=budget, seed=0)

    assert (config.tokens, config.decisions, config.warmup_tokens) == (tokens, decisions, warmup_tokens)


def test_warm_up_leaves_something_of_the_run() -> None:
    config = replace(SETTING, batch_size=1, warmup_share=1.0).on(CONFIG, seed=0)

    assert config.warmup_tokens == CONFIG.tokens - 1
