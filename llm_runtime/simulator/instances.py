"""Draw instances of simulated runs: physics around the available calibrations, hardware costs, and budgets.

`Hardware` gives seconds, watts and joules of a step, as arrays over many runs. `uniforms` and `normals` are
counter-based random numbers: they depend on a run's key and not on its place in the batch, so that a run has the same
ones alone and among others.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Annotated

import numpy as np
from numpy.typing import NDArray

from trainpilot.llm_runtime.budget import Currency
from trainpilot.llm_runtime.config import PRECISIONS, STEPS_PER_INTERVAL, batch_limits
from trainpilot.llm_runtime.ranges import Range, check_ranges
from trainpilot.llm_runtime.schedules import PROBE_PASSES
from trainpilot.llm_runtime.simulator.fitting import FittedPhysics
from trainpilot.llm_runtime.simulator.physics import ADDED, LATE, NAMES, PARAMETERS, Physics
from trainpilot.llm_runtime.simulator.records import Bools, Floats, Ints, Rows
from trainpilot.llm_runtime.simulator.sensors import Sensors

TINY, SCRATCH, FINE_TUNING = range(3)
"""Kinds of instances: around calibrations of tiny live runs; at the scale of published runs, and fine-tuning there."""
SEQUENCE_LENGTH = 64.0
"""Nominal tokens per sequence of tiny models; only ratios of tokens matter."""
FORWARD_SHARE = 1 / 3
"""Time of a forward pass as a share of a step; the backward pass takes twice as long."""
PROBE_COPIES = 0.6
"""Time of a probe besides its passes (update direction, copies of the weights), relative to a step's overhead."""


@dataclass(kw_only=True)
class Hardware(Rows):
    """Costs of a model on a machine; arrays of shape (n_runs,) unless stated otherwise."""

    overhead_s: Floats
    """Seconds of a step that do not depend on the batch."""
    sequence_s: Floats
    """Seconds per sequence at the starting precision."""
    speed: Floats
    """Speed of each precision relative to the first, shape (n_runs, number of precisions); slower ones are masked."""
    masked: Bools
    """Precisions that are not available, shape (n_runs, number of precisions)."""
    width_share: Floats
    """Share of a sequence's time that decreases with removed channels."""
    idle_w: Floats
    load_w: Floats
    """Watts when the machine is saturated."""
    switch_s: Floats
    """Seconds of a change of batch or precision."""
    memory_share: Floats
    """Share of memory in use at the starting batch."""

    def step_s(self, batch: Floats, precision: Ints, sparsity: Floats) -> Floats:
        """Return the seconds of a step: throughput saturates as B / (B + B_half), with B_half = overhead / sequence."""
        speed = self.speed[np.arange(len(precision)), precision]
        seconds: Floats = self.overhead_s + self.sequence_s * batch / speed * (1.0 - self.width_share * sparsity)
        return seconds

    def fastest_precision(self) -> Ints:
        """Return the precision of each machine at which a step takes the least time, shape (n_runs,)."""
        fastest: Ints = np.where(self.masked, 0.0, self.speed).argmax(axis=1)
        return fastest

    def sequence_cost(self, batch: Floats, currency: Currency, precision: Ints | None = None) -> Floats:
        """Return the cost of a sequence in a step of `batch`, by default at the first precision: seconds, joules, 1."""
        if currency == "tokens":
            return np.ones_like(batch)
        precision = np.zeros(len(batch), dtype=np.int64) if precision is None else precision
        seconds = self.step_s(batch, precision, np.zeros_like(batch)) / batch
        return seconds if currency == "time_s" else seconds * self.power_w(batch)

    def probe_s(self, sequences: Floats, sparsity: Floats) -> Floats:
        """Return the seconds of a curvature probe: forward passes at the first precision, and their overhead."""
        passes = self.overhead_s + self.sequence_s * sequences * (1.0 - self.width_share * sparsity)
        seconds: Floats = PROBE_PASSES * FORWARD_SHARE * passes + PROBE_COPIES * self.overhead_s
        return seconds

    def power_w(self, batch: Floats) -> Floats:
        """Return the mean watts of a step, which are lower during the overhead."""
        busy = self.sequence_s * batch / (self.overhead_s + self.sequence_s * batch)
        watts: Floats = self.idle_w + (self.load_w - self.idle_w) * busy
        return watts


LEAST_SPREAD = 0.15
"""Standard deviation, per unit of spread, of the perturbation of each parameter's logarithm around the calibrations."""
CALIBRATED_BATCH = 8.0
"""Typical batch of calibrations, in sequences."""
SCARS = (1e-3, 0.3)
"""Range of the lasting damage of too large first steps, which calibrations do not determine."""
RATE_SPAN = 5.0
"""Best learning rates are varied by up to this factor in both directions around the calibrations."""
ALARM = 0.5
"""Strength of the edge's precursors around calibrations, which have no edge."""
UPDATE_SPREAD = 0.25
"""Spread of the relative update size, which limits how well it predicts the best learning rate of a new model."""


@dataclass(kw_only=True)
class Instances(Rows):
    """Constants of simulated runs: physics, hardware, sensors and budget; arrays of shape (n_instances,)."""

    physics: Physics
    sensors: Sensors
    hardware: Hardware
    sequences: Floats
    """Budget in sequences. One in seconds or joules is what they cost at the starting batch (`budget`)."""
    data: Floats
    """Sequences in the text; if there are fewer than in the budget, the text is repeated."""
    overfitting: Floats
    """Validation loss minus training loss after a second epoch, in nats/token."""
    start_batch: Ints
    prunes: Bools
    pruning_cost: Floats
    """Permanent increase of the loss when a tenth of the channels is removed, in nats/token."""

    kind: Ints
    """`TINY`, `SCRATCH` or `FINE_TUNING`."""
    n_parameters: Floats
    """Weights; NaN where not drawn."""
    sequence_length: Floats
    """Tokens per sequence; nominal for tiny models, where only ratios of tokens matter."""
    machine_batches: Ints
    """Smallest and largest batch that the machine runs, (n_instances, 2); 0 where the range of live runs holds."""
    advice: Floats
    """Learning rate and batch in sequences that a scaling law advises, (n_instances, 2); NaN without."""
    searched_rate: Floats
    """Middle of the range of learning rates in which the best one is searched."""

    def __len__(self) -> int:
        return len(self.sequences)

    def budget(self, currency: Currency) -> Floats:
        """Return the budget in sequences, or the seconds or joules that these cost at the starting batch."""
        return self.sequences * self.hardware.sequence_cost(self.start_batch.astype(np.float64), currency)

    def static_sequences(self, batch: Floats, currency: Currency) -> Floats:
        """Return the sequences that the budget is enough for in steps of `batch` at the fastest precision."""
        if currency == "tokens":
            return self.sequences
        return self.budget(currency) / self.hardware.sequence_cost(batch, currency, self.hardware.fastest_precision())

    def batch_limits(self, decisions: int) -> tuple[Ints, Ints]:
        """Return the smallest and the largest batch: by the rules of live runs, or what the machine runs."""
        per_interval = self.sequences.astype(np.int64) // decisions
        low, high = batch_limits(self.start_batch, per_interval)
        machine = self.machine_batches
        most = np.maximum(np.minimum(machine[:, 1], per_interval // STEPS_PER_INTERVAL), self.start_batch)
        return np.where(machine[:, 0] > 0, machine[:, 0], low), np.where(machine[:, 0] > 0, most, high)


@dataclass(frozen=True, kw_only=True)
class Widening:
    """Width of the distribution of instances around the calibrations (domain randomisation)."""

    spread: Annotated[float, Range(0, 10)] = 1.3
    """Factor on the perturbation of every parameter; 0 draws the calibrations themselves."""
    budget: tuple[Annotated[float, Range(1, 1e12)], Annotated[float, Range(1, 1e12)]] = (800.0, 12_000.0)
    """Range of budgets in sequences, drawn log-uniformly."""
    scratch: Annotated[float, Range(0, 1)] = 0.0
    """Share of instances of 10 M to 10 B weights around published runs instead, trained from scratch."""
    fine_tuning: Annotated[float, Range(0, 1)] = 0.0
    """Share of instances of that size that fine-tune a trained model."""
    sharp_fine_tuning: bool = False
    """Whether its learning rate matters as much as in real sweeps, and its texts may be as short. The default policy
    was trained without."""
    edges: Annotated[float, Range(0, 1)] = 0.0
    """Share of instances with an edge."""
    edge_over_best: tuple[Annotated[float, Range(1e-3, 1e6)], Annotated[float, Range(1e-3, 1e6)]] = (1.5, 30.0)
    """Range of the edge over the best learning rate at the best batch, drawn log-uniformly."""
    noise_batch: tuple[Annotated[float, Range(0, 10)], Annotated[float, Range(0, 10)]] = (0.0, 0.0)
    """Range of `noise_batch` of instances around calibrations, which they do not determine; their noise stays what it
    is at a batch of 8 sequences."""
    weights: tuple[Annotated[float, Range(1e3, 1e15)], Annotated[float, Range(1e3, 1e15)]] = (1e7, 1e10)
    """Range of the weights of larger instances, drawn log-uniformly."""
    tokens_per_weight: tuple[Annotated[float, Range(1e-3, 1e6)], Annotated[float, Range(1e-3, 1e6)]] = (5.0, 300.0)
    """Range of their budgets from scratch in tokens per weight, drawn log-uniformly."""
    published: tuple[str, ...] = ()
    """Names of the published models that larger instances are drawn around, such as `step-law-215M`; by default all
    whose learning rate and batch were varied. A model that is left out can test a policy."""

    def __post_init__(self) -> None:
        check_ranges(self, "simulator.widening.")
        if not isinstance(self.sharp_fine_tuning, bool):
            raise ValueError(
                f"simulator.widening.sharp_fine_tuning must be true or false, got {self.sharp_fine_tuning!r}"
            )
        for name in ("budget", "edge_over_best", "weights", "tokens_per_weight"):
            low, high = getattr(self, name)
            if not low <= high:
                raise ValueError(f"simulator.widening.{name} must be two rising positive numbers, got {(low, high)}")
        if not self.noise_batch[0] <= self.noise_batch[1]:
            raise ValueError(f"simulator.widening.noise_batch must be two rising numbers >= 0, got {self.noise_batch}")
        if self.scratch + self.fine_tuning > 1:
            raise ValueError(
                f"simulator.widening must have scratch + fine_tuning at most 1, got {self.scratch} + {self.fine_tuning}"
            )


def draw_instances(
    n_instances: int, seed: int, calibrations: Sequence[FittedPhysics], widening: Widening | None = None
) -> Instances:
    """Draw instances around calibrations."""
    if not calibrations:
        raise ValueError("calibrations must hold at least one, got none; run trainpilot calibrate first")
    widening = widening or Widening()
    random = np.random.default_rng(seed)
    sequences = between(random, n_instances, *widening.budget).round()
    start_batch = _start_batches(random, sequences)
    repeats = random.random(n_instances) < 0.25
    data = np.where(repeats, sequences * np.exp(random.uniform(np.log(0.15), 0, n_instances)), 100 * sequences)
    instances = Instances(
        physics=_physics(random, n_instances, calibrations, widening.spread),
        sensors=_sensors(random, n_instances, widening.spread),
        hardware=_hardware(random, n_instances),
        sequences=sequences,
        data=data,
        overfitting=between(random, n_instances, 0.002, 0.05),
        start_batch=start_batch,
        prunes=random.random(n_instances) < 0.25,
        pruning_cost=between(random, n_instances, 0.003, 0.05),
        kind=np.full(n_instances, TINY),
        n_parameters=np.full(n_instances, np.nan),
        sequence_length=np.full(n_instances, SEQUENCE_LENGTH),
        machine_batches=np.zeros((n_instances, 2), dtype=np.int64),
        advice=np.full((n_instances, 2), np.nan),
        searched_rate=np.full(n_instances, np.nan),
    )
    if widening.noise_batch[1] > 0:
        values, exponent = instances.physics.values, random.uniform(*widening.noise_batch, n_instances)
        change = exponent - values["noise_batch"]
        values["noise"] *= CALIBRATED_BATCH ** (change * values["noise_power"])
        values["noise_batch"] = exponent
    return instances


def _physics(random: np.random.Generator, n: int, calibrations: Sequence[FittedPhysics], spread: float) -> Physics:
    """Interpolate between pairs of calibrations (their parameters are correlated), and perturb each parameter.

    Parameters added since version 0.1 are not perturbed, so that instances of older calibrations stay what they were,
    but for the late signal, which those do not have.
    """
    names = [name for name in NAMES if name not in ADDED]
    table = np.log([[each.values[name] for name in names] for each in calibrations])
    initial = np.log([each.initial_loss for each in calibrations])
    one, other = random.integers(len(calibrations), size=(2, n))
    share = random.random(n)
    width = spread * LEAST_SPREAD
    drawn = share[:, None] * table[one] + (1 - share[:, None]) * table[other]
    values = dict(zip(names, np.exp(drawn + width * random.normal(size=drawn.shape)).T, strict=True))
    for name in names:
        if name != "floor":
            values[name] = np.clip(values[name], PARAMETERS[name].low, PARAMETERS[name].high)
    for name in ADDED:
        added = np.log([each.values[name] for each in calibrations])
        values[name] = np.exp(share * added[one] + (1 - share) * added[other])
    apart = random.spawn(1)[0]
    for name in LATE:
        moved = values[name] * np.exp(width * apart.normal(size=n))
        values[name] = np.clip(moved, PARAMETERS[name].low, PARAMETERS[name].high)
    values["scar"] = between(random, n, *SCARS)
    first = np.exp(share * initial[one] + (1 - share) * initial[other] + width / 2 * random.normal(size=n))
    values["floor"] = np.clip(values["floor"], 0.15 * first, 0.6 * first)
    rescale(values, np.exp(random.uniform(-1.0, 1.0, n) * np.log(RATE_SPAN)))
    values["update"] = values["update"] * np.exp(UPDATE_SPREAD * spread * random.normal(size=n))
    return Physics(values=values, initial_loss=first, weight_decay=np.full(n, 0.1))


def rescale(values: dict[str, Floats], factor: Floats) -> None:
    """Change the unit of learning rates: a run at l / factor becomes what it was at l.

    Observations are ratios and do not change, but no single learning rate is good for all models any more.
    """
    values["rate"] *= factor
    values["update"] *= factor
    values["stall_rate"] /= factor
    values["growth"] *= factor**2
    values["scar"] *= factor**4
    values["noise"] *= factor ** values["noise_power"]
    values["slow_noise"] *= factor
    values["shrinking"] *= factor


def _sensors(random: np.random.Generator, n: int, spread: float) -> Sensors:
    def around(typical: float, width: float) -> Floats:
        return typical * np.exp(width * spread * random.normal(size=n))

    return Sensors(
        loss_spread=around(0.48, 0.3),
        validation_gap=0.04 * spread * random.normal(size=n),
        noise_scale=around(2.0, 0.5),
        gradient_norm=around(3.0, 0.7),
        curvature=around(2.5e-3, 0.5),
        curvature_memory=random.uniform(0.8, 1.5, n),
        probe_spread=around(0.8, 0.2),
        alarm=np.full(n, ALARM),
    )


def _hardware(random: np.random.Generator, n: int) -> Hardware:
    sequence_s = between(random, n, 5e-4, 5e-3)
    speed = np.ones((n, len(PRECISIONS)))
    masked = np.ones((n, len(PRECISIONS)), dtype=np.bool_)
    masked[:, PRECISIONS.index("fp32")] = False
    gpu = random.random(n) < 0.4
    for name, low, high in (("tf32", 1.1, 2.0), ("bf16", 1.2, 3.0), ("fp16", 1.1, 2.8)):
        column = PRECISIONS.index(name)
        speed[:, column] = random.uniform(low, high, n)
        masked[:, column] = ~(gpu & (random.random(n) < 0.7))
    idle = between(random, n, 5.0, 100.0)
    return Hardware(
        overhead_s=sequence_s * between(random, n, 0.5, 64.0),
        sequence_s=sequence_s,
        speed=speed,
        masked=masked,
        width_share=random.uniform(0.3, 0.7, n),
        idle_w=idle,
        load_w=idle * between(random, n, 1.05, 7.0),
        switch_s=sequence_s * between(random, n, 0.1, 20.0),
        memory_share=between(random, n, 0.01, 0.6),
    )


def _start_batches(random: np.random.Generator, sequences: Floats) -> Ints:
    """Draw powers of two from 4 to 32 that leave at least two steps in one of fifty intervals."""
    most = np.clip(np.floor(np.log2(sequences / 50 / 2)), 2, 5)
    powers = 2 + np.floor(random.random(len(sequences)) * (most - 1))
    batches: Ints = (2**powers).astype(np.int64)
    return batches


def between(random: np.random.Generator, n: int, low: float, high: float) -> Floats:
    """Return log-uniform numbers from `low` to `high`."""
    drawn: Floats = np.exp(random.uniform(np.log(low), np.log(high), n))
    return drawn


Keys = NDArray[np.uint64]

_GOLDEN = np.uint64(0x9E3779B97F4A7C15)
_27, _30, _31 = np.uint64(27), np.uint64(30), np.uint64(31)
_MIX_1, _MIX_2 = np.uint64(0xBF58476D1CE4E5B9), np.uint64(0x94D049BB133111EB)


def mix(keys: Keys) -> Keys:
    """Return well-mixed numbers: the finaliser of SplitMix64 (Steele et al. 2014)."""
    z = keys + _GOLDEN  # arrays of integers overflow silently
    z = (z ^ (z >> _30)) * _MIX_1
    z = (z ^ (z >> _27)) * _MIX_2
    mixed: Keys = z ^ (z >> _31)
    return mixed


def run_keys(seed: int, rows: NDArray[np.int64], episodes: NDArray[np.int64]) -> Keys:
    """Return a key for each run from the seed, its row, and the number of earlier runs in the row."""
    key = mix(np.full(len(rows), seed, dtype=np.uint64))
    key = mix(key ^ rows.astype(np.uint64))
    return mix(key ^ episodes.astype(np.uint64))


def uniforms(keys: Keys, counter: NDArray[np.int64] | int, channels: int) -> Floats:
    """Return uniform numbers in (0, 1), shape (n_runs, channels): the same for the same key and counter."""
    start = mix(keys ^ mix(np.asarray(counter, dtype=np.uint64) + np.zeros_like(keys)))
    numbers = mix(start[:, None] + np.arange(1, channels + 1, dtype=np.uint64) * _GOLDEN)
    values: Floats = ((numbers >> np.uint64(11)).astype(np.float64) + 0.5) / 2.0**53
    return values


def normals(keys: Keys, counter: NDArray[np.int64] | int, channels: int) -> Floats:
    """Return standard normal numbers, shape (n_runs, channels), by the Box-Muller transform."""
    pairs = -(-channels // 2)
    drawn = uniforms(keys, counter, 2 * pairs)
    radius, angle = np.sqrt(-2.0 * np.log(drawn[:, :pairs])), 2.0 * np.pi * drawn[:, pairs:]
    return np.concatenate([radius * np.cos(angle), radius * np.sin(angle)], axis=1)[:, :channels]
