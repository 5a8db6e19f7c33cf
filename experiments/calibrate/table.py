"""Print a calibration: what was fitted, how far off it is, and the best learning rates as the fit sees them."""

from __future__ import annotations

import math

from rich.console import Console
from rich.markup import escape
from rich.table import Table

from trainpilot.experiments.calibrate.calibration import Calibration
from trainpilot.experiments.calibrate.errors import BestRate, FitError, Physics
from trainpilot.llm_runtime.simulator.physics import PARAMETERS

MEANINGS = {"floor": "loss after endless training, nats/token"}
"""Of values that a fit gives in another unit than the simulator's table."""
OPEN_FROM = 1.5
"""A fit that the runs tell nothing about a value says 2 for its logarithm: the width of its prior."""
CAPTION = "x/÷ 1.5: likely within a factor of 1.5; open: the runs do not tell; rate unit: a learning rate of 0.001"


def print_calibration(calibration: Calibration, console: Console) -> None:
    """Print the short form of a calibration."""
    console.print(_values(calibration.physics))
    console.print(_errors(calibration))
    console.print(_rates(calibration.best_rates))
    console.print(_ranks(calibration.grid_rank_correlation), soft_wrap=True)
    console.print(_cost_line(calibration), soft_wrap=True)


def _values(physics: Physics) -> Table:
    table = Table(title="fitted physics", title_justify="left", caption=CAPTION, caption_justify="left")
    table.add_column("what")
    for column in ("value", "uncertainty"):
        table.add_column(column, justify="right")
    for name, value in physics.values.items():
        what = f"{name.replace('_', ' ')}: {MEANINGS.get(name) or PARAMETERS[name].meaning}"
        table.add_row(escape(what), _figure(value), _factor(physics.uncertainty[name]))
    return table


def _factor(error: float) -> str:
    """Say the uncertainty of a logarithm as a factor."""
    return f"x/÷ {math.exp(error):.2f}" if error < OPEN_FROM else "open"


def _errors(calibration: Calibration) -> Table:
    table = Table(title="mean absolute error, nats/token", title_justify="left")
    columns = ("runs", "diverged", "final loss", "its worst", "along the run", "best to worst run")
    table.add_column("")
    for column in columns:
        table.add_column(column, justify="right")
    table.add_row("held out", *_error_cells(calibration.held_out))
    table.add_row("fitted", *_error_cells(calibration.fitted))
    return table


def _error_cells(error: FitError) -> list[str]:
    figures = (error.final_loss, error.final_loss_worst, error.trajectory, error.final_loss_range)
    cells = ["-" if figure is None else f"{figure:.3f}" for figure in figures]
    return [str(error.n_runs), str(error.n_diverged), *cells]


def _rates(rates: tuple[BestRate, ...]) -> Table:
    table = Table(title="best learning rate (WSD)", title_justify="left")
    for column in ("batch", "as the fit sees it", "measured on the grid"):
        table.add_column(column, justify="right")
    for rate in rates:
        edge = ", edge of the grid" if rate.at_edge else ""
        table.add_row(str(rate.batch_size), _figure(rate.fitted) + edge, _figure(rate.measured))
    return table


def _ranks(correlation: float | None) -> str:
    if correlation is None:
        return "settings ranked as measured: cannot be said, all ended alike"
    return (
        f"grid of learning rates and batches, in the order measured: rank correlation {correlation:.2f} (1 is the same)"
    )


def _cost_line(calibration: Calibration) -> str:
    cost = calibration.cost
    joules = "joules unknown" if cost.energy_j is None else f"{cost.energy_j:,.0f} J ({cost.energy_source})"
    return f"{cost.n_runs} runs took {cost.run_time_s:,.0f} s in all, {joules}; the fit took {cost.fit_time_s:.0f} s"


def _figure(value: object) -> str:
    return f"{value:.3g}" if isinstance(value, int | float) else "-"
