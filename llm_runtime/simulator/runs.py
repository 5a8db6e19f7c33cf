"""Run simulated trainings: thousands at once as a `PlantBatch`, or a single one as a `Plant`.

`SimulatedRuns` is the simulated counterpart of `LiveRun` for a whole batch; `SimulatedRun` is one row of it.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from copy import deepcopy
from dataclasses import dataclass, field
from typing import Any, cast

import numpy as np

from trainpilot.llm_runtime.budget import CURRENCIES, Currency
from trainpilot.llm_runtime.config import PRECISIONS, ControlLimits, Controls, StepPrice
from trainpilot.llm_runtime.schedules import ScheduleName, learning_rate, neutral_factor, probe_due, sequences_probed
from trainpilot.llm_runtime.simulator.fitting import FittedPhysics
from trainpilot.llm_runtime.simulator.instances import (
    FINE_TUNING,
    SCRATCH,
    TINY,
    Instances,
    Widening,
    draw_instances,
    normals,
    run_keys,
    uniforms,
)
from trainpilot.llm_runtime.simulator.physics import (
    DEAD,
    DIVERGED_FACTOR,
    EDGE,
    PARAMETERS,
    RATE_UNIT,
    PhysicsState,
    advance,
    edge,
    loss,
)
from trainpilot.llm_runtime.simulator.records import (
    PRICED_BATCHES,
    Bools,
    ControlBatch,
    Floats,
    Ints,
    LimitBatch,
    PlantBatch,
    TelemetryBatch,
)
from trainpilot.llm_runtime.simulator.references import Progress, References, ScheduleTable, find_references, overfit
from trainpilot.llm_runtime.simulator.scales import draw_scales, place_edges
from trainpilot.llm_runtime.simulator.sensors import CHANNELS, SimulatedInterval, read_sensors
from trainpilot.llm_runtime.telemetry import Snapshot, Telemetry

VALIDATION_NOISE = 0.004
"""Standard deviation of a measured validation loss around the expected one, in nats/token."""
PRUNING_BUMP = 40.0
"""Temporary increase of the loss by a pruning step, in nats/token per cubed share; it decays with further steps."""
HEALING_STEPS = 60.0
TIME_NOISE, POWER_NOISE = 0.03, 0.02
"""Standard deviations of the logarithm of measured seconds and watts."""
PRICED_SHARE = 0.75
"""Share of the runs that are long enough to measure prices at the start."""
PRICE_COUNTER = 5000
PRIVILEGED = 11
"""Numbers of `SimulatedRuns.privileged`."""
LEAST_STEPS = 0.25
"""Least steps of an interval under a budget in seconds or joules, whatever a step costs."""


@dataclass(frozen=True, kw_only=True)
class Pool:
    """Instances to draw runs from, with the tuned static of each."""

    instances: Instances
    references: References
    """Under budgets in tokens."""
    measured: Mapping[Currency, References] = field(default_factory=dict)
    """Under budgets in seconds or joules, where runs are drawn with them."""

    @classmethod
    def draw(
        cls, n_instances: int, seed: int, calibrations: Sequence[FittedPhysics], widening: Widening | None = None,
        *, schedule: ScheduleName = "wsd", warmup_share: float = 0.1, currencies: Sequence[Currency] = ("tokens",),
        published: Sequence[FittedPhysics] | None = None,
    ) -> Pool:  # fmt: skip
        """Draw instances and tune a static setting on each.

        That takes about 2 s per thousand instances around calibrations and currency, and half a minute per thousand
        larger ones.

        Args:
            n_instances: Number of instances.
            seed: Seed of the draw.
            calibrations: Physics that tiny instances are drawn around.
            widening: Width of the distribution, and shares of other kinds of instances.
            schedule: Schedule of the tuned statics.
            warmup_share: Share of the budget that they warm up.
            currencies: What budgets may be counted in.
            published: Physics that larger instances are drawn around; by default `published_sweeps`.
        """
        widening = widening or Widening()
        instances = draw_instances(n_instances, seed, calibrations, widening)
        random = np.random.default_rng([seed, 1])
        instances = _with_scales(instances, widening, random, published)
        if widening.edges or (instances.kind != TINY).any():
            free = find_references(instances, schedule, warmup_share)
            instances = place_edges(instances, free, random, widening)
        found = {each: find_references(instances, schedule, warmup_share, each) for each in {*currencies, "tokens"}}
        lost = ~np.logical_and.reduce([np.isfinite(each.losses[:, -1]) for each in found.values()])
        if (rows := np.flatnonzero(lost)).size:  # no static setting survives the edge there: it is taken away
            for name in EDGE:
                instances.physics.values[name][rows] = PARAMETERS[name].typical
            for each, references in found.items():
                references.put(rows, find_references(instances.take(rows), schedule, warmup_share, each))
        return cls(instances=instances, references=found.pop("tokens"), measured=found)

    def references_in(self, currency: Currency) -> References:
        """Return the tuned statics under budgets in a currency.

        Raises:
            ValueError: the pool was drawn without it.
        """
        found = self.references if currency == "tokens" else self.measured.get(currency)
        if found is None:
            raise ValueError(
                f"currencies must be among those that the pool was drawn with, got {currency}; give them to Pool.draw"
            )
        return found

    def __len__(self) -> int:
        return len(self.instances)

    def __deepcopy__(self, memo: dict[int, Any]) -> Pool:
        """Return the pool itself: it is immutable, so copies of runs can share it."""
        return self


def _with_scales(
    instances: Instances,
    widening: Widening,
    random: np.random.Generator,
    published: Sequence[FittedPhysics] | None,
) -> Instances:
    """Replace shares of the instances by larger ones."""
    if widening.scratch + widening.fine_tuning == 0:
        return instances
    if published is None:
        from trainpilot.llm_runtime.simulator.shipped import published_sweeps

        published = published_sweeps(widening.published)
    drawn = random.random(len(instances))
    larger = np.where(drawn < widening.scratch, SCRATCH, FINE_TUNING)
    kind = np.where(drawn < widening.scratch + widening.fine_tuning, larger, TINY)
    rows = np.flatnonzero(kind != TINY)
    instances.put(rows, draw_scales(kind[rows], random, published, widening))
    return instances


@dataclass(frozen=True, kw_only=True)
class Start:
    """Base schedule and starting learning rates of runs."""

    decisions: int = 50
    schedule: ScheduleName = "wsd"
    """Base schedule."""
    warmup_share: float = 0.1
    rates: tuple[float, float] = (1 / 30, 10.0)
    """Range of starting learning rates relative to the tuned one, drawn log-uniformly."""
    advice_error: float = 10.0
    """A scaling law's advice is off by up to this factor in both directions, drawn log-uniformly for each run."""
    advised: float = 0.0
    """Share of runs that start at the advised learning rate instead, with the advice's error, where a law advises."""
    currencies: tuple[Currency, ...] = ("tokens",)
    """What the budgets are counted in; each run draws one."""

    def __post_init__(self) -> None:
        if not 0 <= self.advised <= 1:
            raise ValueError(f"advised must be a share from 0 to 1, got {self.advised}")
        if not self.currencies or set(self.currencies) - set(CURRENCIES):
            found = ", ".join(self.currencies) or "none"
            raise ValueError(f"currencies must be some of {', '.join(CURRENCIES)}, got {found}")


class SimulatedRuns:
    """Simulates training runs, as a `PlantBatch` with references.

    Instance, starting learning rate and noise of a run depend only on `seed`, its row, and the number of earlier runs
    in the row. So the results of a row are the same alone and in a batch of thousands.

    Args:
        n_runs: Number of runs in the batch.
        seed: Seed of everything that is drawn.
        pool: Instances to draw from; by default drawn around the shipped calibrations.
        start: Base schedule and starting learning rates.
        first_row: Number of the first row.
    """

    def __init__(
        self, n_runs: int, seed: int = 0, pool: Pool | None = None, start: Start | None = None, first_row: int = 0
    ) -> None:
        self.n_runs = n_runs
        self.seed = seed
        self.pool = pool if pool is not None else default_pool()
        self.start = start or Start()
        self.table = ScheduleTable.of(self.start.schedule, self.start.warmup_share, self.start.decisions)
        self.currency: Ints = np.zeros(n_runs, dtype=np.int64)
        """What the budget of each run is counted in, as an index into `CURRENCIES`."""
        self.budget: Floats = np.ones(n_runs)
        """Budget in sequences, seconds or joules."""
        self._tuned = [
            (each, self.pool.references_in(each), self.pool.instances.budget(each)) for each in self.start.currencies
        ]
        self.rows: Ints = np.arange(first_row, first_row + n_runs)
        self.episodes: Ints = np.zeros(n_runs, dtype=np.int64)
        self.keys = run_keys(seed, self.rows, self.episodes)
        self.index: Ints = np.zeros(n_runs, dtype=np.int64)
        self.instances = self.pool.instances.take(self.index)
        self.references = self.pool.references.take(self.index)
        self.start_rate: Floats = np.ones(n_runs)
        self.advice_error: Floats = np.ones((n_runs, 2))
        """Advised over tuned learning rate and batch."""
        self.prices: Floats = np.full((n_runs, 2, len(PRECISIONS), len(PRICED_BATCHES)), np.nan)
        """What a price measurement before the start has found, as in `LimitBatch`."""
        self.state = PhysicsState.fresh(n_runs)
        self.progress = Progress.fresh(n_runs, self.start.decisions)
        self.memory: Floats = np.zeros(n_runs)
        self.bump: Floats = np.zeros(n_runs)
        self.used: Floats = np.zeros(n_runs)
        self.decision: Ints = np.zeros(n_runs, dtype=np.int64)
        self.sparsity: Floats = np.zeros(n_runs)
        self.batch: Ints = np.ones(n_runs, dtype=np.int64)
        self.precision: Ints = np.zeros(n_runs, dtype=np.int64)
        self.diverged: Bools = np.zeros(n_runs, dtype=np.bool_)
        self.validation_loss: Floats = np.full(n_runs, np.nan)
        self.expected_loss: Floats = self._expected()
        """Expected training loss after the last interval, without noise, in nats/token."""
        self.begin(np.arange(n_runs))

    @property
    def reference_losses(self) -> Floats:
        """Losses of the tuned static at a quarter, a half and the whole of the budget, shape (n_runs, 3)."""
        return self.references.losses

    @property
    def reference_energy_j(self) -> Floats:
        """Joules of the tuned static's run."""
        return self.references.energy_j

    @property
    def reference_time_s(self) -> Floats:
        """Seconds of the tuned static's run."""
        return self.references.time_s

    @property
    def best_learning_rate(self) -> Floats:
        """The tuned static's learning rate, converted to the starting batch by the neutral rule."""
        return self.references.rate

    @property
    def start_learning_rate(self) -> Floats:
        """Peak of the base schedule at the start of each run."""
        return self.start_rate

    def begin(self, rows: Ints) -> None:
        """Begin new runs in these rows."""
        self.episodes[rows] += 1
        self.keys[rows] = run_keys(self.seed, self.rows[rows], self.episodes[rows])
        drawn = uniforms(self.keys[rows], 0, 7)
        self.index[rows] = (drawn[:, 0] * len(self.pool)).astype(np.int64)
        self.instances.put(rows, self.pool.instances.take(self.index[rows]))
        self._draw_currency(rows, drawn[:, 4])
        low, high = np.log(self.start.rates)
        self.start_rate[rows] = self.references.rate[rows] * np.exp(low + (high - low) * drawn[:, 1])
        self.advice_error[rows] = self.start.advice_error ** (2 * drawn[:, 2:4] - 1)
        if self.start.advised:
            self._start_as_advised(rows[drawn[:, 6] < self.start.advised])
        self.prices[rows] = np.where(drawn[:, 5, None, None, None] < PRICED_SHARE, self._priced(rows), np.nan)
        self._restart(rows)

    def _start_as_advised(self, rows: Ints) -> None:
        """Start these runs at the advised learning rate, neutrally lower where the batch is below the advised one."""
        rate, batch = (self._advice() * self.advice_error)[rows].T
        at_start = rate * np.minimum(neutral_factor(self.instances.start_batch[rows].astype(np.float64), batch), 1.0)
        self.start_rate[rows] = np.where(np.isnan(at_start), self.start_rate[rows], at_start)

    def _priced(self, rows: Ints) -> Floats:
        """Return measured prices of these rows at the start, with the noise of their telemetry."""
        hardware, batch = self.instances.hardware.take(rows), self.instances.start_batch[rows].astype(np.float64)
        n, dense = len(rows), np.zeros(len(rows))
        noise = normals(self.keys[rows], PRICE_COUNTER, 2 * len(PRECISIONS) * len(PRICED_BATCHES))
        noise = noise.reshape(n, 2, len(PRECISIONS), len(PRICED_BATCHES))
        prices = np.exp(np.array([TIME_NOISE, POWER_NOISE])[:, None, None] * noise)
        for place, factor in enumerate(PRICED_BATCHES):
            prices[:, 1, :, place] *= hardware.power_w(factor * batch)[:, None]
            for index in range(len(PRECISIONS)):
                step_s = hardware.step_s(factor * batch, np.full(n, index), dense)
                prices[:, 0, index, place] *= step_s / (factor * batch)
        prices[:, 1] *= prices[:, 0]
        return np.where(hardware.masked[:, None, :, None], np.nan, prices)

    def _draw_currency(self, rows: Ints, drawn: Floats) -> None:
        """Draw what the budgets in these rows are counted in, and put the tuned statics for it there."""
        chosen = (drawn * len(self._tuned)).astype(np.int64)
        for number, (currency, references, budgets) in enumerate(self._tuned):
            mine = rows[chosen == number]
            index = self.index[mine]
            self.currency[mine] = CURRENCIES.index(currency)
            self.references.put(mine, references.take(index))
            self.budget[mine] = budgets[index]

    def _restart(self, rows: Ints) -> None:
        self.state.restart(rows)
        self.progress.restart(rows, self.start.decisions)
        for zeroed in (self.memory, self.bump, self.used, self.decision, self.sparsity, self.precision, self.diverged):
            zeroed[rows] = 0
        self.batch[rows] = self.instances.start_batch[rows]
        self.validation_loss[rows] = np.nan

    def limits(self) -> LimitBatch:
        """Return the control limits of each run."""
        low, high = self.instances.batch_limits(self.start.decisions)
        n, start_batch = self.n_runs, self.instances.start_batch
        advised_rate, advised_batch = (self._advice() * self.advice_error).T
        return LimitBatch(
            start=ControlBatch.at_start(start_batch),
            min_batch_size=low,
            max_batch_size=high,
            masked_precisions=self.instances.hardware.masked.copy(),
            timed_precisions=np.tile(np.arange(len(PRECISIONS)) > 0, (n, 1)),
            currency=self.currency.copy(),
            learning_rate_over_law=self.start_rate / advised_rate,
            batch_over_law=start_batch / advised_batch,
            prices=self.prices.copy(),
            prunes=self.instances.prunes.copy(),
            decisions=np.full(n, self.start.decisions),
        )

    def _advice(self) -> Floats:
        """Return a law's learning rate and batch for each run, (n_runs, 2), before the error; NaN for fine-tuning.

        For tiny models, of which published laws know nothing, they are the tuned ones.
        """
        batch = self.references.batch.astype(np.float64)
        tuned_rate = self.references.rate * neutral_factor(batch, self.instances.start_batch)
        tuned = np.stack([tuned_rate, batch], axis=1)
        return np.where(self.instances.kind[:, None] == TINY, tuned, self.instances.advice)

    def advance(self, controls: ControlBatch) -> TelemetryBatch:
        """Train every run for one interval, or to the end of its cool-down."""
        self.progress.begin_cooldown(controls.finish, self.table)
        length, mean, last = self.progress.next_interval(self.table)
        batch = controls.batch_size.astype(np.float64)
        scale, start_batch = controls.learning_rate_scale, self.instances.start_batch
        rate = learning_rate(self.start_rate, scale, 1.0, batch, start_batch)  # at the schedule's peak
        switches = self._switch(controls)
        random = normals(self.keys, 1 + self.decision, CHANNELS)
        sequences = self._sequences(length, batch, switches, random)
        steps = sequences / batch
        before = self._expected()
        with np.errstate(over="ignore", invalid="ignore"):
            moments = advance(self.instances.physics, self.state, steps, rate * mean, batch)
            self.bump *= np.exp(-steps / HEALING_STEPS)
            self.used += sequences
            after = self._expected()
            interval = SimulatedInterval(
                steps=steps,
                batch=batch,
                last_rate=rate * last,
                mean_loss=(before + after) / 2,
                loss_fall=before - after,
                probed=probe_due(self.decision, self.progress.position / self.start.decisions),
            )
            fields = read_sensors(
                self.instances.sensors, self.instances.physics, self.state, moments, interval,
                memory=self.memory, random=random,
            )  # fmt: skip
        self.expected_loss = after
        self.diverged |= ~(after < DIVERGED_FACTOR * self.instances.physics.initial_loss) | (self.state.damage > DEAD)
        self.progress.position += length
        costs = self._costs(interval, sequences, switches, random)
        return self._telemetry(controls, interval, sequences, fields, costs)

    def _switch(self, controls: ControlBatch) -> Floats:
        """Apply batch, precision and sparsity; return the number of changes of batch and precision."""
        removed = np.where(self.instances.prunes, np.maximum(controls.sparsity - self.sparsity, 0.0), 0.0)
        self.bump += PRUNING_BUMP * removed**3
        self.sparsity = np.where(removed > 0, controls.sparsity, self.sparsity)
        changes: Floats = (controls.batch_size != self.batch).astype(np.float64) + (
            controls.precision != self.precision
        )
        self.batch, self.precision = controls.batch_size.copy(), controls.precision.copy()
        return changes

    def _sequences(self, length: Floats, batch: Floats, switches: Floats, random: Floats) -> Floats:
        """Return the sequences of the next interval; those that fit into its seconds or joules under such budgets."""
        sequences = length * self.instances.sequences / self.start.decisions
        measured = self.currency != CURRENCIES.index("tokens")
        if not measured.any():
            return sequences
        hardware, amount = self.instances.hardware, length * self.budget / self.start.decisions
        in_joules = self.currency == CURRENCIES.index("energy_j")
        time_s = np.where(in_joules, amount / (hardware.power_w(batch) * _power_noise(random)), amount)
        probed = probe_due(self.decision, self.progress.position / self.start.decisions)
        probe_s = np.where(probed, hardware.probe_s(sequences_probed(sequences), self.sparsity), 0.0)
        training_s = (time_s - hardware.switch_s * switches) / _time_noise(random) - probe_s
        steps = np.maximum(training_s / hardware.step_s(batch, self.precision, self.sparsity), LEAST_STEPS)
        return np.where(measured, steps * batch, sequences)

    def _expected(self) -> Floats:
        """Return the current expected training loss, in nats/token."""
        pruned = self.instances.pruning_cost * ((1.0 - self.sparsity) ** -2.0 - 1.0) / 0.235
        expected: Floats = loss(self.instances.physics, self.state) + pruned + self.bump
        return expected

    def privileged(self) -> Floats:
        """Return what no live run knows of itself, for the value network of an agent in training.

        The kind of the instance, its best learning rate and batch, its edge, how much compute matters, the loss left
        to gain, and the state of the physics.

        Returns:
            Shape (n_runs, PRIVILEGED), in [-1, 1].
        """
        physics, start = self.instances.physics, self.instances.start_batch
        batch = self.references.batch.astype(np.float64)
        best = self.references.rate * neutral_factor(batch, start)
        highest = edge(physics, batch, np.full(self.n_runs, np.inf)) * RATE_UNIT
        quarter, _, whole = self.references.losses.T
        columns = [
            self.instances.kind == TINY,
            self.instances.kind == FINE_TUNING,
            np.log2(self.references.rate / self.start_rate) / 6,
            np.log2(batch / start) / 6,
            np.log10(highest / best) / 1.5,
            5 * np.log(quarter / whole),
            5 * np.log(np.maximum(self.expected_loss, 1e-3) / whole),  # 0 before the first interval
            np.log10(1 + self.instances.sequences / self.instances.data),
            physics.values["edge_damage"] * self.state.damage,
            np.log10(1 + self.state.scar),
            self.state.excess,
        ]
        with np.errstate(invalid="ignore"):
            known = np.nan_to_num(np.stack(columns, axis=1).astype(np.float64), nan=1.0)
        return np.clip(known, -1.0, 1.0)

    def evaluate(self, rows: Ints | None = None) -> Floats:
        """Measure the validation loss of these rows (of all by default) and return it, in nats/token."""
        rows = np.arange(self.n_runs) if rows is None else rows
        exact = self._expected() + self.instances.sensors.validation_gap + overfit(self.instances, self.used)
        noise = VALIDATION_NOISE * normals(self.keys[rows], 1000 + self.decision[rows], 1)[:, 0]
        measured = np.where(self.diverged[rows], np.nan, exact[rows] + noise)
        self.validation_loss[rows] = measured
        return measured

    def _costs(
        self, interval: SimulatedInterval, sequences: Floats, switches: Floats, random: Floats
    ) -> dict[str, Floats]:
        hardware = self.instances.hardware
        training_s = hardware.step_s(interval.batch, self.precision, self.sparsity) * interval.steps
        probe_s = np.where(interval.probed, hardware.probe_s(sequences_probed(sequences), self.sparsity), 0.0)
        switch_s = hardware.switch_s * switches
        time_s = (training_s + probe_s) * _time_noise(random) + switch_s
        power_w = hardware.power_w(interval.batch) * _power_noise(random)
        return {
            "time_s": time_s,
            "probe_time_s": probe_s,
            "switch_time_s": switch_s,
            "evaluation_time_s": np.zeros(self.n_runs),
            "energy_j": power_w * time_s,
            "power_w": power_w,
            "memory_share": hardware.memory_share * (0.7 + 0.3 * interval.batch / self.instances.start_batch),
        }

    def _telemetry(
        self, controls: ControlBatch, interval: SimulatedInterval, sequences: Floats, fields: dict[str, Floats],
        costs: dict[str, Floats],
    ) -> TelemetryBatch:  # fmt: skip
        self.decision = self.decision + 1
        fields["train_loss"] = np.where(self.diverged, np.nan, fields["train_loss"])
        finished = (self.progress.position >= self.progress.end - 1e-9) | self.diverged
        return TelemetryBatch(
            **fields,
            **costs,
            decision=self.decision - 1,
            budget_used=self.progress.position / self.start.decisions,
            tokens=np.rint(self.used * self.instances.sequence_length),
            interval_tokens=np.rint(sequences * self.instances.sequence_length),
            steps=np.maximum(np.rint(interval.steps), 1.0),
            epochs_seen=self.used / self.instances.data,
            validation_loss=self.validation_loss.copy(),
            learning_rate=interval.last_rate,
            batch_size=interval.batch,
            micro_batch_size=interval.batch,
            precision=controls.precision,
            sparsity=self.sparsity.copy(),
            finishing=self.progress.finishing,
            finished=finished,
            diverged=self.diverged.copy(),
        )


def _time_noise(random: Floats) -> Floats:
    """Return the factors on the seconds of an interval."""
    return np.exp(TIME_NOISE * random[:, 9])


def _power_noise(random: Floats) -> Floats:
    """Return the factors on the watts of an interval."""
    return np.exp(POWER_NOISE * random[:, 10])


def default_pool(n_instances: int = 256, seed: int = 0) -> Pool:
    """Return a pool of instances around the shipped calibrations."""
    from trainpilot.llm_runtime.simulator.shipped import shipped_physics

    return Pool.draw(n_instances, seed, shipped_physics())


MASKED = "does not pay on this machine"
"""Reason for a masked precision of a simulated run."""


class OnePlant:
    """Adapts a `PlantBatch` of one run to the `Plant` interface. The run is restarted."""

    def __init__(self, plants: PlantBatch) -> None:
        if plants.n_runs != 1:
            raise ValueError(f"plants must have one run, got {plants.n_runs}")
        self.plants = plants
        self.finished = False
        plants.begin(np.arange(1))

    def limits(self) -> ControlLimits:
        """Return the control limits of the run."""
        limits = self.plants.limits()
        masked = zip(PRECISIONS, limits.masked_precisions[0], strict=True)
        timed = zip(PRECISIONS, limits.timed_precisions[0], strict=True)
        return ControlLimits(
            start=limits.start.row(0),
            min_batch_size=int(limits.min_batch_size[0]),
            max_batch_size=int(limits.max_batch_size[0]),
            masked_precisions={name: MASKED for name, is_masked in masked if is_masked},
            timed_precisions=tuple(name for name, is_timed in timed if is_timed),
            currency=CURRENCIES[int(limits.currency[0])],
            learning_rate_over_law=_known(limits.learning_rate_over_law[0]),
            batch_over_law=_known(limits.batch_over_law[0]),
            prices=_step_prices(limits),
            pruning="width" if limits.prunes[0] else "none",
            decisions=int(limits.decisions[0]),
        )

    def advance(self, controls: Controls, share: float) -> Telemetry:
        """Train for one interval. `share` is ignored; an interval is always one over the number of decisions.

        Raises:
            ValueError: the run has finished.
        """
        if self.finished:
            raise ValueError("advance needs a run that has not finished; make a new one or restore a snapshot")
        telemetry = self.plants.advance(ControlBatch.of([controls])).row(0, controls)
        self.finished = telemetry.finished or telemetry.diverged
        return telemetry

    def evaluate(self) -> float:
        """Return the validation loss, in nats/token."""
        return float(self.plants.evaluate()[0])

    def snapshot(self) -> Snapshot:
        """Return a copy of the state."""
        return {"plants": deepcopy(self.plants), "finished": self.finished}

    def restore(self, snapshot: Snapshot) -> None:
        """Restore a state that `snapshot` returned."""
        self.plants = deepcopy(snapshot["plants"])
        self.finished = snapshot["finished"]


def _step_prices(limits: LimitBatch) -> tuple[StepPrice, ...]:
    """Return the prices of the only run that are known."""
    start_batch = int(limits.start.batch_size[0])
    found = []
    for index, precision in enumerate(PRECISIONS):
        for place, factor in enumerate(PRICED_BATCHES):
            (seconds, joules), batch = limits.prices[0, :, index, place], int(factor * start_batch)
            time_s, energy_j = _known(seconds * batch), _known(joules * batch)
            if batch and time_s is not None:
                found.append(StepPrice(batch_size=batch, precision=precision, time_s=time_s, energy_j=energy_j))
    return tuple(found)


def _known(value: np.float64) -> float | None:
    return None if np.isnan(value) else float(value)


class SimulatedRun(OnePlant):
    """One simulated run as a `Plant`: the first run of row `row` of `SimulatedRuns` with the same seed.

    Args:
        seed: Seed of everything that is drawn.
        row: Row of `SimulatedRuns`.
        pool: Instances to draw from; by default drawn around the shipped calibrations.
        start: Base schedule and range of starting learning rates.
    """

    def __init__(self, seed: int = 0, row: int = 0, pool: Pool | None = None, start: Start | None = None) -> None:

        super().__init__(SimulatedRuns(1, seed, pool, start, first_row=row))

    @property
    def runs(self) -> SimulatedRuns:
        """The batch of one run that holds the instance, references and state."""
        return cast("SimulatedRuns", self.plants)
