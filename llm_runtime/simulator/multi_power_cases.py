"""Draw what the runs of the Multi-Power Law are: their law, their budget, their noise and their machine."""

from __future__ import annotations

from dataclasses import dataclass, fields
from typing import Any

import numpy as np

from trainpilot.llm_runtime.simulator.multi_power_law import (
    LAW_NAMES,
    PUBLISHED_FITS,
    Floats,
    LawBatch,
    wsd_mean_factor,
)
from trainpilot.llm_runtime.simulator.records import Ints

WARMUP_SHARE = 0.1
"""The base schedule is WSD with this share of the budget as warm-up."""
SEQUENCE_LENGTH = 128

_SPREADS = {
    "floor": 0.1, "scale": 0.15, "exponent": 0.08, "noise_scale": 0.2, "memory_rate": 0.2, "memory_exponent": 0.08,
    "rate_exponent": 0.05,
}  # fmt: skip
"""Standard deviation of the logarithm of each constant around the published fit."""


@dataclass(kw_only=True)
class CaseBatch:
    """All that decides what the runs are; every array has shape (n_runs,)."""

    law: LawBatch
    n_steps: Floats
    """Steps of the whole budget in the law's own unit."""
    unit: Floats
    """Learning rate of the run over the law's."""
    start_ratio: Floats
    """Starting learning rate over the best."""
    breaks_at: Floats
    """Learning rate over the law's edge above which a run diverges."""
    batch_size: Ints
    """Starting batch, in sequences."""
    n_sequences: Ints
    """Budget, in sequences."""
    epochs: Floats
    """Passes over the corpus in the whole budget."""

    critical_ratio: Floats
    """Critical batch over the starting batch, late in the run."""
    noise_bias: Floats
    """Noise scale that is measured over the critical batch."""
    loss_spread: Floats
    """Standard deviation of the loss of a batch of one sequence, in nats/token."""
    gradient_norm: Floats
    """Norm of the mean gradient where there is no noise."""
    relative_update: Floats
    """Norm of an update over that of the weights at the best learning rate."""
    curvature: Floats
    """Curvature over slope along an update at the edge, where the slope is that of a small step."""

    tokens_per_s: Floats
    """Throughput of a large batch."""
    half_batch: Floats
    """Batch at half that throughput, in sequences."""
    bf16_speed: Floats
    """Throughput in bf16 over that in fp32."""
    idle_w: Floats
    busy_w: Floats
    base_memory_share: Floats
    batch_memory_share: Floats
    """Memory that the starting batch adds."""

    def put(self, rows: Ints, cases: CaseBatch) -> None:
        """Put other cases into these rows."""
        _put(self, rows, cases)

    def take(self, rows: Ints) -> CaseBatch:
        """Return the cases of these rows."""
        taken: CaseBatch = _take(self, rows)
        return taken

    def base_factors(self, share: float, decisions: int) -> Floats:
        """Return the base schedule's factor in each interval of a run of that share of the budget."""
        budget: Floats = share * self.n_sequences.astype(np.float64)[:, None]
        edges: Floats = np.linspace(0.0, 1.0, decisions + 1) * budget
        step = self.batch_size[:, None].astype(np.float64)
        warmup: Floats = WARMUP_SHARE * budget
        return wsd_mean_factor(edges[:, :-1], edges[:, 1:], step, budget, warmup)


def draw_cases(random: np.random.Generator, n: int, decisions: int, start_range: float) -> CaseBatch:
    """Draw cases around the three published fits.

    Args:
        random: Where chance comes from.
        n: How many.
        decisions: Decisions in a run; every interval has at least four steps.
        start_range: The starting learning rate lies within this factor of the best.
    """
    batch_size = 2 ** random.integers(1, 6, n)
    steps = np.maximum(_between(random, n, 500, 3_000), 4 * decisions)
    idle_w = _between(random, n, 5, 100)
    return CaseBatch(
        law=_draw_law(random, n),
        n_steps=_between(random, n, 8_000, 72_000),
        unit=_between(random, n, 0.5, 10),
        start_ratio=_between(random, n, 1 / start_range, start_range),
        breaks_at=_between(random, n, 20, 60),
        batch_size=batch_size,
        n_sequences=np.round(steps * batch_size).astype(np.int64),
        epochs=_between(random, n, 0.02, 1),
        critical_ratio=_between(random, n, 1, 100),
        noise_bias=_between(random, n, 0.3, 30),
        loss_spread=0.4 * np.exp(0.3 * random.standard_normal(n)),
        gradient_norm=0.7 * np.exp(0.5 * random.standard_normal(n)),
        relative_update=5e-3 * np.exp(0.5 * random.standard_normal(n)),
        curvature=0.4 * np.exp(0.4 * random.standard_normal(n)),
        tokens_per_s=_between(random, n, 2e3, 2e6),
        half_batch=_between(random, n, 0.25, 64),
        bf16_speed=_between(random, n, 0.8, 2),
        idle_w=idle_w,
        busy_w=idle_w * _between(random, n, 1.5, 6),
        base_memory_share=random.uniform(0.02, 0.2, n),
        batch_memory_share=random.uniform(0.001, 0.04, n),
    )


def best_learning_rates(cases: CaseBatch, decisions: int) -> Floats:
    """Return the peak learning rate, in the law's unit, at which the base schedule ends at the lowest loss."""
    factors = cases.base_factors(1.0, decisions)
    powers = np.linspace(-1.25, 0.75, 21)
    peaks = cases.law.edge[:, None] * 10.0**powers
    losses = np.stack([cases.law.base_loss(peak, factors, cases.n_steps) for peak in peaks.T], axis=1)
    best = np.clip(losses.argmin(axis=1), 1, len(powers) - 2)
    rows = np.arange(len(best))
    left, middle, right = (losses[rows, best + i] for i in (-1, 0, 1))
    bend = np.maximum(left - 2 * middle + right, 1e-12)
    offset = np.clip((left - right) / (2 * bend), -1.0, 1.0)  # the vertex of the parabola through the three
    rates: Floats = cases.law.edge * 10.0 ** (powers[best] + offset * (powers[1] - powers[0]))
    return rates


def _draw_law(random: np.random.Generator, n: int) -> LawBatch:
    fits = np.array(list(PUBLISHED_FITS.values()))[random.integers(0, len(PUBLISHED_FITS), n)]
    constants = {
        name: fits[:, i] * np.exp(_SPREADS[name] * random.standard_normal(n)) for i, name in enumerate(LAW_NAMES)
    }
    edge = 1e-3 * np.exp(0.35 * random.standard_normal(n))
    return LawBatch(**constants, initial_loss=random.uniform(9.5, 11.0, n), edge=edge)


def _between(random: np.random.Generator, n: int, low: float, high: float) -> Floats:
    drawn: Floats = np.exp(random.uniform(np.log(low), np.log(high), n))
    return drawn


def _put(target: Any, rows: Ints, source: Any) -> None:
    for each in fields(target):
        mine, new = getattr(target, each.name), getattr(source, each.name)
        if isinstance(mine, np.ndarray):
            mine[rows] = new
        else:
            _put(mine, rows, new)


def _take(source: Any, rows: Ints) -> Any:
    taken = {}
    for each in fields(source):
        value = getattr(source, each.name)
        taken[each.name] = value[rows] if isinstance(value, np.ndarray) else _take(value, rows)
    return type(source)(**taken)
