"""Draw the losses and the worth of the methods: Pareto front, loss curves, budget curves, multipliers, cost shares.

Each function returns one panel per case, or per unit of cost.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from statistics import fmean, median
from typing import Any

from trainpilot.experiments.analysis.figures import PARTS, BaselineCurve, CaseFigures, Estimate, FrontPoint
from trainpilot.experiments.report.drawing import (
    PART_INKS,
    MethodStyle,
    MethodStyles,
    Panel,
    counted,
    ink,
    log_axis,
    log_ticks,
    log_window,
    measured,
    name_x,
    named_rows,
    panel,
    plain_axis,
    stack,
    window,
)
from trainpilot.experiments.report.formatting import percent, ratio
from trainpilot.experiments.report.report_data import ReportData
from trainpilot.experiments.results import TUNED, UNTUNED, RunResult

Style = dict[str, Any]
LOSS = "validation loss, nats/token"
EARLY = 0.3
"""The curves over tokens show the losses from this share of the budget on; what lies before would flatten the rest."""


def front_panels(data: ReportData, looks: MethodStyles) -> list[Panel]:
    """Return final loss against modelled joules, or seconds where joules are unknown."""
    drawn = (_front(data, looks, case) for case in data.case_names)
    return [one for one in drawn if one is not None]


def counts_joules(data: ReportData, case: str) -> bool:
    """Return whether the joules of everything on a case are known; the front is then one of joules, else of seconds."""
    here = [point for point in data.figures.points if point.case == case]
    return bool(here) and all(point.energy_j is not None for point in here)


def _front(data: ReportData, looks: MethodStyles, case: str) -> Panel | None:
    joules = counts_joules(data, case)
    points = [point for point in data.figures.points if point.case == case]
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
    _families(drawn, data, looks, judged, joules)
    for point in judged:
        _method_dot(drawn, data, looks.of(point.method), point, joules)
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


def _families(drawn: Panel, data: ReportData, looks: MethodStyles, judged: Sequence[FrontPoint], joules: bool) -> None:
    """Join the points of one policy under several preferences."""
    members: dict[str, list[FrontPoint]] = {}
    for point in judged:
        if _kind(data, point.method) == "policy":
            members.setdefault(point.family, []).append(point)
    for family in members.values():
        look = looks.of(family[0].method)
        line = sorted((_cost(point, joules), point.validation_loss) for point in family)
        color = ink(look.color) if look else ink("soft")
        drawn.axes.plot([x for x, _ in line], [y for _, y in line], color=color, linewidth=0.8, alpha=0.5)


def _method_dot(drawn: Panel, data: ReportData, look: MethodStyle | None, point: FrontPoint, joules: bool) -> None:
    """Draw a method; one whose loss lies beyond the axis becomes a hollow mark at its upper edge."""
    cost, top = _cost(point, joules), drawn.axes.get_ylim()[1]
    beyond = point.validation_loss > top
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
    )


def loss_panels(data: ReportData, looks: MethodStyles) -> list[Panel]:
    """Return validation loss over the tokens: the chosen few over the two baselines, with a thin line per seed."""
    drawn = (_courses(data, (*looks.baselines, *looks.subjects), case) for case in data.case_names)
    return [one for one in drawn if one is not None]


def _courses(data: ReportData, shown: Sequence[MethodStyle], case: str) -> Panel | None:
    courses = {look: [c for run in data.runs(case, look.method) if len(c := course(run)) > 1] for look in shown}
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
            drawn.axes.plot(*zip(*line, strict=True), **style, linewidth=1.7, zorder=3)
            end_mark: Style = {"marker": look.marker, "markersize": 4.5, "clip_on": False, "zorder": 4}
            drawn.axes.plot(*line[-1], **style | end_mark)
    return drawn


def course(run: RunResult) -> list[tuple[float, float]]:
    """Return tokens and validation loss wherever it was measured."""
    start = [] if run.initial_validation_loss is None else [(0.0, run.initial_validation_loss)]
    among = run.intervals
    if run.spec.members > 1:  # at the tokens of all members, the losses of those that led to the best
        among = tuple(interval for interval in among if not interval.rolled_back)
    return start + [(float(i.tokens), i.validation_loss) for i in among if i.validation_loss is not None]


def middle(runs: Sequence[Sequence[tuple[float, float]]]) -> list[tuple[float, float]]:
    """Return the median of several courses, point by point, as far as at least half of them go."""
    longest = max(len(run) for run in runs)
    columns = ([run[index] for run in runs if len(run) > index] for index in range(longest))
    return [(median(x for x, _ in c), median(y for _, y in c)) for c in columns if 2 * len(c) >= len(runs)]


def budget_panels(data: ReportData, looks: MethodStyles) -> list[Panel]:
    """Return final loss against the budget in tokens, both on logarithmic axes: what multipliers are read from."""
    drawn = (_budgets(data, looks, case) for case in data.case_names)
    return [one for one in drawn if one is not None]


def _budgets(data: ReportData, looks: MethodStyles, case: str) -> Panel | None:
    curves = [c for c in data.figures.curves if c.case == case and c.axis == "tokens" and len(c.budgets) > 1]
    if not curves:
        return None
    drawn = panel(case, LOSS, about=f"final loss of the baselines at several budgets on {case}")
    marks = _marks(data, looks, case)
    budgets = [x for curve in curves for x in curve.budgets] + [x for x, _ in marks.values()]
    losses = [y for curve in curves for y in curve.losses] + [y for _, y in marks.values()]
    log_axis(drawn.axes, "x", log_window(budgets), counted)
    log_axis(drawn.axes, "y", log_window(losses), lambda y: f"{y:.4g}")
    name_x(drawn.axes, "budget, tokens")
    for curve in curves:
        _curve(drawn, curve, looks)
    edge: Style = {"markeredgecolor": ink("paper"), "markeredgewidth": 0.8, "markersize": 6.5, "zorder": 4}
    for look, (tokens, loss) in marks.items():
        drawn.axes.plot([tokens], [loss], look.marker, color=ink(look.color), **edge)
    return drawn


def _marks(data: ReportData, looks: MethodStyles, case: str) -> dict[MethodStyle, tuple[float, float]]:
    """Return tokens and final loss of the methods that are followed."""
    found = {look: data.by_case.get((case, look.method)) for look in looks.subjects}
    known = {look: (f.tokens.value, f.validation_loss.value) for look, f in found.items() if f is not None}
    return {look: (x, y) for look, (x, y) in known.items() if x and y is not None}


def _curve(drawn: Panel, curve: BaselineCurve, looks: MethodStyles) -> None:
    look = looks.of(UNTUNED if curve.baseline == "untuned" else TUNED)
    color, marker, dash = (look.color, look.marker, look.linestyle) if look else ("soft", ".", (0.0, None))
    style: Style = {"color": ink(color), "marker": marker, "markersize": 3.4, "linewidth": 1.2, "linestyle": dash}
    drawn.axes.plot(curve.budgets, curve.losses, **style)


def _cost(point: FrontPoint, joules: bool) -> float:
    return point.energy_j if joules and point.energy_j is not None else point.time_s


def _kind(data: ReportData, method: str) -> str:
    return data.notes[method].kind if method in data.notes else ""


FAR = 4.0
"""Multipliers beyond this factor are drawn as arrows at the edge."""
TICKS = ((1 / 4, 1 / 2, 1, 2, 4), (0.5, 0.7, 1, 1.5, 2), (0.8, 0.9, 1, 1.1, 1.25))
N_BARS = 14

Of = Callable[[str, str], Estimate]
"""Returns a multiplier by method and axis."""


def multiplier_panels(data: ReportData, looks: MethodStyles, second: str | None) -> list[Panel]:
    """Return compute multipliers against the tuned static: over all cases, then on each of them.

    Args:
        data: What is drawn.
        looks: The methods that are shown.
        second: `energy_j` or `time_s`, drawn hollow below the figure in tokens.
    """
    shown = [look for look in looks.chosen if look.method != TUNED]
    everywhere: list[tuple[str, Of]] = [("all cases", lambda name, axis: data.multiplier(name, "tuned", axis))]
    cases = [(case, _on(data, case)) for case in data.case_names]
    groups = [group for group in (everywhere if len(cases) > 1 else []) + cases if _any(group[1], shown)]
    axes = ("tokens", second or "tokens")
    limits = _limits([of(look.method, axis) for _, of in groups for look in shown for axis in axes])
    return [_forest(shown, title, of, second, limits) for title, of in groups]


def _on(data: ReportData, case: str) -> Of:
    return lambda name, axis: data.case_multiplier(case, name, "tuned", axis)


def _any(of: Of, shown: Sequence[MethodStyle]) -> bool:
    return any(of(look.method, "tokens").value is not None for look in shown)


def _limits(estimates: Sequence[Estimate]) -> tuple[float, float]:
    """Return a range around 1 that holds the estimates and their intervals, as far as they are not far off."""
    ends = [end for e in estimates for end in (e.value, e.low, e.high) if end is not None]
    reach = min(max([1.1, *(max(end, 1 / end) for end in ends if end > 0)]), FAR) ** 1.08
    low = max(min([0.95, *(end for end in ends if end > 0)]), 1 / FAR) / 1.05
    high = min(max([1.05, *ends]), FAR) * 1.05
    return max(low, 1 / reach), min(high, reach)


def _forest(shown: Sequence[MethodStyle], title: str, of: Of, second: str | None, limits: tuple[float, float]) -> Panel:
    drawn = named_rows(title, [look.title for look in shown], f"compute multipliers, {title}")
    log_axis(drawn.axes, "x", limits, ratio, _ticks(limits))
    name_x(drawn.axes, "compute multiplier")
    drawn.axes.axvline(1, color=ink("ink"), linewidth=0.9, zorder=1)
    for row, look in enumerate(shown):
        _estimate(drawn, of(look.method, "tokens"), row - (0.16 if second else 0), look.color)
        if second:
            _hollow(drawn, of(look.method, second), row + 0.2, look.color)
    return drawn


def _ticks(limits: tuple[float, float]) -> list[float]:
    """Return the widest of the usual sets of ticks of which three are in sight."""
    inside = ([tick for tick in ticks if limits[0] <= tick <= limits[1]] for ticks in TICKS)
    return next((ticks for ticks in inside if len(ticks) >= 3), log_ticks(*limits))


def _estimate(drawn: Panel, estimate: Estimate, row: float, color: str) -> None:
    """Draw a dot with its interval; an arrow where only a bound is known, or where it lies off the axis."""
    if estimate.value is None:
        return
    low, high = drawn.axes.get_xlim()
    style: dict[str, Any] = {
        "color": ink(color),
        "linestyle": "",
        "clip_on": False,
        "markeredgewidth": 0.9,
        "zorder": 3,
    }
    if estimate.low is not None:
        ends = [min(max(end, low), high) for end in (estimate.low, estimate.high or high)]
        drawn.axes.plot(ends, [row, row], color=ink(color), linewidth=1.3, alpha=0.55, solid_capstyle="butt", zorder=2)
    place, mark = min(max(estimate.value, low), high), _mark(estimate, low, high)
    drawn.axes.plot([place], [row], marker=mark, markersize=5.2, **style)


def _hollow(drawn: Panel, estimate: Estimate, row: float, color: str) -> None:
    """Draw the same with an empty dot."""
    _estimate(drawn, estimate, row, color)
    if estimate.value is not None:
        drawn.axes.lines[-1].set_markerfacecolor(ink("paper"))


def _mark(estimate: Estimate, low: float, high: float) -> str:
    value = estimate.value or 0.0
    if estimate.censored == "<" or value < low:
        return "<"
    return ">" if estimate.censored == ">" or value > high else "o"


def part_panels(data: ReportData, looks: MethodStyles) -> list[Panel]:
    """Return stacked bars of modelled joules and seconds by part, as a share of the untuned default's."""
    unit = next((name for name in (UNTUNED, TUNED) if name in data.notes), None)
    if unit is None:
        return []
    shown = [look.method for look in looks.chosen]
    names = shown + [n for n in data.ranked if n not in shown][: max(N_BARS - len(shown), 0)]
    kinds: tuple[tuple[str, Callable[[CaseFigures], Mapping[str, float] | None]], ...] = (
        ("modelled energy", lambda found: found.energy_parts_j),
        ("modelled time", lambda found: found.time_parts_s or None),
    )
    drawn = []
    for title, parts in kinds:
        shares = {name: found for name in names if (found := _shares(data, name, unit, parts))}
        if shares:
            drawn.append(_bars(data, title, data.title(unit), shares))
    return drawn


def _shares(
    data: ReportData, name: str, unit: str, parts: Callable[[CaseFigures], Mapping[str, float] | None]
) -> dict[str, float]:
    """Return a method's parts over the unit's total, mean over the cases where both are known."""
    rows = []
    for case in data.case_names:
        own, whole = data.by_case.get((case, name)), data.by_case.get((case, unit))
        ours, theirs = (parts(found) if found else None for found in (own, whole))
        if ours and theirs and (total := sum(theirs.values())) > 0:
            rows.append({part: ours.get(part, 0.0) / total for part in PARTS})
    return {part: fmean(row[part] for row in rows) for part in PARTS} if rows else {}


def _bars(data: ReportData, title: str, unit: str, shares: Mapping[str, Mapping[str, float]]) -> Panel:
    drawn = named_rows(title, [data.title(name) for name in shares], f"{title} by part and method")
    longest = max(sum(parts.values()) for parts in shares.values())
    plain_axis(drawn.axes, "x", (0, longest * 1.16), percent)
    name_x(drawn.axes, f"share of {unit}")
    stack(drawn, [[parts[part] for part in PARTS] for parts in shares.values()], PART_INKS, percent)
    return drawn
