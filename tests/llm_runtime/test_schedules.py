"""Schedules worked out by hand: learning rate, cool-down, and when the curvature is probed."""

from __future__ import annotations

import math
from itertools import pairwise
from pathlib import Path

import numpy as np
import pytest
from live_runs import case, live_run

from trainpilot.llm_runtime.config import RunConfig
from trainpilot.llm_runtime.schedules import SCHEDULES, Cooldown, Schedule, ScheduleName, probe_due, sequences_probed

# 1,000 tokens of which 200 warm up: the decay runs over the 800 from 200 to 1,000.
BY_HAND: dict[ScheduleName, dict[int, float]] = {
    "linear": {200: 1.0, 400: 0.75, 600: 0.5, 990: 0.0125, 1000: 0.0},
    # 0.1 + 0.45 (1 + cos(pi p)): cos(pi / 4) = 0.70711, cos(pi / 2) = 0, cos(pi) = -1
    "cosine": {200: 1.0, 400: 0.1 + 0.45 * 1.70711, 600: 0.55, 800: 0.1 + 0.45 * 0.29289, 1000: 0.1},
    # The last fifth of the decay begins at 840.
    "wsd": {200: 1.0, 600: 1.0, 840: 1.0, 920: 0.5, 984: 0.1, 1000: 0.0},
    "constant": {200: 1.0, 600: 1.0, 999: 1.0, 1000: 1.0},
}
POINTS = [(name, tokens, factor) for name, points in BY_HAND.items() for tokens, factor in points.items()]


def schedule(name: ScheduleName = "linear", warmup_tokens: int = 200) -> Schedule:
    return Schedule(name=name, budget_tokens=1_000, warmup_tokens=warmup_tokens)


@pytest.mark.parametrize(("name", "tokens", "factor"), POINTS)
def test_decay(name: ScheduleName, tokens: int, factor: float) -> None:
    assert schedule(name).factor(tokens, step_tokens=10) == pytest.approx(factor, abs=1e-5)


@pytest.mark.parametrize("name", SCHEDULES)
def test_warm_up_counts_the_step_itself(name: ScheduleName) -> None:
    factors = [schedule(name).factor(tokens, step_tokens=50) for tokens in (0, 50, 100, 150, 200)]
    assert factors == [0.25, 0.5, 0.75, 1.0, 1.0]


@pytest.mark.parametrize("name", SCHEDULES)
def test_no_warm_up(name: ScheduleName) -> None:
    assert schedule(name, warmup_tokens=0).factor(0, step_tokens=10) == 1.0


def test_a_batch_larger_than_the_warm_up() -> None:
    assert schedule().factor(0, step_tokens=500) == 1.0


def test_warm_up_depends_on_tokens_not_on_steps() -> None:
    # The same end of a step, reached with one large batch or with the last of many small ones.
    assert schedule().factor(0, step_tokens=120) == schedule().factor(110, step_tokens=10) == 0.6


@pytest.mark.parametrize("name", SCHEDULES)
def test_beyond_the_budget_the_end_holds(name: ScheduleName) -> None:
    assert schedule(name).factor(5_000, step_tokens=10) == schedule(name).factor(1_000, step_tokens=10)


@pytest.mark.parametrize("name", SCHEDULES)
def test_factor_stays_in_range_and_never_rises_after_warm_up(name: ScheduleName) -> None:
    factors = [schedule(name).factor(tokens, step_tokens=10) for tokens in range(200, 1_001)]
    assert all(0 <= factor <= 1 for factor in factors)
    assert all(later <= earlier for earlier, later in pairwise(factors))


def test_cool_down_takes_a_fifth_of_the_tokens_so_far() -> None:
    cooldown = Cooldown.begin(schedule(), tokens=600, step_tokens=10)

    assert (cooldown.start_tokens, cooldown.end_tokens, cooldown.start_factor) == (600, 720, 0.5)
    assert [cooldown.factor(tokens) for tokens in (600, 660, 690, 720, 800)] == [0.5, 0.25, 0.125, 0.0, 0.0]


def test_cool_down_ends_with_the_budget() -> None:
    cooldown = Cooldown.begin(schedule("constant"), tokens=900, step_tokens=10)

    assert cooldown.end_tokens == 1_000
    assert cooldown.factor(950) == 0.5


def test_cool_down_has_at_least_one_step() -> None:
    cooldown = Cooldown.begin(schedule(), tokens=20, step_tokens=10)

    # A fifth of 20 is 4. The factor stays what it was: (20 + 10) / 200.
    assert cooldown.end_tokens == 30
    assert cooldown.factor(20) == pytest.approx(0.15)


def test_cool_down_from_the_linear_schedule_meets_its_end() -> None:
    # A fifth of 850 is 170, more than is left: the fall to zero at the budget is what linear does anyway.
    cooldown = Cooldown.begin(schedule(), tokens=850, step_tokens=10)
    for tokens in (850, 900, 990):
        assert cooldown.factor(tokens) == pytest.approx(schedule().factor(tokens, 10))


def test_run_config_makes_the_schedule_in_whole_sequences() -> None:
    config = RunConfig(tokens=100_050, batch_size=4, sequence_length=100, decisions=10)

    made = config.base_schedule()

    assert (made.name, made.budget_tokens, made.warmup_tokens) == ("linear", 100_000, 2_001)
    assert RunConfig(warmup_tokens=0).base_schedule().warmup_tokens == 0


def test_mean_of_the_linear_schedule_is_half() -> None:
    factors = [schedule(warmup_tokens=0).factor(tokens, 10) for tokens in range(0, 1_000, 10)]
    assert math.fsum(factors) / 100 == pytest.approx(0.505)  # the first step is whole, the last one hundredth


# Probes -------------------------------------------------------------------------------------------------------------


def test_probe_ends_each_interval_of_the_first_fifth_then_one_in_four() -> None:
    decisions = np.arange(50)
    due = np.flatnonzero(probe_due(decisions, decisions / 50))
    assert due.tolist() == [*range(10), 12, 16, 20, 24, 28, 32, 36, 40, 44, 48]


def test_probe_sees_a_two_hundredth_of_an_interval_at_least_one_sequence() -> None:
    assert sequences_probed([0, 1, 100, 300, 1_000]).tolist() == [1, 1, 1, 2, 5]


def test_a_live_run_probes_by_the_plan_and_says_on_how_much(tmp_path: Path) -> None:
    run = live_run(case(tmp_path), probe=True)
    looked, told = [], []
    for _ in range(10):
        telemetry = run.advance(run.config.start(), 0.1)
        looked.append(run.sequences_probed)
        told.append(telemetry.probe_linear is not None)
    assert looked == [1, 1, 0, 0, 1, 0, 0, 0, 1, 0]
    assert told == [count > 0 for count in looked]
