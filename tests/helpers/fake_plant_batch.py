"""Many toys at once: runs whose loss has a closed form, for whoever steers runs as arrays."""

from __future__ import annotations

import numpy as np

from trainpilot.llm_runtime.config import PRECISIONS
from trainpilot.llm_runtime.simulator.records import (
    Bools,
    ControlBatch,
    Floats,
    Ints,
    LimitBatch,
    TelemetryBatch,
)


class ToyPlants:
    """Runs whose loss is 4 (1 + work/100)^-1/4; a token does most work at a learning-rate scale that is drawn.

    A run diverges above 16 times its best scale. One interval is 800 tokens; a token takes 1 ms and 0.1 J.
    """

    INTERVAL_TOKENS = 800

    def __init__(self, n_runs: int, seed: int = 0, decisions: int = 20) -> None:
        self.n_runs = n_runs
        self.decisions = decisions
        self.random = np.random.default_rng(seed)
        self.budget = decisions * self.INTERVAL_TOKENS
        self.best_scale = np.ones(n_runs)
        self.tokens = np.zeros(n_runs)
        self.work = np.zeros(n_runs)
        self.end_tokens = np.zeros(n_runs)
        self.validation_loss: Floats = np.full(n_runs, np.nan)
        self.decision = np.zeros(n_runs, dtype=np.int64)
        self.finishing = np.zeros(n_runs, dtype=np.bool_)
        self.diverged = np.zeros(n_runs, dtype=np.bool_)
        self.evaluated: list[Ints] = []

    def limits(self) -> LimitBatch:
        """Return limits that differ from run to run."""
        n, tight = self.n_runs, self.best_scale > 4
        masked = np.repeat(tight[:, None], len(PRECISIONS), axis=1)
        masked[:, 0] = False
        return LimitBatch(
            start=ControlBatch.at_start(np.full(n, 8)),
            min_batch_size=np.full(n, 2),
            max_batch_size=np.where(tight, 8, 32),
            masked_precisions=masked,
            timed_precisions=np.zeros_like(masked),
            currency=np.zeros(n, dtype=np.int64),
            learning_rate_over_law=np.full(n, np.nan),
            batch_over_law=np.full(n, np.nan),
            prices=np.full((n, 2, len(PRECISIONS), 3), np.nan),
            prunes=~tight,
            decisions=np.full(n, self.decisions),
        )

    def begin(self, rows: Ints) -> None:
        """Draw a new best scale, and start at nothing."""
        self.best_scale[rows] = 2.0 ** self.random.uniform(0, 4, len(rows))
        self.tokens[rows] = self.work[rows] = 0.0
        self.end_tokens[rows] = self.budget
        self.validation_loss[rows] = np.nan
        self.decision[rows] = 0
        self.finishing[rows] = self.diverged[rows] = False

    @property
    def loss(self) -> Floats:
        """Loss now, in nats/token."""
        return np.where(self.diverged, np.nan, 4 * (1 + self.work / 100) ** -0.25)

    def rate(self, scale: Floats) -> Floats:
        """Return the work per token at a learning-rate scale."""
        off: Floats = np.log2(scale / self.best_scale)
        rate: Floats = 2 ** (1 - off**2 / 4)
        return rate

    def advance(self, controls: ControlBatch) -> TelemetryBatch:
        """Do an interval's work; a cool-down takes a fifth of the tokens so far."""
        begins = controls.finish & ~self.finishing
        self.finishing |= begins
        self.end_tokens = np.where(begins, np.minimum(self.tokens * 6 // 5, self.end_tokens), self.end_tokens)
        done = np.clip(self.end_tokens - self.tokens, 1, self.INTERVAL_TOKENS)
        self.tokens = self.tokens + done
        self.work = self.work + done * self.rate(controls.learning_rate_scale)
        self.diverged |= controls.learning_rate_scale > 16 * self.best_scale
        self.decision = self.decision + 1
        return self._telemetry(controls, done)

    def _telemetry(self, controls: ControlBatch, done: Floats) -> TelemetryBatch:
        n, loss = self.n_runs, self.loss
        unknown = np.full(n, np.nan)
        return TelemetryBatch(
            decision=self.decision - 1,
            budget_used=np.minimum(self.tokens / self.budget, 1.0),
            tokens=self.tokens,
            interval_tokens=done,
            steps=np.full(n, 4.0),
            epochs_seen=self.tokens / 4_000,
            train_loss=loss,
            train_loss_std=0.01 * loss,
            train_loss_max=1.02 * loss,
            validation_loss=self.validation_loss.copy(),
            gradient_norm=np.full(n, 0.5),
            clipped_share=np.zeros(n),
            noise_scale=2.0 * self.tokens**0.5,
            relative_update=1e-3 * controls.learning_rate_scale,
            probe_linear=unknown,
            probe_quadratic=unknown,
            learning_rate=1e-3 * controls.learning_rate_scale,
            batch_size=controls.batch_size.astype(np.float64),
            micro_batch_size=np.full(n, 8.0),
            precision=controls.precision,
            sparsity=controls.sparsity,
            finishing=self.finishing.copy(),
            finished=self.tokens >= self.end_tokens,
            diverged=self.diverged.copy(),
            time_s=done * 1e-3,
            probe_time_s=np.zeros(n),
            switch_time_s=np.zeros(n),
            evaluation_time_s=np.zeros(n),
            energy_j=done * 0.1,
            power_w=np.full(n, 100.0),
            memory_share=unknown,
        )

    def evaluate(self, rows: Ints | None = None) -> Floats:
        """Return the loss, and remember it as the validation loss of these rows."""
        rows = np.arange(self.n_runs) if rows is None else rows
        self.evaluated.append(rows)
        self.validation_loss[rows] = self.loss[rows]
        losses: Floats = self.validation_loss[rows]
        return losses

    @property
    def reference_losses(self) -> Floats:
        """Loss at a scale of 1 after a quarter, a half and all of the budget."""
        work = self.rate(np.ones(self.n_runs))[:, None] * self.budget * np.array([0.25, 0.5, 1.0])
        losses: Floats = 4 * (1 + work / 100) ** -0.25
        return losses

    @property
    def reference_energy_j(self) -> Floats:
        """Joules of the whole budget."""
        return np.full(self.n_runs, self.budget * 0.1)

    @property
    def reference_time_s(self) -> Floats:
        """Seconds of the whole budget."""
        return np.full(self.n_runs, self.budget * 1e-3)


def some_actions(random: np.random.Generator, masks: Bools, n_choices: tuple[int, ...]) -> Ints:
    """Draw one allowed choice per field and run; the cool-down seldom."""
    columns = np.split(masks, np.cumsum(n_choices)[:-1], axis=1)
    drawn = [np.argmax(allowed * random.random(allowed.shape), axis=1) for allowed in columns]
    drawn[-1] = drawn[-1] * (random.random(len(masks)) < 0.05)
    return np.stack(drawn, axis=1)
