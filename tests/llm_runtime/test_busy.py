"""OpenMP's threads spin briefly while they wait, and a busy machine is told from a quiet one."""

from __future__ import annotations

import os
import subprocess
import sys
import time

import pytest

from trainpilot.llm_runtime.busy import BusyWatch, busy_remark

ENTRY = """
import os, sys
sys.argv = ["trainpilot", "--version"]
from trainpilot.experiments import cli
try:
    cli.main()
except SystemExit:
    pass
print(os.environ.get("GOMP_SPINCOUNT"), "torch" in sys.modules)
"""


@pytest.mark.parametrize(("chosen", "spins"), [(None, "10000"), ("ACTIVE", "None")])
def test_every_command_says_how_to_wait_before_torch_is_there(
    monkeypatch: pytest.MonkeyPatch, chosen: str | None, spins: str
) -> None:
    monkeypatch.delenv("GOMP_SPINCOUNT", raising=False)
    monkeypatch.setenv("OMP_WAIT_POLICY", chosen or "")
    if chosen is None:
        monkeypatch.delenv("OMP_WAIT_POLICY")
    said = subprocess.run([sys.executable, "-c", ENTRY], check=True, capture_output=True, text=True).stdout
    assert said.splitlines()[-1] == f"{spins} False"


@pytest.mark.parametrize(
    ("wall_s", "cpu_s", "load", "cores", "found"),
    [
        (100.0, 98.0, 1.0, 2, None),
        (100.0, 160.0, 2.4, 2, None),  # two threads of its own
        (100.0, 50.0, 1.0, 2, "this process had a core for 50.0 of 100.0 s"),
        (100.0, None, 1.0, 2, None),  # on a GPU the process waits for it
        (0.5, 0.1, None, 2, None),  # too short to tell
        (100.0, None, 2.6, 2, "load average 2.6 on 2 cores"),
        (100.0, 50.0, 3.0, 1, "this process had a core for 50.0 of 100.0 s; load average 3.0 on 1 core"),
    ],
)
def test_a_busy_machine_is_remarked_on(
    wall_s: float, cpu_s: float | None, load: float | None, cores: int, found: str | None
) -> None:
    remark = busy_remark(wall_s, cpu_s, load, cores)
    assert remark == (None if found is None else f"the machine was busy ({found}): alone, the run takes fewer seconds")


def test_the_watch_counts_from_when_it_was_made(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(time, "perf_counter", iter([5.0, 15.0, 25.0]).__next__)
    monkeypatch.setattr(time, "process_time", iter([1.0, 3.0, 4.0]).__next__)
    monkeypatch.setattr(os, "getloadavg", lambda: (0.5, 9.0, 9.0), raising=False)
    watch = BusyWatch()
    assert "had a core for 2.0 of 10.0 s)" in (watch.remark(on_cpu=True) or "")
    assert watch.remark(on_cpu=False) is None
