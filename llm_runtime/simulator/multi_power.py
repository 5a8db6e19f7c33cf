"""Run the Multi-Power Law under any controls: a second physics, kept for testing policies. Never train on it.

A policy trained in the power-law noisy quadratic may have learnt that model's habits. Here the loss comes from another
law, fitted by others (`multi_power_law`), so that a policy that does well on both has learnt something about training.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np

from trainpilot.llm_runtime.config import PRECISIONS
from trainpilot.llm_runtime.schedules import probe_due
from trainpilot.llm_runtime.simulator.multi_power_cases import (
    SEQUENCE_LENGTH,
    WARMUP_SHARE,
    CaseBatch,
    best_learning_rates,
    draw_cases,
)
from trainpilot.llm_runtime.simulator.multi_power_law import Floats, wsd_mean_factor
from trainpilot.llm_runtime.simulator.multi_power_telemetry import Interval, interval_telemetry, throughput
from trainpilot.llm_runtime.simulator.records import Bools, ControlBatch, Ints, LimitBatch, TelemetryBatch

DrawCases = Callable[[np.random.Generator, int, int, float], CaseBatch]

BATCH_RANGE = 16
"""The batch stays within this factor of the starting batch, and leaves at least four steps in an interval."""
COOLDOWN_SHARE = 0.2
"""A cool-down lasts this share of what was trained on before it."""
REFERENCE_SHARES = (0.25, 0.5, 1.0)
"""Shares of the budget whose runs under the base schedule are the reference."""
EVALUATION_TOKENS = 32_768
LEAST_BF16_GAIN = 1.05
"""bf16 is offered where it is at least so much faster."""


@dataclass(kw_only=True)
class _State:
    """How far the runs have come; arrays of shape (n_runs,), the three of the law of shape (n_runs, decisions)."""

    sequences: Floats
    decision: Ints
    path: Floats
    """Sum of the learning rates in the law's unit, as far as they helped."""
    rate: Floats
    """Learning rate of the last interval in the law's unit, at the starting batch."""
    rates: Floats
    changes: Floats
    starts: Floats
    """Path at which each change came."""
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

    def renew(self, rows: Ints) -> None:
        fresh = _State.fresh(len(rows), self.rates.shape[1])
        for name, values in vars(fresh).items():
            getattr(self, name)[rows] = values


class MultiPowerRuns:
    """Many runs under the Multi-Power Law; a `PlantBatch` with references. For tests of policies only.

    The base schedule is WSD with a warm-up of a tenth of the budget. What the law leaves out is kept simple:

    * Batch: changes are neutral for Adam, so that the law's learning rate per sequence stays what it was; beyond the
      critical batch a sequence helps less, by sqrt((B_start + B_crit) / (B + B_crit)). B_crit rises as the loss falls.
    * Too large learning rates: a step's progress is greatest at an edge and falls beyond it, see `LawBatch.progress`;
      at 20 to 60 times the edge the run diverges.
    * Precision changes speed alone, and pruning is not offered.

    Args:
        n_runs: Runs side by side.
        seed: Decides what the runs are and what is measured on them.
        decisions: Decisions in a run.
        start_range: The starting learning rate lies within this factor of the best one.
        noise: Factor on the chance in what is measured; 0 measures exactly.
        draw: Draws what the runs are, from a generator, a count, the decisions and the start's range.
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
        # Apart, so that what is done to the runs does not change which runs come next.
        self._case_random, self._random = np.random.default_rng(seed).spawn(2)
        self.cases: CaseBatch = draw(self._case_random, n_runs, decisions, start_range)
        self.state = _State.fresh(n_runs, decisions)
        self.best_learning_rate: Floats = np.zeros(n_runs)
        """Peak of the base schedule with the lowest final loss at the starting batch."""
        self.start_learning_rate: Floats = np.zeros(n_runs)
        """Peak of the base schedule as the run starts with it."""
        self.reference_losses: Floats = np.zeros((n_runs, len(REFERENCE_SHARES)))
        """Final loss of the base schedule at REFERENCE_SHARES of the budget, in nats/token."""
        self.reference_time_s: Floats = np.zeros(n_runs)
        self.reference_energy_j: Floats = np.zeros(n_runs)
        self._prepare(np.arange(n_runs))

    @property
    def finished(self) -> Bools:
        """Whether the budget is used up or the cool-down complete."""
        done: Bools = self.state.sequences >= self._end()
        return done

    def limits(self) -> LimitBatch:
        """Return what may be asked of each run."""
        n, start = self.n_runs, self.cases.batch_size
        masked = np.ones((n, len(PRECISIONS)), dtype=np.bool_)
        masked[:, PRECISIONS.index("fp32")] = False
        masked[:, PRECISIONS.index("bf16")] = self.cases.bf16_speed < LEAST_BF16_GAIN
        per_interval = self.cases.n_sequences // self.decisions
        return LimitBatch(
            start=ControlBatch(
                learning_rate_scale=np.ones(n), batch_size=start.copy(), precision=np.zeros(n, dtype=np.int64),
                sparsity=np.zeros(n), finish=np.zeros(n, dtype=np.bool_),
            ),
            min_batch_size=np.maximum(1, start // BATCH_RANGE),
            max_batch_size=np.maximum(start, np.minimum(start * BATCH_RANGE, per_interval // 4)),
            masked_precisions=masked,
            prunes=np.zeros(n, dtype=np.bool_),
            decisions=np.full(n, self.decisions),
        )  # fmt: skip

    def begin(self, rows: Ints) -> None:
        """Start new runs in these rows; the others go on."""
        if len(rows):
            self.cases.put(rows, self._draw(self._case_random, len(rows), self.decisions, self.start_range))
            self.state.renew(rows)
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
        """Return the critical batch now, in sequences: it grows as the part of the loss that can be learnt shrinks."""
        cases = self.cases
        late = cases.law.edge * cases.n_steps / 2  # path of a run at the edge
        grown = np.clip(self.state.path / late, 1e-6, 1.0) ** cases.law.exponent
        critical: Floats = cases.critical_ratio * cases.batch_size * grown
        return critical

    def _prepare(self, rows: Ints) -> None:
        """Work out what the base schedule comes to on new runs."""
        cases = self.cases.take(rows)
        best = best_learning_rates(cases, self.decisions)
        peak = best * cases.start_ratio
        self.best_learning_rate[rows] = best * cases.unit
        self.start_learning_rate[rows] = peak * cases.unit
        for i, share in enumerate(REFERENCE_SHARES):
            factors = cases.base_factors(share, self.decisions)
            self.reference_losses[rows, i] = cases.law.base_loss(peak, factors, share * cases.n_steps)
        interval = Interval.usual(cases, self.decisions)
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

    def _interval(self, controls: ControlBatch, active: Bools) -> Interval:
        """Return what this interval takes: sequences up to its border or the run's end, and the learning rates."""
        state, cases = self.state, self.cases
        start = state.sequences
        border = np.round((state.decision + 1) * cases.n_sequences / self.decisions)
        taken = np.where(active, np.maximum(np.minimum(border, self._end()) - start, 1.0), 0.0)
        batch = np.minimum(controls.batch_size, np.maximum(taken, 1.0))
        end = start + taken
        peak = self.start_learning_rate / cases.unit * controls.learning_rate_scale
        return Interval(
            taken=taken,
            batch=batch,
            precision=controls.precision,
            rate=np.where(active, peak * self._factor(start, end, batch), state.rate),
            last_rate=np.where(active, peak * self._factor(end - batch, end, batch), state.rate),
            critical_batch=self.critical_batch(),
            switched=active & (controls.precision != state.precision),
            probed=probe_due(state.decision, state.sequences / cases.n_sequences),
        )

    def _enter(self, interval: Interval, active: Bools) -> Floats:
        """Note the change of the learning rate, and return the path that the interval adds."""
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
        """Fill in what the state knows: where the run stands, and its last evaluation."""
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
