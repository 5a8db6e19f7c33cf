"""Draw the controls of steered runs over the budget, and a policy's average schedule beside the tuned static's."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from statistics import median
from typing import Any

import numpy as np

from trainpilot.experiments.report.controls import CONTROLS, FLOOR, ShownControl
from trainpilot.experiments.report.drawing import (
    DASHES,
    MARKERS,
    N_COLOURED,
    MethodStyle,
    MethodStyles,
    Panel,
    ink,
    log_axis,
    log_ticks,
    name_x,
    panel,
    plain_axis,
)
from trainpilot.experiments.report.formatting import percent
from trainpilot.experiments.report.report_data import ReportData
from trainpilot.experiments.results import POPULATION, TUNED, IntervalResult, PolicyName, RunResult
from trainpilot.llm_runtime.config import PRECISIONS, RunConfig

N_METHODS = 3
"""Methods whose controls are shown."""
GRID = tuple(index / 50 for index in range(51))
"""Shares of the budget at which the median over runs is taken."""
HALF_STEP = 0.01

Course = tuple[list[float], list[float]]
"""Shares of the budget, and the control that holds from each on."""


@dataclass(frozen=True, kw_only=True)
class ControlChanges:
    """What one method did to the controls."""

    look: MethodStyle
    panels: tuple[Panel, ...]
    unmoved: tuple[str, ...]
    """Controls that it never changed in any run."""


def control_changes(data: ReportData, looks: MethodStyles) -> list[ControlChanges]:
    """Return the controls over the budget for methods that change them: policies first, else the heuristics."""
    steering = [name for name in data.notes if _steers(data, name)]
    policies = [name for name in steering if data.notes[name].kind == "policy"]
    chosen = policies or sorted(steering, key=lambda name: name == "random")
    return [_moves(data, looks.of(name) or _plain(data, name)) for name in chosen[:N_METHODS]]


def _plain(data: ReportData, name: str) -> MethodStyle:
    """Return the look of a method that has none: it stands alone here."""
    return MethodStyle(method=name, title=data.title(name), color="s1", marker="o")


def _steers(data: ReportData, method: str) -> bool:
    """Return whether a method's runs are steered one by one; the course of a population is that of several runs."""
    return any(run.spec.steering.kind not in ("keep", POPULATION) for run in _all_runs(data, method))


def _all_runs(data: ReportData, method: str) -> list[RunResult]:
    return [run for case in data.case_names for run in data.runs(case, method) if run.intervals]


def _moves(data: ReportData, look: MethodStyle) -> ControlChanges:
    runs = _all_runs(data, look.method)
    moved = [control for control in CONTROLS if not all(control.keeps(run) for run in runs)]
    return ControlChanges(
        look=look,
        panels=tuple(_panel(control, look, runs) for control in moved),
        unmoved=tuple(control.name for control in CONTROLS if control not in moved),
    )


def _panel(control: ShownControl, look: MethodStyle, runs: Sequence[RunResult]) -> Panel:
    drawn = panel(control.name, control.compared_y, about=f"{control.name} over the budget, {look.title}")
    courses = [_course(control, run) for run in runs]
    if control.axis == "names":
        courses = _ranked(drawn, courses)
    else:
        _scale(drawn, control, [value for _, values in courses for value in values])
    plain_axis(drawn.axes, "x", (0, 1), percent)
    name_x(drawn.axes, "share of the budget")
    if control.axis == "rate":
        _base(drawn, runs)
    for shares, values in courses:
        drawn.axes.plot(shares, values, color=ink(look.color), linewidth=0.7, alpha=0.35, drawstyle="steps-post")
    style: dict[str, Any] = {"color": ink(look.color), "linewidth": 1.8, "drawstyle": "steps-post", "zorder": 3}
    drawn.axes.plot(*zip(*_typical(courses), strict=True), **style)
    return drawn


def _course(control: ShownControl, run: RunResult) -> Course:
    """Return the shares of the budget at which intervals begin, and the control in each; the last one twice."""
    config = run.spec.config
    ends = [interval.tokens / config.tokens for interval in run.intervals]
    values = [control.compared(interval, config) for interval in run.intervals]
    return [0.0, *ends], [*values, values[-1]]


def _typical(courses: Sequence[Course]) -> list[tuple[float, float]]:
    """Return the median over the runs, as far as at least half of them go."""
    columns = ((x, [at(course, x) for course in courses if course[0][-1] >= x - HALF_STEP]) for x in GRID)
    return [(x, median(values)) for x, values in columns if 2 * len(values) >= len(courses)]


def at(course: Course, x: float) -> float:
    """Return the value that holds at `x`."""
    shares, values = course
    place = sum(share <= x for share in shares) - 1
    return values[max(place, 0)]


def _base(drawn: Panel, runs: Sequence[RunResult]) -> None:
    """Draw the untouched base schedule, which the method multiplies."""
    for schedule in {run.spec.config.schedule: run.spec.config.base_schedule() for run in runs}.values():
        tokens = [round(share * schedule.budget_tokens) for share in GRID]
        factors = [max(schedule.factor(t, 1), FLOOR / 10) for t in tokens]
        style: dict[str, Any] = {"color": ink("soft"), "linewidth": 1.1, "linestyle": (0, (3, 1.6))}
        drawn.axes.plot(GRID, factors, **style)


def _ranked(drawn: Panel, courses: Sequence[Course]) -> list[Course]:
    """Give every precision that was used a row of its own."""
    used = sorted({value for _, values in courses for value in values})
    drawn.axes.set_ylim(-0.5, len(used) - 0.5)
    drawn.axes.set_yticks(range(len(used)), [PRECISIONS[int(code)] for code in used])
    return [(shares, [float(used.index(value)) for value in values]) for shares, values in courses]


def _scale(drawn: Panel, control: ShownControl, values: Sequence[float]) -> None:
    low, high = min(values), max(values)
    if control.axis == "rate":
        limits = (FLOOR, max(high, 1.0) * 1.3)
        ticks = [tick for tick in log_ticks(*limits, most=6) if tick > 1.5 * FLOOR]
        log_axis(drawn.axes, "y", limits, times, ticks)
    elif control.axis == "doublings":
        limits = (min(low, 1.0) / 1.2, max(high, 1.0) * 1.2)
        doublings = [2.0**k for k in range(-8, 12) if limits[0] <= 2.0**k <= limits[1]]
        log_axis(drawn.axes, "y", limits, times, doublings)
    else:
        plain_axis(drawn.axes, "y", (0, max(high * 1.1, 0.1)), percent)


def times(value: float) -> str:
    """Return a factor for an axis: `× 1/4`, `× 3`."""
    if value < 1 and (1 / value).is_integer():
        return f"\N{MULTIPLICATION SIGN} 1/{1 / value:g}"
    return f"\N{MULTIPLICATION SIGN} {value:g}"


LOWEST = FLOOR / 10
"""Ratios below it are drawn there: a schedule ends at zero."""
STATIC = MethodStyle(method=TUNED, title="tuned static", color="soft", marker="s", dash=(3.0, 1.6))

Ratio = Callable[[IntervalResult, RunConfig, RunConfig], float]
"""Returns a control over what it is compared with, from the interval, its run and the tuned run."""


@dataclass(frozen=True, kw_only=True)
class AverageSchedule:
    """What one policy does on average under one preference."""

    heading: str
    looks: tuple[MethodStyle, ...]
    """A line for each start, then the tuned static's."""
    panels: tuple[Panel, ...]
    note: str = ""
    """Which starts are not drawn."""


@dataclass(frozen=True, kw_only=True)
class StartGroup:
    """The runs of a policy that began at one factor of the tuned learning rate."""

    look: MethodStyle
    runs: tuple[tuple[RunResult, RunConfig], ...]
    """Each with the tuned static's run on its case."""


def rate_ratio(interval: IntervalResult, run: RunConfig, tuned: RunConfig) -> float:
    """Return the learning rate over the tuned peak, both at the tuned batch: Adam's square-root rule."""
    rate = interval.learning_rate * float(np.sqrt(tuned.batch_size / interval.batch_size))
    return max(rate / tuned.base_learning_rate, LOWEST)


def batch_ratio(interval: IntervalResult, run: RunConfig, tuned: RunConfig) -> float:
    """Return the batch over the run's starting batch."""
    return interval.batch_size / run.batch_size


def learnt(data: ReportData) -> list[AverageSchedule]:
    """Return the average schedules of every policy and preference, by start; none without a tuned static."""
    tuned = _tuned(data)
    groups: dict[tuple[str, str, bool], list[str]] = {}
    for name, note in data.notes.items():
        if note.kind == "policy" and any(run.spec.steering.kind == "policy" for run, _ in _runs(data, name, tuned)):
            parsed = PolicyName.parse(name)
            groups.setdefault((parsed.file, parsed.preference, parsed.guarded), []).append(name)
    return [_learnt(data, names, tuned) for names in groups.values()]


def _tuned(data: ReportData) -> dict[str, RunConfig]:
    """Return the tuned static's run by case."""
    found = data.comparison.baselines.items()
    return {case: one.config for case, all_ in found for one in all_ if one.axis == "tokens"}


def _runs(data: ReportData, method: str, tuned: Mapping[str, RunConfig]) -> list[tuple[RunResult, RunConfig]]:
    return [(run, tuned[case]) for case in tuned for run in data.runs(case, method) if run.intervals]


def _learnt(data: ReportData, names: Sequence[str], tuned: Mapping[str, RunConfig]) -> AverageSchedule:
    ordered = sorted(names, key=lambda name: PolicyName.parse(name).start or 0.0)
    regimes = [
        StartGroup(look=_look(name, index), runs=tuple(_runs(data, name, tuned)))
        for index, name in enumerate(ordered[:N_COLOURED])
    ]
    named = PolicyName.parse(names[0])
    parts = [named.short, named.preference, "" if named.guarded else "unguarded"]
    heading = ", ".join(part for part in parts if part)
    left_out = ", ".join(_begins(name) for name in ordered[N_COLOURED:])
    return AverageSchedule(
        heading=heading,
        looks=(*(regime.look for regime in regimes), STATIC),
        panels=(_rate_panel(regimes, heading), _batch_panel(regimes, heading)),
        note=f"Not drawn: {left_out}." if left_out else "",
    )


def _look(name: str, index: int) -> MethodStyle:
    return MethodStyle(
        method=name, title=_begins(name), color=f"s{index + 1}", marker=MARKERS[index], dash=DASHES[index]
    )


def _begins(name: str) -> str:
    start = PolicyName.parse(name).start
    return "start at the case's own rate" if start is None else f"start at {times(start)}"


def _rate_panel(regimes: Sequence[StartGroup], heading: str) -> Panel:
    drawn = panel("learning rate", "over the tuned peak, at equal batch", about=f"average learning rate, {heading}")
    bands = [_band(regime, rate_ratio) for regime in regimes]
    limits = (FLOOR, max([1.0, *(float(band[:, 3].max()) for band in bands)]) * 1.3)
    log_axis(drawn.axes, "y", limits, times, [tick for tick in log_ticks(*limits, most=6) if tick > 1.5 * FLOOR])
    _draw(drawn, regimes, bands, [_static_rate(config) for config in _compared(regimes)])
    return drawn


def _batch_panel(regimes: Sequence[StartGroup], heading: str) -> Panel:
    drawn = panel("batch", "over the starting batch", about=f"average batch, {heading}")
    bands = [_band(regime, batch_ratio) for regime in regimes]
    static = [[tuned.batch_size / start] * len(GRID) for start, tuned in _starts(regimes)]
    ends = [1.0, *(float(edge) for band in bands for edge in (band[:, 1].min(), band[:, 3].max()))]
    ends += [float(value) for value in np.median(static, axis=0)[:1]]
    limits = (min(ends) / 1.2, max(ends) * 1.2)
    doublings = [2.0**k for k in range(-8, 12) if limits[0] <= 2.0**k <= limits[1]]
    log_axis(drawn.axes, "y", limits, times, doublings)
    _draw(drawn, regimes, bands, static)
    return drawn


def _draw(
    drawn: Panel, regimes: Sequence[StartGroup], bands: Sequence[np.ndarray], static: Sequence[Sequence[float]]
) -> None:
    plain_axis(drawn.axes, "x", (0, 1), percent)
    name_x(drawn.axes, "share of the budget")
    usual: dict[str, Any] = {"linestyle": STATIC.linestyle, "linewidth": 1.3}
    drawn.axes.plot(GRID, np.median(static, axis=0), color=ink(STATIC.color), **usual)
    for regime, band in zip(regimes, bands, strict=True):
        share, low, middle, high = band.T
        color = ink(regime.look.color)
        drawn.axes.fill_between(share, low, high, step="post", color=color, alpha=0.13, linewidth=0)
        style: dict[str, Any] = {"linestyle": regime.look.linestyle, "drawstyle": "steps-post", "zorder": 3}
        drawn.axes.plot(share, middle, color=color, linewidth=1.6, **style)


def _band(regime: StartGroup, ratio: Ratio) -> np.ndarray:
    """Return share, lower quartile, median and upper quartile, as far as at least half of the runs go."""
    courses = [_ratio_course(run, tuned, ratio) for run, tuned in regime.runs]
    rows = []
    for share in GRID:
        values = [at(course, share) for course in courses if course[0][-1] >= share - HALF_STEP]
        if 2 * len(values) >= len(courses):
            rows.append([share, *np.quantile(values, (0.25, 0.5, 0.75))])
    return np.array(rows)


def _ratio_course(run: RunResult, tuned: RunConfig, ratio: Ratio) -> Course:
    config = run.spec.config
    values = [ratio(interval, config, tuned) for interval in run.intervals]
    return [0.0, *(interval.tokens / config.tokens for interval in run.intervals)], [*values, values[-1]]


def _starts(regimes: Sequence[StartGroup]) -> list[tuple[int, RunConfig]]:
    """Return starting batch and tuned run of every case, once."""
    return list({(run.spec.config.batch_size, tuned): None for regime in regimes for run, tuned in regime.runs})


def _compared(regimes: Sequence[StartGroup]) -> list[RunConfig]:
    return list({tuned: None for regime in regimes for _, tuned in regime.runs})


def _static_rate(config: RunConfig) -> list[float]:
    """Return the tuned static's own learning rate over its peak, along the budget."""
    schedule = config.base_schedule()
    return [max(schedule.factor(round(share * schedule.budget_tokens), 1), LOWEST) for share in GRID]
