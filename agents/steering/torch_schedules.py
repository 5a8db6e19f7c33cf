"""Make a base schedule of a torch learning-rate scheduler, so that the policy's scale multiplies the user's own curve.

    scheduler = get_cosine_with_min_lr_schedule_with_warmup(optimizer, 100, steps, min_lr_rate=0.1)
    settings = SteeringSettings(..., base_schedule=schedule_of(scheduler, steps))

The scheduler itself must then not be stepped any more: steering writes the learning rate.
"""

from __future__ import annotations

import copy
import warnings
from collections.abc import Callable

import torch
from torch.optim import SGD
from torch.optim.lr_scheduler import LRScheduler, ReduceLROnPlateau

SAME = 1e-6
"""Parameter groups whose factors differ by more than this share have schedules of their own."""


def schedule_of(scheduler: LRScheduler, steps: int) -> Callable[[float], float]:
    """Return a torch scheduler as a function from the share of the run to the factor on the peak learning rate.

    A copy of the scheduler is stepped through the whole run, so it may be of any kind that follows from the number of
    steps alone. Scheduler and optimizer stay as they are. Where the batch changes, a share of the run still has the
    factor that it would have had.

    Args:
        scheduler: Has not been stepped. The peak is the rate that its optimizer was made with.
        steps: How often the whole run would step it.

    Raises:
        ValueError: the scheduler needs losses, was stepped before, or has a curve for each parameter group.
    """
    name = type(scheduler).__name__
    if steps < 1:
        raise ValueError(f"steps must be at least 1, got {steps}")
    if isinstance(scheduler, ReduceLROnPlateau) or not isinstance(scheduler, LRScheduler):
        raise ValueError(f"scheduler must follow from the number of steps alone, got {name}; leave it out")
    if scheduler.last_epoch > 0:
        raise ValueError(f"scheduler must not have been stepped, got {name} after {scheduler.last_epoch} steps")
    factors = _factors(scheduler, steps)

    def factor_of(share: float) -> float:
        return factors[min(int(share * steps + SAME), steps)]

    return factor_of


def _factors(scheduler: LRScheduler, steps: int) -> list[float]:
    """Return the factors of all steps and of the end, shape (steps + 1,)."""
    groups = scheduler.optimizer.param_groups
    peaks = [float(group.get("initial_lr", group["lr"])) for group in groups]
    stand_in = SGD([{"params": [torch.zeros(1)]} for _ in groups], lr=0.0)
    for own, group in zip(stand_in.param_groups, groups, strict=True):
        own.update({key: copy.copy(value) for key, value in group.items() if key != "params"})
    twin = copy.deepcopy(scheduler, {id(scheduler.optimizer): stand_in})
    highest = max(range(len(peaks)), key=peaks.__getitem__)
    if not peaks[highest] > 0:
        raise ValueError("scheduler must have an optimizer with a learning rate above 0, got 0 in every group")
    factors = []
    for step in range(steps + 1):
        rates = [float(group["lr"]) for group in stand_in.param_groups]
        factors.append(rates[highest] / peaks[highest])
        if any(abs(rate - peak * factors[-1]) > SAME * peaks[highest] for rate, peak in zip(rates, peaks, strict=True)):
            raise ValueError(
                f"scheduler must have one curve for all parameter groups, got {type(scheduler).__name__} with another "
                f"at step {step}; groups keep the ratios of their learning rates under steering"
            )
        with warnings.catch_warnings():  # torch wonders at an optimizer that it did not see in the beginning
            warnings.simplefilter("ignore")
            stand_in.step()
            twin.step()
    return factors
