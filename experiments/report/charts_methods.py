"""Draw what a method is worth against the tuned static, case by case, and where its time and energy went."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from statistics import fmean
from typing import Any

from trainpilot.experiments.compare.comparison import TUNED, UNTUNED
from trainpilot.experiments.measuring.figures import PARTS, CaseFigures, Estimate
from trainpilot.experiments.report.looks import Look, Looks
from trainpilot.experiments.report.material import Material
from trainpilot.experiments.report.numbers import multiplier, percent, ratio
from trainpilot.experiments.report.scales import log_axis, log_ticks, plain_axis
from trainpilot.experiments.report.svg import BOTTOM, TEXT, TOP, Panel, ink, name_x, panel

ROW = 0.235
"""Height of a method's row, in inches."""
NAMES = 1.4
"""Width of the names before the rows, in inches."""
LONGEST_NAME = 20
FAR = 4.0
"""Multipliers beyond this factor are drawn as arrows at the edge."""
TICKS = ((1 / 4, 1 / 2, 1, 2, 4), (0.5, 0.7, 1, 1.5, 2), (0.8, 0.9, 1, 1.1, 1.25))
N_BARS = 14

Of = Callable[[str, str], Estimate]
"""Returns a multiplier by method and axis."""


def multiplier_panels(material: Material, looks: Looks, second: str | None) -> list[Panel]:
    """Return compute multipliers against the tuned static: over all cases, then on each of them.

    Args:
        material: What is drawn.
        looks: The methods that are shown.
        second: `energy_j` or `time_s`, drawn hollow below the figure in tokens.
    """
    shown = [look for look in looks.chosen if look.method != TUNED]
    everywhere: list[tuple[str, Of]] = [("all cases", lambda name, axis: material.multiplier(name, "tuned", axis))]
    cases = [(case, _on(material, case)) for case in material.case_names]
    groups = [group for group in (everywhere if len(cases) > 1 else []) + cases if _any(group[1], shown)]
    axes = ("tokens", second or "tokens")
    limits = _limits([of(look.method, axis) for _, of in groups for look in shown for axis in axes])
    return [_forest(shown, title, of, second, limits) for title, of in groups]


def _on(material: Material, case: str) -> Of:
    return lambda name, axis: material.case_multiplier(case, name, "tuned", axis)


def _any(of: Of, shown: Sequence[Look]) -> bool:
    return any(of(look.method, "tokens").value is not None for look in shown)


def _limits(estimates: Sequence[Estimate]) -> tuple[float, float]:
    """Return a range around 1 that holds the estimates and their intervals, as far as they are not far off."""
    ends = [end for e in estimates for end in (e.value, e.low, e.high) if end is not None]
    reach = min(max([1.1, *(max(end, 1 / end) for end in ends if end > 0)]), FAR) ** 1.08
    low = max(min([0.95, *(end for end in ends if end > 0)]), 1 / FAR) / 1.05
    high = min(max([1.05, *ends]), FAR) * 1.05
    return max(low, 1 / reach), min(high, reach)


def _forest(shown: Sequence[Look], title: str, of: Of, second: str | None, limits: tuple[float, float]) -> Panel:
    drawn = _rows(title, [look.title for look in shown], f"compute multipliers, {title}")
    log_axis(drawn.axes, "x", limits, ratio, _ticks(limits))
    name_x(drawn.axes, "compute multiplier")
    drawn.axes.axvline(1, color=ink("ink"), linewidth=0.9, zorder=1)
    unit = {"energy_j": "joules", "time_s": "seconds"}.get(second or "")
    for row, look in enumerate(shown):
        text = f"{look.title}, tokens: {multiplier(of(look.method, 'tokens'))}"
        _estimate(drawn, of(look.method, "tokens"), row - (0.16 if second else 0), look.color, text)
        if second:
            text = f"{look.title}, modelled {unit}: {multiplier(of(look.method, second))}"
            _hollow(drawn, of(look.method, second), row + 0.2, look.color, text)
    return drawn


def _ticks(limits: tuple[float, float]) -> list[float]:
    """Return the widest of the usual sets of ticks of which three are in sight."""
    inside = ([tick for tick in ticks if limits[0] <= tick <= limits[1]] for ticks in TICKS)
    return next((ticks for ticks in inside if len(ticks) >= 3), log_ticks(*limits))


def _estimate(drawn: Panel, estimate: Estimate, row: float, color: str, text: str) -> None:
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
    drawn.axes.plot([place], [row], marker=mark, markersize=5.2, gid=drawn.mark(text), **style)


def _hollow(drawn: Panel, estimate: Estimate, row: float, color: str, text: str) -> None:
    """Draw the same with an empty dot."""
    _estimate(drawn, estimate, row, color, text)
    if estimate.value is not None:
        drawn.axes.lines[-1].set_markerfacecolor(ink("paper"))


def _mark(estimate: Estimate, low: float, high: float) -> str:
    value = estimate.value or 0.0
    if estimate.censored == "<" or value < low:
        return "<"
    return ">" if estimate.censored == ">" or value > high else "o"


def part_panels(material: Material, looks: Looks) -> list[Panel]:
    """Return stacked bars of modelled joules and seconds by part, as a share of the untuned default's."""
    unit = next((name for name in (UNTUNED, TUNED) if name in material.notes), None)
    if unit is None:
        return []
    shown = [look.method for look in looks.chosen]
    names = shown + [n for n in material.ranked if n not in shown][: max(N_BARS - len(shown), 0)]
    kinds: tuple[tuple[str, Callable[[CaseFigures], Mapping[str, float] | None]], ...] = (
        ("modelled energy", lambda found: found.energy_parts_j),
        ("modelled time", lambda found: found.time_parts_s or None),
    )
    drawn = []
    for title, parts in kinds:
        shares = {name: found for name in names if (found := _shares(material, name, unit, parts))}
        if shares:
            drawn.append(_bars(material, title, material.title(unit), shares))
    return drawn


def _shares(
    material: Material, name: str, unit: str, parts: Callable[[CaseFigures], Mapping[str, float] | None]
) -> dict[str, float]:
    """Return a method's parts over the unit's total, mean over the cases where both are known."""
    rows = []
    for case in material.case_names:
        own, whole = material.by_case.get((case, name)), material.by_case.get((case, unit))
        ours, theirs = (parts(found) if found else None for found in (own, whole))
        if ours and theirs and (total := sum(theirs.values())) > 0:
            rows.append({part: ours.get(part, 0.0) / total for part in PARTS})
    return {part: fmean(row[part] for row in rows) for part in PARTS} if rows else {}


def _bars(material: Material, title: str, unit: str, shares: Mapping[str, Mapping[str, float]]) -> Panel:
    drawn = _rows(title, [material.title(name) for name in shares], f"{title} by part and method")
    longest = max(sum(parts.values()) for parts in shares.values())
    plain_axis(drawn.axes, "x", (0, longest * 1.16), percent)
    name_x(drawn.axes, f"share of {unit}")
    for row, (name, parts) in enumerate(shares.items()):
        start = 0.0
        for index, part in enumerate(PARTS):
            text = drawn.mark(f"{material.title(name)}, {part}: {percent(parts[part], 1)}")
            drawn.axes.barh(row, parts[part], left=start, height=0.62, color=ink(f"part{index + 1}"), gid=text)
            start += parts[part]
        drawn.axes.text(start + longest * 0.015, row, percent(start), va="center", fontsize=TEXT, color=ink("ink"))
    return drawn


def _rows(title: str, names: Sequence[str], about: str) -> Panel:
    """Return a panel with a named row for each method, the first on top."""
    height = TOP + BOTTOM + ROW * max(len(names), 2)
    drawn = panel(title, about=about, height=height, left=NAMES)
    drawn.axes.set_ylim(max(len(names), 2) - 0.5, -0.5)
    drawn.axes.set_yticks(range(len(names)), [_shortened(name) for name in names])
    drawn.axes.tick_params(axis="y", labelcolor=ink("ink"), pad=8)
    drawn.axes.grid(visible=False)
    drawn.axes.grid(axis="x", color=ink("faint"), linewidth=0.7)
    return drawn


def _shortened(name: str) -> str:
    return name if len(name) <= LONGEST_NAME else f"{name[: LONGEST_NAME - 1]}…"
