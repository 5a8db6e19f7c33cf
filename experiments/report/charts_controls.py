"""Draw what the methods that steer did to the controls over the run."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from statistics import median
from typing import Any

from trainpilot.experiments.compare.records import IntervalResult, RunResult
from trainpilot.experiments.report.looks import Look, Looks
from trainpilot.experiments.report.material import Material
from trainpilot.experiments.report.numbers import percent
from trainpilot.experiments.report.scales import log_axis, log_ticks, plain_axis
from trainpilot.experiments.report.svg import Panel, ink, name_x, panel
from trainpilot.llm_runtime.config import PRECISIONS, RunConfig

N_METHODS = 3
"""Methods whose controls are shown."""
FLOOR = 0.01
"""Learning rates below this share of the starting one are not told apart: a schedule ends at zero."""
GRID = tuple(index / 50 for index in range(51))
"""Shares of the budget at which the median over runs is taken."""
HALF_STEP = 0.01

Value = Callable[[IntervalResult, RunConfig], float]
Course = tuple[list[float], list[float]]
"""Shares of the budget, and the control that holds from each on."""


@dataclass(frozen=True, kw_only=True)
class Control:
    """One of the four controls, as a chart shows it."""

    name: str
    y: str
    value: Value
    keeps: Callable[[RunResult], bool]
    """Whether a run never moved it."""


@dataclass(frozen=True, kw_only=True)
class Moves:
    """What one method did to the controls."""

    look: Look
    panels: tuple[Panel, ...]
    unmoved: tuple[str, ...]
    """Controls that it never changed in any run."""


def _batch(interval: IntervalResult, config: RunConfig) -> float:
    return interval.batch_size / config.batch_size


def _one(values: Sequence[object]) -> bool:
    return len(set(values)) <= 1


CONTROLS = (
    Control(
        name="learning rate",
        y="over the peak of the base schedule",
        value=lambda interval, config: max(interval.learning_rate / config.base_learning_rate, FLOOR / 10),
        keeps=lambda run: _one([i.learning_rate_scale for i in run.intervals]) and not _finishes(run),
    ),
    Control(
        name="batch",
        y="over the starting batch",
        value=_batch,
        keeps=lambda run: _one([round(_batch(i, run.spec.config), 1) for i in run.intervals]),
    ),
    Control(
        name="precision",
        y="of the matrix products",
        value=lambda interval, config: float(PRECISIONS.index(interval.precision)),
        keeps=lambda run: _one([i.precision for i in run.intervals]),
    ),
    Control(
        name="sparsity",
        y="share of zero weights or removed channels",
        value=lambda interval, config: interval.sparsity,
        keeps=lambda run: _one([i.sparsity for i in run.intervals]),
    ),
)


def control_moves(material: Material, looks: Looks) -> list[Moves]:
    """Return the controls over the budget for methods that change them: policies first, else the heuristics."""
    steering = [name for name in material.notes if _steers(material, name)]
    policies = [name for name in steering if material.notes[name].kind == "policy"]
    chosen = policies or sorted(steering, key=lambda name: name == "random")
    return [_moves(material, looks.of(name) or _plain(material, name)) for name in chosen[:N_METHODS]]


def _plain(material: Material, name: str) -> Look:
    """Return the look of a method that has none: it stands alone here."""
    return Look(method=name, title=material.title(name), color="s1", marker="o")


def _steers(material: Material, method: str) -> bool:
    return any(run.spec.steering.kind != "keep" for run in _all_runs(material, method))


def _all_runs(material: Material, method: str) -> list[RunResult]:
    return [run for case in material.case_names for run in material.runs(case, method) if run.intervals]


def _finishes(run: RunResult) -> bool:
    return any(interval.finishing for interval in run.intervals)


def _moves(material: Material, look: Look) -> Moves:
    runs = _all_runs(material, look.method)
    moved = [control for control in CONTROLS if not all(control.keeps(run) for run in runs)]
    return Moves(
        look=look,
        panels=tuple(_panel(control, look, runs) for control in moved),
        unmoved=tuple(control.name for control in CONTROLS if control not in moved),
    )


def _panel(control: Control, look: Look, runs: Sequence[RunResult]) -> Panel:
    drawn = panel(control.name, control.y, about=f"{control.name} over the budget, {look.title}")
    courses = [_course(control, run) for run in runs]
    if control.name == "precision":
        courses = _ranked(drawn, courses)
    else:
        _scale(drawn, control, [value for _, values in courses for value in values])
    plain_axis(drawn.axes, "x", (0, 1), percent)
    name_x(drawn.axes, "share of the budget")
    if control.name == "learning rate":
        _base(drawn, runs)
    for shares, values in courses:
        drawn.axes.plot(shares, values, color=ink(look.color), linewidth=0.7, alpha=0.35, drawstyle="steps-post")
    gid = drawn.mark(f"{look.title}, median of {len(courses)} runs")
    style: dict[str, Any] = {"color": ink(look.color), "linewidth": 1.8, "drawstyle": "steps-post", "zorder": 3}
    drawn.axes.plot(*zip(*_typical(courses), strict=True), gid=gid, **style)
    return drawn


def _course(control: Control, run: RunResult) -> Course:
    """Return the shares of the budget at which intervals begin, and the control in each; the last one twice."""
    config = run.spec.config
    ends = [interval.tokens / config.tokens for interval in run.intervals]
    values = [control.value(interval, config) for interval in run.intervals]
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
        drawn.axes.plot(GRID, factors, **style, gid=drawn.mark(f"base schedule: {schedule.name}"))


def _ranked(drawn: Panel, courses: Sequence[Course]) -> list[Course]:
    """Give every precision that was used a row of its own."""
    used = sorted({value for _, values in courses for value in values})
    drawn.axes.set_ylim(-0.5, len(used) - 0.5)
    drawn.axes.set_yticks(range(len(used)), [PRECISIONS[int(code)] for code in used])
    return [(shares, [float(used.index(value)) for value in values]) for shares, values in courses]


def _scale(drawn: Panel, control: Control, values: Sequence[float]) -> None:
    low, high = min(values), max(values)
    if control.name == "learning rate":
        limits = (FLOOR, max(high, 1.0) * 1.3)
        ticks = [tick for tick in log_ticks(*limits, most=6) if tick > 1.5 * FLOOR]
        log_axis(drawn.axes, "y", limits, times, ticks)
    elif control.name == "batch":
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
