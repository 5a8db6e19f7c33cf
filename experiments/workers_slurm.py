"""Execute runs as jobs of Slurm through submitit, for `--on slurm`; runs that begin together are one array of jobs."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from concurrent.futures import BrokenExecutor, Future
from pathlib import Path
from threading import Event, Lock, Thread
from typing import Any

import submitit

from trainpilot.experiments.elsewhere import Answer, Home, call

CLUSTER = "slurm"
"""Submitit's name of the queue; its `local` has the same interface, with processes of this machine."""
POLL_S = 0.5
"""Seconds between two looks at the files in which jobs leave their results."""
MINUTES = 60
"""Time limit of a run where none is given."""

Call = tuple[Callable[..., Any], tuple[Any, ...]]


class SlurmEngine:
    """The jobs of Slurm: one run each, with cores and GPUs of its own.

    Args:
        folder: Folder for the jobs' scripts, logs and results, on a disk that all machines share.
        jobs: Runs side by side, waiting or running.
        threads: Torch threads of each run, and the cores that it asks for.
        gpus: GPUs of each run, whole ones.
        partition: Partition of Slurm, by default Slurm's own choice.
        minutes: Time limit of a run, `MINUTES` by default. One that takes longer has failed.

    Raises:
        ValueError: an argument cannot be used, or this machine cannot submit to Slurm.
    """

    def __init__(
        self,
        folder: Path,
        *,
        jobs: int,
        threads: int = 1,
        gpus: float = 0.0,
        partition: str | None = None,
        minutes: int | None = None,
    ) -> None:
        if jobs < 1:
            raise ValueError(f"jobs must be given for --on slurm, the runs that may wait or run at once, got {jobs}")
        if gpus != int(gpus):
            raise ValueError(f"gpus_per_run must be a whole number for --on slurm, got {gpus:g}")
        if CLUSTER == "slurm" and shutil.which("sbatch") is None:
            raise ValueError("on: slurm needs the command sbatch, which this machine has not; use a login node")
        self.jobs = jobs
        self.gpus = gpus
        self.share_meter: int | None = 1 if gpus else None
        self._home = Home.here(threads)
        self._queue = submitit.AutoExecutor(folder=folder, cluster=CLUSTER)
        asked: dict[str, Any] = {"cpus_per_task": threads, "timeout_min": minutes or MINUTES, "name": "trainpilot"}
        asked |= {"gpus_per_node": int(gpus)} if gpus else {}
        asked |= {"slurm_partition": partition} if partition is not None else {}
        self._queue.update_parameters(**asked, slurm_array_parallelism=jobs)
        self._lock = Lock()
        self._new: dict[Future[Any], Call] = {}
        self._under_way: dict[Future[Any], Any] = {}
        """Jobs of submitit."""
        self._closed = Event()
        self._thread = Thread(target=self._serve, name="trainpilot-slurm", daemon=True)
        self._thread.start()

    def submit(self, function: Callable[..., Any], /, *arguments: Any) -> Future[Any]:
        """Begin a task. Its future raises `BrokenExecutor` if its job ended without a result."""
        future: Future[Any] = Future()
        with self._lock:
            self._new[future] = function, arguments
        return future

    def shutdown(self, wait: bool = True, kill_workers: bool = False) -> None:
        """Cancel the jobs under way if `kill_workers`."""
        if kill_workers:
            self.close()

    def close(self) -> None:
        """Cancel the jobs under way, and submit no more."""
        self._closed.set()
        self._thread.join()
        for job in self._under_way.values():
            job.cancel(check=False)
        self._under_way.clear()

    def _serve(self) -> None:
        """Submit the new tasks and collect the ended ones, until the engine is closed."""
        while not self._closed.wait(POLL_S):
            with self._lock:
                new, self._new = self._new, {}
            try:
                self._submit(new)
            except Exception as error:
                for future in new:
                    future.set_exception(ValueError(f"on: slurm refused a job: {' '.join(str(error).split())[-300:]}"))
            for future, job in list(self._under_way.items()):
                if job.done():
                    del self._under_way[future]
                    _settle(future, job)

    def _submit(self, new: dict[Future[Any], Call]) -> None:
        if not new:
            return
        with self._queue.batch():
            jobs = [self._queue.submit(call, self._home, function, *given) for function, given in new.values()]
        self._under_way |= dict(zip(new, jobs, strict=True))


def _settle(future: Future[Any], job: Any) -> None:
    """End the future of a job that has ended."""
    try:
        answer: Answer = job.result()
    except submitit.core.utils.FailedJobError as error:  # an error of the function is part of its answer
        last = str(job.stderr() or error).strip().splitlines()[-1]
        future.set_exception(ValueError(f"on: a machine of Slurm cannot run trainpilot: {last}"))
    except Exception as error:
        future.set_exception(BrokenExecutor(str(error)))
    else:
        answer.settle(future)
