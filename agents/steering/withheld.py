"""What a run withholds from itself, against a reference run, by learning more slowly than that did.

A low learning rate has less noise, so the loss looks no worse, or even better, until the reference run cools down; then
it is too late. So learning that is withheld is counted when it is withheld, in nats/token, and may not exceed what was
agreed unless the loss is so much lower already that it pays for all that the run may still miss.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np

from trainpilot.llm_runtime.config import Controls

BATCH_EXPONENT = 0.25
"""Progress per token falls with the batch by this power, at the same scale. By the neutral rule it does not depend on
the batch, and by the sum of learning rates it falls with the root: this is the geometric mean of the two."""
FREE_UNTIL = 0.08
"""Share of the budget in which a policy may look for its learning rate from below: what is withheld then is counted,
but nothing is held."""
LATE = 0.7
"""Share of the budget from which a run may not learn faster than the reference and than it does already: what a higher
rate stirs up needs time to settle."""
SETTLED = 0.3
"""Share of the budget from which the reference's fall is read: before it falls too steeply to be given up for good."""
ENDING = 0.9
"""The reference's loss at its end is its mean from this share of the budget on."""
GRID = 50


def relative_speed(controls: Controls, start: Controls) -> float:
    """Return how fast controls learn per token, over those of the base schedule: 1 for the same."""
    return controls.learning_rate_scale * (start.batch_size / controls.batch_size) ** BATCH_EXPONENT


def at_full_speed(controls: Controls, start: Controls) -> Controls:
    """Return the nearest controls that learn as fast as those of the base schedule, with a batch not above theirs."""
    batch_size = min(controls.batch_size, start.batch_size)
    scale = (batch_size / start.batch_size) ** BATCH_EXPONENT
    return replace(controls, batch_size=batch_size, learning_rate_scale=scale)


@dataclass(frozen=True)
class ReferenceFall:
    """How the losses of a reference run fall, in nats/token."""

    rate: float
    """Mean fall over the settled part, per whole budget: what a share of the budget that is not used may cost."""
    end: float
    """Loss at the end."""

    @classmethod
    def of(cls, reference: Sequence[tuple[float, float]]) -> ReferenceFall:
        """Return the fall of losses (share of the budget, loss)."""
        shares, losses = zip(*reference, strict=True)
        settled, ending = np.linspace(SETTLED, 1.0, GRID), np.linspace(ENDING, 1.0, GRID)
        slope = np.polyfit(settled, np.interp(settled, shares, losses), 1)[0]
        return cls(rate=max(-float(slope), 0.0), end=float(np.interp(ending, shares, losses).mean()))

    def missed(self, share: float, loss: float, speed: float) -> float:
        """Return how much of the fall that is left a run would miss that goes on at a speed below 1.

        Losses fall with the logarithm of what was learnt, so it makes more than that share of the progress.

        Args:
            share: Share of the budget used.
            loss: The reference's loss there.
            speed: How fast the run learns per token, over the reference.
        """
        left = max(loss - self.end, self.rate * (1 - share), 0.0)
        if not 0 < share < 1:
            return left * (1 - speed)
        return left * (1 - math.log1p(speed * (1 - share) / share) / math.log(1 / share))
