"""Simulate runs under the Multi-Power Law: a second physics for testing policies, never for training them.

A policy trained in the power-law noisy quadratic may have overfitted to it. Here the loss follows another law,
published by others (`law`), so that a policy that does well in both has learnt something about training in general.
`draw_cases` draws the law, budget, noise and machine of each run; `interval_telemetry` generates telemetry, time and
energy of an interval.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field

import numpy as np
from second_physics.law import LAW_NAMES, PUBLISHED_FITS, Floats, LawBatch, wsd_mean_factor

from trainpilot.llm_runtime.config import PRECISIONS, batch_limits
from trainpilot.llm_runtime.schedules import BUDGET_SHARES, COOLDOWN_SHARE, neutral_factor, probe_due, sequences_probed
from trainpilot.llm_runtime.simulator.records import Bools, ControlBatch, Ints, LimitBatch, Rows, TelemetryBatch

WARMUP_SHARE = 0.1
"""The base schedule is WSD with this share of the budget as warm-up."""
SEQUENCE_LENGTH = 128

_SPREADS = {
    "floor": 0.1, "scale": 0.15, "exponent": 0.08, "noise_scale": 0.2, "memory_rate": 0.2, "memory_exponent": 0.08,
    "rate_exponent": 0.05,
}  # fmt: skip
"""Standard deviation of the logarithm of each constant around the published fit."""


@dataclass(kw_only=True)
class CaseBatch(Rows):
    """Constants of the runs; every array has shape (n_runs,)."""

    law: LawBatch
    n_steps: Floats
    """Steps of the whole budget in the law's own unit."""
    unit: Floats
    """Learning rate of the run divided by that of the law."""
    start_ratio: Floats
    """Starting learning rate divided by the best one."""
    breaks_at: Floats
    """Ratio of learning rate and the law's edge above which a run diverges."""
    batch_size: Ints
    """Starting batch, in sequences."""
    n_sequences: Ints
    """Budget, in sequences."""
    epochs: Floats
    """Passes over the corpus in the whole budget."""

    critical_ratio: Floats
    """Critical batch late in the run, divided by the starting batch."""
    noise_bias: Floats
    """Measured noise scale divided by the critical batch."""
    loss_spread: Floats
    """Standard deviation of the loss of a batch of one sequence, in nats/token."""
    gradient_norm: Floats
    """Norm of the mean gradient without noise."""
    relative_update: Floats
    """Norm of an update at the best learning rate, divided by the norm of the weights."""
    curvature: Floats
    """Curvature divided by slope along an update at the edge; the slope is that of a small step."""

    tokens_per_s: Floats
    """Throughput of a large batch."""
    half_batch: Floats
    """Batch at half that throughput, in sequences."""
    bf16_speed: Floats
    """Throughput in bf16 divided by that in fp32."""
    idle_w: Floats
    busy_w: Floats
    base_memory_share: Floats
    batch_memory_share: Floats
    """Share of memory that the starting batch needs."""

    def base_factors(self, share: float, decisions: int) -> Floats:
        """Return the base schedule's factor in each interval of a run of `share` of the budget."""
        budget: Floats = share * self.n_sequences.astype(np.float64)[:, None]
        edges: Floats = np.linspace(0.0, 1.0, decisions + 1) * budget
        step = self.batch_size[:, None].astype(np.float64)
        warmup: Floats = WARMUP_SHARE * budget
        return wsd_mean_factor(edges[:, :-1], edges[:, 1:], step, budget, warmup)


def draw_cases(random: np.random.Generator, n: int, decisions: int, start_range: float) -> CaseBatch:
    """Draw cases around the three published fits.

    Args:
        random: Random generator.
        n: Number of cases.
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


SWITCH_S = 1e-3
"""Seconds that a change of precision takes."""


@dataclass(kw_only=True)
class LawInterval:
    """One interval of many runs; arrays of shape (n_runs,)."""

    taken: Floats
    """Sequences trained on; 0 for a run that has ended."""
    batch: Floats
    precision: Ints
    rate: Floats
    """Mean learning rate in the law's unit, at the starting batch."""
    last_rate: Floats
    """Learning rate of the last step in the law's unit, at the starting batch."""
    critical_batch: Floats
    switched: Bools
    """Whether precision was changed at the beginning."""
    probed: Bools
    """Whether it ends with a curvature probe."""
    loss: Floats = field(default_factory=lambda: np.zeros(0))
    """Loss in the middle of the interval, in nats/token."""

    @classmethod
    def usual(cls, cases: CaseBatch, decisions: int) -> LawInterval:
        """Return an interval at the starting controls; its learning rates are not set."""
        nothing = np.zeros(len(cases.batch_size))
        return cls(
            taken=cases.n_sequences / decisions, batch=cases.batch_size.astype(np.float64),
            precision=np.zeros(len(nothing), dtype=np.int64), rate=nothing, last_rate=nothing, critical_batch=nothing,
            switched=np.zeros(len(nothing), dtype=np.bool_), probed=np.zeros(len(nothing), dtype=np.bool_),
        )  # fmt: skip

    @property
    def steps(self) -> Floats:
        """Optimiser steps; 0 for a run that has ended."""
        steps: Floats = np.ceil(self.taken / self.batch)
        return steps

    def probe_s(self, cases: CaseBatch) -> Floats:
        """Return the seconds of the probe: three forward passes, which take about as long as one training step."""
        probed = np.where(self.probed & (self.taken > 0), sequences_probed(self.taken), 0.0)
        return probed * SEQUENCE_LENGTH / throughput(cases, self.batch, self.precision)

    def time_s(self, cases: CaseBatch) -> Floats:
        """Return the seconds of the interval, probe and switching included."""
        trained = self.taken * SEQUENCE_LENGTH / throughput(cases, self.batch, self.precision)
        return trained + self.probe_s(cases) + SWITCH_S * self.switched

    def power_w(self, cases: CaseBatch) -> Floats:
        """Return the mean power, which increases with the machine's utilisation."""
        return cases.idle_w + (cases.busy_w - cases.idle_w) * self.batch / (self.batch + cases.half_batch)


def throughput(cases: CaseBatch, batch: Floats | Ints, precision: Floats | Ints) -> Floats:
    """Return tokens per second: it saturates with the batch as B / (B + B_half)."""
    speed = np.where(np.asarray(precision) == PRECISIONS.index("bf16"), cases.bf16_speed, 1.0)
    rate: Floats = cases.tokens_per_s * speed * batch / (batch + cases.half_batch)
    return rate


def interval_telemetry(
    cases: CaseBatch,
    interval: LawInterval,
    controls: ControlBatch,
    best_learning_rate: Floats,
    *,
    random: np.random.Generator,
    noise: float,
) -> TelemetryBatch:
    """Return the telemetry of an interval; the progress of the run is not filled in.

    Args:
        cases: Constants of the runs.
        interval: The interval that was simulated.
        controls: Requested controls.
        best_learning_rate: Best learning rate of each run.
        random: Random generator.
        noise: Factor on the measurement noise.
    """
    n = len(interval.taken)

    def chance(scale: float) -> Floats:
        return noise * scale * random.standard_normal(n)

    def probe(shown: Floats) -> Floats:
        return np.where(interval.probed, shown, np.nan)

    steps, batch = interval.steps, interval.batch
    std = cases.loss_spread / np.sqrt(batch)
    train_loss = interval.loss + std / np.sqrt(np.maximum(steps, 1.0)) * chance(1.0)
    seen_std = np.where(steps > 2, std * np.exp(chance(1.0) / np.sqrt(2 * np.maximum(steps, 1.0))), 0.0)
    learning_rate = (
        interval.last_rate * cases.unit * neutral_factor(controls.batch_size.astype(np.float64), cases.batch_size)
    )
    height = interval.last_rate / cases.law.edge
    small = 1e-2 * np.minimum(height, 1.0) * np.exp(chance(0.1))  # slope along an update without curvature
    gradient_norm = cases.gradient_norm * np.sqrt(1.0 + interval.critical_batch / batch) * np.exp(chance(0.05))
    time_s = interval.time_s(cases) * np.exp(chance(0.02))
    power_w = interval.power_w(cases)
    switch_s: Floats = np.where(interval.switched, SWITCH_S, 0.0)
    unset, off = np.full(n, np.nan), np.zeros(n, dtype=np.bool_)
    return TelemetryBatch(
        decision=np.zeros(n, dtype=np.int64),
        budget_used=unset,
        tokens=unset,
        interval_tokens=interval.taken * SEQUENCE_LENGTH,
        steps=steps,
        epochs_seen=unset,
        train_loss=train_loss,
        train_loss_std=seen_std,
        train_loss_max=train_loss + seen_std * np.sqrt(2 * np.log1p(steps)),
        validation_loss=unset,
        gradient_norm=gradient_norm,
        clipped_share=1.0 / (1.0 + gradient_norm**-6.0),
        noise_scale=interval.critical_batch * cases.noise_bias * np.exp(chance(0.3)),
        relative_update=probe(cases.relative_update * learning_rate / best_learning_rate * np.exp(chance(0.05))),
        probe_linear=probe(small * (chance(0.2) - 1.0 / (1.0 + height**2))),
        probe_quadratic=probe(small * cases.curvature * height * np.exp(chance(0.3))),
        learning_rate=learning_rate,
        batch_size=batch,
        micro_batch_size=batch,
        precision=controls.precision.copy(),
        sparsity=np.zeros(n),
        finishing=off,
        finished=off,
        diverged=off,
        time_s=time_s,
        probe_time_s=interval.probe_s(cases),
        switch_time_s=switch_s,
        evaluation_time_s=unset,
        energy_j=time_s * power_w,
        power_w=power_w,
        memory_share=np.minimum(cases.base_memory_share + cases.batch_memory_share * batch / cases.batch_size, 0.95),
    )


DrawCases = Callable[[np.random.Generator, int, int, float], CaseBatch]

EVALUATION_TOKENS = 32_768
LEAST_BF16_GAIN = 1.05
"""Least speed-up at which bf16 is offered."""


@dataclass(kw_only=True)
class _State(Rows):
    """State of the runs; arrays of shape (n_runs,), those of the law's changes of shape (n_runs, decisions)."""

    sequences: Floats
    decision: Ints
    path: Floats
    """Sum of the progress of all steps (`LawBatch.progress`) in the law's unit."""
    rate: Floats
    """Learning rate of the last interval in the law's unit, at the starting batch."""
    rates: Floats
    changes: Floats
    starts: Floats
    """Path at each learning-rate change."""
    cooldown_start: Floats
    """Sequences at which the cool-down began; NaN before it."""
    cooldown_end: Floats
    cooldown_factor: Floats
    precision: Ints
    diverged: Bools
    validation_loss: Floats
    evaluation_s: Floats

    @classmethod
    def fresh(cls, n: int, decisions: int) -> _State:
        flat, law, unknown = np.zeros(n), np.zeros((n, decisions)), np.full(n, np.nan)
        return cls(
            sequences=flat.copy(), decision=np.zeros(n, dtype=np.int64), path=flat.copy(), rate=flat.copy(),
            rates=law.copy(), changes=law.copy(), starts=law.copy(),
            cooldown_start=unknown.copy(), cooldown_end=unknown.copy(), cooldown_factor=unknown.copy(),
            precision=np.zeros(n, dtype=np.int64), diverged=np.zeros(n, dtype=np.bool_),
            validation_loss=unknown.copy(), evaluation_s=flat.copy(),
        )  # fmt: skip


class MultiPowerRuns:
    """Simulates many runs under the Multi-Power Law, as a `PlantBatch` with references, for tests of policies only.

    The base schedule is WSD with a warm-up of a tenth of the budget. Effects outside of the law are modelled simply:

    * Batch: changes are neutral for Adam, so the law's learning rate per sequence is unchanged; beyond the critical
      batch a sequence makes less progress, by sqrt((B_start + B_crit) / (B + B_crit)). B_crit rises as the loss falls.
    * Too large learning rates: a step's progress is greatest at an edge and falls beyond it, see `LawBatch.progress`;
      at 20 to 60 times the edge the run diverges.
    * Precision changes speed alone, and pruning is not offered.

    Args:
        n_runs: Number of runs in the batch.
        seed: Seed of the cases and of the measurement noise.
        decisions: Decisions in a run.
        start_range: The starting learning rate lies within this factor of the best one.
        noise: Factor on the measurement noise; 0 for exact measurements.
        draw: Draws the cases from a generator, a count, the decisions and the start's range.
    """

    def __init__(
        self,
        n_runs: int,
        seed: int = 0,
        *,
        decisions: int = 50,
        start_range: float = 10.0,
        noise: float = 1.0,
        draw: DrawCases = draw_cases,
    ) -> None:
        for name, value, least in (("n_runs", n_runs, 1), ("decisions", decisions, 1), ("start_range", start_range, 1)):
            if value < least:
                raise ValueError(f"{name} must be at least {least}, got {value}")
        self.n_runs = n_runs
        self.decisions = decisions
        self.noise = noise
        self.start_range = start_range
        self._draw = draw
        # Separate generators, so that actions on the runs do not change which runs are drawn next.
        self._case_random, self._random = np.random.default_rng(seed).spawn(2)
        self.cases: CaseBatch = draw(self._case_random, n_runs, decisions, start_range)
        self.state = _State.fresh(n_runs, decisions)
        self.best_learning_rate: Floats = np.zeros(n_runs)
        """Peak of the base schedule with the lowest final loss at the starting batch."""
        self.start_learning_rate: Floats = np.zeros(n_runs)
        """Peak of the base schedule at the start of the run."""
        self.reference_losses: Floats = np.zeros((n_runs, len(BUDGET_SHARES)))
        """Final loss of the base schedule at BUDGET_SHARES of the budget, in nats/token."""
        self.reference_time_s: Floats = np.zeros(n_runs)
        self.reference_energy_j: Floats = np.zeros(n_runs)
        self._prepare(np.arange(n_runs))

    @property
    def finished(self) -> Bools:
        """Whether the budget is used up or the cool-down complete."""
        done: Bools = self.state.sequences >= self._end()
        return done

    def limits(self) -> LimitBatch:
        """Return the control limits of each run."""
        n, start = self.n_runs, self.cases.batch_size
        masked = np.ones((n, len(PRECISIONS)), dtype=np.bool_)
        masked[:, PRECISIONS.index("fp32")] = False
        masked[:, PRECISIONS.index("bf16")] = self.cases.bf16_speed < LEAST_BF16_GAIN
        smallest, largest = batch_limits(start, self.cases.n_sequences // self.decisions)
        return LimitBatch(
            start=ControlBatch.at_start(start),
            min_batch_size=smallest,
            max_batch_size=largest,
            masked_precisions=masked,
            timed_precisions=np.tile(np.arange(len(PRECISIONS)) > 0, (n, 1)),
            currency=np.zeros(n, dtype=np.int64),
            learning_rate_over_law=np.full(n, np.nan),
            batch_over_law=np.full(n, np.nan),
            prices=np.full((n, 2, len(PRECISIONS), 3), np.nan),
            prunes=np.zeros(n, dtype=np.bool_),
            decisions=np.full(n, self.decisions),
        )  # fmt: skip

    def begin(self, rows: Ints) -> None:
        """Start new runs in these rows; the others continue."""
        if len(rows):
            self.cases.put(rows, self._draw(self._case_random, len(rows), self.decisions, self.start_range))
            self.state.put(rows, _State.fresh(len(rows), self.decisions))
            self._prepare(rows)

    def advance(self, controls: ControlBatch) -> TelemetryBatch:
        """Train every run for one interval; those that have finished or diverged stay as they are."""
        state = self.state
        active = ~(self.finished | state.diverged)
        self._begin_cooldowns(controls, active)
        interval = self._interval(controls, active)
        middle = state.path + self._enter(interval, active) / 2
        interval.loss = self._loss(middle)
        state.path += 2 * (middle - state.path)
        state.sequences += interval.taken
        state.decision += active
        state.precision = np.where(active, controls.precision, state.precision)
        state.diverged |= active & (interval.rate > self.cases.breaks_at * self.cases.law.edge)
        telemetry = interval_telemetry(
            self.cases, interval, controls, self.best_learning_rate, random=self._random, noise=self.noise
        )
        return self._with_progress(telemetry)

    def evaluate(self, rows: Ints | None = None) -> Floats:
        """Return the exact loss of these rows, of all by default, in nats/token; it enters their next telemetry."""
        rows = np.arange(self.n_runs) if rows is None else rows
        loss = self._loss(self.state.path)[rows]
        self.state.validation_loss[rows] = loss
        evaluated = EVALUATION_TOKENS / 3 / throughput(self.cases, self.cases.batch_size, np.zeros(self.n_runs))
        self.state.evaluation_s[rows] += evaluated[rows]
        return loss

    def critical_batch(self) -> Floats:
        """Return the current critical batch in sequences; it grows as the reducible loss shrinks."""
        cases = self.cases
        late = cases.law.edge * cases.n_steps / 2  # path of a run at the edge
        grown = np.clip(self.state.path / late, 1e-6, 1.0) ** cases.law.exponent
        critical: Floats = cases.critical_ratio * cases.batch_size * grown
        return critical

    def _prepare(self, rows: Ints) -> None:
        """Compute the base schedule's losses, best learning rates and references of new runs."""
        cases = self.cases.take(rows)
        best = best_learning_rates(cases, self.decisions)
        peak = best * cases.start_ratio
        self.best_learning_rate[rows] = best * cases.unit
        self.start_learning_rate[rows] = peak * cases.unit
        for i, share in enumerate(BUDGET_SHARES):
            factors = cases.base_factors(share, self.decisions)
            self.reference_losses[rows, i] = cases.law.base_loss(peak, factors, share * cases.n_steps)
        interval = LawInterval.usual(cases, self.decisions)
        self.reference_time_s[rows] = self.decisions * interval.time_s(cases)
        self.reference_energy_j[rows] = self.reference_time_s[rows] * interval.power_w(cases)

    def _end(self) -> Floats:
        """Return the sequences at which each run ends."""
        cooling = np.isfinite(self.state.cooldown_end)
        end: Floats = np.where(cooling, np.ceil(self.state.cooldown_end), self.cases.n_sequences)
        return end

    def _begin_cooldowns(self, controls: ControlBatch, active: Bools) -> None:
        state, cases = self.state, self.cases
        begins = active & controls.finish & np.isnan(state.cooldown_end)
        if not begins.any():
            return
        now, step = state.sequences, controls.batch_size.astype(np.float64)
        end = np.minimum(now + np.maximum(COOLDOWN_SHARE * now, step), cases.n_sequences)
        factor = self._schedule(now, now + step, step)
        for mine, new in ((state.cooldown_start, now), (state.cooldown_end, end), (state.cooldown_factor, factor)):
            mine[begins] = new[begins]

    def _schedule(self, start: Floats, end: Floats, step: Floats) -> Floats:
        budget = self.cases.n_sequences.astype(np.float64)
        warmup: Floats = WARMUP_SHARE * budget
        return wsd_mean_factor(start, end, step, budget, warmup)

    def _factor(self, start: Floats, end: Floats, step: Floats) -> Floats:
        """Return the mean factor over the steps from `start` to `end`, of the cool-down where it has begun."""
        state = self.state
        span = np.maximum(state.cooldown_end - state.cooldown_start, 1e-9)
        left = np.clip((state.cooldown_end - (start + end - step) / 2) / span, 0.0, 1.0)
        cooling = np.isfinite(state.cooldown_end)
        return np.where(cooling, state.cooldown_factor * left, self._schedule(start, end, step))

    def _interval(self, controls: ControlBatch, active: Bools) -> LawInterval:
        """Return the next interval: its sequences up to the next decision or the run's end, and its learning rates."""
        state, cases = self.state, self.cases
        start = state.sequences
        border = np.round((state.decision + 1) * cases.n_sequences / self.decisions)
        taken = np.where(active, np.maximum(np.minimum(border, self._end()) - start, 1.0), 0.0)
        batch = np.minimum(controls.batch_size, np.maximum(taken, 1.0))
        end = start + taken
        peak = self.start_learning_rate / cases.unit * controls.learning_rate_scale
        return LawInterval(
            taken=taken,
            batch=batch,
            precision=controls.precision,
            rate=np.where(active, peak * self._factor(start, end, batch), state.rate),
            last_rate=np.where(active, peak * self._factor(end - batch, end, batch), state.rate),
            critical_batch=self.critical_batch(),
            switched=active & (controls.precision != state.precision),
            probed=probe_due(state.decision, state.sequences / cases.n_sequences),
        )

    def _enter(self, interval: LawInterval, active: Bools) -> Floats:
        """Record the change of the learning rate, and return the path that the interval adds."""
        state, cases = self.state, self.cases
        rows = np.flatnonzero(active)
        now = state.decision[rows]
        state.rates[rows, now] = interval.rate[rows]
        state.changes[rows, now] = (interval.rate - state.rate)[rows]
        state.starts[rows, now] = state.path[rows]
        state.rate[rows] = interval.rate[rows]
        critical = interval.critical_batch
        helps = np.sqrt((cases.batch_size + critical) / (interval.batch + critical))
        steps: Floats = cases.n_steps * interval.taken / cases.n_sequences
        return cases.law.progress(interval.rate) * helps * steps

    def _loss(self, path: Floats) -> Floats:
        state = self.state
        loss = self.cases.law.loss(path, state.rates, state.changes, path[:, None] - state.starts)
        return np.where(state.diverged, np.nan, loss)

    def _with_progress(self, telemetry: TelemetryBatch) -> TelemetryBatch:
        """Fill in the progress of the run and its last evaluation."""
        state, cases = self.state, self.cases
        used = state.sequences / cases.n_sequences
        telemetry.decision = np.maximum(state.decision - 1, 0)
        telemetry.budget_used = used
        telemetry.tokens = state.sequences * SEQUENCE_LENGTH
        telemetry.epochs_seen = used * cases.epochs
        telemetry.validation_loss = state.validation_loss.copy()
        telemetry.evaluation_time_s, state.evaluation_s = state.evaluation_s, np.zeros(self.n_runs)
        telemetry.finishing = np.isfinite(state.cooldown_end)
        telemetry.finished = self.finished
        telemetry.diverged = state.diverged.copy()
        for name in ("train_loss", "train_loss_std", "train_loss_max"):
            setattr(telemetry, name, np.where(state.diverged, np.nan, getattr(telemetry, name)))
        return telemetry
