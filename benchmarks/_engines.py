"""A run that trains nothing, in a file of its own so that other processes can import it."""

from __future__ import annotations

from trainpilot.experiments.results import IntervalResult, RunResult, RunSpec
from trainpilot.llm_runtime.config import RunConfig

INTERVALS = 100


def made_run() -> RunResult:
    """Return a result with as many intervals as a long run has."""
    interval = IntervalResult(
        tokens=1_000,
        steps=10,
        train_loss=2.5,
        validation_loss=2.5,
        learning_rate=1e-3,
        batch_size=8.0,
        precision="fp32",
        sparsity=0.0,
        probe_sequences=0,
        evaluation_sequences=0,
        time_s=1.0,
        probe_time_s=0.0,
        switch_time_s=0.0,
        evaluation_time_s=0.0,
        energy_j=None,
        evaluation_energy_j=None,
    )
    return RunResult(
        key="made",
        spec=RunSpec(config=RunConfig()),
        n_parameters=1,
        initial_validation_loss=5.0,
        final_validation_loss=2.5,
        final_test_loss=2.5,
        diverged=False,
        stopped_early=False,
        failure=None,
        energy_source=None,
        energy_shared=False,
        device="cpu",
        intervals=(interval,) * INTERVALS,
    )
