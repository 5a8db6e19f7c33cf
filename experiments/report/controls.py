"""How each control is shown: in the charts and sentences of a report, and in the curves of `inspect`.

All of it reads this table. Loads neither torch nor matplotlib.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Literal

from trainpilot.envs.decision import Advice
from trainpilot.experiments.report.formatting import percent, ratio
from trainpilot.experiments.results import IntervalResult, RunResult
from trainpilot.llm_runtime.config import PRECISIONS, RunConfig
from trainpilot.llm_runtime.telemetry import Telemetry

FLOOR = 0.01
"""Learning rates below this share of the starting one are not distinguished, as a schedule ends at zero."""

Curve = tuple[str, Callable[[Telemetry], float | None], str]
"""Title with unit, value, and format of a curve of `inspect`."""


@dataclass(frozen=True, kw_only=True)
class ShownControl:
    """One control, as charts, sentences and tables show it."""

    name: str
    axis: Literal["rate", "doublings", "names", "share"]
    """The y-axis of its charts: logarithmic, logarithmic with powers of two, precisions, or a share from 0 on."""
    fields: tuple[str, ...]
    """Action fields whose choices are marked on it."""

    y: str
    """Title of the y-axis for single runs."""
    value: Callable[[Telemetry], float]
    advised: Callable[[Advice, Telemetry], float]
    """What the advice would have made of it."""
    told: Callable[[Sequence[Telemetry]], str] = lambda run: ""
    """What is said of its course through a run; empty where it never moved."""
    curve: Curve | None = None
    """How `inspect` shows it; `None` for what is no number."""

    compared_y: str
    """Title of the y-axis for the runs of a comparison."""
    compared: Callable[[IntervalResult, RunConfig], float]
    keeps: Callable[[RunResult], bool]
    """Whether a run of a comparison never moved it."""


def _precision_code(name: str) -> float:
    return float(PRECISIONS.index(name)) if name in PRECISIONS else -1.0


def _advised_rate(advice: Advice, telemetry: Telemetry) -> float:
    asked, given = advice.controls, telemetry.requested
    batch = math.sqrt(asked.batch_size / max(given.batch_size, 1))
    return telemetry.learning_rate * asked.learning_rate_scale / given.learning_rate_scale * batch


def _told_rate(run: Sequence[Telemetry]) -> str:
    scales = [t.requested.learning_rate_scale for t in run]
    low, high = min(scales), max(scales)
    return f"learning rate at {ratio(low)} to {ratio(high)} times the base schedule" if low != high else ""


def _told_batch(run: Sequence[Telemetry]) -> str:
    sizes = [t.requested.batch_size for t in run]
    low, high = min(sizes), max(sizes)
    return f"batch between {low} and {high} sequences, {sizes[-1]} at the end" if low != high else ""


def _told_sparsity(run: Sequence[Telemetry]) -> str:
    first, last = run[0].sparsity, run[-1].sparsity
    return f"sparsity up to {percent(last)}" if last > first else ""


def _batch_over_start(interval: IntervalResult, config: RunConfig) -> float:
    return interval.batch_size / config.batch_size


def _one(values: Sequence[object]) -> bool:
    return len(set(values)) <= 1


CONTROLS = (
    ShownControl(
        name="learning rate",
        axis="rate",
        fields=("learning_rate", "finish"),
        y="of the last step",
        value=lambda t: t.learning_rate,
        advised=_advised_rate,
        told=_told_rate,
        curve=("learning rate", lambda t: t.learning_rate, ".2e"),
        compared_y="over the peak of the base schedule",
        compared=lambda interval, config: max(interval.learning_rate / config.base_learning_rate, FLOOR / 10),
        keeps=lambda run: (
            _one([i.learning_rate_scale for i in run.intervals]) and not any(i.finishing for i in run.intervals)
        ),
    ),
    ShownControl(
        name="batch",
        axis="doublings",
        fields=("batch_size",),
        y="sequences",
        value=lambda t: float(t.requested.batch_size),
        advised=lambda advice, _: float(advice.controls.batch_size),
        told=_told_batch,
        curve=("batch, sequences", lambda t: t.batch_size, ".0f"),
        compared_y="over the starting batch",
        compared=_batch_over_start,
        keeps=lambda run: _one([round(_batch_over_start(i, run.spec.config), 1) for i in run.intervals]),
    ),
    ShownControl(
        name="precision",
        axis="names",
        fields=("precision",),
        y="of the matrix products",
        value=lambda t: _precision_code(t.precision),
        advised=lambda advice, _: _precision_code(advice.controls.precision),
        compared_y="of the matrix products",
        compared=lambda interval, config: float(PRECISIONS.index(interval.precision)),
        keeps=lambda run: _one([i.precision for i in run.intervals]),
    ),
    ShownControl(
        name="sparsity",
        axis="share",
        fields=("pruning",),
        y="share of zero weights or removed channels",
        value=lambda t: t.sparsity,
        advised=lambda advice, _: advice.controls.sparsity,
        told=_told_sparsity,
        curve=("sparsity, %", lambda t: 100 * t.sparsity, ".0f"),
        compared_y="share of zero weights or removed channels",
        compared=lambda interval, config: interval.sparsity,
        keeps=lambda run: _one([i.sparsity for i in run.intervals]),
    ),
)
