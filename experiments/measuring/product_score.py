"""Score a run against a base run by one number: P^1.5 (a T + b E), as Wallace et al. 2025 do for inference."""

from __future__ import annotations

import math

import numpy as np

from trainpilot.envs.reward import MAX_LOSS_INCREASE, Outcome, product
from trainpilot.experiments.measuring.statistics import Bounded, above, exactly

TIME_WEIGHT, ENERGY_WEIGHT = 0.5, 0.5
"""a and b."""
WORST = math.exp(1.5 * MAX_LOSS_INCREASE)
"""A failed run is worth more (worse) than this: a loss as bad as any that is told apart, at the base run's cost."""


def product_score(
    loss: float | None,
    base_loss: float,
    *,
    time: float,
    energy: float | None,
    time_weight: float = TIME_WEIGHT,
    energy_weight: float = ENERGY_WEIGHT,
) -> Bounded:
    """Return P^1.5 (a T + b E), where 1 is as good as the base run and less is better.

    P is the ratio of the perplexities, exp(loss - base_loss). It is capped where the loss is two nats above.

    Args:
        loss: Final validation loss in nats/token; `None` for a run that diverged or failed.
        base_loss: The base run's.
        time: T, seconds over the base run's.
        energy: E, joules over the base run's; `None` where unknown, which leaves the time alone (a = 1, b = 0).
        time_weight: a.
        energy_weight: b; a and b are scaled to sum to 1.
    """
    if loss is None:
        return above(WORST)
    weights = np.array([0.0, energy_weight if energy is not None else 0.0, time_weight])
    outcome = Outcome(energy=-(energy or 0.0), time=-time, loss_increase=loss - base_loss)
    return exactly(-product(outcome, weights))
