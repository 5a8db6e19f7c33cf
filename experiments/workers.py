"""Run specs side by side in processes of their own; a process that dies costs its own run and no other.

Set up a process that works for another: few threads, no interrupts of its own, and no life without its parent.

Run the settings of a calibration side by side, in processes of one thread each.
"""

from __future__ import annotations

import os
import signal
from collections import Counter
from collections.abc import Iterator, Sequence
from concurrent.futures import FIRST_COMPLETED, Future, ProcessPoolExecutor, as_completed, wait
from concurrent.futures.process import BrokenProcessPool
from dataclasses import dataclass
from multiprocessing import get_context, parent_process
from threading import Thread
from types import TracebackType

from trainpilot.experiments.calibrate.design import Setting
from trainpilot.experiments.calibrate.runs import RunFile, carry_out
from trainpilot.experiments.compare.execute import execute, failed
from trainpilot.experiments.compare.results import RunResult, RunSpec
from trainpilot.llm_runtime.process import use_threads


def begin_work(threads: int = 1) -> None:
    """Make this process a worker with so many threads."""
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


ATTEMPTS = 2
"""A run whose process died is tried again once."""
RUNS_PER_PROCESS = 200
"""Then a new process takes over: what libraries keep from run to run adds up."""


@dataclass(frozen=True)
class _Place:
    """Where a run is running."""

    slot: int
    spec: RunSpec
    key: str


class Workers:
    """`jobs` processes with `threads` torch threads each. The number of processes never changes a loss."""

    def __init__(self, jobs: int, threads: int) -> None:
        for name, value in (("jobs", jobs), ("threads", threads)):
            if value < 1:
                raise ValueError(f"{name} must be at least 1, got {value}")
        self.jobs, self.threads = jobs, threads
        self._slots = [self._executor() for _ in range(jobs)]
        self._free = list(range(jobs))
        self._busy: dict[Future[RunResult], _Place] = {}
        self._deaths: Counter[str] = Counter()
        self._ended: Counter[int] = Counter()

    def __enter__(self) -> Workers:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        for executor in self._slots:
            if error is not None:  # or an interrupt would wait for runs that nobody takes any more
                for process in (executor._processes or {}).values():
                    process.terminate()
            executor.shutdown(wait=error is None, cancel_futures=True)

    @property
    def free(self) -> bool:
        """Whether another run can start at once."""
        return bool(self._free)

    @property
    def busy(self) -> bool:
        """Whether a run is under way."""
        return bool(self._busy)

    def start(self, spec: RunSpec, key: str) -> None:
        """Start a run in a free process."""
        place = _Place(self._free.pop(0), spec, key)
        self._busy[self._submit(place)] = place

    def finished(self) -> list[RunResult]:
        """Wait until at least one run has ended, and return those that have."""
        results: list[RunResult] = []
        while self._busy and not results:
            done, _ = wait(self._busy, return_when=FIRST_COMPLETED)
            for future in done:
                place = self._busy.pop(future)
                if (result := self._outcome(future, place)) is not None:
                    self._free.append(place.slot)
                    results.append(result)
        return results

    def _outcome(self, future: Future[RunResult], place: _Place) -> RunResult | None:
        """Return a run's result; `None` if its process died and it has been started again in a new one."""
        try:
            result = future.result()
        except BrokenProcessPool:
            self._renew(place.slot)
        else:
            self._ended[place.slot] += 1
            if self._ended[place.slot] % RUNS_PER_PROCESS == 0:  # max_tasks_per_child can hang: CPython issue 115634
                self._renew(place.slot)
            return result
        self._deaths[place.key] += 1
        if self._deaths[place.key] >= ATTEMPTS:
            return failed(place.spec, place.key, f"its process was killed {ATTEMPTS} times, perhaps for lack of memory")
        self._busy[self._submit(place)] = place
        return None

    def _submit(self, place: _Place) -> Future[RunResult]:
        shared = self.jobs > 1
        try:
            return self._slots[place.slot].submit(execute, place.spec, place.key, energy_shared=shared)
        except BrokenProcessPool:  # its process died while it had nothing to do
            self._renew(place.slot)
            return self._slots[place.slot].submit(execute, place.spec, place.key, energy_shared=shared)

    def _renew(self, slot: int) -> None:
        self._slots[slot].shutdown(wait=False)
        self._slots[slot] = self._executor()

    def _executor(self) -> ProcessPoolExecutor:
        return ProcessPoolExecutor(1, mp_context=get_context("spawn"), initializer=begin_work, initargs=(self.threads,))


Work = tuple[Setting, str]
"""A setting and its key."""


def run_all(work: Sequence[Work], jobs: int) -> Iterator[tuple[Setting, RunFile | str]]:
    """Yield every setting with its run, or with why it failed in one line, as the runs end.

    Raises:
        ValueError: a process was killed; the runs that have been yielded are whole.
    """
    executor = ProcessPoolExecutor(jobs, mp_context=get_context("spawn"), initializer=begin_work)
    under_way: dict[Future[RunFile | str], Setting] = {}
    whole = False
    try:
        for setting, key in work:
            under_way[executor.submit(_attempt, setting, key, jobs)] = setting
        for future in as_completed(under_way):
            yield under_way[future], future.result()
        whole = True
    except BrokenProcessPool:
        raise ValueError(
            "jobs: the process of a run was killed, perhaps for lack of memory; the same command goes on where it "
            f"was, got {jobs}; fewer need less"
        ) from None
    finally:
        if not whole:  # or an interrupt would wait for runs that nobody takes any more
            for process in (executor._processes or {}).values():
                process.terminate()
        executor.shutdown(wait=whole, cancel_futures=True)


def _attempt(setting: Setting, key: str, jobs: int) -> RunFile | str:
    try:
        return carry_out(setting, key, jobs=jobs)
    except (ValueError, RuntimeError, MemoryError, OSError) as error:
        return f"{type(error).__name__}: {' '.join(str(error).split())[:300]}"
