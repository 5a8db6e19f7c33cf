"""The settings that a static baseline may tune, and their neighbours."""

from __future__ import annotations

import math
from collections.abc import Collection, Sequence
from dataclasses import dataclass, replace

from trainpilot.llm_runtime.config import Precision, RunConfig
from trainpilot.llm_runtime.schedules import ScheduleName

TUNED_SCHEDULES: tuple[ScheduleName, ...] = ("linear", "cosine", "wsd")
LEARNING_RATE_STEP = math.sqrt(10)
"""Factor between two learning rates of the grid; the refinement halves it on the logarithm, twice."""
LEARNING_RATE_GRID = (-1, 0, 1, 2, 3)
"""Steps from the case's own learning rate. Leaning upwards, as small models want more than recipes give; beyond an
edge the refinement goes on."""
BATCH_GRID = (0.5, 1.0, 2.0)
"""Factors on the case's own batch."""
WARMUP_SHARES = (0.02, 0.05, 0.1, 0.2, 0.4)
"""Shares of the budget spent on warm-up. A rate that is tuned under a short warm-up alone comes out too low."""
GRID_WARMUP = 0.1
RESPECTS = ("learning_rate", "batch_size", "warmup_share", "schedule")
"""In what two neighbouring settings may differ."""


@dataclass(frozen=True, kw_only=True)
class Setting:
    """What a static run can choose."""

    learning_rate: float
    batch_size: int
    schedule: ScheduleName
    warmup_share: float
    precision: Precision

    def on(self, config: RunConfig, *, budget: float = 1.0, seed: int) -> RunConfig:
        """Return the run of this setting on a case's budget times `budget`, with as many decisions as fit."""
        step = self.batch_size * config.sequence_length
        tokens = max(round(config.tokens * budget), step)
        decisions = max(1, min(math.ceil(config.decisions * budget), config.decisions, tokens // step))
        return replace(
            config,
            tokens=tokens,
            batch_size=self.batch_size,
            base_learning_rate=self.learning_rate,
            schedule=self.schedule,
            warmup_tokens=min(round(self.warmup_share * tokens), tokens - 1),
            precision=self.precision,
            decisions=decisions,
            seed=seed,
        )


def grid(config: RunConfig, precisions: Sequence[Precision]) -> list[Setting]:
    """Return every combination of the grid around a case's own setting."""
    rates = [rounded(config.base_learning_rate * LEARNING_RATE_STEP**k) for k in LEARNING_RATE_GRID]
    batches = [batch for factor in BATCH_GRID if (batch := batch_near(config.batch_size * factor, config)) is not None]
    return [
        Setting(learning_rate=rate, batch_size=batch, schedule=schedule, warmup_share=GRID_WARMUP, precision=precision)
        for batch in dict.fromkeys(batches)
        for rate in rates
        for schedule in TUNED_SCHEDULES
        for precision in precisions
    ]


def neighbours(setting: Setting, step: float, config: RunConfig, respects: Collection[str] = RESPECTS) -> list[Setting]:
    """Return the settings that differ from `setting` by one step in one of `respects`; `step` is the rate's factor."""
    found: list[Setting] = []
    if "learning_rate" in respects:
        rates = [rounded(setting.learning_rate * factor) for factor in (step, 1 / step)]
        found += [replace(setting, learning_rate=rate) for rate in rates]
    if "batch_size" in respects:
        batches = [batch_near(setting.batch_size * factor, config) for factor in (0.5, 2.0)]
        found += [replace(setting, batch_size=batch) for batch in batches if batch is not None]
    if "warmup_share" in respects:
        place = WARMUP_SHARES.index(setting.warmup_share)
        found += [replace(setting, warmup_share=share) for share in WARMUP_SHARES[max(place - 1, 0) : place + 2]]
    if "schedule" in respects:
        found += [replace(setting, schedule=schedule) for schedule in TUNED_SCHEDULES]
    return [neighbour for neighbour in found if neighbour != setting]


def batch_near(size: float, config: RunConfig) -> int | None:
    """Return a batch that leaves at least sixteen steps in the budget; `None` if there is none of that size."""
    whole = size >= 1 and size == int(size)
    fits = size * config.sequence_length * 16 <= config.tokens
    return int(size) if whole and fits else None


def rounded(rate: float) -> float:
    """Round to three digits, so that two ways to one rate are one setting."""
    return float(f"{rate:.3g}")
