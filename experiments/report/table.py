"""The tables of the report, as the template draws them."""

from __future__ import annotations

from dataclasses import dataclass

from trainpilot.experiments.report.numbers import Cell


@dataclass(frozen=True, kw_only=True)
class Column:
    """The head of a column."""

    name: str
    over: str = ""
    """What stands above it and its neighbours of the same group."""
    title: str = ""
    """What a pointer that rests on it is told."""
    left: bool = False
    """Holds words, which stand on the left."""
    wraps: bool = False
    """Holds sentences, which wrap; figures never do."""


@dataclass(frozen=True, kw_only=True)
class Line:
    """One row: its name and its cells."""

    name: str
    cells: tuple[Cell, ...]
    title: str = ""
    strong: bool = False


@dataclass(frozen=True, kw_only=True)
class Table:
    """A table in groups of rows, as the template draws it."""

    corner: str
    """Head of the first column."""
    columns: tuple[Column, ...]
    groups: tuple[tuple[str, tuple[Line, ...]], ...]
    """Rows under their headings; an empty heading is not drawn."""
    caption: str = ""

    @property
    def heads(self) -> list[tuple[str, int]]:
        """Headings over neighbouring columns, each with how many it spans; none if there are no headings."""
        spans: list[tuple[str, int]] = []
        for column in self.columns:
            if spans and spans[-1][0] == column.over:
                spans[-1] = (column.over, spans[-1][1] + 1)
            else:
                spans.append((column.over, 1))
        return spans if any(over for over, _ in spans) else []


@dataclass(frozen=True, kw_only=True)
class Fold:
    """A table that opens on a click."""

    summary: str
    table: Table
    about: str = ""
