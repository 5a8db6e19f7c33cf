"""Write the figures and the runs as CSV, for spreadsheets and notebooks: unrounded, empty where unknown."""

from __future__ import annotations

import csv
from collections.abc import Iterable, Mapping
from dataclasses import fields, is_dataclass
from pathlib import Path
from typing import Any

from trainpilot.experiments.compare.records import Row, RunResult, cost_key
from trainpilot.experiments.measuring.cost import modelled_cost
from trainpilot.experiments.measuring.figures import Estimate
from trainpilot.experiments.report.material import Material
from trainpilot.llm_runtime.files import whole_file

Sheet = list[dict[str, Any]]


def write_sheets(folder: Path, material: Material) -> None:
    """Write `per_case.csv`, `methods.csv` and `runs.csv`."""
    write_csv(folder / "per_case.csv", [flat(found) for found in material.figures.cases])
    write_csv(folder / "methods.csv", [flat(found) for found in material.figures.methods])
    write_csv(folder / "runs.csv", [_run(material, row) for row in material.comparison.rows])


def write_csv(path: Path, sheet: Sheet) -> None:
    """Write rows under the union of their columns, whole."""
    columns = list(dict.fromkeys(column for row in sheet for column in row))
    with whole_file(path) as temporary, temporary.open("w", encoding="utf-8", newline="") as stream:
        writer = csv.DictWriter(stream, columns, restval="")
        writer.writeheader()
        writer.writerows(sheet)


def flat(record: Any, prefix: str = "") -> dict[str, Any]:
    """Return a record's fields as columns: nested names joined by `_`, an estimate's ends behind its value."""
    columns: dict[str, Any] = {}
    for name, value in _items(record):
        column = f"{prefix}{name}"
        if isinstance(value, Estimate):
            ends = {f"{column}_{end}": getattr(value, end) for end in ("low", "high", "n", "censored")}
            columns |= {column: value.value} | ends
        elif is_dataclass(value) or isinstance(value, Mapping):
            columns |= flat(value, f"{column}_")
        else:
            columns[column] = value
    return columns


def _items(record: Any) -> Iterable[tuple[str, Any]]:
    if isinstance(record, Mapping):
        return record.items()
    return ((field.name, getattr(record, field.name)) for field in fields(record))


def _run(material: Material, row: Row) -> dict[str, Any]:
    place = flat(row)
    result = material.results.get(row.key)
    if result is None:
        return place | {"failure": "its file is missing"}
    return place | _settings(result) | _outcome(result) | _measured(result) | _modelled(material, result)


def _settings(result: RunResult) -> dict[str, Any]:
    config = result.spec.config
    names = ("optimizer", "base_learning_rate", "batch_size", "schedule", "precision", "pruning", "sequence_length")
    settings = {name: getattr(config, name) for name in names}
    return settings | {"warmup_tokens": config.warmup(), "steering": result.spec.steering.kind}


def _outcome(result: RunResult) -> dict[str, Any]:
    names = ("initial_validation_loss", "final_validation_loss", "final_test_loss", "tokens", "diverged")
    return {name: getattr(result, name) for name in (*names, "stopped_early", "failure", "n_parameters")}


def _measured(result: RunResult) -> dict[str, Any]:
    """Return measured seconds and joules, evaluation included; a sum of which a part is unknown is empty."""
    return {
        "measured_time_s": sum(i.time_s + i.evaluation_time_s for i in result.intervals),
        "measured_energy_j": _joules(result),
        "energy_source": result.energy_source,
        "energy_shared": result.energy_shared,
        "device": result.device,
    }


def _joules(result: RunResult) -> float | None:
    training = [interval.energy_j for interval in result.intervals]
    evaluation = [interval.evaluation_energy_j for interval in result.intervals if interval.evaluation_sequences]
    parts = training + evaluation
    known = [part for part in parts if part is not None]
    return sum(known) if len(known) == len(parts) and parts else None


def _modelled(material: Material, result: RunResult) -> dict[str, Any]:
    table = material.tables.get(cost_key(result.spec.config))
    try:
        cost = modelled_cost(result, table) if table is not None else None
    except ValueError:
        cost = None  # the table lacks something that the run used: unknown
    if cost is None:
        return {"modelled_time_s": None, "modelled_energy_j": None}
    return {"modelled_time_s": cost.time_s, "modelled_energy_j": cost.energy_j}
