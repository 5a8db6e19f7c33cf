"""Execute runs as tasks of a Ray cluster, for `--on ray`; a machine that dies costs its runs a new start elsewhere.

Ray only starts the tasks and brings their results here, so nothing needs a shared disk but the files that a run reads.
"""

from __future__ import annotations

import os
import signal
import socket
from collections.abc import Callable, Iterator
from concurrent.futures import BrokenExecutor, Future
from contextlib import contextmanager
from functools import partial
from typing import Any

import ray
from ray.exceptions import RayTaskError

from trainpilot.experiments.elsewhere import Answer, Home, call
from trainpilot.experiments.workers import TASKS_PER_PROCESS
from trainpilot.llm_runtime.process import available_cores

OBJECT_STORE_BYTES = 100_000_000
"""Memory for results on their way, in the cluster of this machine; a result has some ten kilobytes."""


class RayEngine:
    """The tasks of a Ray cluster: one run each, with cores and GPUs of its own.

    Args:
        address: Address of the cluster; by default that in `RAY_ADDRESS`, else a cluster of this machine alone, which
            begins and ends with this process.
        jobs: Runs side by side; 0 for as many as the cluster has cores and GPUs for now.
        threads: Torch threads of each run, and the cores that it occupies.
        gpus: GPUs of each run; a fraction shares one.

    Raises:
        ValueError: no cluster answers at the address, or none of its machines has room for a run.
    """

    def __init__(self, address: str | None = None, *, jobs: int = 0, threads: int = 1, gpus: float = 0.0) -> None:
        _connect(address or os.environ.get("RAY_ADDRESS") or "local")
        room = [_room(node["Resources"], threads, gpus) for node in ray.nodes() if node["Alive"]]
        if not any(room):
            ray.shutdown()
            raise ValueError(
                f"on: no machine of the Ray cluster has room for a run of {threads} cores and {gpus:g} GPUs; start one "
                "that has, or lower --threads or --gpus-per-run"
            )
        self.gpus = gpus
        self.room = sum(room)
        """Runs that the cluster has room for."""
        self.jobs = jobs or self.room
        self.share_meter: int | None = max(1, int(1 / gpus)) if gpus else min(self.jobs, max(room))
        self._home = Home.here(threads)
        # A process keeps the GPU that it has begun with, so that the next run on another GPU needs another process.
        per_process = 1 if gpus else TASKS_PER_PROCESS
        resources = {"num_cpus": threads, "num_gpus": gpus, "scheduling_strategy": "SPREAD"}
        self._call = ray.remote(max_retries=0, max_calls=per_process, **resources)(call)
        self._host = ray.remote(max_restarts=0, **resources)(_Host)
        self._under_way: dict[Future[Any], Any] = {}

    def submit(self, function: Callable[..., Any], /, *arguments: Any) -> Future[Any]:
        """Begin a task. Its future raises `BrokenExecutor` if its process or machine has died."""
        future: Future[Any] = Future()
        task = self._call
        if any(getattr(each, "members", 1) > 1 for each in arguments):  # it waits for others, and computes nothing
            task = task.options(num_cpus=0, num_gpus=0)
        reference = task.remote(self._home, function, *arguments)
        self._under_way[future] = reference
        future.add_done_callback(lambda ended: self._under_way.pop(ended, None))
        reference.future().add_done_callback(partial(_settle, future))
        return future

    def begin(self, make: Callable[[], Any]) -> RayObject:
        """Begin an object in a process of its own, with the cores and GPUs of a run; `make` is called there."""
        return RayObject(self._host.remote(self._home, make))

    def shutdown(self, wait: bool = True, kill_workers: bool = False) -> None:
        """Kill the tasks under way if `kill_workers`."""
        if kill_workers:
            for reference in list(self._under_way.values()):
                ray.cancel(reference, force=True)

    def close(self) -> None:
        """Leave the cluster, which kills the tasks under way."""
        ray.shutdown()


class RayObject:
    """An object in another process of the cluster, which lives as long as this one is held.

    Args:
        actor: The actor of its process.
    """

    def __init__(self, actor: Any) -> None:
        self._actor = actor

    def call(self, method: str, /, *arguments: Any) -> Future[Any]:
        """Begin a call of a method. Its future raises `BrokenExecutor` if the process or its machine has died."""
        future: Future[Any] = Future()
        self._actor.call.remote(method, arguments).future().add_done_callback(partial(_settle, future))
        return future


class _Host:
    """Holds an object in its process; what making it raises is the answer of the first call."""

    def __init__(self, home: Home, make: Callable[[], Any]) -> None:
        self._home, self._make = home, make
        self._made: Any = None

    def call(self, method: str, arguments: tuple[Any, ...]) -> Answer:
        """Call a method of the object."""
        if self._made is None:
            made = call(self._home, self._make)
            if made.error is not None:
                return made
            self._made = made.result
        try:
            return Answer(getattr(self._made, method)(*arguments))
        except Exception as error:
            return Answer(error=error)


def _room(resources: dict[str, float], threads: int, gpus: float) -> int:
    """Return the number of runs that a machine has cores and GPUs for."""
    by_cores = int(resources.get("CPU", 0) // threads)
    return min(by_cores, int(resources.get("GPU", 0) / gpus)) if gpus else by_cores


def _settle(future: Future[Any], task: Future[Answer]) -> None:
    """End the future of a task that has ended; Ray calls it in a thread of its own."""
    error = task.exception()
    if error is None:
        task.result().settle(future)
    elif isinstance(error, RayTaskError):  # an error of the function is part of its answer: it was never called
        future.set_exception(ValueError(f"on: a machine of the Ray cluster cannot run trainpilot: {_last_line(error)}"))
    else:
        future.set_exception(BrokenExecutor(str(error)))


def _last_line(error: BaseException) -> str:
    return (str(error).strip().splitlines() or [type(error).__name__])[-1].strip()


def _connect(address: str) -> None:
    """Join the cluster at an address, or begin one of this machine for `local`."""
    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")  # it would report them to its makers
    quiet = {"log_to_driver": False, "logging_level": "ERROR"}
    own = {"num_cpus": available_cores(), "include_dashboard": False, "object_store_memory": OBJECT_STORE_BYTES}
    if address == "local":
        os.environ.setdefault("RAY_worker_niceness", "0")  # 15 by default, which starves runs on a busy machine
    with _own_signals():
        try:
            host, _, port = address.rpartition(":")
            if host and "/" not in host and port.isdigit():  # Ray itself waits for minutes where nobody answers
                socket.create_connection((host, int(port)), timeout=10).close()
            ray.init(address, **quiet, **(own if address == "local" else {}))
        except (OSError, RuntimeError, ValueError) as error:
            raise ValueError(
                f"ray_address: no Ray cluster of this version answers at {address} ({_last_line(error)}); start one "
                "with `ray start --head`, or leave the address out for one of this machine alone"
            ) from error


@contextmanager
def _own_signals() -> Iterator[None]:
    """Keep this process's answer to SIGTERM, which Ray would replace by its own."""
    before = signal.getsignal(signal.SIGTERM)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)
