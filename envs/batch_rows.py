"""Take rows out of a record of arrays, and put rows into a copy of it."""

from __future__ import annotations

from dataclasses import fields, is_dataclass, replace
from typing import Any, TypeVar

from trainpilot.llm_runtime.simulator.records import Ints

Record = TypeVar("Record")


def take(record: Record, rows: Ints) -> Record:
    """Return these rows of every array of a record, and of the records in it."""
    return _each(record, lambda values: take(values, rows) if is_dataclass(values) else values[rows])


def put(record: Record, rows: Ints, part: Record) -> Record:
    """Return a copy of a record of arrays whose `rows` are those of `part`."""
    changed = _each(record, lambda values: values.copy())
    for field in fields(part):  # type: ignore[arg-type]
        getattr(changed, field.name)[rows] = getattr(part, field.name)
    return changed


def _each(record: Record, change: Any) -> Record:
    values = {field.name: change(getattr(record, field.name)) for field in fields(record)}  # type: ignore[arg-type]
    return replace(record, **values)  # type: ignore[type-var]
