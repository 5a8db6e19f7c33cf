"""Show progress as a bar in a terminal, or as one line per ten percent in other outputs."""

from __future__ import annotations

import io
from collections.abc import Callable, Iterator
from contextlib import contextmanager, redirect_stderr

from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn, TimeRemainingColumn

Advance = Callable[..., None]
"""Called with the work done so far and an optional note."""


@contextmanager
def quiet() -> Iterator[None]:
    """Hide the progress bars that libraries write to the error stream."""
    with redirect_stderr(io.StringIO()):
        yield


@contextmanager
def progress_bar(console: Console, label: str, total: float) -> Iterator[Advance]:
    """Yield a function to call with the amount of `total` that is done."""
    if not console.is_terminal:
        yield _lines(console, label, total)
        return
    columns = (
        TextColumn("{task.description}"),
        BarColumn(30),
        TextColumn("{task.percentage:>3.0f} %"),
        TimeRemainingColumn(),
        TextColumn("{task.fields[note]}"),
    )
    with Progress(*columns, console=console) as progress:
        task = progress.add_task(label, total=total, note="")

        def advance(done: float, note: str = "") -> None:
            progress.update(task, completed=done, note=note)

        yield advance


def _lines(console: Console, label: str, total: float) -> Advance:
    shown = -1

    def advance(done: float, note: str = "") -> None:
        nonlocal shown
        tenth = int(10 * done / total)
        if tenth > shown:
            shown = tenth
            console.print(f"{label} {done / total:4.0%}  {note}".rstrip(), highlight=False)

    return advance
