"""Say what a step costs on a machine: seconds, watts, joules; arrays over many runs."""

from __future__ import annotations

from dataclasses import dataclass, fields

import numpy as np

from trainpilot.llm_runtime.schedules import PROBE_PASSES
from trainpilot.llm_runtime.simulator.records import Bools, Floats, Ints

FORWARD_SHARE = 1 / 3
"""A forward pass over a whole step's time: backward costs twice as much."""
PROBE_COPIES = 0.6
"""What a probe costs beyond its passes, over a step's overhead: the update's direction, and copies of the weights."""


@dataclass(kw_only=True)
class Hardware:
    """Machine and model as their costs show them; arrays of shape (n_runs,) unless said otherwise."""

    overhead_s: Floats
    """Seconds of a step that do not depend on the batch."""
    sequence_s: Floats
    """Seconds that every further sequence takes at the starting precision."""
    speed: Floats
    """Speed of each precision over the first, shape (n_runs, number of precisions); what does not pay is masked."""
    masked: Bools
    """Precisions that are not offered, shape (n_runs, number of precisions)."""
    width_share: Floats
    """Share of a sequence's time that falls with removed channels."""
    idle_w: Floats
    load_w: Floats
    """Watts when the machine is saturated."""
    switch_s: Floats
    """Seconds of a change of batch or precision."""
    memory_share: Floats
    """Memory in use at the starting batch."""

    def put(self, rows: Ints, other: Hardware) -> None:
        """Replace some runs' machines by those of `other`."""
        for field in fields(self):
            getattr(self, field.name)[rows] = getattr(other, field.name)

    def take(self, rows: Ints) -> Hardware:
        """Return copies of some runs' machines."""
        return Hardware(**{field.name: getattr(self, field.name)[rows] for field in fields(self)})

    def step_s(self, batch: Floats, precision: Ints, sparsity: Floats) -> Floats:
        """Return the seconds of a step: throughput is B / (B + B_half) of the most, B_half = overhead / sequence."""
        speed = np.take_along_axis(self.speed, precision[:, None], axis=1)[:, 0]
        seconds: Floats = self.overhead_s + self.sequence_s * batch / speed * (1.0 - self.width_share * sparsity)
        return seconds

    def probe_s(self, sequences: Floats, sparsity: Floats) -> Floats:
        """Return the seconds of a curvature probe: forward passes at the first precision, and what goes with them."""
        passes = self.overhead_s + self.sequence_s * sequences * (1.0 - self.width_share * sparsity)
        seconds: Floats = PROBE_PASSES * FORWARD_SHARE * passes + PROBE_COPIES * self.overhead_s
        return seconds

    def power_w(self, batch: Floats) -> Floats:
        """Return the mean watts of a step: a machine that waits for its overhead draws less."""
        busy = self.sequence_s * batch / (self.overhead_s + self.sequence_s * batch)
        watts: Floats = self.idle_w + (self.load_w - self.idle_w) * busy
        return watts
