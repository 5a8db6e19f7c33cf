"""What a policy may choose from in somebody else's run."""

from __future__ import annotations

from trainpilot.agents.steering.settings import SteeringSettings
from trainpilot.llm_runtime.config import ControlLimits
from trainpilot.llm_runtime.loop import Levers, offered

BATCH_RANGE = 16
"""The batch stays within this factor of the first, and leaves at least four steps in an interval."""


def control_limits(settings: SteeringSettings, levers: Levers, decisions: int, processes: int) -> ControlLimits:
    """Return the limits of a run that `processes` share.

    Raises:
        ValueError: the processes cannot share the batch evenly.
    """
    start = levers.controls
    if start.batch_size % processes:
        raise ValueError(f"batch_size must be a multiple of the {processes} processes, got {start.batch_size}")
    smallest, largest = _batches(settings, decisions, processes) if levers.changes_batch else (start.batch_size,) * 2
    return ControlLimits(
        start=start,
        min_batch_size=smallest,
        max_batch_size=largest,
        masked_precisions=offered(settings.precisions, levers.device),
        pruning=settings.pruning,
        decisions=decisions,
    )


def _batches(settings: SteeringSettings, decisions: int, processes: int) -> tuple[int, int]:
    """Return the smallest and the largest batch."""
    batch_size = settings.batch_size
    least = settings.min_batch_size or max(processes, batch_size // BATCH_RANGE)
    most = settings.max_batch_size or min(batch_size * BATCH_RANGE, settings.sequences // decisions // 4)
    return max(least, _least_shared(batch_size, processes)), max(batch_size, most)


def _least_shared(batch_size: int, processes: int) -> int:
    """Return the smallest batch that halving leads to and that the processes share evenly."""
    while processes > 1 and batch_size % (2 * processes) == 0:
        batch_size //= 2
    return batch_size if processes > 1 else 1
