"""Run the loops that people have beside themselves under steering whose policy keeps everything, and compare.

The two sides have the same data, seeds and steps. Each runs in processes of its own, and they take turns of two steps;
while one computes, the other sleeps. Compared are the losses of all micro-batches, the final weights, and the speed
from the third interval on, where everything is warm. An interval has ten steps of about a tenth of a second, so that
steering weighs more than in a run of hours. What steering refuses is shown with the line that it says.

    python benchmarks/loops.py [--only "Muon and AdamW" DeepSpeed] [--steps 60] [--model llama-micro]

This takes about five minutes on one core. With `--only`, the other rows of the results stay as they are.
"""

from __future__ import annotations

import argparse
import json
import logging
import multiprocessing
import os
import sys
import tempfile
import time
import warnings
from collections.abc import Callable
from importlib.util import find_spec
from multiprocessing.connection import Connection
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import Any

os.environ |= {"TORCHINDUCTOR_COMPILE_THREADS": "1", "OMP_NUM_THREADS": "1"}

import numpy as np
import torch
import torch.distributed as dist
from _adapters import meet
from _common import RESULTS, write_result
from _loops import BATCH, INTERVAL, LENGTH, LOOPS, MICRO_BATCHES, NEEDS, REFUSED, REMARKS, UNDER_WAY, Work
from _turns import SIDES, TURN, Side, Turns, alternate, free_port, speed_ratio, start

EQUAL = 1e-6
"""Largest relative difference of the losses that float rounding explains, where the arithmetic is the same."""
WARM = 2
"""Intervals that are not timed: compilers and allocators warm up, and every interval is probed."""
Outcome = tuple[list[float], list[np.ndarray]]
"""Losses of the micro-batches of rank 0, and the final weights."""


def train(side: Side, rank: int, connection: Connection) -> None:
    """Train in this process, one turn at a time, and send what comes of it."""
    quiet()
    if side.processes > 1:
        meet(rank, side.processes, side.port)
    turns = Turns(connection if rank == 0 else None)
    with tempfile.TemporaryDirectory() as folder:
        shape = {"model_name": side.model, "steps": side.steps, "rank": rank, "processes": side.processes}
        work = Work(**shape, folder=Path(folder), tick=turns.tick)
        LOOPS[side.name](work, side.steered)
    weights = [each.numpy() for each in work.weights()]  # of shards: all processes together
    if turns.connection is not None:
        turns.connection.send(([float(loss) for loss in work.losses], weights))
    if dist.is_initialized():
        dist.destroy_process_group()


def compared(name: str, options: argparse.Namespace) -> dict[str, Any]:
    """Run both sides of a loop in turns, and return the row of the table."""
    missing = [package for package in NEEDS.get(name, ()) if find_spec(package) is None]
    if missing:
        return {"loop": name, "remark": f"not installed: {', '.join(missing)}"}
    links: dict[str, Connection] = {}
    processes: list[BaseProcess] = []
    for side in SIDES:
        training = Side(
            name=name,
            steered=side == "steered",
            model=options.model,
            steps=options.steps,
            processes=2 if name.startswith("torchrun") else 1,
            port=free_port(),
        )
        links[side], started = start(training, train, "fork")  # so that the libraries are imported once
        processes += started
    try:
        steps = options.steps - (round(UNDER_WAY * options.steps) if "from 30 %" in name else 0)
        seconds = alternate(links, (steps - 1) // TURN)
        outcomes: dict[str, Outcome] = {}
        for side, link in links.items():
            link.send("go")
            outcomes[side] = link.recv()
    finally:
        for process in processes:
            process.kill()
            process.join()
    warm = WARM * INTERVAL // TURN
    timed = {side: np.array([each[warm:]]) for side, each in seconds.items()}
    ratio, ratio_95 = speed_ratio(timed["alone"], timed["steered"])
    speeds = {side: timed[side].size * TURN * BATCH * LENGTH / float(timed[side].sum()) for side in SIDES}
    return {
        "loop": name,
        **differences(outcomes["alone"], outcomes["steered"]),
        "speed_ratio": ratio,
        "speed_ratio_95": ratio_95,
        "alone_tokens_per_s": speeds["alone"],
        "steered_tokens_per_s": speeds["steered"],
        "remark": REMARKS.get(name, ""),
    }


def differences(alone: Outcome, steered: Outcome) -> dict[str, Any]:
    """Return the largest relative difference of the losses, and the largest of the final weights."""
    one, other = np.array(alone[0]), np.array(steered[0])
    if one.shape != other.shape:
        raise ValueError(f"both sides must have as many losses, got {len(one)} alone and {len(other)} steered")
    pairs = zip(alone[1], steered[1], strict=True)
    far = max(float(np.abs(a - b).max()) for a, b in pairs)
    return {"losses": len(one), "loss_difference": float((np.abs(one - other) / one).max()), "weight_difference": far}


def refused(name: str, options: argparse.Namespace) -> dict[str, Any]:
    """Return the row of a loop that steering refuses."""
    context, port = multiprocessing.get_context("fork"), free_port()
    here, there = context.Pipe()
    process = context.Process(target=say, args=(name, port, options, there), daemon=True)
    process.start()
    there.close()
    says = here.recv()
    process.join()
    return {"loop": name, "refused": says}


def say(name: str, port: int, options: argparse.Namespace, connection: Connection) -> None:
    """Set a loop up in this process, and send how it is refused."""
    quiet()
    meet(0, 1, port)
    with tempfile.TemporaryDirectory() as folder:
        work = Work(model_name=options.model, steps=options.steps, folder=Path(folder))
        connection.send(REFUSED[name](work))
    dist.destroy_process_group()


def quiet() -> None:
    """Compute on one thread, without the warnings that runs of seconds bring."""
    torch.set_num_threads(1)
    warnings.simplefilter("ignore")


def preload() -> None:
    """Import what the loops need, once for all processes."""
    import transformers

    transformers.utils.logging.set_verbosity_error()
    for package in ("accelerate", "datasets", "peft", "trl", "lightning.pytorch"):
        if find_spec(package.partition(".")[0]) is not None:
            __import__(package)
    logging.getLogger("lightning.pytorch").setLevel(logging.ERROR)  # importing it sets another level


def line(row: dict[str, Any]) -> str:
    """Return a row of the table in Markdown."""
    if "loss_difference" not in row:
        says = f"refused: {row['refused']}" if "refused" in row else row["remark"]
        return f"| {row['loop']} | | | | {says} |"
    loss, weight = (_shown(row[name]) for name in ("loss_difference", "weight_difference"))
    return f"| {row['loop']} | {loss} | {weight} | {row['speed_ratio']:.3f} | {row['remark']} |"


def _shown(difference: float) -> str:
    return "0" if difference == 0 else f"{difference:.1e}"


def table(rows: list[dict[str, Any]]) -> str:
    """Return the table in Markdown."""
    head = "| Loop | Largest difference of the losses | of the final weights | Speed ratio | Remarks |"
    return "\n".join([head, "|---|---|---|---|---|", *map(line, rows)])


def main() -> None:
    """Run the rows named on the command line and write `results/loops.json`."""
    names = [*LOOPS, *REFUSED]
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", nargs="+", default=names, choices=names, metavar="ROW", help=", ".join(names))
    parser.add_argument("--model", default="llama-micro")
    parser.add_argument("--steps", type=int, default=60, help=f"optimiser steps, a multiple of {INTERVAL}")
    options = parser.parse_args()
    if options.steps < 4 * INTERVAL or options.steps % INTERVAL:
        parser.error(f"--steps must be a multiple of {INTERVAL} from {4 * INTERVAL} on, got {options.steps}; e.g. 60")
    began, rows = time.monotonic(), _rows_before(options)
    preload()
    run: Callable[[str], dict[str, Any]]
    for name in options.only:
        run = (lambda each: compared(each, options)) if name in LOOPS else (lambda each: refused(each, options))
        rows[name] = run(name)
        print(f"{time.monotonic() - began:4.0f} s  {line(rows[name])}", file=sys.stderr, flush=True)
        write(rows, options)
    print(table([rows[name] for name in names if name in rows]))


def write(rows: dict[str, dict[str, Any]], options: argparse.Namespace) -> None:
    """Write the rows so far."""
    made = {"model": options.model, "steps": options.steps, "steps_per_interval": INTERVAL, "batch_size": BATCH}
    made |= {"micro_batches": MICRO_BATCHES, "sequence_length": LENGTH}
    found = [rows[name] for name in (*LOOPS, *REFUSED) if name in rows]
    equal = [row["loss_difference"] <= EQUAL for row in found if "loss_difference" in row]
    made |= {"equal_within": EQUAL, "equal": sum(equal), "compared": len(equal), "rows": found}
    write_result("loops", made, torch.device("cpu"), command="python benchmarks/loops.py")


def _rows_before(options: argparse.Namespace) -> dict[str, dict[str, Any]]:
    """Return the rows of the last results, which are kept where only some are run anew under the same conditions."""
    path = RESULTS / "loops.json"
    if not path.exists():
        return {}
    before = json.loads(path.read_text(encoding="utf-8"))
    same = before["model"] == options.model and before["steps"] == options.steps
    return {row["loop"]: row for row in before["rows"]} if same else {}


if __name__ == "__main__":
    main()
