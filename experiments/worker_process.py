"""Set up a process that works for another: few threads, no interrupts of its own, and no life without its parent."""

from __future__ import annotations

import os
import signal
from multiprocessing import parent_process
from threading import Thread

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
