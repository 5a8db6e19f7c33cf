"""Draw what a model is worth against what it costs: joules of training, joules per generated token, bytes, latency."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from trainpilot.experiments.analysis.figures import USE_AXES, UsePoint
from trainpilot.experiments.report.charts import LOSS
from trainpilot.experiments.report.drawing import (
    MARKS,
    N_COLOURED,
    MethodStyle,
    Panel,
    ink,
    log_axis,
    log_window,
    measured,
    name_x,
    panel,
    plain_axis,
    window,
)
from trainpilot.experiments.report.formatting import Cell, dash, nats, si
from trainpilot.experiments.report.report_data import ReportData, by_kind
from trainpilot.experiments.report.tables import Column, Line, Table

AXIS_NAMES: Mapping[str, tuple[str, str, str]] = {
    "training_j": ("energy of training", "training, modelled", "J"),
    "use_j": ("energy in use", "per generated token", "J"),
    "weight_bytes": ("size", "weights", "B"),
    "latency_s": ("latency", "latency per generated token", "s"),
}
"""What stands above each panel and below its axis, and the unit."""


@dataclass(frozen=True, kw_only=True)
class UseCharts:
    """The charts of one case."""

    case: str
    panels: tuple[Panel, ...]


def use_looks(data: ReportData) -> tuple[MethodStyle, ...]:
    """Return a mark and a colour for every method whose model's use was measured."""
    names = list(dict.fromkeys(point.method for point in data.figures.uses))
    marks = list(MARKS)
    return tuple(
        MethodStyle(
            method=name,
            title=data.title(name),
            color=f"s{index % N_COLOURED + 1}",
            marker=marks[index % len(marks)],
        )
        for index, name in enumerate(names)
    )


def use_charts(data: ReportData, looks: Sequence[MethodStyle]) -> list[UseCharts]:
    """Return a panel for each of `USE_AXES` on which anything is known, for every case."""
    found = []
    for case in data.case_names:
        points = [point for point in data.figures.uses if point.case == case]
        drawn = [_plane(points, looks, case, axis) for axis in USE_AXES if any(_x(point, axis) for point in points)]
        if drawn:
            found.append(UseCharts(case=case, panels=tuple(drawn)))
    return found


def _x(point: UsePoint, axis: str) -> float | None:
    value: float | None = getattr(point, axis)
    return value


def _plane(points: Sequence[UsePoint], looks: Sequence[MethodStyle], case: str, axis: str) -> Panel:
    title, name, unit = AXIS_NAMES[axis]
    known = [(x, point) for point in points if (x := _x(point, axis))]
    drawn = panel(title, LOSS, about=f"final loss against {name} on {case}")
    plain_axis(drawn.axes, "y", window(point.validation_loss for _, point in known))
    log_axis(drawn.axes, "x", log_window([x for x, _ in known], spare=0.12), measured(unit))
    name_x(drawn.axes, name)
    front = sorted((x, point.validation_loss) for x, point in known if axis in point.on_front)
    end = drawn.axes.get_xlim()[1]
    steps = [*front, (end, front[-1][1])]
    drawn.axes.plot(*zip(*steps, strict=True), drawstyle="steps-post", color=ink("soft"), linewidth=0.9, alpha=0.8)
    for x, point in known:
        look = next(look for look in looks if look.method == point.method)
        _mark(drawn, x, point.validation_loss, look, best=axis in point.on_front)
    return drawn


def _mark(drawn: Panel, x: float, loss: float, look: MethodStyle, *, best: bool) -> None:
    """Draw a method: in its colour on the front, elsewhere grey with an edge in it; hollow where it lies above."""
    top = drawn.axes.get_ylim()[1]
    color = ink(look.color if best else "soft")
    drawn.axes.plot(
        [x],
        [min(loss, top)],
        marker=look.marker,
        markersize=6.5,
        color=color,
        markerfacecolor="none" if loss > top else color,
        markeredgecolor=ink("paper" if best and loss <= top else look.color),
        markeredgewidth=0.8,
        alpha=1.0 if best else 0.55,
        linestyle="",
        clip_on=False,
        zorder=4 if best else 3,
    )


def use_table(data: ReportData, case: str) -> Table:
    """Return every figure behind the charts of a case, a row per method."""
    points = {point.method: point for point in data.figures.uses if point.case == case}
    columns = (
        Column(name="loss", title="Final validation loss in the format that is used, nats/token."),
        Column(name="parameters"),
        Column(name="weights", title="Bytes of the files with weights; packed."),
        Column(name="bits", title="Per weight of the quantised matrices, with their scales."),
        Column(name="energy", over="training, modelled"),
        Column(name="time", over="training, modelled"),
        Column(name="energy", over="per generated token"),
        Column(name="latency", over="per generated token"),
    )
    groups = tuple(
        (heading, tuple(Line(name=data.title(name), cells=_cells(points[name])) for name in names))
        for heading, names in by_kind(data, points)
    )
    return Table(corner="method", columns=columns, groups=groups)


def _cells(point: UsePoint) -> tuple[Cell, ...]:
    unrun = "nothing here runs this format, or it could not be told from noise"
    return (
        Cell(text=nats(point.validation_loss)),
        Cell(text=f"{point.n_parameters:,}"),
        Cell(text=si(point.weight_bytes, "B")),
        Cell(text=f"{point.bits_per_weight:.2f}"),
        _amount(point.training_j, "J", "the cost tables have no joules"),
        _amount(point.training_time_s, "s", "there is no cost table for it"),
        _amount(point.use_j, "J", f"{unrun}, or there was no energy meter"),
        _amount(point.latency_s, "s", unrun),
    )


def _amount(value: float | None, unit: str, why_not: str) -> Cell:
    return dash(why_not) if value is None else Cell(text=si(value, unit))
