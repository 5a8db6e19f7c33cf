"""Run the settings of a calibration side by side, in processes of one thread each."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from concurrent.futures import Future, ProcessPoolExecutor, as_completed
from concurrent.futures.process import BrokenProcessPool
from multiprocessing import get_context

from trainpilot.experiments.calibrate.design import Setting
from trainpilot.experiments.calibrate.runs import RunFile, carry_out
from trainpilot.experiments.worker_process import begin_work

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
