"""Measure what a run costs beside its training, as a worker process here, a task of Ray, or a job of submitit.

    python benchmarks/engines.py [--engines local ray slurm] [--runs 20]

Needs `pip install "trainpilot[compare,ray,slurm]"`. The runs train nothing: they hand back a stored result of the usual
size. Ray is a cluster of this machine alone, and submitit's local executor stands in for Slurm, whose queue and network
come on top.
"""

from __future__ import annotations

import argparse
import statistics
import tempfile
import time
from contextlib import closing, nullcontext
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
from _common import write_result
from _engines import made_run

from trainpilot.experiments import workers_slurm
from trainpilot.experiments.engines import Engine
from trainpilot.experiments.workers import Workers
from trainpilot.experiments.workers_ray import RayEngine
from trainpilot.experiments.workers_slurm import SlurmEngine
from trainpilot.llm_runtime.busy import BusyWatch

PACKAGES = {"local": "loky", "ray": "ray", "slurm": "submitit"}


def engine_called(name: str, folder: Path) -> Engine | None:
    """Return the engine with one run at a time; `None` for a process of this machine."""
    if name == "ray":
        return RayEngine("local", jobs=1)
    if name == "slurm":
        workers_slurm.CLUSTER = "local"
        return SlurmEngine(folder, jobs=1)
    return None


def overhead(name: str, n_runs: int) -> dict[str, Any]:
    """Return the seconds until the first run has ended, and those of each further run."""
    watch, seconds = BusyWatch(), list[float]()
    with tempfile.TemporaryDirectory() as folder:
        start = time.perf_counter()
        engine = engine_called(name, Path(folder))
        with (
            nullcontext() if engine is None else closing(engine),
            Workers(made_run, 1, executor=engine) as workers,
        ):
            connected_s = time.perf_counter() - start
            for _ in range(n_runs + 1):
                begun = time.perf_counter()
                workers.start()
                workers.finished()
                seconds.append(time.perf_counter() - begun)
    return {
        "engine": name,
        "package": f"{PACKAGES[name]} {version(PACKAGES[name])}",
        "connect_s": connected_s,
        "first_run_s": seconds[0],
        "run_s": statistics.median(seconds[1:]),
        "slowest_run_s": max(seconds[1:]),
        "runs": n_runs,
        "busy": watch.remark(on_cpu=False),
    }


def main() -> None:
    """Measure the engines named on the command line and write `results/engines.json`."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--engines", nargs="+", default=["local", "ray", "slurm"], choices=list(PACKAGES))
    parser.add_argument("--runs", type=int, default=20)
    options = parser.parse_args()
    results = [overhead(name, options.runs) for name in options.engines]
    for each in results:
        first_s = each["connect_s"] + each["first_run_s"]
        print(
            f"{each['engine']}: {first_s:.1f} s to the end of the first run, {each['run_s']:.3f} s for each further one"
        )
    print(write_result("engines", {"results": results}, torch.device("cpu")))


if __name__ == "__main__":
    main()
