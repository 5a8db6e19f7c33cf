from __future__ import annotations

import math

import pytest

from trainpilot.experiments.analysis.multiplier import WORST, product_score
from trainpilot.experiments.analysis.statistics import above, exactly


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
