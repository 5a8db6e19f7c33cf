from __future__ import annotations

import re
from dataclasses import replace
from pathlib import Path

import pytest
from html_pages import Seen, seen
from planted_comparison import Planted
from report_input import NOTES, WORTH, report_input

from trainpilot.experiments.analysis.figures import Estimate, Figures
from trainpilot.experiments.report.formatting import DASH
from trainpilot.experiments.report.page import render, write_report
from trainpilot.experiments.report.report_data import ReportData

TITLES = {name: title for name, title, _, _ in NOTES}


METHODS = ("policy:agent", "tuned", "cosine", "plateau", "prodigy", "random", "check-self")


@pytest.fixture(scope="module")
def html() -> str:
    return render(ReportData(*report_input(2, METHODS).all()))


@pytest.fixture(scope="module")
def page(html: str) -> Seen:
    return seen(html)


def test_the_page_needs_nothing_but_itself(html: str, page: Seen) -> None:
    assert page.sources == []
    assert all(target.startswith("#") for target in page.targets)
    assert not page.tags & {"script", "link", "img", "iframe", "object"}
    assert "http:" not in html
    assert "https:" not in html
    assert "@import" not in html
    assert not re.search(r"url\((?!#)", html)


def test_every_id_is_there_once_and_every_link_leads_somewhere(page: Seen) -> None:
    assert len(page.ids) == len(set(page.ids))
    assert {target[1:] for target in page.targets} <= set(page.ids)


def test_every_colour_is_set_in_the_style_sheet_for_light_and_dark(html: str) -> None:
    css = html[html.index("<style>") : html.index("</style>")]
    light, dark = (set(re.findall(r"--(\w+):", part)) for part in css.split("prefers-color-scheme: dark", 1))
    used = set(re.findall(r"var\(--(\w+)\)", html))

    assert used <= light
    assert light - dark == {"serif", "sans", "mono"}


def test_every_method_and_case_appears(page: Seen) -> None:
    for method in METHODS:
        assert TITLES[method] in page.words
    for case in ("llama-0", "gpt2-1"):
        assert case in page.words


def test_the_headline_table_is_grouped_by_kind(page: Seen) -> None:
    headings = ["Policies", "Tuned static", "Untuned", "Heuristics", "Tuning-free", "Planted checks"]

    assert [word for word in page.words if word in headings][: len(headings)] == headings


def test_the_headline_table_holds_value_interval_bound_and_sign_test(page: Seen) -> None:
    start = page.text.index("What each method is worth")
    row = page.text[start : page.text.index("Tuned static", start)]

    assert "2.00 [1.92, 2.08]" in row, "against the untuned default"
    assert "1.04 [1.00, 1.08]" in row
    assert "1 of 2 p = 1.00" in row
    assert "0 of 6" in row, "diverged or failed"
    assert "< 0.25 [0.25, 0.30]" in page.text, "the random policy's bound"


def test_what_is_unknown_is_a_dash_with_a_reason(html: str) -> None:
    dashes = re.findall(r'<td[^>]*?(?: title="([^"]*)")?><span class="v">' + DASH, html)

    assert dashes
    assert all(dashes), "a dash without a reason"


def test_failures_are_listed_one_by_one(page: Seen) -> None:
    text = page.text[page.text.index("Judged runs that diverged or failed") :]

    assert "llama-0 random policy 2 3e-4, batch 8, cosine diverged after 65.5 k tokens" in text
    assert "gpt2-1 Prodigy 3 3e-4, batch 8, cosine failed: killed by signal 9" in text
    assert "stopped before the budget was used up: 2" in text
    assert "reduce on plateau 1 3e-4, batch 8, cosine stopped early by the method, after 131 k of 164 k" in text
    assert "diverged or failed: 2" in text, "of the searches"
    assert "gpt2-1: batch size, tuned for equal tokens (57 runs): the grid was too small there" in text


def test_sanity_checks_show_what_was_expected_and_found(page: Seen) -> None:
    text = page.text[page.text.index("What the literature") :]

    assert "planted budget 1.25 1.31 [1.27, 1.35] FAILED" in text
    assert "cosine over constant cosine ends lower 0.08 lower passed" in text
    assert "bf16 pays fewer joules not tried" in text


def test_the_page_says_how_to_get_every_number_again(page: Seen) -> None:
    text = page.text[page.text.index("How to reproduce") :]

    assert "trainpilot compare --cases test --seeds 3" in text
    assert "versions.torch 2.13" in text
    assert "1.5e-3 8 linear 2 % bf16 grid 57" in text, "the tuned setting"
    assert "tuned for equal tokens, seconds and joules" in text
    assert "1: llama-0-cosine-1, 2: llama-0-cosine-2" in text


def test_every_figure_has_a_caption_and_every_chart_a_name(html: str, page: Seen) -> None:
    assert html.count("<figure>") == html.count("<figcaption>") == 7
    assert html.count('<svg class="chart"') == html.count('role="img"') > 10
    assert "{{" not in html
    assert "None" not in page.words


def test_twenty_methods_are_all_in_the_tables_and_few_in_the_charts() -> None:
    found = seen(render(ReportData(*report_input(1, tuple(WORTH), seeds=(1,)).all())))

    for title in TITLES.values():
        assert title in found.words
    assert "Charts show 8 methods in colour" in found.text
    assert "The 9 other methods stand in the tables" in found.text


@pytest.mark.parametrize("methods", [("cosine",), ("tuned",), ("policy:agent",), ("check-self",)])
def test_one_case_and_one_method_make_a_page(methods: tuple[str, ...]) -> None:
    found = seen(render(ReportData(*report_input(1, methods, seeds=(1,)).all())))

    assert TITLES[methods[0]] in found.words
    assert "llama-0" in found.words


def test_names_are_escaped() -> None:
    small = report_input(1, ("cosine", "tuned"), seeds=(1,))
    notes = tuple(replace(note, title=f"<b>{note.title}</b> & so") for note in small.comparison.methods)

    html = render(ReportData(replace(small.comparison, methods=notes), *small.all()[1:]))

    assert "<b>cosine" not in html
    assert "<b>cosine to 10 %</b> & so" in seen(html).words


def test_names_that_no_chart_can_draw_are_written_out() -> None:
    small = report_input(1, ("policy:agent", "tuned"), seeds=(1,))
    title = "policy m$\\frac{x$ \x1b[2J \ud800"
    notes = tuple(replace(note, title=f"{title}{index}") for index, note in enumerate(small.comparison.methods))

    html = render(ReportData(replace(small.comparison, methods=notes), *small.all()[1:]))

    assert "policy m$\\frac{x$ \\x1b[2J \\ud8000" in seen(html).words
    assert not {"\x1b", "\ud800"} & set(html)


def test_a_comparison_without_any_run_makes_a_page() -> None:
    small = report_input(2, ("cosine", "tuned"), seeds=(1,))
    empty = Figures(
        cases=(),
        methods=(),
        points=(),
        fronts=(),
        curves=(),
        checks=(),
        targets={},
        sweep_costs={},
        rests_on="",
    )

    found = seen(render(ReportData(replace(small.comparison, rows=(), baselines={}), {}, {}, empty)))

    assert "no compute multiplier could be worked out" in found.text
    assert "Every judged run ended with a finite loss." in found.text


def test_seconds_take_the_place_of_unknown_joules() -> None:
    small = report_input(1, ("cosine", "tuned"), seeds=(1,))
    points = tuple(replace(point, energy_j=None) for point in small.figures.points)
    nothing = Estimate(value=None)
    cases = tuple(replace(case, energy_j=nothing, energy_parts_j=None) for case in small.figures.cases)
    figures = replace(small.figures, points=points, cases=cases)

    found = seen(render(ReportData(*small.all()[:3], figures)))

    assert "Loss against cost" in found.words
    assert "modelled time (energy unknown)" in found.words
    assert "modelled energy" not in found.words


def test_a_planted_comparison_goes_all_the_way(tmp_path: Path) -> None:
    worths = {"cosine": 0.5, "constant": 0.3, "tuned": 1.0, "check-budget": 1.0, "policy:planted": 0.95}
    planted = Planted(efficiencies=worths, cases=["planted-a"], noise=0.002, failing=[("planted-a", "constant", 1)])
    comparison, figures = planted.comparison(), planted.figures()

    path = write_report(tmp_path, comparison, planted.results, planted.tables(), figures, tensorboard=False)

    found = seen(path.read_text(encoding="utf-8"))
    assert "policy:planted" in found.text
    assert "planted-a constant 1" in found.text, "the failure"
    worth = next(m for m in figures.methods if m.method == "check-budget").multipliers["tuned"]["tokens"]
    assert f"{worth.value:.2f} [{worth.low:.2f}, {worth.high:.2f}]" in found.text
