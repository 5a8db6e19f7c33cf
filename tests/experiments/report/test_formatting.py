from __future__ import annotations

import pytest

from trainpilot.experiments.analysis.figures import Estimate, SignTest
from trainpilot.experiments.report.formatting import (
    DASH,
    SPACE,
    Cell,
    count,
    duration,
    listed,
    loss,
    multiplier,
    percent,
    probability,
    quantity,
    rate,
    ratio,
    score,
    share,
    si,
    sign_test,
)


def plain(text: object) -> str:
    """Return text with ordinary spaces: those of the report keep a figure and its unit on one line."""
    return str(text).replace(SPACE, " ")


def test_a_multiplier_stands_with_its_interval() -> None:
    cell = multiplier(Estimate(value=1.03, low=0.98, high=1.07, n=8))

    assert str(cell) == "1.03 [0.98, 1.07]"
    assert cell.tone == "", "1 lies in the interval"
    assert cell.title == "median of 8 cases, 95 % interval"


@pytest.mark.parametrize(("sign", "text"), [("<", "< 0.25 [0.00, 0.25]"), (">", "> 0.25 [0.00, 0.25]")])
def test_a_bound_says_that_it_is_one(sign: str, text: str) -> None:
    estimate = Estimate(value=0.25, low=0.0, high=0.25, n=3, censored=sign)  # type: ignore[arg-type]

    assert plain(multiplier(estimate)).replace("[0,", "[0.00,") == text


def test_an_interval_without_upper_end_is_open() -> None:
    assert plain(multiplier(Estimate(value=2.0, low=1.5, n=3, censored=">"))) == "> 2.00 [1.50, ∞)"


@pytest.mark.parametrize(
    ("low", "high", "tone"), [(1.01, 1.2, "better"), (0.8, 0.99, "worse"), (1.0, 1.2, ""), (1.5, None, "better")]
)
def test_a_multiplier_has_a_tone_where_its_interval_lies_on_one_side_of_1(
    low: float, high: float | None, tone: str
) -> None:
    assert multiplier(Estimate(value=1.0, low=low, high=high, n=3)).tone == tone


def test_of_a_product_score_less_is_better() -> None:
    assert score(Estimate(value=0.9, low=0.8, high=0.95, n=3)).tone == "better"
    assert score(Estimate(value=1.2, low=1.1, high=1.3, n=3)).tone == "worse"


def test_a_method_that_mostly_failed_is_worth_0() -> None:
    assert multiplier(Estimate(value=0.0, low=0.0, high=0.0, n=3, censored="<")) == Cell(
        text="0", title="half of its runs or more diverged or failed", tone="worse"
    )


def test_what_is_unknown_is_a_dash_that_says_why() -> None:
    nothing = Estimate(value=None)

    for cell in (
        multiplier(nothing, "why"),
        multiplier(None, "why"),
        quantity(nothing, "J", "why"),
        loss(nothing, "why"),
    ):
        assert cell == Cell(text=DASH, title="why")
    assert score(nothing).text == sign_test(None).text == share(0, 0).text == DASH
    assert sign_test(SignTest(wins=0, losses=0, ties=0, p_value=1.0)).text == DASH


def test_a_sign_test_counts_cases() -> None:
    cell = sign_test(SignTest(wins=6, losses=1, ties=1, p_value=0.125))

    assert str(cell) == "6 of 8 p = 0.12"
    assert cell.title == "better on 6, worse on 1, the same on 1"


@pytest.mark.parametrize(("p", "text"), [(0.29, "p = 0.29"), (0.0078, "p = 0.008"), (0.0001, "p < 0.001")])
def test_small_probabilities_have_more_digits(p: float, text: str) -> None:
    assert probability(p) == text


@pytest.mark.parametrize(
    ("value", "unit", "text"),
    [
        (163840, "", "164 k"),
        (999_600, "", "1.00 M"),
        (12.34, "J", "12.3 J"),
        (0.0125, "J", "12.5 mJ"),
        (2300, "J", "2.30 kJ"),
        (0, "J", "0 J"),
    ],
)
def test_quantities_have_three_digits_and_a_prefix(value: float, unit: str, text: str) -> None:
    assert plain(si(value, unit)) == text


@pytest.mark.parametrize(("seconds", "text"), [(12.34, "12.3 s"), (210, "3.5 min"), (8640, "2.4 h")])
def test_seconds_are_written_as_they_are_read(seconds: float, text: str) -> None:
    assert plain(duration(seconds)) == text


def test_a_loss_of_which_only_a_bound_is_known_says_so() -> None:
    assert plain(loss(Estimate(value=8.0, n=3, censored=">"))) == "> 8.0000"
    assert plain(loss(Estimate(value=2.0, low=1.9, high=2.1, n=3))) == "2.0000 [1.9000, 2.1000]"


def test_small_words() -> None:
    assert [ratio(x) for x in (0.05, 0.5, 1.234, 58.04, 1234.0)] == ["0.05", "0.50", "1.23", "58.0", "1,234"]
    assert [rate(x) for x in (3e-4, 1.12e-3, 1.0)] == ["3e-4", "1.12e-3", "1e0"]
    assert [count(1, "case"), count(3, "case")] == ["1 case", "3 cases"]
    assert [listed(x) for x in ([], ["a"], ["a", "b"], ["a", "b", "c"])] == ["", "a", "a and b", "a, b and c"]
    assert plain(percent(0.0526, 1)) == "5.3 %"
    assert share(2, 24).tone == "bad"
    assert share(0, 24).tone == ""
