"""Random runs, some numbers unknown or not finite, to hold observations against recorded ones."""

from __future__ import annotations

import math
import random
from collections.abc import Iterator
from typing import Any

from fakes import make_limits, make_telemetry

from trainpilot.envs.action import ACTION_FIELDS
from trainpilot.envs.decision import DecisionState, Preference
from trainpilot.llm_runtime.telemetry import Telemetry

OPTIONAL = ("noise_scale", "relative_update", "energy_j", "power_w", "memory_share")
MEASURED = ("train_loss", "train_loss_std", "train_loss_max", "learning_rate", "time_s", "clipped_share")


def random_run(seed: int, decisions: int = 12) -> Iterator[tuple[DecisionState, Telemetry | None]]:
    """Yield the state of a run before its first decision and after each interval."""
    random_ = random.Random(seed)
    quality = random_.uniform(0.5, 1.0)
    energy = random_.uniform(0.0, 1.0 - quality)
    limits = make_limits(pruning=random_.choice(["none", "magnitude"]), max_batch_size=random_.choice([8, 64]))
    state = DecisionState(limits, Preference(quality=quality, energy=energy, time=1 - quality - energy))
    yield state, None
    tokens, validation = 0, None
    for decision in range(decisions):
        state.decide([random_.randrange(len(field.choices)) for field in ACTION_FIELDS])
        tokens += random_.randrange(1, 3_000)
        if random_.random() < 0.3:
            validation = random_.uniform(1.0, 5.0)
        telemetry = _interval(random_, decision / decisions, tokens, validation if random_.random() < 0.8 else None)
        state.observe(telemetry)
        yield state, telemetry


def _interval(random_: random.Random, budget_used: float, tokens: int, validation: float | None) -> Telemetry:
    loss = random_.uniform(1.0, 6.0)
    values: dict[str, Any] = {
        "train_loss": loss,
        "train_loss_std": random_.uniform(0.0, 0.2),
        "train_loss_max": loss + random_.uniform(0.0, 1.0),
        "noise_scale": 10 ** random_.uniform(-1, 5),
        "relative_update": 10 ** random_.uniform(-7, 0),
        "probe_linear": random_.uniform(-0.02, 0.002),
        "probe_quadratic": random_.uniform(-0.002, 0.02),
        "learning_rate": 10 ** random_.uniform(-6, -1),
        "batch_size": random_.uniform(1, 64),
        "sparsity": random_.uniform(0, 0.9),
        "clipped_share": random_.random(),
        "epochs_seen": random_.uniform(0, 40),
        "time_s": random_.uniform(0.1, 3.0),
        "energy_j": random_.uniform(1.0, 300.0),
        "power_w": random_.uniform(10.0, 300.0),
        "memory_share": random_.random(),
    }
    for name in OPTIONAL:
        if random_.random() < 0.15:
            values[name] = None
    if random_.random() < 0.15:
        values |= {"probe_linear": None, "probe_quadratic": None}
    for name in MEASURED:
        if random_.random() < 0.05:
            values[name] = random_.choice([math.nan, math.inf, 0.0])
    if random_.random() < 0.05:
        values |= {name: math.nan for name in (*MEASURED, "gradient_norm")} | {"diverged": True}
    return make_telemetry(
        **values,
        steps=random_.randrange(1, 40),
        interval_tokens=random_.randrange(1, 3_000),
        tokens=tokens,
        budget_used=budget_used,
        validation_loss=validation,
    )
