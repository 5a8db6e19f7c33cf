"""Ask a policy that may fail: whatever it does, the run goes on."""

from __future__ import annotations

import math
from typing import Any

import numpy as np

from trainpilot.agents.controller import Controller
from trainpilot.envs.action import KEEP, Action, check_action

MAX_FAILURES = 5
"""So many failures running, and a policy is not asked again."""


class AskedPolicy:
    """Counts how often running a policy could not be asked."""

    def __init__(self) -> None:
        self.failures = 0

    @property
    def failed_for_good(self) -> bool:
        """Whether it has failed too often."""
        return self.failures >= MAX_FAILURES

    def ask(self, controller: Controller) -> tuple[Action, str | None]:
        """Return what the policy asks for, or KEEP and why there is no answer."""
        try:
            if not np.isfinite(controller.state.observation()).all():
                raise ValueError("the observation is not finite")
            wish = _checked(controller.wish())
        except Exception as error:  # anything that a stranger's policy may do
            self.failures += 1
            return KEEP, f"policy failed: {type(error).__name__}: {error}"
        self.failures = 0
        return wish, None


def _checked(action: Any) -> Action:
    """Return an action as whole numbers. Raises `ValueError` for anything else."""
    numbers = [float(choice) for choice in action]
    if not all(math.isfinite(number) and number == int(number) for number in numbers):
        raise ValueError(f"choices must be whole numbers, got {numbers}")
    checked = tuple(int(number) for number in numbers)
    check_action(checked)
    return checked
