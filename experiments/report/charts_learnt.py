"""Draw what policies do on average, beside the tuned static schedule: one line for each learning rate at the start."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from trainpilot.experiments.compare.comparison import TUNED
from trainpilot.experiments.compare.policies import PolicyName
from trainpilot.experiments.compare.records import IntervalResult, RunResult
from trainpilot.experiments.report.charts_controls import FLOOR, GRID, HALF_STEP, Course, at, times
from trainpilot.experiments.report.looks import DASHES, MARKERS, N_COLOURED, Look
from trainpilot.experiments.report.material import Material
from trainpilot.experiments.report.numbers import percent
from trainpilot.experiments.report.scales import log_axis, log_ticks, plain_axis
from trainpilot.experiments.report.svg import Panel, ink, name_x, panel
from trainpilot.llm_runtime.config import RunConfig

LOWEST = FLOOR / 10
"""Ratios below it are drawn there: a schedule ends at zero."""
STATIC = Look(method=TUNED, title="tuned static", color="soft", marker="s", dash=(3.0, 1.6))

Ratio = Callable[[IntervalResult, RunConfig, RunConfig], float]
"""Returns a control over what it is compared with, from the interval, its run and the tuned run."""


@dataclass(frozen=True, kw_only=True)
class Learnt:
    """What one policy does on average under one preference."""

    heading: str
    looks: tuple[Look, ...]
    """A line for each start, then the tuned static's."""
    panels: tuple[Panel, ...]
    note: str = ""
    """Which starts are not drawn."""


@dataclass(frozen=True, kw_only=True)
class Regime:
    """The runs of a policy that began at one factor of the tuned learning rate."""

    look: Look
    runs: tuple[tuple[RunResult, RunConfig], ...]
    """Each with the tuned static's run on its case."""


def rate_ratio(interval: IntervalResult, run: RunConfig, tuned: RunConfig) -> float:
    """Return the learning rate over the tuned peak, both at the tuned batch: Adam's square-root rule."""
    rate = interval.learning_rate * float(np.sqrt(tuned.batch_size / interval.batch_size))
    return max(rate / tuned.base_learning_rate, LOWEST)


def batch_ratio(interval: IntervalResult, run: RunConfig, tuned: RunConfig) -> float:
    """Return the batch over the run's starting batch."""
    return interval.batch_size / run.batch_size


def learnt(material: Material) -> list[Learnt]:
    """Return the average schedules of every policy and preference, by start; none without a tuned static."""
    tuned = _tuned(material)
    groups: dict[tuple[str, str], list[str]] = {}
    for name, note in material.notes.items():
        if note.kind == "policy" and any(run.spec.steering.kind == "policy" for run, _ in _runs(material, name, tuned)):
            parsed = PolicyName.parse(name)
            groups.setdefault((parsed.file, parsed.preference), []).append(name)
    return [_learnt(material, names, tuned) for names in groups.values()]


def _tuned(material: Material) -> dict[str, RunConfig]:
    """Return the tuned static's run by case."""
    found = material.comparison.baselines.items()
    return {case: one.config for case, all_ in found for one in all_ if one.axis == "tokens"}


def _runs(material: Material, method: str, tuned: Mapping[str, RunConfig]) -> list[tuple[RunResult, RunConfig]]:
    return [(run, tuned[case]) for case in tuned for run in material.runs(case, method) if run.intervals]


def _learnt(material: Material, names: Sequence[str], tuned: Mapping[str, RunConfig]) -> Learnt:
    ordered = sorted(names, key=lambda name: PolicyName.parse(name).start or 0.0)
    regimes = [
        Regime(look=_look(name, index), runs=tuple(_runs(material, name, tuned)))
        for index, name in enumerate(ordered[:N_COLOURED])
    ]
    named = PolicyName.parse(names[0])
    heading = f"{named.short}, {named.preference}" if named.preference else named.short
    left_out = ", ".join(_begins(name) for name in ordered[N_COLOURED:])
    return Learnt(
        heading=heading,
        looks=(*(regime.look for regime in regimes), STATIC),
        panels=(_rate_panel(regimes, heading), _batch_panel(regimes, heading)),
        note=f"Not drawn: {left_out}." if left_out else "",
    )


def _look(name: str, index: int) -> Look:
    return Look(method=name, title=_begins(name), color=f"s{index + 1}", marker=MARKERS[index], dash=DASHES[index])


def _begins(name: str) -> str:
    start = PolicyName.parse(name).start
    return "start at the case's own rate" if start is None else f"start at {times(start)}"


def _rate_panel(regimes: Sequence[Regime], heading: str) -> Panel:
    drawn = panel("learning rate", "over the tuned peak, at equal batch", about=f"average learning rate, {heading}")
    bands = [_band(regime, rate_ratio) for regime in regimes]
    limits = (FLOOR, max([1.0, *(float(band[:, 3].max()) for band in bands)]) * 1.3)
    log_axis(drawn.axes, "y", limits, times, [tick for tick in log_ticks(*limits, most=6) if tick > 1.5 * FLOOR])
    _draw(drawn, regimes, bands, [_static_rate(config) for config in _compared(regimes)])
    return drawn


def _batch_panel(regimes: Sequence[Regime], heading: str) -> Panel:
    drawn = panel("batch", "over the starting batch", about=f"average batch, {heading}")
    bands = [_band(regime, batch_ratio) for regime in regimes]
    static = [[tuned.batch_size / start] * len(GRID) for start, tuned in _starts(regimes)]
    ends = [1.0, *(float(edge) for band in bands for edge in (band[:, 1].min(), band[:, 3].max()))]
    ends += [float(value) for value in np.median(static, axis=0)[:1]]
    limits = (min(ends) / 1.2, max(ends) * 1.2)
    doublings = [2.0**k for k in range(-8, 12) if limits[0] <= 2.0**k <= limits[1]]
    log_axis(drawn.axes, "y", limits, times, doublings)
    _draw(drawn, regimes, bands, static)
    return drawn


def _draw(
    drawn: Panel, regimes: Sequence[Regime], bands: Sequence[np.ndarray], static: Sequence[Sequence[float]]
) -> None:
    plain_axis(drawn.axes, "x", (0, 1), percent)
    name_x(drawn.axes, "share of the budget")
    gid = drawn.mark(f"{STATIC.title}, median of {len(static)} cases")
    usual: dict[str, Any] = {"linestyle": STATIC.linestyle, "linewidth": 1.3}
    drawn.axes.plot(GRID, np.median(static, axis=0), color=ink(STATIC.color), gid=gid, **usual)
    for regime, band in zip(regimes, bands, strict=True):
        share, low, middle, high = band.T
        color = ink(regime.look.color)
        drawn.axes.fill_between(share, low, high, step="post", color=color, alpha=0.13, linewidth=0)
        style: dict[str, Any] = {"linestyle": regime.look.linestyle, "drawstyle": "steps-post", "zorder": 3}
        gid = drawn.mark(f"{regime.look.title}, median of {len(regime.runs)} runs")
        drawn.axes.plot(share, middle, color=color, linewidth=1.6, gid=gid, **style)


def _band(regime: Regime, ratio: Ratio) -> np.ndarray:
    """Return share, lower quartile, median and upper quartile, as far as at least half of the runs go."""
    courses = [_ratio_course(run, tuned, ratio) for run, tuned in regime.runs]
    rows = []
    for share in GRID:
        values = [at(course, share) for course in courses if course[0][-1] >= share - HALF_STEP]
        if 2 * len(values) >= len(courses):
            rows.append([share, *np.quantile(values, (0.25, 0.5, 0.75))])
    return np.array(rows)


def _ratio_course(run: RunResult, tuned: RunConfig, ratio: Ratio) -> Course:
    config = run.spec.config
    values = [ratio(interval, config, tuned) for interval in run.intervals]
    return [0.0, *(interval.tokens / config.tokens for interval in run.intervals)], [*values, values[-1]]


def _starts(regimes: Sequence[Regime]) -> list[tuple[int, RunConfig]]:
    """Return starting batch and tuned run of every case, once."""
    return list({(run.spec.config.batch_size, tuned): None for regime in regimes for run, tuned in regime.runs})


def _compared(regimes: Sequence[Regime]) -> list[RunConfig]:
    return list({tuned: None for regime in regimes for _, tuned in regime.runs})


def _static_rate(config: RunConfig) -> list[float]:
    """Return the tuned static's own learning rate over its peak, along the budget."""
    schedule = config.base_schedule()
    return [max(schedule.factor(round(share * schedule.budget_tokens), 1), LOWEST) for share in GRID]
