"""Measure the overhead of each adapter: tokens/s of the steered framework over tokens/s of the framework alone.

Both sides run in their own processes and alternate every two steps, so that a change of the machine's speed affects
both; while one computes, the other sleeps. The steered side evaluates the shipped policy without applying its choice
(so that the work stays the same), and runs the guardrails with their snapshots, the curvature probe, the energy meter
and the telemetry. An interval has only ten steps; with longer intervals steering costs less. Start-up and the first
step are not timed. The target is 0.97 for every adapter.

How often glibc returns memory to the system, only to fetch it again in the next step, depends on the memory layout of
a process: it makes the speed of two equal processes differ by several per cent. Therefore each adapter is measured with
several pairs of processes, in which the sides alternate in starting first, and glibc keeps freed memory on both sides;
`--stock-heap` leaves glibc at its defaults.

    python benchmarks/adapter_overhead.py [--forms "plain loop" Trainer] [--model llama-micro] [--steps 250] [--pairs 4]

This takes about half an hour on two otherwise idle cores.
"""

from __future__ import annotations

import argparse
import os
import tempfile
from collections.abc import Callable
from multiprocessing.connection import Connection
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
from _adapters import BATCH, FORMS, INTERVAL, LENGTH, MICRO_BATCHES, Training, meet
from _common import write_result
from _turns import SIDES, TURN, Side, Timed, Turns, alternate, free_port, speed_ratio, start
from rich.console import Console

from trainpilot.experiments.progress import progress_bar
from trainpilot.llm_runtime.process import available_cores, use_threads

TARGET = 0.97
KEPT_HEAP = {"MALLOC_TRIM_THRESHOLD_": str(2**32), "MALLOC_MMAP_THRESHOLD_": str(2**25)}
"""Environment variables that make glibc keep freed memory for the next step."""
SPARE = 20
"""Untimed extra steps: the first step is not timed, and the Trainer's callback rounds its budget down."""


def train(side: Side, rank: int, connection: Connection) -> None:
    """Train in this process, one turn at a time."""
    use_threads(max(available_cores() // side.processes, 1))
    if side.processes > 1:
        meet(rank, side.processes, side.port)
    turns = Turns(connection if rank == 0 else None)
    with tempfile.TemporaryDirectory() as folder:
        FORMS[side.name](Training(side.model, side.steps + SPARE, rank), side.steered, turns.tick, Path(folder))
    if side.processes > 1:
        dist.destroy_process_group()
    if turns.connection is not None:
        turns.connection.close()


def compare(form: str, options: argparse.Namespace) -> dict[str, Any]:
    """Run a form with and without steering, in several pairs, and return the figures."""
    with progress_bar(Console(), form, options.pairs * (options.steps // TURN)) as advance:
        pairs = [timed(form, options, pair, advance) for pair in range(options.pairs)]
    return figures(form, {side: np.array([pair[side] for pair in pairs]) for side in SIDES})


def timed(form: str, options: argparse.Namespace, pair: int, advance: Callable[[int, str], None]) -> Timed:
    """Run a form with and without steering in alternating turns, and return the seconds of each turn."""
    links: dict[str, Connection] = {}
    processes: list[BaseProcess] = []
    for side in SIDES if pair % 2 else reversed(SIDES):  # the side that starts first is a little faster
        training = Side(
            name=form,
            steered=side == "steered",
            model=options.model,
            steps=options.steps,
            processes=2 if form.startswith("DDP") else 1,
            port=free_port(),
        )
        links[side], started = start(training, train, "spawn")
        processes += started
    try:
        turns = options.steps // TURN
        return alternate(links, turns, lambda done: advance(pair * turns + done, ""))
    finally:
        for process in processes:
            process.kill()
            process.join()


def figures(form: str, seconds: dict[str, np.ndarray]) -> dict[str, Any]:
    """Return tokens/s and their ratio, with a 95 % interval over pairs and their turns.

    Args:
        form: Name of the adapter.
        seconds: Seconds of the turns of each side; shape (pairs, turns).
    """
    alone, steered = seconds["alone"], seconds["steered"]
    tokens = alone.size * TURN * BATCH * LENGTH
    ratio, ratio_95 = speed_ratio(alone, steered)
    return {
        "form": form,
        "alone_tokens_per_s": tokens / float(alone.sum()),
        "steered_tokens_per_s": tokens / float(steered.sum()),
        "ratio": ratio,
        "ratio_95": ratio_95,
        "pairs": [float(ratio) for ratio in alone.sum(1) / steered.sum(1)],
        "target": TARGET,
        "target_met": ratio >= TARGET,
    }


def main() -> None:
    """Measure the forms named on the command line and write `results/adapter_overhead.json`."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--forms", nargs="+", default=list(FORMS), choices=list(FORMS), metavar="FORM")
    parser.add_argument("--model", default="llama-micro")
    parser.add_argument("--steps", type=int, default=250, help=f"optimiser steps, a multiple of {INTERVAL}")
    parser.add_argument("--pairs", type=int, default=4, help="pairs of processes for each form")
    parser.add_argument("--stock-heap", action="store_true", help="let glibc give memory back between steps")
    parser.add_argument("--name", default="adapter_overhead", help="name of the result file")
    options = parser.parse_args()
    if options.steps < INTERVAL or options.steps % INTERVAL:
        parser.error(f"--steps must be a multiple of {INTERVAL}, got {options.steps}; 250, for example")
    if options.pairs < 1:
        parser.error(f"--pairs must be at least 1, got {options.pairs}; 4, for example")
    os.environ["OMP_WAIT_POLICY"] = "passive"  # inherited by the processes: waiting threads must not spin
    if not options.stock_heap:
        os.environ |= KEPT_HEAP
    made = {"model": options.model, "steps": options.steps, "steps_per_interval": INTERVAL, "batch_size": BATCH}
    made |= {
        "heap": "stock" if options.stock_heap else "kept",
        "sequence_length": LENGTH,
        "micro_batches": MICRO_BATCHES,
    }
    results = []
    for form in options.forms:
        results.append(compare(form, options))
        print(f"{form}: {results[-1]['ratio']:.4f} of the tokens/s without steering (target {TARGET})", flush=True)
        print(write_result(options.name, {**made, "results": results}, torch.device("cpu")))


if __name__ == "__main__":
    main()
