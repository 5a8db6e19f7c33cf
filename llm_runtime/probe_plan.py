"""Say when the curvature is probed and on how much, for live and simulated runs alike. Knows no torch."""

from __future__ import annotations

import numpy as np
from numpy.typing import ArrayLike, NDArray

PROBE_SHARE = 0.005
"""A probe looks at this share of an interval's sequences, at least one."""
EVERY_INTERVAL_UNTIL = 0.2
"""Share of the budget up to which every interval ends with a probe: there the learning rate is found."""
PROBE_EVERY = 4
"""Later, one interval in so many. On short runs a probe costs as much as several steps."""


def probe_due(decision: ArrayLike, budget_used: ArrayLike) -> NDArray[np.bool_]:
    """Return whether an interval ends with a probe.

    Args:
        decision: Number of the interval, from 0.
        budget_used: Share of the budget used when it began.
    """
    early = np.asarray(budget_used) < EVERY_INTERVAL_UNTIL
    due: NDArray[np.bool_] = early | (np.asarray(decision) % PROBE_EVERY == 0)
    return due


def sequences_probed(taken: ArrayLike) -> NDArray[np.float64]:
    """Return how many sequences a probe looks at after an interval of `taken` sequences."""
    return np.maximum(1.0, np.round(PROBE_SHARE * np.asarray(taken, dtype=np.float64)))
