"""Draw the zero-shot benchmark: what the steered runs are worth against the tuned static, by where they started."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import matplotlib
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import FixedFormatter, FixedLocator, NullLocator

TITLES = {
    "tokens": ("in tokens", "asked for quality alone"),
    "time_s": ("in modelled seconds", "asked for quality and time"),
    "energy_j": ("in modelled joules", "asked for quality and energy"),
}
POINT, LINE, SOFT = "#5b8fc7", "#0a3d7a", "#62676f"
SPREAD = 0.5
"""Width over which the cases of one start are spread, in steps between two starts."""
LEAST, MOST = 0.2, 4.0
"""The axis never goes further; what lies beyond stands at its edge."""
TICKS = (0.2, 0.3, 0.5, 0.7, 0.85, 1.0, 1.2, 1.5, 2.0, 3.0, 4.0)

Told = Mapping[str, Any]
"""An estimate as the result file holds it."""


def draw(result: Mapping[str, Any], path: Path) -> None:
    """Write the picture of a result of `zero_shot`."""
    axes = {axis: found for axis, found in result["axes"].items() if found["starts"]}
    figure = Figure(figsize=(3.5 * max(len(axes), 1) + 0.7, 3.9), layout="constrained")
    panels = figure.subplots(1, max(len(axes), 1), sharey=True, squeeze=False)[0]
    limits = _limits(list(axes.values()))
    for panel, (axis, found) in zip(panels, axes.items(), strict=False):
        _panel(panel, found, limits)
        title, asked = TITLES[axis]
        panel.set_title(f"{title}\n", loc="left", fontsize=11, fontweight="bold")
        panel.text(
            0, 1.03, asked + _default(found["untuned_default"]), transform=panel.transAxes, fontsize=9.5, color=SOFT
        )
        panel.set_xlabel("start over the tuned learning rate", fontsize=9.5)
    panels[0].set_ylabel("compute multiplier against the tuned static", fontsize=9.5)
    figure.legend(
        *panels[0].get_legend_handles_labels(), loc="outside lower center", ncols=4, frameon=False, fontsize=9
    )
    path.parent.mkdir(parents=True, exist_ok=True)
    with matplotlib.rc_context({"svg.hashsalt": "trainpilot"}):
        figure.savefig(path, dpi=160, metadata={"Software": None})


def _default(told: Told | None) -> str:
    known = told is not None and told["value"] is not None
    return f"; untuned default {told['bound']}{told['value']:.2f}" if told is not None and known else ""


def _panel(panel: Axes, found: Mapping[str, Any], limits: tuple[float, float]) -> None:
    starts = list(found["starts"].items())
    panel.set_yscale("log")
    panel.set_ylim(limits)
    panel.set_xlim(-0.6, len(starts) - 0.4)
    ticks = [tick for tick in TICKS if limits[0] <= tick <= limits[1]]
    panel.yaxis.set_major_locator(FixedLocator(ticks))
    panel.yaxis.set_major_formatter(FixedFormatter([f"{tick:g}" for tick in ticks]))
    panel.yaxis.set_minor_locator(NullLocator())
    panel.set_xticks(range(len(starts)), [f"\N{MULTIPLICATION SIGN} {start}" for start, _ in starts])
    panel.grid(axis="y", color="#e3e0d9", linewidth=0.7)
    panel.set_axisbelow(True)
    panel.tick_params(length=0, labelsize=9)
    for side in ("top", "right", "left"):
        panel.spines[side].set_visible(False)
    panel.axhline(1, color="#1d1f23", linewidth=1, label="tuned static")
    panel.plot([], [], "o", color=POINT, markersize=4.2, markeredgewidth=0, label="one case, median of its seeds")
    _points(panel, [figures["tuned_by_case"] for _, figures in starts], limits)
    _medians(panel, [figures["tuned"] for _, figures in starts], limits)


def _points(panel: Axes, starts: Sequence[Mapping[str, Told]], limits: tuple[float, float]) -> None:
    """Draw a point per case, cases always in the same order; a triangle where only a bound is known."""
    for place, cases in enumerate(starts):
        for index, told in enumerate(cases.values()):
            if told["value"] is None:
                continue
            x = place + SPREAD * ((index + 0.5) / len(cases) - 0.5)
            style: dict[str, Any] = {
                "color": POINT,
                "alpha": 0.8,
                "markersize": 4.2,
                "markeredgewidth": 0,
                "clip_on": False,
            }
            mark = _mark(told, limits)
            panel.plot([x], [_inside(told["value"], limits)], mark, linestyle="", **style)


def _medians(panel: Axes, starts: Sequence[Told], limits: tuple[float, float]) -> None:
    known = [(x, told) for x, told in enumerate(starts) if told["value"] is not None]
    for x, told in known:
        if told["low"] is not None:
            ends = [_inside(told["low"], limits), _inside(told["high"] or limits[1], limits)]
            panel.plot([x, x], ends, color=LINE, linewidth=1.4, solid_capstyle="butt", zorder=3)
    heights = [_inside(told["value"], limits) for _, told in known]
    label = "median over cases, 95 % interval"
    panel.plot([x for x, _ in known], heights, "o-", color=LINE, linewidth=1.8, markersize=6, zorder=4, label=label)


def _limits(axes: Sequence[Mapping[str, Any]]) -> tuple[float, float]:
    starts = [figures for found in axes for figures in found["starts"].values()]
    told = [one for figures in starts for one in (*figures["tuned_by_case"].values(), figures["tuned"])]
    values = [float(one["value"]) for one in told if one["value"] is not None and one["value"] > 0]
    return max(min([0.7, *values]) / 1.1, LEAST), min(max([1.2, *values]) * 1.1, MOST)


def _inside(value: float, limits: tuple[float, float]) -> float:
    return min(max(value, limits[0]), limits[1])


def _mark(told: Told, limits: tuple[float, float]) -> str:
    if told["bound"] == "<" or told["value"] < limits[0]:
        return "v"
    return "^" if told["bound"] == ">" or told["value"] > limits[1] else "o"
