"""Print the zero-shot tables of `gpu_check` to the terminal."""

from __future__ import annotations

from collections.abc import Mapping
from statistics import median
from typing import Any

from rich.console import Console
from rich.table import Table

COLUMNS = ("start", "nats/token", "multiplier, tokens", "multiplier, joules", "s", "J")


def show(result: Mapping[str, Any]) -> None:
    """Print what has been measured of every model."""
    for name, found in result["models"].items():
        if "best" in found:
            Console().print(_table(f"{name}, {found['n_parameters']:,} parameters, {found['precision']}", found))


def _table(title: str, found: Mapping[str, Any]) -> Table:
    table = Table(title=title, title_style="bold")
    table.add_column("")
    for column in COLUMNS:
        table.add_column(column, justify="right")
    whole = [run for run in found["best"] if run["share"] == 1]
    table.add_row("sweep's best", "1", _middle(whole, "validation_loss", ".4f"), "1.00", "1.00", *_cost(whole))
    sweep = [found["sweep"]]
    table.add_row(f"all {sweep[0]['n_runs']} of the sweep", "", "", "", "", *_cost(sweep))
    rows = [("untouched", row) for row in found.get("untuned", [])]
    rows += [(name, row) for name, part in found.get("steered", {}).items() for row in part]
    for name, row in rows:
        runs, multiplier = row["runs"], row["multiplier"]
        worth = (_estimate(multiplier["tokens"]), _estimate(multiplier["energy_j"]))
        table.add_row(name, f"{row['start']:g}", _middle(runs, "validation_loss", ".4f"), *worth, *_cost(runs))
    return table


def _cost(runs: list[dict[str, Any]]) -> tuple[str, str]:
    return _middle(runs, "time_s", ",.1f"), _middle(runs, "energy_j", ",.0f")


def _middle(runs: list[dict[str, Any]], name: str, form: str) -> str:
    values = [run[name] for run in runs]
    return "-" if None in values else format(median(values), form)


def _estimate(found: Mapping[str, Any] | None) -> str:
    if found is None or found["value"] is None:
        return "-"
    return f"{found['censored']}{found['value']:.2f}"
