"""Steer one simulated run as if it were a live one."""

from __future__ import annotations

from copy import deepcopy
from typing import TYPE_CHECKING, cast

import numpy as np

from trainpilot.llm_runtime.controls import PRECISIONS, ControlLimits, Controls
from trainpilot.llm_runtime.plant import Snapshot
from trainpilot.llm_runtime.simulator.records import ControlBatch, PlantBatch
from trainpilot.llm_runtime.telemetry import Telemetry

if TYPE_CHECKING:
    from trainpilot.llm_runtime.simulator.runs import Pool, SimulatedRuns, Start

MASKED = "does not pay on this machine"
"""Why a simulated run does not offer a precision."""


class OnePlant:
    """The only run of a `PlantBatch`, as a `Plant`. It is begun anew."""

    def __init__(self, plants: PlantBatch) -> None:
        if plants.n_runs != 1:
            raise ValueError(f"plants must have one run, got {plants.n_runs}")
        self.plants = plants
        self.finished = False
        plants.begin(np.arange(1))

    def limits(self) -> ControlLimits:
        """Return what may be asked of it."""
        limits = self.plants.limits()
        masked = zip(PRECISIONS, limits.masked_precisions[0], strict=True)
        return ControlLimits(
            start=limits.start.row(0),
            min_batch_size=int(limits.min_batch_size[0]),
            max_batch_size=int(limits.max_batch_size[0]),
            masked_precisions={name: MASKED for name, is_masked in masked if is_masked},
            pruning="width" if limits.prunes[0] else "none",
            decisions=int(limits.decisions[0]),
        )

    def advance(self, controls: Controls, share: float) -> Telemetry:
        """Train for one interval, whatever `share` says: it is one over the decisions.

        Raises:
            ValueError: the run has finished.
        """
        if self.finished:
            raise ValueError("advance needs a run that has not finished; make a new one or restore a snapshot")
        telemetry = self.plants.advance(ControlBatch.of([controls])).row(0, controls)
        self.finished = telemetry.finished or telemetry.diverged
        return telemetry

    def evaluate(self) -> float:
        """Return the validation loss, in nats/token."""
        return float(self.plants.evaluate()[0])

    def snapshot(self) -> Snapshot:
        """Return a copy of the state."""
        return {"plants": deepcopy(self.plants), "finished": self.finished}

    def restore(self, snapshot: Snapshot) -> None:
        """Go back to a state that `snapshot` returned."""
        self.plants = deepcopy(snapshot["plants"])
        self.finished = snapshot["finished"]


class SimulatedRun(OnePlant):
    """One simulated run: what row `row` of `SimulatedRuns` trains first in an environment, under the same seed.

    Args:
        seed: Decides everything that is drawn.
        row: Which of the runs under this seed.
        pool: What it is drawn from; by default around the calibrations that come with trainpilot.
        start: How it begins.
    """

    def __init__(self, seed: int = 0, row: int = 0, pool: Pool | None = None, start: Start | None = None) -> None:
        from trainpilot.llm_runtime.simulator.runs import SimulatedRuns

        super().__init__(SimulatedRuns(1, seed, pool, start, first_row=row))

    @property
    def runs(self) -> SimulatedRuns:
        """The run among its kind: its instance, its references, its state."""
        return cast("SimulatedRuns", self.plants)
