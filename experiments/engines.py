"""Choose where the runs of a command are executed: in processes of this machine, on a Ray cluster, or by Slurm."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path
from typing import TYPE_CHECKING, Protocol

from trainpilot.experiments.workers import TaskExecutor
from trainpilot.llm_runtime.live_run import resolve_device

if TYPE_CHECKING:
    from trainpilot.experiments.options import CalibrateOptions, CompareOptions, TrainAgentOptions
    from trainpilot.experiments.workers_ray import RayEngine

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
    _check_belonging(options)
    if options.on == "local":
        return None
    gpus = _gpus(options, devices)
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


def engine_of_envs(
    options: TrainAgentOptions, devices: Iterable[str], n_envs: int, threads: int = 1
) -> RayEngine | None:
    """Return the engine of a training's environments, with room for all of them; `None` for processes of this machine.

    Args:
        options: The options of the command.
        devices: Devices of the live runs.
        n_envs: Environments side by side.
        threads: Torch threads of each run.

    Raises:
        ValueError: as `check_engine_of_envs`, or the engine cannot have the environments.
        ModuleNotFoundError: its package is not installed.
    """
    check_engine_of_envs(options)
    if options.on == "local":
        return None
    from trainpilot.experiments.workers_ray import RayEngine

    engine = RayEngine(options.ray_address, jobs=n_envs, threads=threads, gpus=_gpus(options, devices))
    if engine.room < n_envs:
        engine.close()
        raise ValueError(
            f"n_envs must be at most {engine.room}, as many as the Ray cluster has room for, got {n_envs}; set n_envs, "
            "or add machines"
        )
    return engine


def check_engine_of_envs(options: TrainAgentOptions) -> None:
    """Check what `engine_of_envs` will need, hours before it is called.

    Raises:
        ValueError: an option does not belong to the engine, or the engine cannot carry environments out.
        ModuleNotFoundError: its package is not installed.
    """
    _check_belonging(options)
    if options.on == "slurm":
        raise ValueError(
            "on: train-agent must be on local or ray, got slurm: PPO waits for all environments at every decision, and "
            "jobs of Slurm begin and end at different times; start a Ray cluster within one job"
        )
    if options.on == "ray":
        import trainpilot.experiments.workers_ray  # noqa: F401


def _check_belonging(options: CompareOptions | CalibrateOptions | TrainAgentOptions) -> None:
    for name, engines in BELONGS_TO.items():
        if getattr(options, name, None) is not None and options.on not in engines:
            words = " or ".join(f"--on {engine}" for engine in engines)
            raise ValueError(f"{name} needs {words}, got --on {options.on}")


def _gpus(options: CompareOptions | CalibrateOptions | TrainAgentOptions, devices: Iterable[str]) -> float:
    """Return the GPUs of each run, by default one where a device is cuda."""
    if options.gpus_per_run is not None:
        return options.gpus_per_run
    return float(any(resolve_device(device).type == "cuda" for device in devices))
