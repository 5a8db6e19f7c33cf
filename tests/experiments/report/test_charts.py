from __future__ import annotations

import re
from collections.abc import Callable
from html.parser import HTMLParser

import pytest
from report_input import ReportInput, report_input

from trainpilot.experiments.report.charts import (
    budget_panels,
    course,
    front_panels,
    loss_panels,
    middle,
    multiplier_panels,
    part_panels,
)
from trainpilot.experiments.report.charts_controls import control_changes
from trainpilot.experiments.report.drawing import (
    INKS,
    N_COLOURED,
    MethodStyles,
    Panel,
    choose,
    ink,
    log_ticks,
    name_x,
    panel,
    to_svg,
    window,
)
from trainpilot.experiments.report.report_data import ReportData

FEW = ("policy:agent", "tuned", "cosine", "seesaw", "check-budget")


def material(made_up: ReportInput) -> ReportData:
    return ReportData(*made_up.all())


@pytest.fixture(scope="module")
def two_cases() -> ReportData:
    return material(report_input(2, FEW, seeds=(1, 2)))


Draw = Callable[[ReportData, MethodStyles], list[Panel]]


@pytest.mark.parametrize(
    "draw",
    [
        front_panels,
        loss_panels,
        budget_panels,
        part_panels,
        lambda m, looks: multiplier_panels(m, looks, "energy_j"),
        lambda m, looks: [drawn for moves in control_changes(m, looks) for drawn in moves.panels],
    ],
)
def test_every_colour_of_a_chart_is_a_variable_of_the_page(two_cases: ReportData, draw: Draw) -> None:
    drawn = draw(two_cases, choose(two_cases))

    assert drawn
    for one in drawn[:2]:
        svg = to_svg(one, "chart")
        assert not re.search(r"#[0-9a-fA-F]{3,8}\b(?=[;\"])", svg), "a colour is written out"
        assert set(re.findall(r"var\(--(\w+)\)", svg)) <= set(INKS)
        assert "font-family" not in svg
        assert "http" not in svg
        assert "<style" not in svg, "it would hold for the whole page"


def test_ids_of_two_charts_do_not_meet() -> None:
    def draw(name: str) -> str:
        drawn = panel("a case", "loss")
        drawn.axes.plot([1, 2], [1, 2], marker="o", color=ink("s1"))
        return to_svg(drawn, name)

    first, second = (set(re.findall(r'id="([^"]+)"', draw(name))) for name in ("first", "second"))

    assert first
    assert not first & second
    assert {name.removeprefix("first-") for name in first} == {name.removeprefix("second-") for name in second}
    assert all(f"#{name}" in draw("first") for name in first), "every id that is kept is referred to"


def test_text_stays_text_and_may_be_read_aloud() -> None:
    drawn = panel("a case", "loss", about="the loss of a case")
    name_x(drawn.axes, "tokens")

    svg = to_svg(drawn, "chart")

    assert ">tokens</text>" in svg
    assert 'role="img"' in svg
    assert 'aria-label="the loss of a case"' in svg


def test_a_chart_is_drawn_the_same_twice(two_cases: ReportData) -> None:
    first, second = (to_svg(front_panels(two_cases, choose(two_cases))[0], "chart") for _ in range(2))

    assert first == second


def test_there_is_a_panel_for_each_case(two_cases: ReportData) -> None:
    looks = choose(two_cases)

    for draw in (front_panels, loss_panels, budget_panels):
        assert [drawn.title for drawn in draw(two_cases, looks)] == ["llama-0", "gpt2-1"]
    titles = [drawn.title for drawn in multiplier_panels(two_cases, looks, None)]
    assert titles == ["all cases", "llama-0", "gpt2-1"]


def test_the_controls_shown_are_those_that_a_policy_moved(two_cases: ReportData) -> None:
    (moves,) = control_changes(two_cases, choose(two_cases))

    assert moves.look.method == "policy:agent"
    assert [drawn.title for drawn in moves.panels] == ["learning rate", "batch", "precision"]
    assert moves.unmoved == ("sparsity",)


def test_without_a_policy_the_heuristics_controls_are_shown() -> None:
    moves = control_changes(
        found := material(report_input(1, ("tuned", "cosine", "seesaw"), seeds=(1,))), choose(found)
    )

    assert [(one.look.method, [drawn.title for drawn in one.panels]) for one in moves] == [("seesaw", ["batch"])]


def test_baselines_and_policies_come_before_the_best_of_what_was_not_tuned() -> None:
    looks = choose(material(report_input(1, seeds=(1,))))

    methods = [look.method for look in looks.chosen]
    assert methods[:5] == ["tuned", "cosine", "policy:agent", "policy:agent@0,1,1", "prodigy"]
    assert "tuned-tpe" not in methods
    assert len(methods) == N_COLOURED + 2
    assert not any(name.startswith("check") for name in methods)
    assert looks.n_methods == 17, "20 less the 3 checks"
    assert looks.n_grey == 9
    assert [look.method for look in looks.subjects] == ["policy:agent", "policy:agent@0,1,1"]
    assert len({look.color for look in looks.chosen}) == len({look.marker for look in looks.chosen}) == len(methods)


def test_a_run_begins_before_its_first_step() -> None:
    run = report_input(1, ("cosine",), seeds=(1,)).results["llama-0-cosine-1"]

    points = course(run)

    assert points[0] == (0.0, 5.55)
    assert len(points) == 1 + 5, "the start and every tenth of 50 decisions"
    assert points[-1] == (163840.0, run.final_validation_loss)


def test_the_middle_of_several_courses_goes_as_far_as_half_of_them() -> None:
    runs = [[(0.0, 5.0), (1.0, 4.0), (2.0, 3.0)], [(0.0, 7.0), (1.0, 2.0)], [(0.0, 6.0)]]

    assert middle(runs) == [(0.0, 6.0), (1.0, 3.0)]


def test_one_bad_run_does_not_squeeze_the_axis() -> None:
    low, high = window([2.0, 2.1, 2.2, 9.0])

    assert 1.9 < low < 2.0
    assert 2.2 < high < 2.3


@pytest.mark.parametrize(
    ("low", "high", "ticks"), [(0.9, 1100, [1, 10, 100, 1000]), (24e3, 7e5, [30e3, 100e3, 300e3]), (11, 12.5, None)]
)
def test_logarithmic_ticks_are_round_and_three_at_least(low: float, high: float, ticks: list[float] | None) -> None:
    found = log_ticks(low, high)

    assert found == pytest.approx(ticks) if ticks else 3 <= len(found) <= 6
    assert all(low <= tick <= high for tick in found)


def test_svg_is_balanced(two_cases: ReportData) -> None:
    class Balance(HTMLParser):
        open: list[str]

        def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
            self.open.append(tag)

        def handle_endtag(self, tag: str) -> None:
            assert self.open.pop() == tag

    parser = Balance()
    parser.open = []
    parser.feed(to_svg(front_panels(two_cases, choose(two_cases))[0], "chart"))

    assert parser.open == []
