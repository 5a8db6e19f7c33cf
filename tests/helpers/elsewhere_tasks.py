"""Functions that tests have called in processes of Ray and Slurm, which must be able to import them."""

from __future__ import annotations

import os
import signal
import time
from pathlib import Path

DEADLY = 13


def half(number: int) -> float:
    """Return half of a number; a negative one is refused, and an unlucky one kills the process."""
    if number == DEADLY:
        os.kill(os.getpid(), signal.SIGKILL)
    if number < 0:
        raise ValueError(f"number must be positive, got {number}")
    return number / 2


def marked(folder: Path, number: int) -> int:
    """Leave a file at the beginning, wait for the file `go`, and leave another at the end."""
    (folder / f"begun-{number}-{os.getpid()}").touch()
    while not (folder / "go").exists():
        time.sleep(0.02)
    (folder / f"ended-{number}-{os.getpid()}").touch()
    return number


def beginnings(folder: Path, number: int) -> list[int]:
    """Return the processes that have begun a task of `marked`."""
    return [int(path.name.split("-")[2]) for path in folder.glob(f"begun-{number}-*")]


def endings(folder: Path, number: int) -> list[int]:
    """Return the processes that have ended a task of `marked`."""
    return [int(path.name.split("-")[2]) for path in folder.glob(f"ended-{number}-*")]


class Counter:
    """Counts in the process that it was made in; can be told to die."""

    def __init__(self) -> None:
        self.count = 0

    def add(self, number: int) -> tuple[int, int]:
        """Return the sum so far, and the process."""
        if number < 0:
            raise ValueError(f"number must be positive, got {number}")
        if number == DEADLY:
            os.kill(os.getpid(), signal.SIGKILL)
        self.count += number
        return self.count, os.getpid()


def broken() -> Counter:
    """Raise instead of making anything."""
    raise ValueError("there is nothing to count")
