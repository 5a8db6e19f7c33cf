"""Draw a run so far as a small picture: loss, learning rate and batch against the share of the budget."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.ticker import FuncFormatter, LogLocator, MaxNLocator, NullFormatter, NullLocator
from numpy.typing import NDArray

from trainpilot.envs.reward import Reference
from trainpilot.llm_runtime.telemetry import Telemetry

STEERED, REFERENCE, INK, FAINT = "#1b6ca8", "#9aa0a6", "#3c4043", "#e8eaed"
INCHES, DPI = (4.8, 4.8), 100


class RunPicture:
    """A figure that is drawn anew for every frame, and only its lines change."""

    def __init__(self) -> None:
        self.figure = Figure(figsize=INCHES, dpi=DPI, facecolor="white")
        self.figure.subplots_adjust(left=0.14, right=0.96, top=0.9, bottom=0.1, hspace=0.42)
        self.canvas: Any = FigureCanvasAgg(self.figure)
        loss, rate, batch = self.figure.subplots(3, 1, sharex=True)
        self.charts = (loss, rate, batch)
        self.reference = loss.axhline(0.0, color=REFERENCE, linewidth=1.2, linestyle="--")
        self.loss = _line(loss, "training loss, nats/token (dashed: the reference's final loss)")
        self.rate = _line(rate, "learning rate")
        self.batch = _line(batch, "batch, sequences")
        self.batch.set_drawstyle("steps-post")
        for chart in (rate, batch):
            chart.set_yscale("log")
        batch.yaxis.set_major_locator(LogLocator(2, numticks=5))
        batch.set_xlabel("share of the budget", fontsize=8, color=INK)
        for chart in self.charts[1:]:
            chart.yaxis.set_minor_locator(NullLocator())
            chart.yaxis.set_minor_formatter(NullFormatter())
        batch.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
        loss.yaxis.set_major_locator(MaxNLocator(4))
        self.title = self.figure.suptitle("", x=0.02, ha="left", fontsize=9.5, color=INK)

    def draw(self, run: Sequence[Telemetry], reference: Reference) -> NDArray[np.uint8]:
        """Return the picture of a run's intervals, uint8 of shape (height, width, 3)."""
        used = [0.0, *(each.budget_used for each in run)]
        self.loss.set_data(used[1:], [each.train_loss for each in run])
        rates, batches = [each.learning_rate for each in run], [float(each.batch_size) for each in run]
        self.rate.set_data(used[1:], rates)
        self.batch.set_data(used[: len(run) + bool(run)], [*batches, *batches[-1:]])
        goal = reference.losses[-1]
        self.reference.set_ydata([goal, goal])
        self.charts[0].relim()
        self.charts[0].autoscale_view(scalex=False)
        for chart, values in zip(self.charts[1:], (rates, batches), strict=True):
            shown = [value for value in values if value > 0] or [1.0]
            chart.set_ylim(min(shown) / 1.5, max(shown) * 1.5)
        self.title.set_text(_headline(run, reference))
        self.canvas.draw()
        picture: NDArray[np.uint8] = np.asarray(self.canvas.buffer_rgba())[..., :3].copy()
        return picture


def _line(chart: Axes, title: str) -> Line2D:
    chart.set_title(title, loc="left", fontsize=8, color=INK)
    chart.spines[["top", "right", "left"]].set_visible(False)
    chart.spines["bottom"].set_color(REFERENCE)
    chart.tick_params(length=0, labelsize=7.5, colors=INK)
    chart.grid(axis="y", color=FAINT, linewidth=0.8)
    chart.set_xlim(0, 1)
    (line,) = chart.plot([], [], color=STEERED, linewidth=1.8)
    return line


def _headline(run: Sequence[Telemetry], reference: Reference) -> str:
    if not run:
        return "before the first interval"
    last = run[-1]
    parts = [f"decision {len(run)}", "diverged" if last.diverged else f"loss {last.train_loss:.3f}"]
    parts.append(f"{sum(each.time_s for each in run) / reference.time_s:.0%} of the reference's time")
    if last.finishing:
        parts.append("cooling down")
    return ", ".join(parts)
