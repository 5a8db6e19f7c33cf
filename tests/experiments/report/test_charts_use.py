"""The section on what models cost in use: only where that was measured, with the dominated in grey."""

from __future__ import annotations

from dataclasses import replace

import pytest
from html_pages import seen
from matplotlib.colors import to_hex
from report_input import report_input

from trainpilot.experiments.analysis.figures import UsePoint
from trainpilot.experiments.report.charts_use import use_charts, use_looks
from trainpilot.experiments.report.drawing import ink
from trainpilot.experiments.report.page import render
from trainpilot.experiments.report.report_data import ReportData

METHODS = ("policy:agent", "tuned", "cosine")


def point(method: str, loss: float, n_bytes: int, latency_s: float | None, on_front: tuple[str, ...]) -> UsePoint:
    return UsePoint(
        case="llama-0", method=method, validation_loss=loss, n_parameters=100, weight_bytes=n_bytes,
        bits_per_weight=32.0, training_time_s=1.0, training_j=20.0, latency_s=latency_s, use_j=None,
        energy_source=None, on_front=on_front,
    )  # fmt: skip


@pytest.fixture(scope="module")
def data() -> ReportData:
    made = report_input(1, METHODS, seeds=(1,))
    uses = (
        point("policy:agent", 2.0, 400, 0.002, ("training_j", "weight_bytes", "latency_s")),
        point("tuned", 2.1, 400, 0.002, ()),
        point("cosine", 2.2, 100, None, ("weight_bytes",)),
    )
    return replace(ReportData(*made.all()), figures=replace(made.figures, uses=uses))


def test_there_is_a_panel_for_each_cost_that_is_known(data: ReportData) -> None:
    looks = use_looks(data)
    [found] = use_charts(data, looks)

    assert [one.axes.get_xlabel() for one in found.panels] == [
        "training, modelled", "weights", "latency per generated token",
    ]  # fmt: skip
    assert len({(look.color, look.marker) for look in looks}) == len(METHODS)
    size, latency = found.panels[1:]
    colours = [to_hex(line.get_color()) for line in size.axes.lines[1:]]
    assert colours == [ink(looks[0].color), ink("soft"), ink(looks[2].color)]
    assert len(latency.axes.lines) == 3  # the front, and the two methods that something runs


def test_the_page_has_the_section_only_where_use_was_measured(data: ReportData) -> None:
    html = render(data)
    page = seen(html)

    assert "Loss against what a model costs" in page.text
    assert "No meter told the joules per generated token." in page.text
    assert html.count("final loss against") == 4  # three here, one of the front
    assert len(page.ids) == len(set(page.ids))
    without = seen(render(replace(data, figures=replace(data.figures, uses=()))))
    assert "Loss against what a model costs" not in without.text
