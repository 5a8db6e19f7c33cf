"""Draw runs from their folders: losses over tokens, controls over the budget, what they cost, and why.

What was refused is a hollow triangle on a curve; what was taken back is a thin branch that ends in a cross.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from trainpilot.envs.action import ACTION_FIELDS, KEEP
from trainpilot.experiments.report.controls import CONTROLS, ShownControl
from trainpilot.experiments.report.drawing import (
    DASHES,
    MARKERS,
    N_COLOURED,
    PART_INKS,
    PART_NAMES,
    TEXT,
    MethodStyle,
    Panel,
    counted,
    ink,
    log_axis,
    measured,
    name_x,
    named_rows,
    panel,
    plain_axis,
    stack,
    window,
)
from trainpilot.experiments.report.formatting import duration, percent, rate, si
from trainpilot.experiments.stored_run import StoredRun, cost_parts
from trainpilot.llm_runtime.config import PRECISIONS
from trainpilot.llm_runtime.telemetry import Telemetry

EARLY = 0.1
"""The range of a loss axis comes from the losses from this share of the run on; what lies before would flatten it."""
LOWEST = 1e-3
"""Learning rates below this share of the highest are drawn there, as a schedule ends at zero."""
EFFECT_INKS = ("s1", "s2", "s3", "s4", "s5", "s6")
"""Colours of the action fields, in their order."""
ROOM = 1.16
"""Length of an axis of bars over the longest bar, for the figures behind them."""

Points = list[tuple[float, float]]


@dataclass(frozen=True, kw_only=True)
class Drawn:
    """A run with the way it is drawn."""

    run: StoredRun
    look: MethodStyle


def looks_of(runs: Sequence[StoredRun], reference: StoredRun | None) -> list[Drawn]:
    """Return the runs that charts show: the reference run in grey, then the first few in colour."""
    drawn = []
    if reference is not None:
        look = MethodStyle(method="", title=reference.name, color="soft", marker="D", dash=(3.0, 1.6))
        drawn.append(Drawn(run=reference, look=look))
    for index, run in enumerate(runs[:N_COLOURED]):
        title = f"{run.name}, which only advised" if run.advised else run.name
        look = MethodStyle(
            method=run.name, title=title, color=f"s{index + 1}", marker=MARKERS[index], dash=DASHES[index]
        )
        drawn.append(Drawn(run=run, look=look))
    return drawn


def _style(look: MethodStyle, **more: Any) -> dict[str, Any]:
    return {"color": ink(look.color), "linestyle": look.linestyle, "linewidth": 1.5, "dash_capstyle": "butt"} | more


# Losses -------------------------------------------------------------------------------------------------------------


def loss_panels(shown: Sequence[Drawn]) -> list[Panel]:
    """Return training and validation loss over the tokens, as far as they are known."""
    training = [(each, _training(each.run, each.run.standing)) for each in shown]
    validation = [(each, validation_course(each.run)) for each in shown]
    drawn = [_loss_panel("training", training), _loss_panel("validation", validation)]
    if drawn[0] is not None:
        for each in shown:
            _mark_losses(drawn[0], each)
    return [one for one in drawn if one is not None]


def _training(run: StoredRun, places: Sequence[int]) -> Points:
    intervals = (run.records[place].telemetry for place in places)
    return [(float(t.tokens), t.train_loss) for t in intervals if math.isfinite(t.train_loss)]


def validation_course(run: StoredRun) -> Points:
    """Return tokens and validation loss wherever it was measured.

    It is measured at the end of an interval, and stands in the telemetry of the next one.
    """
    points: Points = []
    before = 0
    for place in run.standing:
        telemetry = run.records[place].telemetry
        loss = telemetry.validation_loss
        if loss is not None and math.isfinite(loss) and (not points or loss != points[-1][1]):
            points.append((float(before), loss))
        before = telemetry.tokens
    if run.last.finished and (loss := run.validation_loss) is not None and math.isfinite(loss):
        points = [*(point for point in points if point[0] < before), (float(before), loss)]
    return points


def _loss_panel(title: str, courses: Sequence[tuple[Drawn, Points]]) -> Panel | None:
    everything = [point for _, course in courses for point in course]
    if not everything:
        return None
    end = max(x for x, _ in everything)
    drawn = panel(f"{title} loss", "nats/token", about=f"{title} loss over the tokens")
    plain_axis(drawn.axes, "y", window([y for x, y in everything if x >= EARLY * end]))
    plain_axis(drawn.axes, "x", (0, max(end, 1)), counted)
    name_x(drawn.axes, "tokens")
    for each, course in courses:
        if course:
            drawn.axes.plot(*zip(*course, strict=True), **_style(each.look))
            drawn.axes.plot(*course[-1], **_style(each.look, marker=each.look.marker, markersize=4.5, zorder=4))
    return drawn


def _mark_losses(drawn: Panel, each: Drawn) -> None:
    """Mark on the training loss where choices were refused and where the run was taken back."""
    run, color = each.run, ink(each.look.color)
    refused = [place for place in run.standing if any(refused_controls(run, place))]
    _triangles(drawn, _training(run, refused), color)
    for rollback in run.rollbacks:
        branch = _training(run, [*_before(run, rollback.intervals[0]), *rollback.intervals])
        if branch:
            drawn.axes.plot(*zip(*branch, strict=True), color=color, linewidth=0.9, alpha=0.6)
            high = drawn.axes.get_ylim()[1]
            _cross(drawn, branch[-1][0], min(branch[-1][1], high), color)


def _before(run: StoredRun, place: int) -> list[int]:
    """Return the place of the interval that a branch leaves from, if there is one."""
    decision = run.records[place].telemetry.decision
    return [each for each in run.standing if run.records[each].telemetry.decision == decision - 1][:1]


def _triangles(drawn: Panel, points: Points, color: str) -> None:
    if points:
        mark: dict[str, Any] = {"linestyle": "", "marker": "v", "markersize": 5, "markeredgewidth": 0.9, "zorder": 5}
        drawn.axes.plot(*zip(*points, strict=True), color=color, markerfacecolor=ink("paper"), **mark)


def _cross(drawn: Panel, x: float, y: float, color: str) -> None:
    mark: dict[str, Any] = {"marker": "X", "markersize": 6.5, "markeredgewidth": 0.6, "zorder": 6}
    drawn.axes.plot([x], [y], color=color, markeredgecolor=ink("paper"), clip_on=False, **mark)


def refused_controls(run: StoredRun, place: int) -> list[bool]:
    """Return for each action field whether its choice was refused at a decision."""
    record = run.records[place]
    allowed = record.allowed if record.advice is None else record.advice.action
    return [asked != given for asked, given in zip(record.requested, allowed, strict=True)]


# Controls -----------------------------------------------------------------------------------------------------------


FIELDS = [field.name for field in ACTION_FIELDS]

Numbers = Sequence[tuple[int, int, str]]
"""Decision, index of the action field, and the number that it is explained under."""


def control_panels(shown: Sequence[Drawn], numbers: Numbers = ()) -> tuple[list[Panel], list[str]]:
    """Return the controls over the share of the budget, and the names of those that never moved.

    Args:
        shown: The runs.
        numbers: Decisions of the last of the runs that are numbered.
    """
    moved = [control for control in CONTROLS if control.axis == "rate" or any(_moves(control, each) for each in shown)]
    panels = [one for control in moved if (one := _control_panel(control, shown, numbers)) is not None]
    return panels, [control.name for control in CONTROLS if control not in moved]


def _moves(control: ShownControl, each: Drawn) -> bool:
    run = each.run
    values = {control.value(record.telemetry) for record in run.records}
    advised = {control.advised(r.advice, r.telemetry) for r in run.records if r.advice is not None}
    index = FIELDS.index(control.fields[0])
    asked = any(run.records[place].requested[index] != KEEP[index] for place in run.standing)
    return len(values | advised) > 1 or asked


def _control_panel(control: ShownControl, shown: Sequence[Drawn], numbers: Numbers) -> Panel | None:
    values = [v for each in shown for v in _values(control, each.run) if math.isfinite(v)]
    if not values:
        return None
    drawn = panel(control.name, control.y, about=f"{control.name} over the budget")
    plain_axis(drawn.axes, "x", (0, 1), percent)
    name_x(drawn.axes, "share of the budget")
    place_of = _axis(drawn, control, values)
    for each in shown:
        _draw_control(drawn, control, each, place_of)
    if numbers:
        _write_numbers(drawn, control, shown[-1].run, numbers, place_of)
    return drawn


def _values(control: ShownControl, run: StoredRun) -> list[float]:
    values = [control.value(run.records[place].telemetry) for place in run.standing]
    records = (run.records[place] for place in run.standing)
    return values + [control.advised(r.advice, r.telemetry) for r in records if r.advice is not None]


def _axis(drawn: Panel, control: ShownControl, values: Sequence[float]) -> Callable[[float], float]:
    """Set the y-axis, and return where on it a value stands."""
    low, high = min(values), max(values)
    if control.axis == "rate" and high > 0:
        least = max(low, high * LOWEST)
        log_axis(drawn.axes, "y", (least / 1.25, high * 1.6), rate)
        return lambda value: max(value, least)
    if control.axis == "doublings" and low > 0:
        doublings = [2.0**k for k in range(30) if low / 1.3 <= 2.0**k <= high * 1.3]
        log_axis(drawn.axes, "y", (low / 1.4, high * 1.6), lambda value: f"{value:g}", doublings or sorted({low, high}))
        return lambda value: value
    if control.axis == "names":
        used = sorted(set(values))
        drawn.axes.set_ylim(-0.5, len(used) - 0.4)
        names = [PRECISIONS[int(code)] if code >= 0 else "another" for code in used]
        drawn.axes.set_yticks(range(len(used)), names)
        return lambda value: float(used.index(value))
    plain_axis(drawn.axes, "y", (0, max(high * 1.15, 0.1)), percent)
    return lambda value: value


def _draw_control(drawn: Panel, control: ShownControl, each: Drawn, place_of: Callable[[float], float]) -> None:
    run, color = each.run, ink(each.look.color)
    places = [place for place in run.standing if math.isfinite(control.value(run.records[place].telemetry))]
    if not places:
        return
    telemetry = [run.records[place].telemetry for place in places]
    starts, ends = _spans(telemetry)
    values = [place_of(control.value(t)) for t in telemetry]
    drawn.axes.plot([*starts, ends[-1]], [*values, values[-1]], drawstyle="steps-post", **_style(each.look))
    advised = [
        (start, place_of(control.advised(record.advice, record.telemetry)))
        for start, record in zip(starts, (run.records[place] for place in places), strict=True)
        if record.advice is not None
    ]
    if advised:
        faint: dict[str, Any] = {"linewidth": 3, "alpha": 0.35, "drawstyle": "steps-post"}
        drawn.axes.plot(*zip(*advised, strict=True), color=color, **faint)
    fields = [FIELDS.index(name) for name in control.fields]
    refused = [any(refused_controls(run, place)[index] for index in fields) for place in places]
    _triangles(drawn, [(x, y) for x, y, no in zip(starts, values, refused, strict=True) if no], color)
    for rollback in run.rollbacks:
        went = run.records[rollback.intervals[-1]].telemetry
        value = control.value(went)
        if math.isfinite(value):
            low, high = drawn.axes.get_ylim()
            _cross(drawn, went.budget_used, min(max(_known(place_of, value), low), high), color)


def _known(place_of: Callable[[float], float], value: float) -> float:
    try:
        return place_of(value)
    except ValueError:  # a precision that only an interval had that was taken back
        return -0.5


def _spans(telemetry: Sequence[Telemetry]) -> tuple[list[float], list[float]]:
    """Return the shares of the budget at which intervals begin and end."""
    ends = [t.budget_used for t in telemetry]
    return [0.0, *ends[:-1]], ends


def _write_numbers(
    drawn: Panel, control: ShownControl, run: StoredRun, numbers: Numbers, place_of: Callable[[float], float]
) -> None:
    """Write the numbers of explained changes above the curve, beside each other where they are close."""
    taken: list[float] = []
    for place, index, number in numbers:
        telemetry = run.records[place].telemetry
        value = control.value(telemetry)
        if FIELDS[index] not in control.fields or not math.isfinite(value):
            continue
        x = run.began_at(place)
        level = sum(abs(x - other) < 0.06 for other in taken)
        taken.append(x)
        drawn.axes.annotate(
            number,
            (x, _known(place_of, value)),
            xytext=(0, 5 + 8.5 * level),
            textcoords="offset points",
            ha="center",
            fontsize=TEXT,
            fontweight="bold",
            color=ink("ink"),
        )


# Costs and reasons --------------------------------------------------------------------------------------------------


def cost_panels(shown: Sequence[Drawn]) -> list[Panel]:
    """Return seconds and, as far as all are known, joules of each run by part."""
    parts = {each.look.title: cost_parts(each.run) for each in shown}
    seconds = [[found[name][0] for name in PART_NAMES] for found in parts.values()]
    joules = [[found[name][1] for name in PART_NAMES if name != "evaluation"] for found in parts.values()]
    drawn = []
    if any(map(sum, seconds)):
        drawn.append(_bars("time", list(parts), seconds, "s", PART_INKS))
    known = [[value for value in row if value is not None] for row in joules]
    if any(map(sum, known)) and known == joules:
        inks = [each for each, name in zip(PART_INKS, PART_NAMES, strict=True) if name != "evaluation"]
        drawn.append(_bars("energy, evaluation apart", list(parts), known, "J", inks))
    return drawn


def _bars(title: str, names: list[str], rows: list[list[float]], unit: str, inks: Sequence[str]) -> Panel:
    drawn = named_rows(title, names, f"{title} by part and run")
    plain_axis(drawn.axes, "x", (0, max(map(sum, rows)) * ROOM), measured(unit), n=3)
    stack(drawn, rows, inks, duration if unit == "s" else lambda value: si(value, unit))
    return drawn


def effects_panel(names: Sequence[str], fields: Sequence[tuple[str, Sequence[float]]]) -> Panel:
    """Return the mean effects of observation fields on the choices of a policy, a bar for each field.

    Args:
        names: Controls.
        fields: Each field with its mean effect on each of the controls, in log-odds.
    """
    drawn = named_rows("what moved the choices", [name for name, _ in fields], "mean effect of observation fields")
    plain_axis(drawn.axes, "x", (0, max(sum(effects) for _, effects in fields) * ROOM))
    name_x(drawn.axes, "mean effect, log-odds")
    inks = [EFFECT_INKS[FIELDS.index(name)] for name in names]
    stack(drawn, [effects for _, effects in fields], inks, lambda value: f"{value:.2f}")
    return drawn
