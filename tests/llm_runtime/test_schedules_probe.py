"""When the curvature is probed: always while the learning rate is being found, now and then later."""

from __future__ import annotations

from pathlib import Path

import numpy as np
from live_runs import case, live_run

from trainpilot.llm_runtime.schedules import probe_due, sequences_probed


def test_probe_ends_each_interval_of_the_first_fifth_then_one_in_four() -> None:
    decisions = np.arange(50)
    due = np.flatnonzero(probe_due(decisions, decisions / 50))
    assert due.tolist() == [*range(10), 12, 16, 20, 24, 28, 32, 36, 40, 44, 48]


def test_probe_sees_a_two_hundredth_of_an_interval_at_least_one_sequence() -> None:
    assert sequences_probed([0, 1, 100, 300, 1_000]).tolist() == [1, 1, 1, 2, 5]


def test_a_live_run_probes_by_the_plan_and_says_on_how_much(tmp_path: Path) -> None:
    run = live_run(case(tmp_path), probe=True)
    looked, told = [], []
    for _ in range(10):
        telemetry = run.advance(run.config.start(), 0.1)
        looked.append(run.sequences_probed)
        told.append(telemetry.probe_linear is not None)
    assert looked == [1, 1, 0, 0, 1, 0, 0, 0, 1, 0]
    assert told == [count > 0 for count in looked]
