"""Draw what a policy is worth in the simulator, by where its runs started, beside what needs no or all knowledge."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import matplotlib
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import FixedFormatter, FixedLocator, NullLocator

TITLES = {
    "simulator": ("Simulator", "instances never trained on"),
    "multi_power_law": ("Multi-Power Law", "a physics never trained on"),
}
POLICY, SOFT, RULE = "#0a3d7a", "#62676f", "#e3e0d9"
LINES = {
    "open loop": ("its average schedule, blind", "#c7772b", "s-"),
    "untuned, wsd": ("left alone, WSD", "#8a8f98", "^-"),
    "untuned, cosine": ("left alone, cosine", "#b9bdc4", "v-"),
}
LEVELS = {
    "best single setting": ("best single setting", "#7a9a4f", "--"),
    "tuned rate and batch, wsd": ("tuned rate and batch", "#1d1f23", ":"),
    "tuned rate, wsd": ("tuned rate alone", "#8a8f98", "-."),
}
"""Methods that do not depend on the start."""
TICKS = (0.125, 0.25, 0.5, 0.7, 1.0, 1.4)
LEAST, MOST = 0.115, 1.6

Told = Mapping[str, Any]


def draw(result: Told, path: Path) -> None:
    """Write the picture of a result of `policy_in_simulator`."""
    figure = Figure(figsize=(9.2, 4.0), layout="constrained")
    panels = figure.subplots(1, len(TITLES), sharey=True)
    labels: dict[str, Any] = {}
    for panel, (physics, (title, about)) in zip(panels, TITLES.items(), strict=True):
        _panel(panel, result[physics]["methods"])
        panel.set_title(f"{title}\n", loc="left", fontsize=11, fontweight="bold")
        panel.text(0, 1.03, about, transform=panel.transAxes, fontsize=9.5, color=SOFT)
        labels |= {label: handle for handle, label in zip(*panel.get_legend_handles_labels(), strict=True)}
    panels[0].set_ylabel("compute multiplier", fontsize=9.5)
    figure.legend(list(labels.values()), list(labels), loc="outside lower center", ncols=4, frameon=False, fontsize=9)
    path.parent.mkdir(parents=True, exist_ok=True)
    with matplotlib.rc_context({"svg.hashsalt": "trainpilot"}):
        figure.savefig(path, dpi=160, metadata={"Software": None})


def _panel(panel: Axes, methods: Told) -> None:
    starts = list(methods["policy"]["starts"])
    panel.set_yscale("log")
    panel.set_ylim(LEAST, MOST)
    panel.set_xlim(-0.4, len(starts) - 0.6)
    panel.yaxis.set_major_locator(FixedLocator(TICKS))
    panel.yaxis.set_major_formatter(FixedFormatter([f"{tick:g}" for tick in TICKS]))
    panel.yaxis.set_minor_locator(NullLocator())
    panel.set_xticks(range(len(starts)), [start.replace("-", "\N{EN DASH}") for start in starts])
    panel.set_xlabel("start over the tuned learning rate", fontsize=9.5)
    panel.grid(axis="y", color=RULE, linewidth=0.7)
    panel.set_axisbelow(True)
    panel.tick_params(length=0, labelsize=9)
    for side in ("top", "right", "left"):
        panel.spines[side].set_visible(False)
    for name, (label, color, style) in LEVELS.items():
        if name in methods:
            level = methods[name]["median"]["value"]
            panel.axhline(_inside(level), color=color, linestyle=style, linewidth=1.3, label=label)
    for name, (label, color, style) in LINES.items():
        if name in methods:
            values = [found["median"]["value"] for found in methods[name]["starts"].values()]
            panel.plot(_all_inside(values), style, color=color, markersize=4, linewidth=1.2, label=label)
    _policy(panel, list(methods["policy"]["starts"].values()))


def _policy(panel: Axes, starts: Sequence[Told]) -> None:
    middles = _all_inside([found["median"]["value"] for found in starts])
    tenths = _all_inside([found["p10"] for found in starts])
    panel.fill_between(range(len(starts)), tenths, middles, color=POLICY, alpha=0.12, linewidth=0)
    panel.plot(tenths, "-", color=POLICY, linewidth=0.8, alpha=0.6, label="policy, 10th percentile")
    for x, found in enumerate(starts):
        ends = [_inside(found["median"][end]) for end in ("low", "high")]
        panel.plot([x, x], ends, color=POLICY, linewidth=1.6, zorder=4)
    panel.plot(middles, "o-", color=POLICY, linewidth=1.8, markersize=6, zorder=5, label="policy, median")


def _all_inside(values: Sequence[float]) -> list[float]:
    return [_inside(value) for value in values]


def _inside(value: float) -> float:
    return min(max(value, LEAST), MOST)
