"""Draw quality against cost under many preferences, beside the fronts of static settings."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import matplotlib
from matplotlib.axes import Axes
from matplotlib.figure import Figure

POLICY, SOFT, RULE = "#0a3d7a", "#62676f", "#e3e0d9"
STATIC = {
    "one_setting_for_all": ("one static setting for all (NSGA-II)", "#c7772b", "s--"),
    "tuned_for_each": ("static, tuned on every instance", "#8a8f98", "^:"),
}

Told = Mapping[str, Any]


def draw(result: Told, path: Path) -> None:
    """Write the picture of a result of `preferences`."""
    figure = Figure(figsize=(9.2, 4.0), layout="constrained")
    panels = figure.subplots(1, len(result["costs"]), sharey=True, squeeze=False)[0]
    for panel, (cost, told) in zip(panels, result["costs"].items(), strict=True):
        _panel(panel, cost, told)
    panels[0].set_ylabel("compute-equivalent of the loss", fontsize=9.5)
    figure.legend(
        *panels[0].get_legend_handles_labels(), loc="outside lower center", ncols=3, frameon=False, fontsize=9
    )
    path.parent.mkdir(parents=True, exist_ok=True)
    with matplotlib.rc_context({"svg.hashsalt": "trainpilot"}):
        figure.savefig(path, dpi=160, metadata={"Software": None})


def _panel(panel: Axes, cost: str, told: Told) -> None:
    panel.set_title(f"Quality against {cost}", loc="left", fontsize=11, fontweight="bold")
    panel.set_xlabel(f"{cost} over the reference's", fontsize=9.5)
    panel.grid(color=RULE, linewidth=0.7)
    panel.set_axisbelow(True)
    panel.tick_params(length=0, labelsize=9)
    for side in ("top", "right", "left"):
        panel.spines[side].set_visible(False)
    for name, (label, color, style) in STATIC.items():
        points = told[name]
        x, y = [point["cost"] for point in points], [point["quality"] for point in points]
        panel.plot(x, y, style, color=color, markersize=3.5, linewidth=1.1, label=label)
    _policy(panel, cost, told["preferences"])
    panel.set_xlim(left=0)
    panel.set_ylim(bottom=0)


def _policy(panel: Axes, cost: str, preferences: Sequence[Told]) -> None:
    x = [one[cost]["value"] for one in preferences]
    y = [one["quality"]["value"] for one in preferences]
    for one in preferences:
        panel.plot([one[cost]["value"]] * 2, [one["quality"]["low"], one["quality"]["high"]], color=POLICY, linewidth=1)
        panel.plot([one[cost]["low"], one[cost]["high"]], [one["quality"]["value"]] * 2, color=POLICY, linewidth=1)
    panel.plot(x, y, "o-", color=POLICY, markersize=5, linewidth=1.6, zorder=4, label="policy, by its preference")
    for one, place in ((preferences[0], "quality alone"), (preferences[-1], "half and half")):
        at = (one[cost]["value"], one["quality"]["value"])
        panel.annotate(place, at, textcoords="offset points", xytext=(6, -11), fontsize=8.5, color=SOFT)
