"""Run a function on many arguments in worker processes; a process that dies costs its own task and no other.

The processes are loky's, which can be killed together with all that they started. Every worker is an executor of its
own with one process, because an executor gives up all of its tasks when one of its processes dies. An executor of
another kind, such as those of `workers_ray` and `workers_slurm`, runs the tasks on other machines.
"""

from __future__ import annotations

import os
import signal
from collections import deque
from collections.abc import Callable, Iterable, Iterator, MutableSequence
from concurrent.futures import FIRST_COMPLETED, BrokenExecutor, Future, wait
from dataclasses import dataclass, replace
from multiprocessing import get_context, parent_process
from threading import Thread
from types import TracebackType
from typing import Any, Generic, Protocol, TypeVar

from loky import ProcessPoolExecutor

from trainpilot.llm_runtime.busy import wait_briefly
from trainpilot.llm_runtime.process import use_threads

Result = TypeVar("Result")

TASKS_PER_PROCESS = 200
"""Tasks after which a new process takes over, because what libraries keep from task to task adds up."""
REPORT_EVERY_S = 0.5
"""Seconds between two calls of a progress callback."""

_CONTEXT = get_context("spawn")  # its processes have a handle on their parent, which loky's own have not


class TaskExecutor(Protocol):
    """What runs tasks; loky's executors are of this kind."""

    def submit(self, function: Callable[..., Any], /, *arguments: Any) -> Future[Any]:
        """Begin a task. Its future raises `BrokenExecutor` if what ran it has died, so that it may be tried again."""

    def shutdown(self, wait: bool = True, kill_workers: bool = False) -> None:
        """Take no further task; kill what runs if `kill_workers`."""


@dataclass(frozen=True)
class _Task:
    """A call in a worker process."""

    slot: int
    """Number of the worker."""
    arguments: tuple[Any, ...]
    attempt: int = 1


class Workers(Generic[Result]):
    """Worker processes that call one function. Their number never changes a result.

    Use it in a `with` statement: leaving the block waits for the running tasks; leaving it by an exception, such as an
    interrupt, kills the processes. They ignore interrupts themselves, and end when this process is killed.

    Args:
        function: Called in the worker processes. It must be importable by its name, as pickle demands.
        jobs: Number of worker processes.
        threads: Torch threads of each process.
        attempts: How often a task is tried in all when its process dies.
        on_death: Called with the arguments of a task whose last attempt died; returns its result or raises. By default
            it raises `ValueError`.
        executor: Runs the tasks instead of processes of this machine; `jobs` of them at once.

    Raises:
        ValueError: `jobs`, `threads` or `attempts` is below 1.
    """

    def __init__(
        self,
        function: Callable[..., Result],
        jobs: int,
        threads: int = 1,
        *,
        attempts: int = 1,
        on_death: Callable[..., Result] | None = None,
        executor: TaskExecutor | None = None,
    ) -> None:
        for name, value in (("jobs", jobs), ("threads", threads), ("attempts", attempts)):
            if value < 1:
                raise ValueError(f"{name} must be at least 1, got {value}")
        self.function, self.jobs, self.threads, self.attempts = function, jobs, threads, attempts
        self._on_death = on_death or self._raise
        self._elsewhere = executor
        wait_briefly()  # the processes inherit it; in them it would come after torch
        self._reports: MutableSequence[float] = _CONTEXT.RawArray("d", jobs)
        """What the running task of each worker has reported."""
        self._reported = 0.0
        """Sum of what the tasks that have ended had reported."""
        self._executors = [self._executor(slot) for slot in range(jobs)]
        self._free = list(range(jobs))
        self._running: dict[Future[Result], _Task] = {}
        self._ended = [0] * jobs

    def __enter__(self) -> Workers[Result]:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        for executor in self._executors:
            executor.shutdown(wait=error is None, kill_workers=error is not None)

    @property
    def free(self) -> bool:
        """Whether another task can start at once."""
        return bool(self._free)

    @property
    def busy(self) -> bool:
        """Whether a task is running."""
        return bool(self._running)

    def start(self, *arguments: Any) -> None:
        """Start a task in a free process."""
        self._submit(_Task(self._free.pop(0), arguments))

    def finished(self) -> list[Result]:
        """Wait until at least one task has ended, and return the results of those that have; none if none is running.

        Raises:
            Exception: whatever `function` or `on_death` raised.
        """
        return [result for _, result in self._finished()]

    def run(
        self, tasks: Iterable[tuple[Any, ...]], progress: Callable[[float], object] | None = None
    ) -> Iterator[tuple[tuple[Any, ...], Result]]:
        """Call the function with each tuple of arguments, and yield arguments and result as the tasks end.

        Args:
            tasks: Arguments, a tuple for each task; started in this order.
            progress: Called about twice a second with the sum of what all tasks have given to `report`.

        Raises:
            Exception: whatever `function` or `on_death` raised.
        """
        waiting = deque(tasks)
        while waiting or self.busy:
            while waiting and self.free:
                self.start(*waiting.popleft())
            yield from self._finished(None if progress is None else REPORT_EVERY_S)
            if progress is not None:
                progress(self._reported + sum(self._reports))

    def _finished(self, limit_s: float | None = None) -> list[tuple[tuple[Any, ...], Result]]:
        """Wait for tasks to end, at most `limit_s` seconds."""
        results: list[tuple[tuple[Any, ...], Result]] = []
        while self._running and not results:
            done, _ = wait(self._running, timeout=limit_s, return_when=FIRST_COMPLETED)
            for future in done:
                results += self._take(future)
            if limit_s is not None:
                break
        return results

    def _take(self, future: Future[Result]) -> list[tuple[tuple[Any, ...], Result]]:
        """Return a task's arguments and result; nothing if its process died and it has been started again."""
        task = self._running.pop(future)
        try:
            result = future.result()
        except BrokenExecutor:
            self._renew(task.slot)
            if task.attempt < self.attempts:
                self._submit(replace(task, attempt=task.attempt + 1))
                return []
            result = self._on_death(*task.arguments)
        else:
            self._ended[task.slot] += 1
            if self._ended[task.slot] % TASKS_PER_PROCESS == 0:
                self._renew(task.slot)
        self._reported += self._reports[task.slot]
        self._reports[task.slot] = 0.0
        self._free.append(task.slot)
        return [(task.arguments, result)]

    def _submit(self, task: _Task) -> None:
        self._reports[task.slot] = 0.0
        try:
            future = self._executors[task.slot].submit(self.function, *task.arguments)
        except BrokenExecutor:  # its process died while it had nothing to do
            self._renew(task.slot)
            future = self._executors[task.slot].submit(self.function, *task.arguments)
        self._running[future] = task

    def _renew(self, slot: int) -> None:
        self._executors[slot].shutdown(wait=False)
        self._executors[slot] = self._executor(slot)

    def _executor(self, slot: int) -> TaskExecutor:
        if self._elsewhere is not None:
            return self._elsewhere
        return ProcessPoolExecutor(  # type: ignore[no-any-return]
            1, context=_CONTEXT, initializer=_begin, initargs=(self.threads, self._reports, slot)
        )

    def _raise(self, *_: Any) -> Result:
        raise ValueError(
            f"jobs: a worker process was killed, perhaps for lack of memory, got {self.jobs}; fewer need less"
        )


# In the worker process ----------------------------------------------------------------------------------------------

_report_to: tuple[MutableSequence[float], int] | None = None
"""Memory that is shared with the parent process, and this worker's place in it."""


def report(done: float) -> None:
    """Tell the parent process how much of the running task is done, in any unit; does nothing outside of a worker."""
    if _report_to is not None:
        reports, slot = _report_to
        reports[slot] = done


def _begin(threads: int, reports: MutableSequence[float], slot: int) -> None:
    """Make this process a worker: few threads, no interrupts of its own, and no life without its parent."""
    global _report_to  # noqa: PLW0603, a process has no other way to keep what it is started with
    _report_to = reports, slot
    os.environ["OMP_NUM_THREADS"] = str(threads)
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # the parent decides what an interrupt means
    Thread(target=_end_with_parent, daemon=True).start()
    use_threads(threads)


def _end_with_parent() -> None:
    """Leave no process behind when the parent is killed."""
    parent = parent_process()
    if parent is not None:
        parent.join()
        os._exit(1)
