"""The average schedules of a policy in the report: what is drawn, against what, worked out by hand."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
from comparison_runs import CONFIG, made_interval
from report_input import report_input

from trainpilot.experiments.analysis.figures import Figures, MethodFigures
from trainpilot.experiments.report.charts_controls import batch_ratio, learnt, rate_ratio
from trainpilot.experiments.report.page import render
from trainpilot.experiments.report.report_data import ReportData
from trainpilot.experiments.results import Comparison, MethodNote, Row, RunResult

TUNED_RATE = 1.5e-3
"""Of the made-up tuned static, at batch 8."""


def steered(*starts: float | None, tuned: bool = True, preference: str = "") -> ReportData:
    """Return a made-up comparison with a policy that begins at `starts` and halves what is left to the tuned rate."""
    base = report_input(2, ("policy:agent", "tuned", "cosine"), seeds=(1, 2))
    names = {start: "policy:agent" + preference + ("" if start is None else f"@start={start:g}") for start in starts}
    notes: list[MethodNote] = []
    figures: list[MethodFigures] = []
    rows: list[Row] = []
    results: dict[str, RunResult] = {}
    for start, name in names.items():
        notes.append(replace(base.comparison.methods[0], name=name, title=name))
        figures.append(replace(base.figures.methods[0], method=name))
        for row in base.comparison.rows:
            if row.method == "policy:agent":
                rows.append(replace(row, method=name, key=f"{row.key} {start}"))
                results[rows[-1].key] = _begun_at(base.results[row.key], start or 0.2)
    comparison: Comparison = replace(
        base.comparison,
        methods=(*notes, *base.comparison.methods[1:]),
        rows=(*rows, *(row for row in base.comparison.rows if row.method != "policy:agent")),
        baselines=base.comparison.baselines if tuned else {},
    )
    shown: Figures = replace(base.figures, methods=(*figures, *base.figures.methods[1:]))
    return ReportData(comparison, base.results | results, base.tables, shown)


def _begun_at(run: RunResult, start: float) -> RunResult:
    """Return the run with rates that go from `start` times the tuned one halfway to it, on a logarithmic scale."""
    intervals = [
        replace(interval, learning_rate=TUNED_RATE * start ** (1 - index / 50), batch_size=8.0 * (1 + (index >= 25)))
        for index, interval in enumerate(run.intervals)
    ]
    return replace(run, intervals=tuple(intervals))


def test_a_learning_rate_is_told_at_the_tuned_batch() -> None:
    tuned = replace(CONFIG, base_learning_rate=2e-3, batch_size=2)
    interval = made_interval(CONFIG, learning_rate=6e-3, batch_size=18.0)

    assert rate_ratio(interval, CONFIG, tuned) == pytest.approx(1.0)  # 6e-3 / 2e-3 / sqrt(18 / 2)
    assert rate_ratio(replace(interval, learning_rate=0.0), CONFIG, tuned) == 0.001, "a logarithmic axis has no zero"
    assert batch_ratio(interval, CONFIG, tuned) == 18 / 8


def test_each_start_has_a_line_in_order_and_the_tuned_static_one() -> None:
    [found] = learnt(steered(10, None, 0.1))

    titles = [look.title for look in found.looks]
    assert titles[0] == "start at the case's own rate"
    assert titles[1:] == [
        "start at \N{MULTIPLICATION SIGN} 1/10",
        "start at \N{MULTIPLICATION SIGN} 10",
        "tuned static",
    ]
    assert found.heading == "agent"
    assert [drawn.title for drawn in found.panels] == ["learning rate", "batch"]
    assert len({look.color for look in found.looks}) == 4
    assert found.note == ""


def test_the_lines_are_medians_over_runs() -> None:
    [found] = learnt(steered(0.01, 1))
    rate, batch = ([np.asarray(line.get_ydata()) for line in drawn.axes.get_lines()] for drawn in found.panels)

    assert len(rate) == len(batch) == 3
    assert rate[1][0] == pytest.approx(0.01)
    assert rate[1][20] == pytest.approx(0.01**0.6)
    assert rate[1][25] == pytest.approx(0.1 / 2**0.5)  # the same rate is less at twice the batch
    assert rate[2][20] == pytest.approx(1.0)
    assert batch[1][24] == 1.0
    assert batch[1][25] == 2.0
    assert list(batch[0]) == [1.0] * 51  # the tuned static keeps the case's batch here
    assert rate[0][-1] == 0.001  # and falls to zero
    assert len(found.panels[0].axes.collections) == 2  # a band each


def test_preferences_are_told_apart() -> None:
    first, second = steered(0.1, preference="@quality=1"), steered(0.1, preference="@time=1")
    both = replace(
        first.comparison,
        methods=(*first.comparison.methods, second.comparison.methods[0]),
        rows=(*first.comparison.rows, *second.comparison.rows[:4]),
    )
    figures = replace(first.figures, methods=(*first.figures.methods, second.figures.methods[0]))
    material = ReportData(both, first.results, first.tables, figures)

    assert [found.heading for found in learnt(material)] == ["agent, quality=1", "agent, time=1"]


def test_more_starts_than_colours_are_named() -> None:
    [found] = learnt(steered(1, 2, 3, 4, 5, 6, 7, 8))

    assert len(found.looks) == 7
    assert found.note == "Not drawn: start at \N{MULTIPLICATION SIGN} 7, start at \N{MULTIPLICATION SIGN} 8."


def test_nothing_is_drawn_without_a_tuned_static_or_a_policy() -> None:
    assert learnt(steered(1, tuned=False)) == []
    assert learnt(ReportData(*report_input(1, ("tuned", "cosine", "seesaw"), seeds=(1,)).all())) == []


def test_the_page_has_the_section_where_there_is_something_to_show() -> None:
    shown = render(steered(0.1, 10))
    without = render(ReportData(*report_input(1, ("tuned", "cosine"), seeds=(1,)).all()))

    assert 'href="#learnt"' in shown
    assert 'id="learnt"' in shown
    assert "What the policy has learnt" in shown
    assert "learnt" not in without
