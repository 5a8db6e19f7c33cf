"""Name the controls that hold during one interval of a run, and their limits."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from numbers import Integral
from typing import Literal, get_args

from trainpilot.llm_runtime.controls import Controls, Precision, Pruning

Precision = Literal["fp32", "tf32", "bf16", "fp16"]
Pruning = Literal["none", "magnitude", "evolution", "width"]

PRECISIONS: tuple[Precision, ...] = get_args(Precision)
PRUNINGS: tuple[Pruning, ...] = get_args(Pruning)


@dataclass(frozen=True, kw_only=True)
class Controls:
    """What holds during one interval. `RunConfig.start()` gives those of the untouched base schedule."""

    learning_rate_scale: float = 1.0
    """Factor on the base schedule at the starting batch size, dimensionless."""
    batch_size: int
    """Sequences per optimiser step."""
    precision: Precision = "fp32"
    """Number format of the matrix products; weights and optimiser state stay in float32."""
    sparsity: float = 0.0
    """Share of the prunable weights held at zero, or of the feed-forward channels removed, in [0, 1)."""
    finish: bool = False
    """Cool down now: the learning rate falls linearly to zero over a fifth of the tokens so far, then the run ends."""

    def __post_init__(self) -> None:
        if not (self.learning_rate_scale >= 0 and math.isfinite(self.learning_rate_scale)):
            raise ValueError(f"learning_rate_scale must be a finite number >= 0, got {self.learning_rate_scale}")
        if not isinstance(self.batch_size, Integral) or self.batch_size < 1:
            raise ValueError(f"batch_size must be a whole number of at least 1 sequence, got {self.batch_size}")
        if self.precision not in PRECISIONS:
            raise ValueError(f"precision must be one of {', '.join(PRECISIONS)}, got {self.precision!r}")
        if not 0 <= self.sparsity < 1:
            raise ValueError(f"sparsity must be in [0, 1), got {self.sparsity}")


@dataclass(frozen=True, kw_only=True)
class ControlLimits:
    """What a plant can do, and why it cannot do the rest."""

    start: Controls
    """Controls of the untouched base schedule."""
    min_batch_size: int
    """Smallest batch worth offering, in sequences."""
    max_batch_size: int
    """Largest batch that leaves enough steps in an interval, in sequences."""
    masked_precisions: Mapping[Precision, str]
    """Precisions not offered, each with the reason."""
    pruning: Pruning
    """What the pruning control does here."""
    decisions: int
    """Decisions in the whole run."""
