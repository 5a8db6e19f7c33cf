"""Run the settings of a calibration side by side, in processes of one thread each."""

from __future__ import annotations

import os
import signal
from collections.abc import Iterator, Sequence
from concurrent.futures import Future, ProcessPoolExecutor, as_completed
from concurrent.futures.process import BrokenProcessPool
from multiprocessing import get_context, parent_process
from threading import Thread

from trainpilot.experiments.calibrate.design import Setting
from trainpilot.experiments.calibrate.runs import RunFile, carry_out
from trainpilot.llm_runtime.threads import use_threads

Work = tuple[Setting, str]
"""A setting and its key."""


def run_all(work: Sequence[Work], jobs: int) -> Iterator[tuple[Setting, RunFile | str]]:
    """Yield every setting with its run, or with why it failed in one line, as the runs end.

    Raises:
        ValueError: a process was killed; the runs that have been yielded are whole.
    """
    executor = ProcessPoolExecutor(jobs, mp_context=get_context("spawn"), initializer=_prepare)
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


def _prepare() -> None:
    os.environ["OMP_NUM_THREADS"] = "1"
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # the parent decides what an interrupt means
    Thread(target=_end_with_parent, daemon=True).start()
    use_threads(1)


def _end_with_parent() -> None:
    """Leave no process behind when the calibration is killed."""
    parent = parent_process()
    if parent is not None:
        parent.join()
        os._exit(1)
