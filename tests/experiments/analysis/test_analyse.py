from __future__ import annotations

import json
import math
from collections.abc import Mapping
from dataclasses import replace

import pytest
from planted_comparison import EFFICIENCIES, STEP_J, STEP_S, STEP_TOKENS, TOKENS, Planted, PowerLaw, note

from trainpilot.experiments.analysis.analyse import analyse
from trainpilot.experiments.analysis.figures import AXES, BASELINES, CaseFigures, Figures, MethodFigures, SanityCheck
from trainpilot.experiments.results import Comparison

RUN_S, RUN_J = TOKENS / STEP_TOKENS * STEP_S, TOKENS / STEP_TOKENS * STEP_J
SMALL = {"cosine": 0.5, "tuned": 1.0, "policy:planted": 0.8}


def planted(**changes: object) -> Planted:
    return Planted(**{"efficiencies": SMALL, **changes})  # type: ignore[arg-type]


def method(figures: Figures, name: str) -> MethodFigures:
    return next(found for found in figures.methods if found.method == name)


def on_case(figures: Figures, name: str, case: str = "planted-a") -> CaseFigures:
    return next(found for found in figures.cases if (found.case, found.method) == (case, name))


def check(figures: Figures, start: str) -> SanityCheck:
    return next(found for found in figures.checks if found.name.startswith(start))


def with_rows(made: Planted, **by_name: object) -> Comparison:
    return replace(made.comparison(), **by_name)  # type: ignore[arg-type]


@pytest.fixture(scope="module")
def exact() -> Figures:
    return Planted().figures()


@pytest.fixture(scope="module")
def noisy() -> Figures:
    return Planted(noise=0.003, cases=("planted-a", "planted-b", "planted-c")).figures()


@pytest.mark.parametrize(("name", "efficiency"), [item for item in EFFICIENCIES.items() if item[0] != "check-budget"])
def test_every_planted_efficiency_is_found_again(exact: Figures, name: str, efficiency: float) -> None:
    found = method(exact, name).multipliers

    for axis in AXES:
        assert found["tuned"][axis].value == pytest.approx(efficiency, rel=2e-3)
        assert found["untuned"][axis].value == pytest.approx(efficiency / EFFICIENCIES["cosine"], rel=2e-3)


def test_the_planted_quarter_comes_out_as_a_quarter(exact: Figures, noisy: Figures) -> None:
    assert method(exact, "check-budget").multipliers["tuned"]["tokens"].value == pytest.approx(1.25, rel=2e-3)
    found = method(noisy, "check-budget").multipliers["tuned"]["tokens"]
    assert found.low is not None
    assert found.high is not None
    assert found.low < 1.25 < found.high


def test_the_baseline_against_itself_is_one_whatever_the_noise(noisy: Figures) -> None:
    for name, baseline in (("check-self", "tuned"), ("tuned", "tuned"), ("cosine", "untuned")):
        for axis in AXES:
            found = method(noisy, name).multipliers[baseline][axis]
            assert (found.low, found.value, found.high) == pytest.approx((1, 1, 1))


def test_the_planted_checks_pass(exact: Figures, noisy: Figures) -> None:
    for figures in (exact, noisy):
        assert [found.name for found in figures.checks if not found.passed] == []


def test_with_the_sweep_paid_the_baseline_needs_it_on_top(exact: Figures) -> None:
    # The search of four runs, and what the loss is worth.
    assert exact.sweep_costs["planted-a"] == pytest.approx(
        {"tokens": 4 * TOKENS, "time_s": 4 * RUN_S, "energy_j": 4 * RUN_J}
    )
    found = method(exact, "policy:planted").multipliers["tuned_with_sweep"]
    assert found["tokens"].value == pytest.approx(4 + 0.95, rel=1e-3)
    # What was itself found by that search has paid for it too: (4 + 0.9) / (4 + 1).
    assert method(exact, "tuned-cosine").multipliers["tuned_with_sweep"]["tokens"].value == pytest.approx(
        0.98, rel=1e-3
    )
    assert method(exact, "tuned").multipliers["tuned_with_sweep"]["tokens"].value == pytest.approx(1)


def test_break_even_counts_the_runs_that_earn_the_training_back(exact: Figures) -> None:
    # Each run saves 4.95 runs' joules less its own: 1000 J / (3.95 x 200 J).
    found = method(exact, "policy:planted").break_even_runs

    assert found is not None
    assert found.value == pytest.approx(1_000 / 790, rel=1e-3)
    assert method(exact, "tuned").break_even_runs is None


def test_a_policy_that_saves_nothing_never_breaks_even() -> None:
    figures = planted(n_trials=1, efficiencies={**SMALL, "policy:planted": 0.05}).figures()
    # The search is one run, 200 J. The loss is worth less than a sixteenth of another, so that a run saves < 12.5 J.
    some = method(figures, "policy:planted").break_even_runs
    failing = [("planted-a", "policy:planted", seed) for seed in (0, 1)]
    never = method(planted(failing=failing, cases=("planted-a",)).figures(), "policy:planted").break_even_runs

    assert some is not None
    assert some.value == pytest.approx(80)
    assert some.censored == ">"
    assert never is not None
    assert (never.value, never.censored) == (None, ">")


def test_the_target_is_the_untuned_defaults_loss(exact: Figures) -> None:
    assert exact.targets["planted-a"] == pytest.approx(PowerLaw().loss(0.5 * TOKENS))
    reached = on_case(exact, "tuned").to_target

    # The tuned static is there after half its budget: 2.5 of 5 intervals, between the readings at 2 and 3.
    law = PowerLaw()
    before, after, target = law.loss(0.4 * TOKENS), law.loss(0.6 * TOKENS), law.loss(0.5 * TOKENS)
    tokens = TOKENS * (0.4 + 0.2 * (before - target) / (before - after))
    assert (reached.n_reached, reached.n_runs) == (3, 3)
    assert reached.tokens.value == pytest.approx(tokens)
    assert reached.time_s.value == pytest.approx(tokens / TOKENS * RUN_S)
    assert reached.energy_j.value == pytest.approx(tokens / TOKENS * RUN_J)


def test_a_target_that_is_never_reached_is_a_bound(exact: Figures) -> None:
    reached = on_case(exact, "constant").to_target

    assert reached.n_reached == 0
    assert (reached.tokens.value, reached.tokens.censored) == (TOKENS, ">")
    assert reached.tokens.high is None


def test_a_case_can_bring_its_own_target() -> None:
    made = planted()
    cases = tuple(replace(case, target_loss=7.9) for case in made.comparison().cases)
    figures = analyse(with_rows(made, cases=cases), made.results, made.tables())

    # The first look after the start, at 8.0 nats, is far below: a thirtieth of the first interval is enough.
    assert figures.targets == {"planted-a": 7.9, "planted-b": 7.9}
    first = PowerLaw().loss(0.2 * TOKENS)
    assert on_case(figures, "tuned").to_target.tokens.value == pytest.approx(0.2 * TOKENS * 0.1 / (8.0 - first))


def test_failures_are_counted_and_count_as_worst() -> None:
    failing = [("planted-a", "policy:planted", seed) for seed in (0, 1)]
    figures = planted(failing=failing).figures()
    found = on_case(figures, "policy:planted")

    assert (found.n_runs, found.n_diverged, found.n_failed) == (3, 2, 0)
    assert (found.validation_loss.value, found.validation_loss.censored) == (8.0, ">")
    assert (found.multipliers["tuned"]["tokens"].value, found.multipliers["tuned"]["tokens"].censored) == (0.0, "<")
    assert found.multipliers["tuned"]["tokens"].high == pytest.approx(0.8, rel=1e-3)
    assert found.product_score.value == pytest.approx(math.exp(3))
    assert found.product_score.censored == ">"
    everywhere = method(figures, "policy:planted")
    assert (everywhere.n_runs, everywhere.n_diverged) == (6, 2)
    assert everywhere.sign_tests["tuned"]["tokens"].losses == 2
    assert any("policy:planted 2 of 6" in text for text in figures.notes)


def test_a_run_that_failed_before_its_first_step_is_counted_too() -> None:
    made = planted()
    key = next(row.key for row in made.rows if row.method == "policy:planted" and row.case == "planted-a")
    killed = {"final_validation_loss": None, "final_test_loss": None, "failure": "killed", "intervals": ()}
    made.results[key] = replace(made.results[key], **killed)  # type: ignore[arg-type]
    found = on_case(made.figures(), "policy:planted")

    assert (found.n_runs, found.n_diverged, found.n_failed) == (3, 0, 1)
    assert found.multipliers["tuned"]["time_s"].low == 0.0
    assert found.multipliers["tuned"]["time_s"].n == 3


def test_where_all_runs_of_the_baseline_failed_there_are_no_multipliers() -> None:
    failing = [("planted-a", "tuned", seed) for seed in range(3)]
    figures = planted(failing=failing).figures()

    assert on_case(figures, "policy:planted").multipliers["tuned"]["tokens"].value is None
    assert on_case(figures, "policy:planted").multipliers["untuned"]["tokens"].value == pytest.approx(1.6, rel=1e-3)
    assert method(figures, "policy:planted").multipliers["tuned"]["tokens"].n == 1
    assert any(text.startswith("planted-a: tuned gave no loss") for text in figures.notes)


@pytest.mark.parametrize(
    "changes",
    [
        {"efficiencies": {"cosine": 0.5, "policy:planted": 0.8}},
        {"efficiencies": {"policy:planted": 0.8}},
        {"efficiencies": {"tuned": 1.0}},
        {"seeds": (0,), "cases": ("planted-a",)},
        {"energy_source": None},
        {"n_trials": 0},
        {"failing": [("planted-a", name, seed) for name in SMALL for seed in range(3)]},
    ],
)
def test_whatever_is_missing_the_figures_are_plain_json(changes: Mapping[str, object]) -> None:
    figures = planted(**changes).figures()

    json.dumps(figures.to_json(), allow_nan=False)
    assert {found.method for found in figures.methods} == set(changes.get("efficiencies", SMALL))  # type: ignore[call-overload]
    for found in figures.methods:
        assert set(found.multipliers) == set(BASELINES)
        assert all(set(of_axis) == set(AXES) for of_axis in found.multipliers.values())


def test_one_seed_on_one_case_has_no_interval() -> None:
    found = method(planted(seeds=(0,), cases=("planted-a",)).figures(), "policy:planted").multipliers["tuned"]["tokens"]

    assert found.value == pytest.approx(0.8, rel=1e-3)
    assert (found.low, found.high, found.n) == (None, None, 1)


def test_without_joules_the_figures_rest_on_tokens_and_seconds() -> None:
    figures = planted(energy_source=None).figures()
    found = on_case(figures, "policy:planted")

    assert found.energy_j.value is None
    assert found.measured_energy_j.value is None
    assert found.energy_parts_j is None
    assert found.multipliers["tuned"]["energy_j"].value is None
    assert found.multipliers["tuned"]["time_s"].value == pytest.approx(0.8, rel=1e-3)
    assert found.product_score.value is not None
    assert "unknown" in figures.rests_on
    assert all(point.energy_j is None for point in figures.points)


def test_a_run_that_is_still_missing_is_left_out_and_told_of() -> None:
    made = planted()
    key = next(row.key for row in made.rows if row.method == "policy:planted")
    del made.results[key]
    figures = made.figures()

    assert on_case(figures, "policy:planted").n_runs == 2
    assert any(text.startswith("1 run without a result yet") for text in figures.notes)


def test_runs_without_a_cost_table_keep_their_losses() -> None:
    made = planted()
    figures = analyse(made.comparison(), made.results, {})
    found = on_case(figures, "policy:planted")

    assert found.multipliers["tuned"]["tokens"].value == pytest.approx(0.8, rel=1e-3)
    assert found.time_s.value is None
    assert found.time_parts_s == {}
    assert any("there is no cost table" in text for text in figures.notes)


def test_modelled_and_measured_costs_stand_side_by_side(exact: Figures) -> None:
    found = on_case(exact, "tuned")

    assert found.time_s.value == pytest.approx(RUN_S)
    assert found.time_parts_s["training"] == pytest.approx(RUN_S)
    assert found.measured_time_s.value == pytest.approx(1.1 * RUN_S + 5 * 0.01)
    assert found.energy_j.value == pytest.approx(RUN_J)
    assert found.measured_energy_j.value == pytest.approx(1.2 * RUN_J + 5 * 0.1)
    assert found.energy_source == "estimated"


def test_runs_beside_others_are_told_of() -> None:
    assert "18 of 18 judged runs had others beside them" in planted(energy_shared=True).figures().rests_on


def test_checks_have_no_point_and_trials_have_one_each(exact: Figures) -> None:
    here = [point for point in exact.points if point.case == "planted-a"]

    assert not [point for point in here if point.method.startswith("check")]
    assert sum(point.role == "sweep" for point in here) == 4
    assert sum(point.role == "curve" for point in here) == 8
    tuned = next(point for point in here if (point.method, point.role) == ("tuned", "method"))
    assert tuned.on_front
    assert (tuned.time_s, tuned.energy_j) == pytest.approx((RUN_S, RUN_J))
    assert not next(point for point in here if (point.method, point.role) == ("cosine", "method")).on_front


def test_families_are_compared_in_ratios_to_the_tuned_static(exact: Figures) -> None:
    fronts = {front.family: front for front in exact.fronts}

    assert "check-self" not in fronts
    assert fronts["tuned static"].hypervolume.value == pytest.approx(9)
    assert fronts["tuned static"].expected_utility.value == pytest.approx(0)
    # Half the efficiency: the loss is worth half the compute, at the same cost.
    assert fronts["cosine"].hypervolume.value == pytest.approx((4 - 2) * 3)
    assert fronts["cosine"].igd_plus.value == pytest.approx(1)
    assert fronts["cosine"].expected_utility.value == pytest.approx(-0.5)


def test_a_family_without_a_loss_on_a_case_counts_as_the_worst_point() -> None:
    failing = [("planted-a", "policy:planted", seed) for seed in range(3)]
    figures = planted(failing=failing, cases=("planted-a",)).figures()
    front = next(front for front in figures.fronts if front.family == "policy:planted")

    assert (front.n_points, front.hypervolume.value, front.expected_utility.value) == (0, 0, -3)


def test_no_point_is_worse_than_none() -> None:
    figures = planted(efficiencies={**SMALL, "policy:planted": 0.05}).figures()
    front = next(front for front in figures.fronts if front.family == "policy:planted")

    # The loss is worth a twentieth of the compute at best, which counts as a quarter, at the same cost.
    assert front.hypervolume.value == 0
    assert front.expected_utility.value == pytest.approx((1 - 4) / 2)


def test_the_points_of_a_search_without_a_note_belong_to_its_family() -> None:
    made = planted(efficiencies={**SMALL, "nsga2-1": 0.9, "nsga2-2": 0.7})
    notes = [found for found in made.comparison().methods if not found.name.startswith("nsga2")]
    comparison = with_rows(made, methods=(*notes, replace(note("nsga2"), kind="tuned")))
    figures = analyse(comparison, made.results, made.tables())

    assert next(front for front in figures.fronts if front.family == "nsga2").n_points == 4
    assert method(figures, "nsga2").n_runs == 0


def test_a_gain_of_more_than_five_percent_is_presumed_a_bug() -> None:
    figures = planted(efficiencies={**SMALL, "policy:planted": 1.2}).figures()
    found = check(figures, "no method beats")

    assert found.passed is False
    assert "policy:planted 1.20" in found.found
    assert check(planted().figures(), "no method beats").passed is True


def test_a_tuned_static_that_half_its_budget_beats_is_told_of() -> None:
    made = planted()
    for row in made.rows:
        if (row.case, row.method, row.role) == ("planted-a", "tuned", "method"):
            made.results[row.key] = replace(made.results[row.key], final_validation_loss=PowerLaw().loss(0.4 * TOKENS))
    figures = made.figures()

    found = check(figures, "the tuned static gets better")
    assert (found.passed, found.found) == (False, "not on planted-a")
    assert any("looks too good" in text for text in figures.notes)
    assert check(planted().figures(), "the tuned static gets better").passed


def test_checks_that_need_other_methods_were_not_made() -> None:
    figures = planted(efficiencies={"cosine": 0.5}).figures()

    assert {found.passed for found in figures.checks} == {None}


def test_an_optimum_on_the_edge_of_the_grid_is_told_of() -> None:
    made = planted()
    baselines = {
        case: tuple(replace(b, on_edge=("learning_rate",)) for b in found)
        for case, found in made.comparison().baselines.items()
    }
    figures = analyse(with_rows(made, baselines=baselines), made.results, made.tables())

    assert any("best learning_rate of tuned (tokens) lies on the edge" in text for text in figures.notes)


def test_a_loss_beyond_the_measured_budgets_is_a_bound_and_told_of() -> None:
    figures = planted(efficiencies={**SMALL, "policy:planted": 6.0}).figures()
    found = method(figures, "policy:planted").multipliers["tuned"]["tokens"]

    assert found.value == pytest.approx(4.0)
    assert found.censored == ">"
    assert found.high is None
    assert any("3 of 9 judged runs lie outside" in text for text in figures.notes)


def test_the_same_runs_always_give_the_same_figures() -> None:
    made = planted(noise=0.01)

    assert made.figures() == made.figures()


def test_the_order_of_rows_changes_nothing() -> None:
    made = planted(noise=0.01)
    turned = with_rows(made, rows=tuple(reversed(made.rows)))

    assert analyse(turned, made.results, made.tables()) == made.figures()
