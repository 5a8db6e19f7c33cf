"""Plan the controls of a calibration's runs that follow a plan: batches that rise or drop, and starts far too hot."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import replace
from typing import Literal

from trainpilot.llm_runtime.config import ControlLimits, Controls, RunConfig

Plan = Literal["ramp", "middle-ramp", "early-ramp", "half-ramp", "drop", "hot-tenth", "hot-twentieth"]
"""`...-ramp`: the batch rises from an eighth of the start's back to it, or to half of it, as policies that save time
let it rise. `drop`: it falls to an eighth. `hot-...`: the learning rate starts far too high and is down to that part of
it after three decisions, at an eighth of the batch."""

PLAN_RATES: Mapping[Plan, tuple[float, ...]] = {
    "ramp": (7 / 6,),
    "middle-ramp": (1 / 2,),
    "early-ramp": (1 / 3, 2 / 3),
    "half-ramp": (1 / 2,),
    "drop": (7 / 6,),
    "hot-tenth": (35 / 3,),
    "hot-twentieth": (35 / 3,),
}
"""Factors on the learning rate."""
HALVINGS = 3
"""How often a plan halves the batch, once a decision."""
RAMP_SHARES: Mapping[Plan, tuple[float, ...]] = {
    "ramp": (0.3, 0.6, 0.8),
    "middle-ramp": (0.2, 0.4, 0.6),
    "early-ramp": (0.12, 0.24, 0.4),
    "half-ramp": (0.12, 0.3),
}
"""Shares of the budget from which a plan doubles it again."""
DROP_SHARE = 0.4
"""Share of the budget from which `drop` halves it."""
COOLING = (0.71, 0.355, 0.177)
"""Scales of the learning rate in the first intervals of a hot start."""
COOLED: Mapping[Plan, float] = {"hot-tenth": 0.1, "hot-twentieth": 0.05}
"""Its scales from then on."""


def planned(plan: Plan, decision: int, config: RunConfig, limits: ControlLimits) -> Controls:
    """Return the controls of an interval. Batches change as a policy can change them: by halves, step by step."""
    scale = 1.0
    if plan in COOLED:
        scale = COOLING[decision] if decision < len(COOLING) else COOLED[plan]
    batch_size = max(limits.min_batch_size, config.batch_size >> _halvings(plan, decision, config.decisions))
    return replace(config.start(), learning_rate_scale=scale, batch_size=batch_size)


def _halvings(plan: Plan, decision: int, decisions: int) -> int:
    begin = math.ceil(DROP_SHARE * decisions) if plan == "drop" else 0
    halved = min(max(decision - begin + 1, 0), HALVINGS)
    doubled = sum(decision >= math.ceil(share * decisions) for share in RAMP_SHARES.get(plan, ()))
    return max(halved - doubled, 0)
