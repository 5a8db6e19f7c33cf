"""What a run withholds from itself, against a reference run, by learning more slowly than that did.

A low learning rate has less noise, so the loss looks no worse, or even better, until the reference run cools down; then
it is too late. So learning that is withheld is counted when it is withheld, in nats/token, and may not exceed what was
agreed unless the loss is lower than the reference's by more than a low rate can hide.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np

from trainpilot.llm_runtime.config import Controls

BATCH_EXPONENT = 0.25
"""Progress per token falls with the batch by this power, at the same scale. By the neutral rule it does not depend on
the batch, and by the sum of learning rates it falls with the root: this is the geometric mean of the two."""
STEP = 1.5
"""Factor by which a run that is too slow is brought up at a time."""
LATE = 0.7
"""Share of the budget from which a run may not learn faster than the reference and than it does already: what a higher
rate stirs up needs time to settle."""
SETTLED = 0.3
"""Share of the budget from which the reference's fall is read: before it falls too steeply to be given up for good."""
ENDING = 0.9
"""The reference's loss at its end is its mean from this share of the budget on."""
HALF = 0.5
"""Share of the budget from which on the reference's fall is what a low rate can hide, and its swing is estimated."""
GRID = 50
"""Points at which the reference is read."""


def relative_speed(controls: Controls, start: Controls) -> float:
    """Return how fast controls learn per token, over those of the base schedule: 1 for the same."""
    return float(controls.learning_rate_scale * (start.batch_size / controls.batch_size) ** BATCH_EXPONENT)


def at_speed(speed: float, controls: Controls, start: Controls) -> Controls:
    """Return controls that learn at a speed of at most 1, with a batch not above the base schedule's.

    Args:
        speed: As `relative_speed`.
        controls: What else they are.
        start: Controls of the base schedule.
    """
    batch_size = min(controls.batch_size, start.batch_size)
    scale = speed * (batch_size / start.batch_size) ** BATCH_EXPONENT
    return replace(controls, batch_size=batch_size, learning_rate_scale=scale)


@dataclass(frozen=True)
class ReferenceFall:
    """How the losses of a reference run fall, in nats/token."""

    rate: float
    """Mean fall over the settled part, per whole budget: what a share of the budget that is not used may cost."""
    end: float
    """Loss at the end."""
    swing: float
    """Standard deviation of the loss between intervals, from neighbours in the later half of the budget."""

    @classmethod
    def of(cls, reference: Sequence[tuple[float, float]]) -> ReferenceFall:
        """Return the fall of losses (share of the budget, loss)."""
        shares, losses = zip(*reference, strict=True)
        settled, ending = np.linspace(SETTLED, 1.0, GRID), np.linspace(ENDING, 1.0, GRID)
        slope = np.polyfit(settled, np.interp(settled, shares, losses), 1)[0]
        end = float(np.interp(ending, shares, losses).mean())
        later = np.array([loss for share, loss in reference if share >= HALF])
        swing = float(np.sqrt((np.diff(later) ** 2).mean() / 2)) if len(later) > 1 else 0.0
        return cls(rate=max(-float(slope), 0.0), end=end, swing=swing)

    def left(self, share: float, loss: float) -> float:
        """Return how far the reference still falls, from its loss at a share of the budget; at most from the half."""
        if share < HALF:
            return self.rate * HALF
        return max(loss - self.end, self.rate * (1 - share), 0.0)
