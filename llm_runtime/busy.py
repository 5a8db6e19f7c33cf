"""Share a machine with other work: OpenMP's threads spin only briefly while they wait, and a busy machine is noticed.

Imports nothing heavy: how OpenMP waits has to be set before torch is loaded.
"""

from __future__ import annotations

import os
import time

SPINS = "10000"
"""Turns that a thread spins before it sleeps. A sleep at once would make idle cores slower."""
IDLE_SHARE = 0.7
"""A process that computes on the CPU and gets less than this share of a core waits for other programs."""
CROWDED = 1.25
"""Load average over the cores above which the machine is busy; the process's own threads are in it."""


def wait_briefly() -> None:
    """Have OpenMP's threads spin only briefly while they wait for each other, unless the user has set how they wait.

    By default they spin for long. Where another program holds the core that the last thread needs, all others keep
    theirs busy with waiting, and a step takes ten times as long. It holds for this process if torch is not loaded yet,
    and for all that it starts. PyTorch's libgomp obeys it.
    """
    if "OMP_WAIT_POLICY" not in os.environ:
        os.environ.setdefault("GOMP_SPINCOUNT", SPINS)


class BusyWatch:
    """Notes whether other programs took cores from this process since it was made."""

    def __init__(self) -> None:
        self._wall_s, self._cpu_s = time.perf_counter(), time.process_time()

    def remark(self, *, on_cpu: bool) -> str | None:
        """Return a line about a busy machine; `None` where it was not busy.

        Args:
            on_cpu: Whether the process computed on the CPU all the time, so that it should have had a core.
        """
        wall_s, cpu_s = time.perf_counter() - self._wall_s, time.process_time() - self._cpu_s
        load = os.getloadavg()[0] if hasattr(os, "getloadavg") else None
        return busy_remark(wall_s, cpu_s if on_cpu else None, load, os.cpu_count() or 1)


def busy_remark(wall_s: float, cpu_s: float | None, load: float | None, cores: int) -> str | None:
    """Return a line about a busy machine; `None` where it was not busy.

    Args:
        wall_s: Seconds that passed.
        cpu_s: Seconds of them that the process computed, all threads together; `None` where it had no need to.
        load: Load average of the last minute, the process's own threads included; `None` where it is unknown.
        cores: Cores of the machine.
    """
    found = []
    if cpu_s is not None and wall_s > 1 and cpu_s < IDLE_SHARE * wall_s:
        found.append(f"this process had a core for {cpu_s:.1f} of {wall_s:.1f} s")
    if load is not None and load > CROWDED * cores:
        found.append(f"load average {load:.1f} on {cores} {'core' if cores == 1 else 'cores'}")
    return f"the machine was busy ({'; '.join(found)}): alone, the run takes fewer seconds" if found else None
