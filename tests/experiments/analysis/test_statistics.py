from __future__ import annotations

import numpy as np
import pytest
from scipy import stats

from trainpilot.experiments.analysis.figures import Estimate
from trainpilot.experiments.analysis.statistics import (
    NEVER,
    Bounded,
    above,
    below,
    exactly,
    over_cases,
    over_seeds,
    sign_test,
)


def known(*values: float) -> list[Bounded]:
    return [exactly(value) for value in values]


def test_three_seeds_give_their_median_and_their_range() -> None:
    # A resample of three has the smallest number as its median in 7 of 27 cases, far more than 2.5 %.
    assert over_seeds(known(1.3, 1.0, 1.1)) == Estimate(value=1.1, low=1.0, high=1.3, n=3)


def test_seven_seeds_leave_the_outermost_out() -> None:
    # Four or more of seven draws are the lowest number in 1.0 % of the resamples, one of the lowest two in 10.8 %.
    found = over_seeds(known(1.0, 1.1, 1.2, 1.3, 1.4, 1.5, 1.6))

    assert (found.low, found.high) == (1.1, 1.5)


def test_the_interval_agrees_with_scipy() -> None:
    values = np.random.default_rng(3).normal(1.0, 0.1, size=101)

    found = over_seeds(known(*values))
    other = stats.bootstrap((values,), np.median, method="percentile", n_resamples=5_000, rng=1).confidence_interval

    assert found.value == np.median(values)
    assert found.low == pytest.approx(other.low, abs=0.01)
    assert found.high == pytest.approx(other.high, abs=0.01)


def test_over_cases_the_median_is_taken_of_the_cases_medians() -> None:
    found = over_cases([known(1.0, 1.2, 1.1), known(2.0, 2.1, 5.0), known(0.9, 0.5, 0.7)])

    assert found.value == 1.1
    assert found.n == 3


def test_over_cases_seeds_are_drawn_within_drawn_cases() -> None:
    # A case's median is its smallest seed in 7 of 27 resamples, its middle one in 13, its largest in 7. Both drawn
    # cases are the second one in a quarter of the resamples: 0.8 has the share 1/4 (7/27)^2 = 1.7 %, 0.85 or less
    # 7.9 %, 1.4 or less 95.0 %, 1.5 or less 98.3 %.
    found = over_cases([known(1.0, 1.1, 1.4), known(0.8, 0.9, 1.6)])

    assert (found.low, found.value, found.high) == pytest.approx((0.85, 1.0, 1.5))


def test_cases_with_different_numbers_of_seeds_can_be_mixed() -> None:
    found = over_cases([known(1.0, 1.2), known(0.9), known(1.1, 1.1, 1.3), []])

    assert found.value == pytest.approx(1.1)
    assert found.n == 3


def test_the_same_numbers_give_the_same_interval() -> None:
    values = [known(*np.random.default_rng(seed).normal(size=4)) for seed in range(5)]

    assert over_cases(values) == over_cases(values)


def test_nothing_has_no_median() -> None:
    assert over_seeds([]) == Estimate(value=None)
    assert over_cases([[], []]) == Estimate(value=None)


def test_one_number_has_no_interval() -> None:
    assert over_seeds(known(1.2)) == Estimate(value=1.2, n=1)


@pytest.mark.parametrize(
    ("values", "value", "censored"),
    [
        ([exactly(0.9), exactly(1.0), above(2.0)], 1.0, ""),
        ([exactly(0.9), above(1.5), above(2.0)], 1.5, ">"),
        ([below(0.1), below(0.0), exactly(0.9)], 0.1, "<"),
        ([below(0.1), exactly(0.5), above(2.0)], 0.5, ""),
        ([exactly(1.0), exactly(1.1), exactly(1.2), above(3.0)], pytest.approx(1.15), ""),
        ([exactly(1.0), above(3.0)], 2.0, ">"),
        ([exactly(1.0), NEVER, NEVER], None, ">"),
        ([below(0.5), above(2.0)], None, ""),
        # The bound lies above an exact number, so its rank is not known.
        ([below(1.5), exactly(1.0), exactly(1.2)], 1.2, "<"),
    ],
)
def test_a_median_is_a_bound_where_its_own_rank_is_one(
    values: list[Bounded], value: float | None, censored: str
) -> None:
    found = over_seeds(values)

    assert found.value == value
    assert found.censored == censored


def test_the_truth_behind_bounds_lies_where_the_estimate_says() -> None:
    rng = np.random.default_rng(0)
    for _ in range(60):
        truth = rng.lognormal(size=rng.integers(1, 8))
        limits = rng.lognormal(size=2)
        values = [
            below(max(limits)) if t < min(limits) else above(min(limits)) if t > max(limits) else exactly(t)
            for t in truth
        ]
        found = over_seeds(values)
        median = float(np.median(truth))
        if found.value is not None:
            assert {"": median == found.value, "<": median <= found.value, ">": median >= found.value}[found.censored]


def test_an_interval_without_upper_end_says_so() -> None:
    found = over_seeds([exactly(1.0), exactly(1.1), above(2.0)])

    assert (found.low, found.value, found.high) == (1.0, 1.1, None)


def test_a_failed_run_pulls_the_interval_down_to_zero() -> None:
    found = over_seeds([below(0.0), exactly(1.1), exactly(1.2)])

    assert (found.low, found.value, found.high) == (0.0, 1.1, 1.2)


def test_winning_eight_of_ten_cases_has_a_p_value_of_eleven_percent() -> None:
    # Two-sided: 2 (1 + 10 + 45) / 1024.
    found = sign_test([Estimate(value=1.1)] * 8 + [Estimate(value=0.9)] * 2)

    assert (found.wins, found.losses, found.ties) == (8, 2, 0)
    assert found.p_value == pytest.approx(0.109375)


def test_ties_and_unknown_cases_decide_nothing() -> None:
    found = sign_test(
        [
            Estimate(value=1.0),
            Estimate(value=1.0 + 1e-12),
            Estimate(value=None),
            Estimate(value=1.2, censored="<"),
            Estimate(value=0.8, censored=">"),
        ]
    )

    assert (found.wins, found.losses, found.ties) == (0, 0, 4)
    assert found.p_value == 1.0


def test_bounds_on_the_right_side_of_one_count() -> None:
    found = sign_test(
        [
            Estimate(value=2.0, censored=">"),
            Estimate(value=1.0, censored=">"),
            Estimate(value=1.0, censored="<"),
            Estimate(value=0.0, censored="<"),
        ]
    )

    assert (found.wins, found.losses) == (2, 2)


def test_without_cases_the_sign_test_says_nothing() -> None:
    assert sign_test([]).p_value == 1.0
