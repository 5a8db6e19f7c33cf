from __future__ import annotations

from dataclasses import replace

import pytest
from report_input import report_input

from trainpilot.experiments.analysis.figures import Estimate, SignTest
from trainpilot.experiments.report.formatting import SPACE
from trainpilot.experiments.report.page import claim, find_headline
from trainpilot.experiments.report.report_data import ReportData

SURE = SignTest(wins=8, losses=0, ties=0, p_value=0.008)
UNSURE = SignTest(wins=5, losses=3, ties=0, p_value=0.73)


@pytest.mark.parametrize(
    ("value", "low", "high", "test", "said"),
    [
        (1.25, 1.1, 1.4, SURE, "it needs 20 % fewer tokens than that"),
        (1.25, 1.1, 1.4, UNSURE, "it seems to need 20 % fewer tokens than that"),
        (1.25, 0.9, 1.4, SURE, "it seems to need 20 % fewer tokens than that"),
        (1.25, 0.9, 1.4, UNSURE, "it is neither clearly better nor clearly worse than that"),
        (0.8, 0.7, 0.9, SURE, "it needs 25 % more tokens than that"),
        (0.8, 0.7, 0.9, UNSURE, "it seems to need 25 % more tokens than that"),
        (0.25, 0.2, 0.3, SURE, "it needs 4.00 times the tokens of that"),
        (1.001, 1.0005, 1.002, SURE, "it is neither clearly better nor clearly worse than that"),
    ],
)
def test_a_claim_is_as_strong_as_interval_and_sign_test_together(
    value: float, low: float, high: float, test: SignTest, said: str
) -> None:
    estimate = Estimate(value=value, low=low, high=high, n=8)

    assert claim("it", estimate, test, "that").replace(SPACE, " ") == said


def test_a_bound_is_claimed_as_a_bound() -> None:
    better = Estimate(value=4.0, low=2.0, n=8, censored=">")
    worse = Estimate(value=0.25, low=0.0, high=0.3, n=8, censored="<")

    assert "more than 75" in claim("it", better, SURE, "that")
    assert claim("it", worse, SURE, "that") == "it needs more than 4.00 times the tokens of that"


def test_a_method_that_mostly_failed_claims_nothing() -> None:
    assert "diverged or failed" in claim("it", Estimate(value=0.0, n=8, censored="<"), SURE, "that")
    assert "could not be compared" in claim("it", Estimate(value=None), None, "that")


def material(*methods: str, n_cases: int = 8) -> ReportData:
    return ReportData(*report_input(n_cases, methods, seeds=(1,)).all())


def test_headline_is_about_the_first_policy_even_if_another_is_better() -> None:
    found = find_headline(material("tuned", "cosine", "policy:agent@0,1,1", "policy:agent", "tuned-tpe"))

    assert found.subject == "policy:agent", "the first in the comparison's order"
    assert found.title.startswith("agent ")
    assert "agent, saving first" in found.lead[1]


def test_without_a_policy_it_is_about_the_best_and_says_so() -> None:
    found = find_headline(material("tuned", "cosine", "seesaw", "schedule-free"))

    assert found.subject == "schedule-free"
    assert found.title.startswith("schedule-free AdamW needs 25"), "worth 0.8 is a quarter more tokens"
    assert "; it " in found.title, "and against the untuned default"
    assert "no policy was compared" in found.lead[1]


def test_cases_seeds_methods_and_runs_are_counted() -> None:
    text = find_headline(material("tuned", "cosine", "policy:agent", n_cases=3)).lead[0]

    assert text.startswith("3 methods on 3 cases with 1 paired seed each, 12 runs in all.")
    assert "not finished" not in text


def test_cases_without_runs_are_not_counted_as_compared() -> None:
    whole = material("tuned", "cosine", n_cases=2)
    half = replace(whole.figures, cases=tuple(c for c in whole.figures.cases if c.case == "llama-0"))

    text = find_headline(ReportData(whole.comparison, whole.results, whole.tables, half)).lead[0]

    assert "on 1 case with" in text
    assert "not finished: 1 case" in text


def test_cautions_name_failed_checks_and_the_notes() -> None:
    cautions = find_headline(material("tuned", "policy:agent", n_cases=1)).cautions

    assert any("One case" in caution for caution in cautions)
    assert any("planted budget" in caution for caution in cautions)
    assert any("extrapolated" in caution for caution in cautions)
    assert [caution.split()[0] for caution in cautions[2:]] == ["Conclusions", "On"], "what it rests on, then the notes"


def test_a_gain_over_the_tuned_static_is_presumed_a_fault() -> None:
    good = material("tuned", "policy:agent")
    methods = tuple(
        replace(m, multipliers={**m.multipliers, "tuned": {"tokens": Estimate(value=1.2, low=1.1, high=1.3, n=8)}})
        for m in good.figures.methods
    )

    cautions = find_headline(
        ReportData(good.comparison, good.results, good.tables, replace(good.figures, methods=methods))
    ).cautions

    assert any("presumed to be a fault" in caution for caution in cautions)


def test_with_baselines_alone_it_is_about_tuned_against_untuned() -> None:
    found = find_headline(material("tuned", "cosine"))

    assert found.subject == "tuned"
    assert found.title.endswith("fewer tokens than the untuned default")
    assert ";" not in found.title


def test_nothing_to_compare_is_said() -> None:
    found = find_headline(material("cosine", n_cases=1))

    assert found.subject is None
    assert "no compute multiplier" in found.title
