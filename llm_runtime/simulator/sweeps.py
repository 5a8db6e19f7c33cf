"""Turn the final losses of a sweep into evidence: runs of any schedule over learning rate, batch, budget and size.

Final losses of one schedule leave open how much of the loss is noise that a cool-down would remove, and what lies
beyond the settings that were tried. `borrowed_schedules` adds what published curves say about other schedules, and
`bounds_outside` forbids a fit to promise more outside of a sweep than was measured inside.
"""

from __future__ import annotations

import math
from bisect import bisect_right
from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import product

import numpy as np

from trainpilot.llm_runtime.schedules import ScheduleName
from trainpilot.llm_runtime.simulator.evidence import Evidence, intervals, no_steps
from trainpilot.llm_runtime.simulator.records import Floats


@dataclass(frozen=True, kw_only=True)
class FinalLoss:
    """One run of a sweep: its setting, and the loss at its end."""

    n_parameters: int
    """Weights of the model."""
    steps: int
    """Optimiser steps."""
    learning_rate: float
    """Peak of the schedule."""
    batch: float
    """Sequences per step; all runs of one fit count in sequences of the same length."""
    final_loss: float
    """In nats/token; NaN for a run whose loss is to be predicted."""
    schedule: ScheduleName = "cosine"
    warmup_steps: int = 0
    """Steps of linear warm-up from zero."""
    end_learning_rate: float = 0.0
    """Learning rate at the end of the schedule; a constant schedule ignores it."""


SWEEP_TOLERANCE = 0.005
"""Tolerance of the final losses of a sweep near the best of their cell, in nats/token."""
NEAR = 0.05
"""Runs within this distance of the best of their cell, in nats/token, are near the optimum."""
TOLERANCE_NEAR, TOLERANCE_FAR = 0.05, 0.6
"""Growth of the tolerance with the distance from the best, within `NEAR` and beyond."""
LOST = 0.5
"""Runs this far above the best of their cell, in nats/token, are lost: their instability is not that of the loss."""


def of_final_losses(runs: Sequence[FinalLoss], models: Sequence[int]) -> Evidence:
    """Return the final losses of a sweep as evidence.

    A cell holds all runs of one model, one budget in sequences, and one schedule. Lost runs, `LOST` above the best of
    their cell, should be left out: what happens there is an instability, not the loss of a trained model.

    Args:
        runs: Runs of the sweep.
        models: Weights of each model: a run's index is the place of its `n_parameters` in them.
    """
    rows = [intervals(lambda at, run=run: rate_at(run, at), _knots(run)) for run in runs]  # type: ignore[misc]
    found = no_steps((len(rows), max(len(steps) for steps, _ in rows)))
    numbers: dict[tuple[int, int, ScheduleName], int] = {}
    places = cells(runs)
    for row, (run, (steps, rates)) in enumerate(zip(runs, rows, strict=True)):
        used = slice(0, len(steps))
        found.steps[row, used], found.learning_rate[row, used] = steps, rates
        found.batch[row] = run.batch
        found.losses[row, len(steps)] = run.final_loss
        found.model[row] = models.index(run.n_parameters)
        found.cell[row] = numbers.setdefault(places[row], len(numbers))
    excess = np.nan_to_num(found.final - found.best_of_cell(), nan=0.0, posinf=0.0, neginf=0.0)
    tolerance = SWEEP_TOLERANCE + TOLERANCE_NEAR * excess + TOLERANCE_FAR * np.maximum(excess - NEAR, 0.0)
    found.tolerance[:] = tolerance[:, None]
    return found


def rate_at(run: FinalLoss, step: Floats) -> Floats:
    """Return the learning rate of a sweep's run at some steps.

    A warm-up that is longer than half of the run is cut to that half; so short runs are known to have decayed.
    """
    warm = min(run.warmup_steps, run.steps / 2)
    rising = np.minimum(step / max(warm, 1.0), 1.0)
    progress = np.clip((step - warm) / max(run.steps - warm, 1.0), 0.0, 1.0)
    down = {
        "constant": np.ones_like(progress),
        "linear": 1.0 - progress,
        "wsd": np.minimum(1.0, (1.0 - progress) / 0.2),
        "cosine": 0.5 * (1.0 + np.cos(np.pi * progress)),
    }[run.schedule]
    end = run.end_learning_rate if run.schedule != "constant" else 0.0
    decayed: Floats = end + (run.learning_rate - end) * down
    return np.where(step < warm, run.learning_rate * rising, decayed)


def _knots(run: FinalLoss, intervals: int = 30) -> Floats:
    """Return the ends of a run's intervals: a few in the warm-up, then closer together at both ends."""
    warm = min(run.warmup_steps, run.steps / 2)
    even = np.linspace(0.0, 1.0, intervals + 1)
    shares = 0.5 * even + 0.25 * (1.0 - np.cos(np.pi * even))
    return np.unique(np.concatenate([np.linspace(0.0, warm, 5), warm + (run.steps - warm) * shares]))


SAME_BUDGET = 0.02
"""Budgets whose logarithms differ by less are the same: a batch seldom divides a budget."""


def cells(runs: Sequence[FinalLoss]) -> list[tuple[int, int, ScheduleName]]:
    """Return the cell of each run: weights, number of the budget among those of that model, and schedule."""
    budgets: dict[int, list[float]] = defaultdict(list)
    for run in sorted(runs, key=lambda run: run.steps * run.batch):
        known, this = budgets[run.n_parameters], math.log(run.steps * run.batch)
        if not known or this > known[-1] + SAME_BUDGET:
            known.append(this)
    return [
        (run.n_parameters, bisect_right(budgets[run.n_parameters], math.log(run.steps * run.batch)), run.schedule)
        for run in runs
    ]


def by_cell(runs: Sequence[FinalLoss]) -> list[list[FinalLoss]]:
    """Return the runs of each cell, in the order of their first runs."""
    grouped: dict[tuple[int, int, ScheduleName], list[FinalLoss]] = defaultdict(list)
    for run, cell in zip(runs, cells(runs), strict=True):
        grouped[cell].append(run)
    return list(grouped.values())


def without_lost(runs: Sequence[FinalLoss]) -> list[FinalLoss]:
    """Return the runs that trained: those whose loss is known and at most `LOST` above the best of their cell."""
    kept = []
    for cell in by_cell([run for run in runs if math.isfinite(run.final_loss)]):
        best = min(run.final_loss for run in cell)
        kept += [run for run in cell if run.final_loss <= best + LOST]
    return kept


EDGE_EXPONENT = -0.55
"""The learning rate beyond which runs are lost, as a power of the number of weights: 0.013 (N / 268 M)^-0.55 in models
of 215 to 429 M parameters at all batches and budgets (read off the data of Li et al. 2025, arXiv 2503.04715)."""


@dataclass(frozen=True, kw_only=True)
class Edge:
    """Where runs of one model are lost."""

    learning_rate: float
    """Runs with a higher peak are lost."""
    excess: float
    """Median loss of lost runs over the best of their cell, in nats/token."""


def edges(runs: Sequence[FinalLoss]) -> dict[int, Edge]:
    """Return the edge of each model that lost runs at high learning rates, by its number of weights.

    The edge divides the lost runs from the others with the fewest exceptions. Runs below the best learning rate of
    their cell do not count, as they may just have learnt too little; nor do lost runs without a loss for the excess.
    """
    high: dict[int, list[tuple[float, float]]] = defaultdict(list)
    for cell in by_cell(runs):
        known = [run for run in cell if math.isfinite(run.final_loss)]
        if known:
            best = min(known, key=_loss)
            high[best.n_parameters] += [
                (run.learning_rate, run.final_loss - best.final_loss)
                for run in cell
                if run.learning_rate >= best.learning_rate
            ]
    found = {}
    for n_parameters, settings in high.items():
        rates, excess = np.array(settings).T.reshape(2, -1)
        lost = ~(excess <= LOST)
        if not lost.any():
            continue
        tried = np.unique(rates)
        between = np.sqrt(tried * np.concatenate([tried[:1] / 2, tried[:-1]]))
        wrong = [(lost & (rates < at)).sum() + (~lost & (rates > at)).sum() for at in between]
        known_excess = excess[lost & np.isfinite(excess)]
        found[n_parameters] = Edge(
            learning_rate=float(between[int(np.argmin(wrong))]),
            excess=float(np.median(known_excess)) if known_excess.size else USUAL_EXCESS,
        )
    return found


USUAL_EXCESS = 4.0
"""Loss of a lost run over the best of its cell, in nats/token, where none was noted; published ones are 3 to 5."""


SCHEDULE_DIFFERENCES: Mapping[str, tuple[float, float]] = {
    "cosine": (0.0, 0.003), "cosine to 10 %": (0.027, 0.006), "linear": (0.0, 0.004), "wsd": (0.01, 0.005),
    "constant": (0.2, 0.03),
}  # fmt: skip
"""Final loss near the best learning rate over that of a cosine to zero, and tolerance, in nats/token.

Measured on 124 M parameters and 5.1 B tokens at peaks of 1e-3 and 2e-3: cosine to zero 2.962 and 2.953, to 10 % 2.982
and 2.991, linear 2.961 and 2.954, WSD with a fifth of linear cool-down 2.967 and 2.974, constant 3.141 and 3.193
(Schaipp et al. 2025, https://github.com/fabian-sp/lr-scheduling, MIT licence)."""


def borrowed_schedules(runs: Sequence[FinalLoss], models: Sequence[int]) -> Evidence:
    """Return what the best setting of each cell would reach under schedules that were not tried there."""
    places = cells(runs)
    tried = {(n, budget, _kind(run)) for run, (n, budget, _) in zip(runs, places, strict=True)}
    borrowed, tolerance = [], []
    for cell in dict.fromkeys(places):
        best = min((run for run, place in zip(runs, places, strict=True) if place == cell), key=_loss)
        zero = best.final_loss - SCHEDULE_DIFFERENCES[_kind(best)][0]
        for kind, (difference, width) in SCHEDULE_DIFFERENCES.items():
            if (*cell[:2], kind) in tried:
                continue
            name: ScheduleName = "cosine" if kind.startswith("cosine") else kind  # type: ignore[assignment]
            end = 0.1 * best.learning_rate if kind == "cosine to 10 %" else 0.0
            borrowed.append(replace(best, schedule=name, end_learning_rate=end, final_loss=zero + difference))
            tolerance.append(width)
    evidence = of_final_losses(borrowed, models)
    evidence.cell = np.arange(len(borrowed))
    evidence.tolerance[:] = np.array(tolerance).reshape(-1, 1)
    return evidence


def _loss(run: FinalLoss) -> float:
    return run.final_loss


def _kind(run: FinalLoss) -> str:
    return (
        "cosine to 10 %"
        if run.schedule == "cosine" and run.end_learning_rate > 0.03 * run.learning_rate
        else run.schedule
    )


BEYOND = (2.0, 4.0)
"""Bounds lie at these factors beyond the lowest and the highest learning rate and batch of a cell."""
PROMISE = 0.002
"""A prediction outside of a sweep may be this much below the best measured loss, in nats/token."""
BOUND_TOLERANCE = 0.002
LEAST_STEPS = 50


def bounds_outside(runs: Sequence[FinalLoss], models: Sequence[int]) -> Evidence:
    """Return lower bounds on the loss at settings around each cell, under the cell's own schedule."""
    bounds = [bound for cell in by_cell(runs) for bound in _bounds(cell)]
    evidence = of_final_losses(bounds, models)
    evidence.bound[:] = True
    evidence.tolerance[:] = BOUND_TOLERANCE
    return evidence


def _bounds(cell: Sequence[FinalLoss]) -> list[FinalLoss]:
    best = min(cell, key=_loss)
    sequences = best.steps * best.batch
    rates, batches = (_around(values) for values in ({r.learning_rate for r in cell}, {r.batch for r in cell}))
    inside = {(run.learning_rate, run.batch) for run in cell}
    return [
        replace(
            best,
            learning_rate=rate,
            batch=batch,
            steps=round(sequences / batch),
            final_loss=best.final_loss - PROMISE,
        )
        for rate, batch in product(rates, batches)
        if (rate, batch) not in inside and batch >= 1 and sequences / batch >= LEAST_STEPS
    ]


def _around(values: set[float]) -> list[float]:
    """Return values below, at, between and above those of a grid: its ends, their middle, and `BEYOND` the ends."""
    low, high = min(values), max(values)
    middle = sorted(values)[len(values) // 2]
    beyond = [side for factor in BEYOND for side in (low / factor, high * factor)]
    return sorted({low, middle, high, *beyond})
