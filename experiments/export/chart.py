"""Draw an export as one picture: a line per format, a panel for each of loss, size, speed and joules."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path

from matplotlib.axes import Axes
from matplotlib.figure import Figure

from trainpilot.experiments.export.result import ExportResult, ExportRow, milli
from trainpilot.llm_runtime.plain_values import printable

INK, SOFT, FAINT = "#1f2328", "#59636e", "#d8dee4"
COLOURS = {"fp32": "#8c959f", "transformers": "#2f6fb7", "llama.cpp": "#c2571a", "none": "#7a5ea8"}
"""By the program that runs a format; `none` for formats without a kernel."""

Value = Callable[[ExportRow], float | None]

PANELS: tuple[tuple[str, Value, str], ...] = (
    ("perplexity over fp32, %", lambda row: 100 * (row.perplexity_ratio - 1), ".2f"),
    ("size, MB", lambda row: (row.packed_bytes or row.weight_bytes) / 1e6, ",.3g"),
    ("decoding, tokens/s", lambda row: row.decode_tokens_per_s, ",.0f"),
    ("mJ per generated token", lambda row: milli(row.decode_j_per_token), ".3g"),
)


def draw_export(result: ExportResult, path: Path) -> None:
    """Write the picture as PNG."""
    rows = result.rows
    height = 0.34 * len(rows) + 1.4
    figure = Figure(figsize=(11.5, height), facecolor="white")
    top, bottom = 1 - 0.78 / height, 0.51 / height
    for index, (title, value, form) in enumerate(PANELS):
        axes = figure.add_axes((0.125 + 0.222 * index, bottom, 0.155, top - bottom))
        _panel(axes, rows, [value(row) for row in rows], form)
        axes.set_title(title, fontsize=9, color=INK, loc="left", pad=6)
        axes.set_yticks(range(len(rows)), [row.format for row in rows] if index == 0 else [""] * len(rows))
    figure.text(0.02, 1 - 0.2 / height, _title(result), fontsize=9.5, color=INK, va="top", weight="bold")
    figure.text(0.02, 0.1 / height, _legend(result), fontsize=7.5, color=SOFT, va="bottom")
    figure.savefig(path, dpi=150, metadata={"Software": None})


def _panel(axes: Axes, rows: Sequence[ExportRow], values: list[float | None], form: str) -> None:
    known = [value for value in values if value is not None]
    low, high = min([0.0, *known]), max([0.0, *known]) or 1.0
    for place, (row, value) in enumerate(zip(rows, values, strict=True)):
        if value is None:
            axes.text(0, place, " not measured", fontsize=7.5, color=SOFT, va="center", style="italic")
            continue
        axes.barh(place, value, height=0.62, color=COLOURS[_colour(row)])
        label = f"{value:{form}}".replace("-0.00", "0.00")
        axes.text(max(value, 0.0), place, f" {label}", fontsize=8, color=INK, va="center")
    axes.set_xlim(1.05 * low, high + 0.3 * (high - low))
    axes.set_ylim(len(values) - 0.4, -0.6)
    axes.axvline(0, color=SOFT, linewidth=0.8)
    axes.set_xticks([])
    axes.tick_params(axis="y", length=0, labelsize=8.5, labelcolor=INK)
    for side in axes.spines.values():
        side.set_visible(False)


def _colour(row: ExportRow) -> str:
    if row.format.startswith("fp32"):
        return "fp32"
    if row.packed_bytes is not None:
        return "none"
    return "llama.cpp" if "llama.cpp" in row.runtime else "transformers"


def _title(result: ExportResult) -> str:
    title = printable(f"{result.source}: {result.architecture}, {result.n_parameters:,} parameters")
    return title.replace("$", r"\$")  # or matplotlib would take it for a formula


def _legend(result: ExportResult) -> str:
    source = next((row.cost.energy_source for row in result.rows if row.cost is not None), None)
    joules = {"estimated": "joules estimated from seconds"}.get(source or "", f"joules: {source or 'not measured'}")
    return (
        "grey: not quantised; blue: in transformers; orange: in llama.cpp; violet: nothing packs or runs this format, "
        f"its size is that of a packed file.\nCompare speed and joules within one program; {joules}."
    )
