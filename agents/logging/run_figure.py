"""Draw a run as a figure of six small charts (loss, controls, energy over tokens), with the reference run in grey."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import EngFormatter, MaxNLocator, NullFormatter

from trainpilot.agents.controller import DecisionRecord
from trainpilot.envs.reward import Reference
from trainpilot.llm_runtime.config import PRECISIONS
from trainpilot.llm_runtime.telemetry import Telemetry

STEERED, REFERENCE, INK, FAINT = "#1b6ca8", "#9aa0a6", "#3c4043", "#e8eaed"
PRECISION_CHART = 3
Value = Callable[[Telemetry], float | None]


def run_figure(records: Sequence[DecisionRecord], reference: Reference | None = None, title: str = "") -> Figure:
    """Return a matplotlib figure of a run.

    Args:
        records: The decisions of the run, at least one.
        reference: The reference run, drawn in grey.
        title: Heading; by default the final loss, with energy and time relative to the reference.

    Raises:
        ValueError: `records` is empty.
    """
    if not records:
        raise ValueError("records must hold at least one decision, got none")
    run = [record.telemetry for record in records]
    base = list(reference.telemetry) if reference is not None else []
    figure = Figure(figsize=(10, 7.5), dpi=110, facecolor="white")
    figure.set_layout_engine("constrained", w_pad=0.1, h_pad=0.08, wspace=0.04, hspace=0.06)
    axes = figure.subplots(3, 2, sharex=True).ravel()
    _lines(axes[0], run, base, lambda t: t.train_loss, "training loss, nats/token")
    _lines(axes[1], run, base, lambda t: t.learning_rate, "learning rate")
    axes[1].set_ylim(bottom=0)
    _steps(axes[2], run, base, lambda t: t.batch_size, "batch, sequences")
    _precision(axes[PRECISION_CHART], run, base)
    _steps(axes[4], run, base, lambda t: 100 * t.sparsity, "sparsity, %")
    _energy(axes[5], run, base)
    _finishing_touches(figure, axes, run, base)
    figure.suptitle(f"{title or _headline(run, reference)}\n", x=0.012, ha="left", fontsize=12.5, color=INK)
    return figure


def _lines(axes: Axes, run: list[Telemetry], base: list[Telemetry], value: Value, title: str) -> None:
    for telemetry, color in ((base, REFERENCE), (run, STEERED)):
        x, y = _points(telemetry, value)
        axes.plot(x, y, color=color, linewidth=1.8, solid_capstyle="round", marker="o" if len(x) == 1 else "")
    _title(axes, title)


def _steps(
    axes: Axes, run: list[Telemetry], base: list[Telemetry], value: Callable[[Telemetry], float], title: str
) -> None:
    """Draw a value that is constant during each interval as a step function."""
    for telemetry, color in ((base, REFERENCE), (run, STEERED)):
        if telemetry:
            x = [0, *(t.tokens for t in telemetry)]
            y = [value(t) for t in telemetry]
            axes.plot(x, [*y, y[-1]], color=color, linewidth=1.8, drawstyle="steps-post")
    axes.set_ylim(0, max(axes.get_ylim()[1], 1.0))
    _title(axes, title)


def _precision(axes: Axes, run: list[Telemetry], base: list[Telemetry]) -> None:
    used = [name for name in PRECISIONS if any(t.precision == name for t in run + base)]
    row: dict[str, float] = {name: index for index, name in enumerate(used)}
    _steps(axes, run, base, lambda t: row[t.precision], "precision of the matrix products")
    axes.set_yticks(range(len(used)), used)
    axes.set_ylim(-0.5, max(len(used) - 0.5, 0.5))


def _energy(axes: Axes, run: list[Telemetry], base: list[Telemetry]) -> None:
    if any(t.energy_per_token_j is not None for t in run + base):
        _lines(axes, run, base, lambda t: _milli(t.energy_per_token_j), "energy, mJ/token")
        axes.set_ylim(bottom=0)
    else:
        _lines(axes, run, base, lambda t: t.tokens_per_s, "speed, tokens/s (energy unknown)")
        axes.set_ylim(bottom=0)


def _finishing_touches(figure: Figure, axes: Sequence[Axes], run: list[Telemetry], base: list[Telemetry]) -> None:
    end = max(t.tokens for t in run + base)
    for index, chart in enumerate(axes):
        chart.spines[["top", "right", "left"]].set_visible(False)
        chart.spines["bottom"].set_color(REFERENCE)
        chart.tick_params(length=0, labelsize=8.5, colors=INK)
        chart.grid(axis="y", color=FAINT, linewidth=0.8)
        chart.set_axisbelow(True)
        chart.set_xlim(0, end)
        chart.xaxis.set_major_locator(MaxNLocator(6))
        chart.xaxis.set_major_formatter(EngFormatter(sep=" "))
        chart.xaxis.set_minor_formatter(NullFormatter())
        if index >= len(axes) - 2:
            chart.set_xlabel("tokens", fontsize=9, color=INK)
        if index != PRECISION_CHART:
            chart.yaxis.set_major_locator(MaxNLocator(4, steps=[1, 2, 2.5, 5, 10]))
            chart.yaxis.set_major_formatter("{x:.4g}")
    names = [("steered", STEERED, 1.0), *([("base schedule", REFERENCE, 0.82)] if base else [])]
    place: dict[str, Any] = {"ha": "right", "fontsize": 9.5, "fontweight": "bold", "transform": axes[0].transAxes}
    for name, color, x in names:
        axes[0].text(x, 1.03, name, color=color, **place)


def _title(axes: Axes, title: str) -> None:
    axes.set_title(title, loc="left", fontsize=9.5, color=INK)


def _headline(run: list[Telemetry], reference: Reference | None) -> str:
    last = run[-1]
    loss = last.validation_loss if last.validation_loss is not None else last.train_loss
    parts = ["diverged" if last.diverged else f"loss {loss:.3f} nats/token"]
    if reference is not None:
        parts[0] += f" (reference {reference.losses[-1]:.3f})"
        energies = [t.energy_j for t in run]
        if reference.energy_j and None not in energies:
            parts.append(
                f"{sum(e for e in energies if e is not None) / reference.energy_j:.0%} of the reference's energy"
            )
        parts.append(f"{sum(t.time_s for t in run) / reference.time_s:.0%} of its time")
    return ", ".join(parts)


def _points(telemetry: Sequence[Telemetry], value: Value) -> tuple[list[int], list[float]]:
    known = [(t.tokens, v) for t in telemetry if (v := value(t)) is not None]
    return [x for x, _ in known], [y for _, y in known]


def _milli(value: float | None) -> float | None:
    return None if value is None else 1000 * value
