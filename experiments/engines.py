"""Choose where the runs of a command are executed: in processes of this machine, on a Ray cluster, or by Slurm."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path
from typing import TYPE_CHECKING, Protocol

from trainpilot.experiments.workers import TaskExecutor
from trainpilot.llm_runtime.live_run import resolve_device

if TYPE_CHECKING:
    from trainpilot.experiments.options import CalibrateOptions, CompareOptions

BELONGS_TO = {
    "ray_address": ("ray",),
    "gpus_per_run": ("ray", "slurm"),
    "slurm_partition": ("slurm",),
    "slurm_minutes": ("slurm",),
}
"""The engines that an option is for."""


class Engine(TaskExecutor, Protocol):
    """Executes runs on other machines, each as one task."""

    jobs: int
    """Runs side by side."""
    share_meter: int | None
    """Runs that share an energy meter; `None` if that is unknown."""
    gpus: float
    """GPUs of each run."""

    def close(self) -> None:
        """End all runs under way, and leave the other machines."""


def engine_of(
    options: CompareOptions | CalibrateOptions, devices: Iterable[str], folder: Path, threads: int = 1
) -> Engine | None:
    """Return the engine that the options choose, ready for runs; `None` for processes of this machine.

    Args:
        options: The options of the command.
        devices: Devices of the runs.
        folder: Folder of the command's results.
        threads: Torch threads of each run.

    Raises:
        ValueError: an option does not belong to the engine, or the engine cannot be reached.
        ModuleNotFoundError: its package is not installed.
    """
    for name, engines in BELONGS_TO.items():
        if getattr(options, name) is not None and options.on not in engines:
            words = " or ".join(f"--on {engine}" for engine in engines)
            raise ValueError(f"{name} needs {words}, got --on {options.on}")
    if options.on == "local":
        return None
    gpus = options.gpus_per_run
    if gpus is None:
        gpus = float(any(resolve_device(device).type == "cuda" for device in devices))
    if options.on == "ray":
        from trainpilot.experiments.workers_ray import RayEngine

        return RayEngine(options.ray_address, jobs=options.jobs, threads=threads, gpus=gpus)
    from trainpilot.experiments.workers_slurm import SlurmEngine

    return SlurmEngine(
        folder / "slurm",
        jobs=options.jobs,
        threads=threads,
        gpus=gpus,
        partition=options.slurm_partition,
        minutes=options.slurm_minutes,
    )
