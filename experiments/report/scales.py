"""Choose what part of an axis is shown and where its ticks stand."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Sequence
from statistics import median

from matplotlib.axes import Axes
from matplotlib.ticker import FixedFormatter, FixedLocator, MaxNLocator, NullLocator

from trainpilot.experiments.report.numbers import SPACE, si

STEPS = (1, 1.5, 2, 3, 5, 7)
"""Where the ticks of a logarithmic axis stand within a decade, as far as there is room."""
Form = Callable[[float], str]


def window(values: Iterable[float], spare: float = 0.08) -> tuple[float, float]:
    """Return the range of a loss axis: from the best to those not far off the middle, hiding none for one bad run."""
    ordered = sorted(values)
    low, middle = ordered[0], median(ordered)
    reach = low + 2.5 * max(middle - low, 0.01 * abs(low), 1e-6)
    high = max(value for value in ordered if value <= reach)
    room = spare * max(high - low, 0.01 * abs(low), 1e-6)
    return low - room, high + room


def log_window(values: Iterable[float], spare: float = 0.06) -> tuple[float, float]:
    """Return a logarithmic axis's range around values above 0."""
    ordered = sorted(values)
    room = max(ordered[-1] / ordered[0], 1.1) ** spare
    return ordered[0] / room, ordered[-1] * room


def log_ticks(low: float, high: float, most: int = 5) -> list[float]:
    """Return round numbers on a logarithmic axis: between three and `most` of them where the range allows."""
    decades = range(math.floor(math.log10(low)) - 1, math.ceil(math.log10(high)) + 1)
    for steps in ((1,), (1, 3), (1, 2, 5), STEPS):
        ticks = [step * 10.0**decade for decade in decades for step in steps]
        inside = [tick for tick in ticks if low <= tick <= high]
        if len(inside) >= 3:
            return inside[:: math.ceil(len(inside) / most)]
    even = [float(tick) for tick in MaxNLocator(most - 1).tick_values(low, high)]
    return [tick for tick in even if low <= tick <= high]


def log_axis(axes: Axes, which: str, limits: tuple[float, float], form: Form, ticks: Sequence[float] = ()) -> None:
    """Make the x or y axis logarithmic, with ticks at round numbers."""
    axis = axes.xaxis if which == "x" else axes.yaxis
    (axes.set_xscale if which == "x" else axes.set_yscale)("log")
    (axes.set_xlim if which == "x" else axes.set_ylim)(limits)
    places = [tick for tick in ticks or log_ticks(*limits) if limits[0] <= tick <= limits[1]]
    axis.set_major_locator(FixedLocator(places))
    axis.set_major_formatter(FixedFormatter([form(place) for place in places]))
    axis.set_minor_locator(NullLocator())


def plain_axis(axes: Axes, which: str, limits: tuple[float, float], form: Form | None = None, n: int = 4) -> None:
    """Make the x or y axis linear with about `n` ticks."""
    axis = axes.xaxis if which == "x" else axes.yaxis
    (axes.set_xlim if which == "x" else axes.set_ylim)(limits)
    ticks = MaxNLocator(n, steps=[1, 2, 2.5, 5, 10]).tick_values(*limits)
    places = [float(tick) for tick in ticks if limits[0] <= tick <= limits[1]]
    axis.set_major_locator(FixedLocator(places))
    axis.set_major_formatter(FixedFormatter([form(place) if form else f"{place:.4g}" for place in places]))


def counted(value: float) -> str:
    """Return a number of tokens for an axis: `50 k`."""
    return "0" if value == 0 else _short(si(value))


def measured(unit: str) -> Form:
    """Return the form of an axis in `unit`."""
    return lambda value: f"0{SPACE}{unit}" if value == 0 else _short(si(value, unit))


def _short(text: str) -> str:
    """Drop the zeros that an axis does not need: `50.0 k` is `50 k`."""
    number, _, unit = text.partition(SPACE)
    return f"{number.rstrip('0').rstrip('.') if '.' in number else number}{SPACE}{unit}".strip()
