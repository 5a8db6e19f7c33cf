"""Run `trainpilot fit-sweep`: fit the physics to the final losses of a past sweep, and predict settings not tried.

The sweep is a CSV file with one run per row. Files of runs to predict have the same columns, without the loss. The
errors that are printed are those of the fitted runs; to see what a prediction is worth, fit a part of your sweep and
predict the rest.
"""

from __future__ import annotations

import csv
import io
import math
import shlex
import sys
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, get_args

import numpy as np
from rich.console import Console
from rich.table import Table

from trainpilot.experiments.options import FitSweepOptions
from trainpilot.experiments.progress import progress_bar
from trainpilot.experiments.run_store import versions
from trainpilot.llm_runtime.files import whole_file, write_json
from trainpilot.llm_runtime.plain_values import read_bytes, shown
from trainpilot.llm_runtime.schedules import ScheduleName
from trainpilot.llm_runtime.simulator.evidence import Evidence
from trainpilot.llm_runtime.simulator.fitting import LIVE_PRIOR, Fit, FittedPhysics, Model, Prior, SizeLaw, around, fit
from trainpilot.llm_runtime.simulator.physics import RATE_UNIT
from trainpilot.llm_runtime.simulator.records import Floats
from trainpilot.llm_runtime.simulator.shipped import shipped_law
from trainpilot.llm_runtime.simulator.sweeps import (
    EDGE_EXPONENT,
    NEAR,
    Edge,
    FinalLoss,
    borrowed_schedules,
    bounds_outside,
    by_cell,
    cells,
    edges,
    of_final_losses,
    without_lost,
)

FILE_NAME, PREDICTIONS = "physics.json", "predictions.csv"
MAX_STEPS = 50
LEAST_RUNS = 6
SMALL = 5_000_000
"""Models with fewer weights are not expected to follow the law of the published sweeps."""
WARMUP_MOST = 0.8
"""Runs that end before their warm-up has taken this share of their steps have decayed, and can be fitted."""


@dataclass(frozen=True, kw_only=True)
class Defaults:
    """Settings of runs for which the file has no column."""

    schedule: ScheduleName
    warmup_steps: int
    end_learning_rate: float


@dataclass(frozen=True, kw_only=True)
class Sweep:
    """Runs of a file, and its rows as they were read."""

    runs: tuple[FinalLoss, ...]
    rows: tuple[Mapping[str, str], ...]
    sequence_length: int
    """Tokens of the sequences that the runs' batches count in."""


def fit_sweep(options: FitSweepOptions, console: Console) -> None:
    """Fit, print the errors, and write the physics and the predictions."""
    defaults = Defaults(
        schedule=options.schedule, warmup_steps=options.warmup_steps, end_learning_rate=options.end_learning_rate
    )
    sweep = read_sweep(options.file, defaults)
    asked = None
    if options.predict is not None:
        asked = read_sweep(options.predict, defaults, known=False, length=sweep.sequence_length)
    used = usable(sweep.runs)
    with progress_bar(console, "fit", MAX_STEPS) as advance:
        fitted = fit_final_losses(
            sweep.runs,
            initial_loss=options.initial_loss,
            weight_decay=options.weight_decay,
            on_step=_Counter(advance).step,
        )
    errors = [_error(fitted, used, cell) for cell in dict.fromkeys(cells(used))]
    console.print(_table(errors))
    console.print(_summary(errors, len(sweep.runs), len(used)), soft_wrap=True, highlight=False)
    record = {
        "models": [each.to_json() for each in fitted.physics],
        "law": fitted.law.to_json() if fitted.law else None,
        "sequence_length": sweep.sequence_length,
        "cells": errors,
        "n_runs": len(sweep.runs),
        "n_fitted": len(used),
        "command": shlex.join(["trainpilot", *sys.argv[1:]]),
        "versions": versions(),
        "date": datetime.now(UTC).date().isoformat(),
    }
    write_json(options.out / FILE_NAME, record)
    console.print(f"physics: {options.out / FILE_NAME}", soft_wrap=True, highlight=False)
    if asked is not None:
        write_predictions(options.out / PREDICTIONS, asked, predict(fitted, asked.runs))
        console.print(f"predictions: {options.out / PREDICTIONS}", soft_wrap=True, highlight=False)


@dataclass
class _Counter:
    advance: Any
    done: int = field(default=0)

    def step(self) -> None:
        self.done += 1
        self.advance(min(self.done, MAX_STEPS))


def fit_final_losses(
    runs: Sequence[FinalLoss], *, initial_loss: float = 11.0, weight_decay: float = 0.1, on_step: Any = None
) -> Fit:
    """Fit the physics to final losses; what they leave open comes from published sweeps and curves.

    Lost runs are not fitted, but tell beyond which learning rate runs are lost.

    Args:
        runs: Runs of one model or several.
        initial_loss: Loss before training, in nats/token; final losses hardly depend on it.
        weight_decay: Of the optimiser, per unit of learning rate.
        on_step: Called after each of at most `MAX_STEPS` steps of the search.

    Raises:
        ValueError: there are fewer than `LEAST_RUNS` runs.
    """
    used = usable(runs)
    if len(used) < LEAST_RUNS:
        raise ValueError(
            f"the sweep must have at least {LEAST_RUNS} runs that trained, got {len(used)}; runs count if their "
            "loss is known, not far above the best of their budget, and they outlast their warm-up"
        )
    sizes = sorted({run.n_parameters for run in used})
    models = [Model(n_parameters=n, initial_loss=initial_loss, weight_decay=weight_decay) for n in sizes]
    parts = [of_final_losses(used, sizes), borrowed_schedules(used, sizes), bounds_outside(used, sizes)]
    evidence = Evidence.joined([part for part in parts if len(part)])
    fitted = fit(evidence, models, _prior(used, sizes), max_steps=MAX_STEPS, on_step=on_step)
    return _with_edges(fitted, edges(runs))


def _with_edges(fitted: Fit, found: Mapping[int, Edge]) -> Fit:
    """Return the fit with the edges that were found; the other models' follow from these by `EDGE_EXPONENT`."""
    if not found:
        return fitted
    log_sizes = np.log(list(found))
    log_rates = np.log([edge.learning_rate for edge in found.values()])
    at_one = float(np.mean(log_rates - EDGE_EXPONENT * log_sizes))
    usual = float(np.median([edge.excess for edge in found.values()]))

    def of(physics: FittedPhysics) -> FittedPhysics:
        assert physics.n_parameters is not None
        rate = math.exp(at_one + EDGE_EXPONENT * math.log(physics.n_parameters))
        edge = found.get(physics.n_parameters, Edge(learning_rate=rate, excess=usual))
        signal = physics.initial_loss - physics.values["floor"]
        values = {"edge_rate": edge.learning_rate / RATE_UNIT, "edge_damage": edge.excess / signal}
        return replace(physics, values={**physics.values, **values})

    law = fitted.law
    if law is not None:
        law = replace(law, reference=of(law.reference), exponents={**law.exponents, "edge_rate": EDGE_EXPONENT})
    return Fit(physics=tuple(of(each) for each in fitted.physics), law=law)


def _prior(runs: Sequence[FinalLoss], sizes: Sequence[int]) -> Prior:
    middle = round(math.exp(float(np.mean(np.log(sizes)))))
    if middle < SMALL:
        return LIVE_PRIOR
    best = [min(cell, key=lambda run: run.final_loss) for cell in by_cell(runs)]
    physics = [shipped_law().at(run.n_parameters) for run in best]
    ends = [of_final_losses([run], [run.n_parameters]) for run in best]
    shares = [each.values["floor"] / end.at_end(each.losses(end))[0] for each, end in zip(physics, ends, strict=True)]
    lowest = min(run.final_loss for run in best)
    return around(
        shipped_law(), middle, float(np.mean(shares)) * float(np.mean([run.final_loss for run in best])) / lowest
    )


def usable(runs: Sequence[FinalLoss]) -> list[FinalLoss]:
    """Return the runs that can be fitted: those that trained, and outlasted their warm-up."""
    return [run for run in without_lost(runs) if run.warmup_steps <= WARMUP_MOST * run.steps]


def predict(fitted: Fit, runs: Sequence[FinalLoss]) -> Floats:
    """Return the expected final loss of each run, in nats/token, of shape (n_runs,).

    Models of a size that was not fitted follow the law of the sizes that were; if that is only one, the law of the
    published sweeps says how its parameters change.
    """
    known = {each.n_parameters: each for each in fitted.physics}
    expected = np.empty(len(runs))
    for size in dict.fromkeys(run.n_parameters for run in runs):
        rows = [row for row, run in enumerate(runs) if run.n_parameters == size]
        evidence = of_final_losses([runs[row] for row in rows], [size])
        physics = known.get(size) or _law(fitted).at(size)
        expected[rows] = evidence.at_end(physics.losses(evidence))
    return expected


def _law(fitted: Fit) -> SizeLaw:
    if fitted.law is not None:
        return fitted.law
    [only] = fitted.physics
    assert only.n_parameters is not None
    exponents = {**shipped_law().exponents, "edge_rate": EDGE_EXPONENT}
    return SizeLaw(reference=only, exponents=exponents, fitted_sizes=(only.n_parameters,))


def _error(fitted: Fit, runs: Sequence[FinalLoss], cell: object) -> dict[str, Any]:
    """Return the errors in one cell, in nats/token."""
    inside = [run for run, place in zip(runs, cells(runs), strict=True) if place == cell]
    measured, expected = np.array([run.final_loss for run in inside]), predict(fitted, inside)
    best, chosen = int(measured.argmin()), int(expected.argmin())
    near = measured < measured[best] + NEAR
    return {
        "n_parameters": inside[0].n_parameters,
        "sequences": round(inside[best].steps * inside[best].batch),
        "schedule": inside[0].schedule,
        "n_runs": len(inside),
        "best_loss": float(measured[best]),
        "best_learning_rate": inside[best].learning_rate,
        "best_batch": inside[best].batch,
        "near_error": float(np.abs(expected - measured)[near].mean()),
        "predicted_learning_rate": inside[chosen].learning_rate,
        "predicted_batch": inside[chosen].batch,
        "regret": float(measured[chosen] - measured[best]),
    }


def _table(errors: Sequence[Mapping[str, Any]]) -> Table:
    table = Table(box=None, pad_edge=False, header_style="bold")
    for title in (
        "weights",
        "sequences",
        "schedule",
        "runs",
        "best loss",
        "at rate",
        "batch",
        "error near it",
        "regret",
    ):
        table.add_column(title, justify="left" if title == "schedule" else "right")
    for each in errors:
        table.add_row(
            f"{each['n_parameters'] / 1e6:,.4g} M", f"{each['sequences']:,}", each["schedule"], str(each["n_runs"]),
            f"{each['best_loss']:.4f}", f"{each['best_learning_rate']:.3g}", f"{each['best_batch']:g}",
            f"{each['near_error']:.4f}", f"{each['regret']:.4f}",
        )  # fmt: skip
    return table


def _summary(errors: Sequence[Mapping[str, Any]], n_runs: int, n_used: int) -> str:
    near, regret = (float(np.mean([each[name] for each in errors])) for name in ("near_error", "regret"))
    left = n_runs - n_used
    out = f" {left} runs were left out: lost, without a loss, or shorter than their warm-up." if left else ""
    return (
        f"Mean error within {NEAR} nats of each best loss: {near:.4f} nats/token; mean regret of the setting predicted "
        f"to be best: {regret:.4f}.{out}"
    )


def write_predictions(path: Path, asked: Sweep, expected: Floats) -> None:
    """Write the rows that were asked for with a column `predicted_loss`, in nats/token."""
    columns = [*asked.rows[0], "predicted_loss"]
    with whole_file(path) as temporary, temporary.open("w", encoding="utf-8", newline="") as file:
        writer = csv.DictWriter(file, columns, lineterminator="\n")
        writer.writeheader()
        for row, loss in zip(asked.rows, expected, strict=True):
            writer.writerow({**row, "predicted_loss": f"{loss:.5f}"})


AT_LEAST_ZERO = -1e-300
MOST = {
    "parameters": 1e15, "learning_rate": 1e3, "batch_sequences": 1e9, "sequence_length": 1e9, "steps": 1e12,
    "tokens": 1e18, "final_loss": 1e3, "warmup_steps": 1e12, "end_learning_rate": 1e3,
}  # fmt: skip
"""Largest number in each column."""
NEEDED = ("parameters", "learning_rate", "batch_sequences", "sequence_length")


def read_sweep(path: Path, defaults: Defaults, *, known: bool = True, length: int | None = None) -> Sweep:
    """Read a sweep.

    Args:
        path: CSV file with the columns parameters, learning_rate, batch_sequences, sequence_length, steps or tokens,
            final_loss, and optionally schedule, warmup_steps and end_learning_rate.
        defaults: Settings for the optional columns.
        known: Whether there must be a column `final_loss`; its values may be empty or `nan` for lost runs.
        length: Tokens of the sequences that batches are to be counted in; by default the most frequent length.

    Raises:
        ValueError: the file cannot be read, a column is missing, or a value is not allowed.
    """
    try:
        reader = csv.DictReader(io.StringIO(read_bytes(path).decode("utf-8-sig"), newline=""))
        columns, rows = reader.fieldnames or [], tuple(reader)
    except (OSError, ValueError, csv.Error) as error:
        reason = getattr(error, "strerror", None) or error
        raise ValueError(f"sweep must be a CSV file that can be read, got {path}: {reason}") from None
    missing = [name for name in (*NEEDED, *(["final_loss"] if known else [])) if name not in columns]
    if not {"steps", "tokens"} & set(columns):
        missing.append("steps or tokens")
    if missing:
        raise ValueError(
            f"sweep must have the columns {', '.join(missing)}, got {path} with {', '.join(columns) or 'none'}"
        )
    if not rows:
        raise ValueError(f"sweep must have at least one run, got {path} with none")
    if longer := [line for line, row in enumerate(rows, 2) if None in row]:
        raise ValueError(f"sweep must have a column for every value, got more values in {path}:{longer[0]}")
    lengths = [_number(row, "sequence_length", path, line) for line, row in enumerate(rows, 2)]
    unit = length or int(Counter(lengths).most_common(1)[0][0])
    runs = tuple(_run(row, defaults, unit, path, line) for line, row in enumerate(rows, 2))
    return Sweep(runs=runs, rows=rows, sequence_length=unit)


def _run(row: Mapping[str, str], defaults: Defaults, unit: int, path: Path, line: int) -> FinalLoss:
    def number(name: str, least: float = 0.0) -> float:
        return _number(row, name, path, line, least)

    tokens_per_step = number("batch_sequences") * number("sequence_length")
    steps = number("steps") if _given(row, "steps") else number("tokens") / tokens_per_step
    schedule: Any = row["schedule"].strip() if _given(row, "schedule") else defaults.schedule
    if schedule not in get_args(ScheduleName):
        raise ValueError(
            f"schedule must be one of {', '.join(get_args(ScheduleName))}, got {shown(schedule)} in {path}:{line}"
        )
    return FinalLoss(
        n_parameters=round(number("parameters")),
        steps=max(round(steps), 1),
        learning_rate=number("learning_rate"),
        batch=tokens_per_step / unit,
        final_loss=_loss(row, path, line),
        schedule=schedule,
        warmup_steps=round(number("warmup_steps", AT_LEAST_ZERO))
        if _given(row, "warmup_steps")
        else defaults.warmup_steps,
        end_learning_rate=(
            number("end_learning_rate", AT_LEAST_ZERO)
            if _given(row, "end_learning_rate")
            else defaults.end_learning_rate
        ),
    )


def _given(row: Mapping[str, str], name: str) -> bool:
    return bool((row.get(name) or "").strip())


def _loss(row: Mapping[str, str], path: Path, line: int) -> float:
    """Return the final loss; NaN for a run without one, which was lost or is to be predicted."""
    text = (row.get("final_loss") or "nan").strip().lower()
    if text in ("nan", "inf", "+inf", "-", "none", "diverged"):
        return math.nan
    return _number(row, "final_loss", path, line)


def _number(row: Mapping[str, str], name: str, path: Path, line: int, above: float = 0.0) -> float:
    text = (row.get(name) or "").strip()
    try:
        value = float(text)
    except ValueError:
        value = math.nan
    if not math.isfinite(value) or value <= above:
        rule = "above 0" if above == 0 else "of at least 0"
        raise ValueError(f"{name} must be a number {rule}, got {shown(text)} in {path}:{line}")
    if value > MOST[name]:
        raise ValueError(f"{name} must be at most {MOST[name]:g}, got {shown(text)} in {path}:{line}")
    return value
