"""Let two trainings in processes of their own compute in turns, and compare their speed."""

from __future__ import annotations

import multiprocessing
import socket
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from multiprocessing.connection import Connection
from multiprocessing.process import BaseProcess
from typing import Literal

import numpy as np
import torch.distributed as dist

SIDES = ("alone", "steered")
Timed = dict[str, list[float]]
"""Seconds of each turn, by side."""
TURN = 2
"""Optimiser steps per turn."""


@dataclass(frozen=True, kw_only=True)
class Side:
    """One of the two trainings that are compared."""

    name: str
    """Name of the loop or adapter."""
    steered: bool
    model: str
    steps: int
    processes: int
    """Number of processes that train one model."""
    port: int
    """Port of the process group, if there are several processes."""


Train = Callable[[Side, int, Connection], None]
"""Trains in one process of a side, given its rank and a connection to the controlling process."""


def start(side: Side, train: Train, method: Literal["fork", "spawn"]) -> tuple[Connection, list[BaseProcess]]:
    """Start the processes of one side; return the connection to rank 0 and the processes."""
    context = multiprocessing.get_context(method)
    here, there = context.Pipe()
    processes: list[BaseProcess] = [
        context.Process(target=train, args=(side, rank, there), daemon=True) for rank in range(side.processes)
    ]
    for process in processes:
        process.start()
    there.close()
    return here, processes


class Turns:
    """Blocks a training until its turn, and reports the seconds of each turn.

    Args:
        connection: Connection to the controlling process; only in rank 0.
    """

    def __init__(self, connection: Connection | None) -> None:
        self.connection = connection
        self.done = 0
        self.began = 0.0

    def tick(self) -> None:
        """Count a step; the first is not timed."""
        self.done += 1
        if (self.done - 1) % TURN:
            return
        seconds = time.perf_counter() - self.began
        if self.connection is not None:
            self.connection.send(seconds if self.done > 1 else None)
            self.connection.recv()
        if dist.is_initialized():
            dist.barrier()
        self.began = time.perf_counter()


def alternate(links: Mapping[str, Connection], turns: int, after_turn: Callable[[int], None] = lambda _: None) -> Timed:
    """Let the sides that wait at their first step compute so many turns, and return the seconds of each.

    Args:
        links: Connection to rank 0 of each side.
        turns: How many turns each side gets.
        after_turn: Called with the number of turns that both have had.
    """
    for link in links.values():
        link.recv()
    seconds: Timed = {side: [] for side in SIDES}
    for turn in range(turns):
        for side in SIDES if turn % 2 else reversed(SIDES):
            links[side].send("go")
            seconds[side].append(links[side].recv())
        after_turn(turn + 1)
    return seconds


def speed_ratio(alone: np.ndarray, steered: np.ndarray) -> tuple[float, list[float]]:
    """Return the steered speed over the speed alone, with a 95 % interval over pairs and their turns.

    Args:
        alone: Seconds of the turns of one side; shape (pairs, turns).
        steered: The same of the other side.
    """
    pairs, turns = alone.shape
    draws = np.random.default_rng(0)
    which, when = draws.integers(0, pairs, (2_000, pairs, 1)), draws.integers(0, turns, (2_000, pairs, turns))
    ratios = alone[which, when].sum((1, 2)) / steered[which, when].sum((1, 2))
    return float(alone.sum() / steered.sum()), [float(q) for q in np.percentile(ratios, [2.5, 97.5])]


def free_port() -> int:
    """Return a port on which processes may meet."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port: int = free.getsockname()[1]
    return port
