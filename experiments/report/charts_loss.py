"""Draw losses, one panel per case: against cost with the Pareto front, against tokens, and against the budget."""

from __future__ import annotations

from collections.abc import Sequence
from statistics import median
from typing import Any

from trainpilot.experiments.compare.comparison import TUNED, UNTUNED
from trainpilot.experiments.compare.records import RunResult
from trainpilot.experiments.measuring.figures import BaselineCurve, FrontPoint
from trainpilot.experiments.report.looks import Look, Looks
from trainpilot.experiments.report.material import Material
from trainpilot.experiments.report.numbers import nats, si
from trainpilot.experiments.report.scales import counted, log_axis, log_window, measured, plain_axis, window
from trainpilot.experiments.report.svg import Panel, ink, name_x, panel

Style = dict[str, Any]
LOSS = "validation loss, nats/token"
EARLY = 0.3
"""The curves over tokens show the losses from this share of the budget on; what lies before would flatten the rest."""


def front_panels(material: Material, looks: Looks) -> list[Panel]:
    """Return final loss against modelled joules, or seconds where joules are unknown."""
    drawn = (_front(material, looks, case) for case in material.case_names)
    return [one for one in drawn if one is not None]


def counts_joules(material: Material, case: str) -> bool:
    """Return whether the joules of everything on a case are known; the front is then one of joules, else of seconds."""
    here = [point for point in material.figures.points if point.case == case]
    return bool(here) and all(point.energy_j is not None for point in here)


def _front(material: Material, looks: Looks, case: str) -> Panel | None:
    joules = counts_joules(material, case)
    points = [point for point in material.figures.points if point.case == case]
    judged = [point for point in points if point.role == "method"]
    if not judged:
        return None
    drawn = panel(case, LOSS, about=f"final loss against modelled {'energy' if joules else 'time'} on {case}")
    low, high = window(point.validation_loss for point in judged)
    costs = log_window([_cost(point, joules) for point in judged], spare=0.12)
    log_axis(drawn.axes, "x", costs, measured("J" if joules else "s"))
    plain_axis(drawn.axes, "y", (low, high))
    name_x(drawn.axes, "modelled energy" if joules else "modelled time (energy unknown)")
    _dots(drawn, [point for point in points if point.role != "method"], joules)
    _staircase(drawn, points, joules)
    _families(drawn, material, looks, judged, joules)
    for point in judged:
        _method_dot(drawn, material, looks.of(point.method), point, joules)
    return drawn


def _dots(drawn: Panel, points: Sequence[FrontPoint], joules: bool) -> None:
    """Draw what a search tried, and the baselines at other budgets, as a faint cloud."""
    x, y = [_cost(point, joules) for point in points], [point.validation_loss for point in points]
    drawn.axes.plot(x, y, linestyle="", marker="o", markersize=2.6, color=ink("soft"), alpha=0.5, markeredgewidth=0)


def _staircase(drawn: Panel, points: Sequence[FrontPoint], joules: bool) -> None:
    front = sorted((_cost(p, joules), p.validation_loss) for p in points if p.on_front)
    if front:
        end = drawn.axes.get_xlim()[1]
        x, y = [*(x for x, _ in front), end], [*(y for _, y in front), front[-1][1]]
        drawn.axes.plot(x, y, drawstyle="steps-post", color=ink("soft"), linewidth=0.9, alpha=0.8)


def _families(drawn: Panel, material: Material, looks: Looks, judged: Sequence[FrontPoint], joules: bool) -> None:
    """Join the points of one policy under several preferences."""
    members: dict[str, list[FrontPoint]] = {}
    for point in judged:
        if _kind(material, point.method) == "policy":
            members.setdefault(point.family, []).append(point)
    for family in members.values():
        look = looks.of(family[0].method)
        line = sorted((_cost(point, joules), point.validation_loss) for point in family)
        color = ink(look.color) if look else ink("soft")
        drawn.axes.plot([x for x, _ in line], [y for _, y in line], color=color, linewidth=0.8, alpha=0.5)


def _method_dot(drawn: Panel, material: Material, look: Look | None, point: FrontPoint, joules: bool) -> None:
    """Draw a method; one whose loss lies beyond the axis becomes a hollow mark at its upper edge."""
    cost, top = _cost(point, joules), drawn.axes.get_ylim()[1]
    beyond = point.validation_loss > top
    text = f"{material.title(point.method)}: {nats(point.validation_loss)} at {si(cost, 'J' if joules else 's')}"
    color = ink(look.color) if look else ink("soft")
    drawn.axes.plot(
        [cost],
        [top if beyond else point.validation_loss],
        marker=look.marker if look else "o",
        markersize=6.2 if look else 4,
        color=color,
        markerfacecolor="none" if beyond else color,
        markeredgecolor=color if beyond or look is None else ink("paper"),
        markeredgewidth=0.8,
        linestyle="",
        clip_on=False,
        zorder=4 if look else 3,
        gid=drawn.mark(text),
    )


def course_panels(material: Material, looks: Looks) -> list[Panel]:
    """Return validation loss over the tokens: the chosen few over the two baselines, with a thin line per seed."""
    drawn = (_courses(material, (*looks.baselines, *looks.subjects), case) for case in material.case_names)
    return [one for one in drawn if one is not None]


def _courses(material: Material, shown: Sequence[Look], case: str) -> Panel | None:
    courses = {look: [c for run in material.runs(case, look.method) if len(c := course(run)) > 1] for look in shown}
    everything = [point for runs in courses.values() for run in runs for point in run]
    if not everything:
        return None
    end = max(tokens for tokens, _ in everything)
    drawn = panel(case, LOSS, about=f"validation loss over the tokens on {case}")
    low, high = window(loss for tokens, loss in everything if tokens >= EARLY * end)
    plain_axis(drawn.axes, "y", (low, high))
    plain_axis(drawn.axes, "x", (0, end), counted)
    name_x(drawn.axes, "tokens")
    for look, runs in courses.items():
        style: Style = {"color": ink(look.color), "linestyle": look.linestyle, "dash_capstyle": "butt"}
        for run in runs:
            drawn.axes.plot(*zip(*run, strict=True), **style | {"linewidth": 0.7, "alpha": 0.35})
        if runs:
            line = middle(runs)
            gid = drawn.mark(f"{look.title}, median of {len(runs)} runs")
            drawn.axes.plot(*zip(*line, strict=True), **style, linewidth=1.7, gid=gid, zorder=3)
            end_mark: Style = {"marker": look.marker, "markersize": 4.5, "clip_on": False, "zorder": 4}
            drawn.axes.plot(*line[-1], **style | end_mark)
    return drawn


def course(run: RunResult) -> list[tuple[float, float]]:
    """Return tokens and validation loss wherever it was measured."""
    start = [] if run.initial_validation_loss is None else [(0.0, run.initial_validation_loss)]
    seen = [(float(i.tokens), i.validation_loss) for i in run.intervals if i.validation_loss is not None]
    return start + seen


def middle(runs: Sequence[Sequence[tuple[float, float]]]) -> list[tuple[float, float]]:
    """Return the median of several courses, point by point, as far as at least half of them go."""
    longest = max(len(run) for run in runs)
    columns = ([run[index] for run in runs if len(run) > index] for index in range(longest))
    return [(median(x for x, _ in c), median(y for _, y in c)) for c in columns if 2 * len(c) >= len(runs)]


def budget_panels(material: Material, looks: Looks) -> list[Panel]:
    """Return final loss against the budget in tokens, both on logarithmic axes: what multipliers are read from."""
    drawn = (_budgets(material, looks, case) for case in material.case_names)
    return [one for one in drawn if one is not None]


def _budgets(material: Material, looks: Looks, case: str) -> Panel | None:
    curves = [c for c in material.figures.curves if c.case == case and c.axis == "tokens" and len(c.budgets) > 1]
    if not curves:
        return None
    drawn = panel(case, LOSS, about=f"final loss of the baselines at several budgets on {case}")
    marks = _marks(material, looks, case)
    budgets = [x for curve in curves for x in curve.budgets] + [x for x, _ in marks.values()]
    losses = [y for curve in curves for y in curve.losses] + [y for _, y in marks.values()]
    log_axis(drawn.axes, "x", log_window(budgets), counted)
    log_axis(drawn.axes, "y", log_window(losses), lambda y: f"{y:.4g}")
    name_x(drawn.axes, "budget, tokens")
    for curve in curves:
        _curve(drawn, curve, looks)
    edge: Style = {"markeredgecolor": ink("paper"), "markeredgewidth": 0.8, "markersize": 6.5, "zorder": 4}
    for look, (tokens, loss) in marks.items():
        gid = drawn.mark(f"{look.title}: {nats(loss)} after {si(tokens)} tokens")
        drawn.axes.plot([tokens], [loss], look.marker, color=ink(look.color), gid=gid, **edge)
    return drawn


def _marks(material: Material, looks: Looks, case: str) -> dict[Look, tuple[float, float]]:
    """Return tokens and final loss of the methods that are followed."""
    found = {look: material.by_case.get((case, look.method)) for look in looks.subjects}
    known = {look: (f.tokens.value, f.validation_loss.value) for look, f in found.items() if f is not None}
    return {look: (x, y) for look, (x, y) in known.items() if x and y is not None}


def _curve(drawn: Panel, curve: BaselineCurve, looks: Looks) -> None:
    look = looks.of(UNTUNED if curve.baseline == "untuned" else TUNED)
    color, marker, dash = (look.color, look.marker, look.linestyle) if look else ("soft", ".", (0.0, None))
    style: Style = {"color": ink(color), "marker": marker, "markersize": 3.4, "linewidth": 1.2, "linestyle": dash}
    drawn.axes.plot(curve.budgets, curve.losses, **style, gid=drawn.mark(f"{curve.baseline} baseline"))


def _cost(point: FrontPoint, joules: bool) -> float:
    return point.energy_j if joules and point.energy_j is not None else point.time_s


def _kind(material: Material, method: str) -> str:
    return material.notes[method].kind if method in material.notes else ""
