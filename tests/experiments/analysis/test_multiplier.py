from __future__ import annotations

import math
from collections.abc import Sequence
from itertools import pairwise

import numpy as np
import pytest

from trainpilot.experiments.analysis.multiplier import (
    WORST,
    Curve,
    CurveRun,
    compute_multiplier,
    fit_curve,
    product_score,
)
from trainpilot.experiments.analysis.statistics import Bounded, above, below, exactly, over_seeds

SHARES = (0.125, 0.25, 0.5, 1.0, 2.0)
BUDGET = 1_000.0


def law(share: float) -> float:
    """Return the loss at a share of the budget: 3 nats/token at all of it, falling towards a floor of 2."""
    return 2 + math.pow(share, -0.25)


def doublings(share: float) -> float:
    """Return a loss that every doubling of the budget multiplies by 0.96."""
    return 3.0 * math.pow(0.96, math.log2(share))


def curve_of(losses: dict[float, float | None], seed: int = 0) -> Curve:
    runs = [CurveRun(seed=seed, share=s, used=s * BUDGET, loss=loss) for s, loss in losses.items()]
    found = fit_curve(runs)
    assert found is not None
    return found


def curve_over_seeds(losses: np.ndarray, shares: Sequence[float] = SHARES, only_first: bool = False) -> Curve:
    """Fit the curve through losses of shape (seeds, shares)."""
    runs = [
        CurveRun(seed=seed, share=share, used=share * BUDGET, loss=float(losses[seed, index]))
        for seed in range(len(losses))
        for index, share in enumerate(shares)
        if share == 1 or seed == 0 or not only_first
    ]
    found = fit_curve(runs)
    assert found is not None
    return found


def value(found: Bounded) -> float:
    assert found.low == found.high
    return found.low


def test_between_two_budgets_the_logarithms_are_joined() -> None:
    curve = curve_of({share: doublings(share) for share in SHARES})

    # Half a doubling more multiplies the loss by sqrt(0.96).
    assert value(curve.needed(3.0 * math.sqrt(0.96))) == pytest.approx(BUDGET * math.sqrt(2))
    assert value(curve.needed(3.0 / 0.96**1.5)) == pytest.approx(BUDGET / 2**1.5)


def test_a_quarter_more_budget_comes_out_as_a_quarter_more() -> None:
    curve = curve_of({share: law(share) for share in SHARES})

    # The chord from 1 to 2 lies above the law.
    straight = math.pow(2, math.log(law(1.25) / law(1)) / math.log(law(2) / law(1)))
    assert straight == pytest.approx(1.261, abs=1e-3)
    assert value(compute_multiplier(law(1.25), BUDGET, curve)) == pytest.approx(1.25, rel=1e-3)
    assert value(compute_multiplier(law(1.05), BUDGET, curve)) == pytest.approx(1.05, rel=1e-3)
    assert value(compute_multiplier(law(0.3), BUDGET, curve)) == pytest.approx(0.3, rel=1e-3)


def test_the_baseline_against_itself_is_exactly_one_for_every_seed() -> None:
    rng = np.random.default_rng(0)
    losses = np.array([[law(share) for share in SHARES]]) * np.exp(rng.normal(size=(4, 5)) * 0.02)
    curve = curve_over_seeds(losses)

    worths = [compute_multiplier(losses[seed, 3], BUDGET, curve, seed=seed) for seed in range(4)]

    assert worths == [exactly(1.0)] * 4


def test_planted_quarter_lies_in_its_interval_as_often_as_5_seeds_can() -> None:
    # The range of five numbers holds their true median with probability 1 - 2/32 = 94 %.
    rng, hits, seeds = np.random.default_rng(1), 0, 5
    for _ in range(60):
        common = rng.normal(size=(seeds, 1)) * 0.002
        losses = np.array([[law(share) for share in SHARES]]) * np.exp(common + rng.normal(size=(seeds, 5)) * 0.003)
        method = law(1.25) * np.exp(common[:, 0] + rng.normal(size=seeds) * 0.003)
        curve = curve_over_seeds(losses)
        found = over_seeds([compute_multiplier(method[s], BUDGET, curve, seed=s) for s in range(seeds)])
        assert found.low is not None
        assert found.high is not None
        hits += found.low <= 1.25 <= found.high

    assert hits >= 48


def test_a_seed_that_is_worse_throughout_changes_nothing() -> None:
    losses = np.array([[law(share) * level for share in SHARES] for level in (1.0, 1.03, 0.98)])
    for only_first in (False, True):
        curve = curve_over_seeds(losses, only_first=only_first)

        worths = [value(curve.needed(law(1.3) * level, seed)) for seed, level in enumerate((1.0, 1.03, 0.98))]

        assert worths == pytest.approx([1.3 * BUDGET] * 3, rel=2e-3)


def test_a_seed_without_a_run_of_its_own_is_held_against_the_median() -> None:
    curve = curve_over_seeds(np.array([[doublings(share) * level for share in SHARES] for level in (1.0, 1.1, 0.9)]))

    assert value(curve.needed(3.0 * 0.96, seed=7)) == pytest.approx(2 * BUDGET)


def test_in_seconds_a_seeds_own_time_counts() -> None:
    runs = [CurveRun(seed=0, share=s, used=u, loss=loss) for s, u, loss in ((1.0, 10.0, 3.0), (2.0, 18.0, 2.7))]
    runs.append(CurveRun(seed=1, share=1.0, used=12.0, loss=3.1))
    curve = fit_curve(runs)

    assert curve is not None
    assert value(curve.needed(2.7, seed=0)) == pytest.approx(18.0)
    assert value(curve.needed(3.1 * 0.9, seed=1)) == pytest.approx(12.0 * 1.8)


def test_a_lucky_small_budget_makes_no_jump() -> None:
    # The run of half the budget came out better than the whole one; both are worth the whole one.
    curve = curve_of({0.25: 3.2, 0.5: 2.99, 1.0: 3.0, 2.0: 2.8})

    assert curve.points == ((math.log(0.25), math.log(3.2 / 3)), (0.0, 0.0), (math.log(2), math.log(2.8 / 3)))
    assert curve.n_pooled == 1
    assert curve.whole_beaten
    assert not curve.flat_end
    assert curve.needed(3.0) == exactly(BUDGET)
    assert value(curve.needed(2.999)) == pytest.approx(BUDGET, rel=0.02)
    assert value(curve.needed(3.001)) == pytest.approx(BUDGET, rel=0.02)


def test_two_budgets_out_of_order_meet_in_their_middle() -> None:
    curve = curve_of({0.125: 3.4, 0.25: 3.5, 1.0: 3.0})

    assert curve.budgets == pytest.approx((BUDGET * math.sqrt(0.125 * 0.25), BUDGET))
    assert curve.losses == pytest.approx((math.sqrt(3.4 * 3.5), 3.0))


@pytest.mark.parametrize("seed", range(25))
def test_whatever_the_noise_a_better_loss_never_needs_less(seed: int) -> None:
    rng = np.random.default_rng(seed)
    noise = np.exp(rng.normal(size=(3, 5)) * rng.choice([0.001, 0.02, 0.2]))
    losses = np.array([[law(share) for share in SHARES]]) * noise
    curve = curve_over_seeds(losses, only_first=bool(seed % 2))

    needed = [curve.needed(loss) for loss in np.linspace(6.0, 1.5, 200)]

    assert all(a.high <= b.high and a.low <= b.low for a, b in pairwise(needed))
    assert curve.needed(curve.whole[1]) == exactly(BUDGET)


def test_the_end_pieces_go_on_for_a_factor_of_two() -> None:
    curve = curve_of({share: doublings(share) for share in SHARES})

    assert value(curve.needed(doublings(3.9))) == pytest.approx(3.9 * BUDGET)
    assert value(curve.needed(doublings(1 / 15.9))) == pytest.approx(BUDGET / 15.9)
    assert curve.extrapolates(doublings(2.1))
    assert not curve.extrapolates(doublings(1.9))


def test_further_out_only_a_bound_is_known() -> None:
    curve = curve_of({share: doublings(share) for share in SHARES})

    better, worse = curve.needed(doublings(4.1)), curve.needed(doublings(1 / 17))
    assert (better.low, better.high) == pytest.approx((4 * BUDGET, math.inf))
    assert (worse.low, worse.high) == pytest.approx((-math.inf, BUDGET / 16))


def test_where_budget_brought_nothing_a_better_loss_needs_more() -> None:
    # Twice the budget overfits: what the pieces before it promise is a lower bound.
    curve = curve_of({0.5: 3.2, 1.0: 3.0, 2.0: 3.1})

    found = curve.needed(2.95)

    assert curve.flat_end
    assert not curve.whole_beaten
    assert found.high == math.inf
    assert 1.0 < found.low / BUDGET < 2.0


def test_a_single_budget_tells_better_from_worse_only() -> None:
    curve = curve_of({1.0: 3.0})

    assert curve.needed(3.0) == exactly(BUDGET)
    assert curve.needed(2.9) == above(BUDGET)
    assert curve.needed(3.1) == below(BUDGET)


def test_a_failed_run_is_worth_nothing() -> None:
    curve = curve_of({share: law(share) for share in SHARES})

    assert compute_multiplier(None, 500.0, curve) == below(0.0)
    assert compute_multiplier(None, 500.0, curve, search=10_000.0) == below(0.0)


def test_the_search_is_paid_on_the_baselines_side() -> None:
    curve = curve_of({share: doublings(share) for share in SHARES})

    # 8 runs of search and 2 budgets for the loss, against one run of half the budget.
    found = compute_multiplier(3.0 * 0.96, BUDGET / 2, curve, search=8 * BUDGET)

    assert value(found) == pytest.approx(20)


def test_a_budget_at_which_most_runs_fail_is_no_point() -> None:
    losses: list[tuple[int, float, float | None]] = [(s, share, law(share)) for s in range(3) for share in (0.5, 1.0)]
    losses += [(0, 2.0, None), (1, 2.0, None), (2, 2.0, law(2.0))]
    runs = [CurveRun(seed=s, share=share, used=share * BUDGET if loss else 0.0, loss=loss) for s, share, loss in losses]
    curve = fit_curve(runs)

    assert curve is not None
    assert curve.budgets == pytest.approx((BUDGET / 2, BUDGET))


def test_one_failed_run_of_three_gives_the_level_of_the_worse_other() -> None:
    runs = [CurveRun(seed=s, share=1.0, used=BUDGET, loss=loss) for s, loss in enumerate((3.0, 3.2, None))]
    curve = fit_curve(runs)

    assert curve is not None
    assert curve.whole == (BUDGET, 3.2)


@pytest.mark.parametrize("losses", [[], [None, None, 3.0]])
def test_without_a_whole_run_there_is_no_curve(losses: list[float | None]) -> None:
    runs = [CurveRun(seed=s, share=1.0, used=BUDGET, loss=loss) for s, loss in enumerate(losses)]

    assert fit_curve([*runs, CurveRun(seed=0, share=0.5, used=500.0, loss=3.3)]) is None


# Product score ------------------------------------------------------------------------------------------------------


def score(loss: float, base: float = 3.0, **ratios: float | None) -> float:
    found = product_score(loss, base, time=ratios.get("time") or 1.0, energy=ratios.get("energy"))
    assert found.low == found.high
    return found.low


def test_the_base_run_itself_scores_one() -> None:
    assert product_score(3.0, 3.0, time=1.0, energy=1.0) == exactly(1.0)


def test_the_published_four_bit_model_scores_as_by_hand() -> None:
    # GPT-2 on WikiText in 4 bits: perplexity +4.05 %, time +4.7 %, energy -50.4 %.
    # 1.0405^1.5 = 1.06136; (1.047 + 0.496) / 2 = 0.7715; together 0.81884.
    found = product_score(math.log(1.0405), 0.0, time=1.047, energy=0.496)

    assert found.low == pytest.approx(0.81884, abs=5e-5)


def test_time_and_energy_are_weighed() -> None:
    found = product_score(3.0, 3.0, time=2.0, energy=0.5, time_weight=1.0, energy_weight=3.0)

    assert found.low == pytest.approx(0.25 * 2.0 + 0.75 * 0.5)


def test_unknown_energy_leaves_the_time_alone() -> None:
    assert score(3.0, time=1.3, energy=None) == pytest.approx(1.3)


def test_a_tenth_of_a_nat_costs_sixteen_percent() -> None:
    assert score(3.1, time=1.0, energy=1.0) == pytest.approx(math.exp(0.15))


def test_a_failed_run_is_worse_than_the_worst_loss_that_is_told_apart() -> None:
    assert product_score(None, 3.0, time=0.1, energy=0.1) == above(WORST)
    assert score(9.0, time=1.0, energy=1.0) == pytest.approx(WORST)
