"""Execute one run of a comparison: train it under the controller named in its spec, and record its costs."""

from __future__ import annotations

from trainpilot.experiments.compare.compressed_execution import CompressedExecution
from trainpilot.experiments.compare.execution import Execution
from trainpilot.experiments.elsewhere import check_same
from trainpilot.experiments.results import RunResult, RunSpec
from trainpilot.experiments.run_store import run_key
from trainpilot.llm_runtime.energy.meter import EnergyMeter


def execute(spec: RunSpec, key: str, *, energy_shared: bool = False, meter: EnergyMeter | None = None) -> RunResult:
    """Train a run to its end and return its result. An error inside the run becomes the result's `failure`.

    Args:
        spec: The run.
        key: Name of the run's file.
        energy_shared: Whether other runs share the energy meter and the cores.
        meter: Energy meter; by default the best one that the device has.
    """
    try:
        kind = Execution if spec.compression is None else CompressedExecution
        return kind(spec, key, energy_shared, meter).result()
    except FAILURES as error:
        return failed(spec, key, said(error))


FAILURES = (ValueError, RuntimeError, MemoryError, OSError)
"""Errors that end a run, but not the command."""


def said(error: BaseException) -> str:
    """Return an error in one line."""
    return f"{type(error).__name__}: {' '.join(str(error).split())[:300]}"


def check_files(spec: RunSpec, key: str) -> None:
    """Raise `ValueError` where this machine has another text or model than home, which a run's key tells."""
    config = spec.config
    check_same(lambda: run_key(spec), key, f"the text {' '.join(config.text)} and the model {config.model}")


def failed(spec: RunSpec, key: str, reason: str) -> RunResult:
    """Return the result of a run that an error ended."""
    return RunResult(
        key=key,
        spec=spec,
        n_parameters=0,
        initial_validation_loss=None,
        final_validation_loss=None,
        final_test_loss=None,
        diverged=False,
        stopped_early=False,
        failure=reason,
        energy_source=None,
        energy_shared=False,
        device="",
        intervals=(),
    )
