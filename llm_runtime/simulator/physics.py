"""Simulate the loss of many training runs at once: a power-law noisy quadratic under AdamW, with extensions.

The loss of a run is the sum of a floor, a signal that decays in modes of all speeds, and noise:

    L = floor + (L_initial - floor) sum_i c_i a_i + L_noise + (slow noise in modes)

Effects of an AdamW step of learning rate l on B sequences, with the source of each part:

* *Normalisation.* Adam divides by the root of the gradient's second moment, so that a step moves the weights by about
  l whatever the gradient's size: l_e = l / W^w / sqrt(g + phi/B). The gradient power g, (sum c_i u_i a_i over
  sum c_i u_i)^x, falls from 1; phi is the noise of a gradient over the signal at the start. Where g dominates, steps
  count and the batch does not; where noise does, doubling the batch is worth sqrt(2) in the learning rate (Malladi et
  al. 2022).
* *Growth.* Steps make the weights grow, W^2 <- W^2 + growth (l m)^2, weight decay shrinks them, and larger weights make
  every later step relatively smaller. That is the lasting damage of a learning rate that was too large.
* *Stalling.* Near the edge of stability steps saturate, first in the slow modes: their rates fall by
  1 + (l / (l_stall W^v))^p B^-b u_i^-d. A model that starts too fast learns frequent characters but no syntax.
* *Scars.* Too large steps at the beginning cause permanent damage: a step of rate l adds a stall (l / 3 units)^4 B^-b
  to all later steps, however small these are. Warm-up prevents it. Designed runs hardly show the effect, as all of them
  warm up; starts at ten times the best rate do, with a sharp threshold. So it is drawn from a wide range, not fitted.
* *Edge.* Beyond a learning rate of edge = l_edge B^h min(1, t / warm-up) in step t, a share d of the run dies for good:
  d <- 1 - (1 - d) exp(-(ln l / edge)^2 steps / patience), which adds d times `edge_damage` of the whole signal to the
  loss. What is dead stays dead. A wholly dead run of published sweeps ends 3 to 5 nats higher, half of the signal. The
  edge is taken in the middle of a stretch. In sweeps of 215 M to 430 M parameters (Li et al. 2025, arXiv 2503.04715) it
  lies at 0.013 (N / 268 M)^-0.55 at all batches from 64 k to 8 M tokens, so that its distance from the best learning
  rate, which falls with the batch, grows from 3-6x at 524 k tokens and more to 16-23x at 131 k and less. Fits leave
  runs beyond the edge out and do not determine it: it is drawn.
* *Late signal.* A share of the signal lies in modes around one, beside the power law. Small models first learn which
  bytes follow each other and only then what the context says, and their loss falls faster there than any power law:
  physics without this share, fitted to runs of 0.13 M tokens, predict losses at eight times that budget 0.3 to 0.5
  nats/token too high. What is learnt late suffers most from noise: these longer runs gain 0.2 nats/token in their
  cool-down, the shorter ones little. Larger published models are fitted without it.
* *Noise.* A floor noise (l B^-j / W^n)^e that the loss approaches along the path of the steps, settling times as fast
  as the fastest mode; so a cool-down takes its time. A slow part accumulates in modes. With j = 1/2 a batch that
  changes with its neutral learning rate is no quieter. Runs of one batch do not determine j; where it is 0, a small
  batch in the cool-down gains what no real run does.

Normalisation, growth and slow noise are taken from the literature (Zhang et al. 2019, Li et al. 2025; growth is that of
scale-invariant weights, van Laarhoven 2017); the stalling term and all exponents are fitted to live runs of small
transformers.

The modes are stepped exactly. The loss is a sum over modes i, each with a relaxation rate u_i in units of the fastest:

    L = L0 + A sum_i c_i a_i + N sum_i k_i 2 u_i q_i,    c_i ~ u_i^s,  k_i ~ u_i^kappa,  each summing to 1

a_i is the remaining signal in mode i (1 at the start), q_i the noise accumulated in it (0 at the start). A finite
number of modes approximates the power laws of the functional scaling law (Li et al. 2025, arXiv 2509.19189), whose
signal decays as t^-s and whose memory of past noise decays as t^-(1 + kappa); unlike the integrals of that law, the
modes are a state that can be stepped under any controls. Noisy quadratic model: Zhang et al. 2019, arXiv 1907.04164.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import InitVar, dataclass

import numpy as np
from numpy.typing import ArrayLike

from trainpilot.llm_runtime.simulator.records import Floats, Ints, Rows

N_MODES = 48
"""Number of modes: about seven per decade, enough for smooth power laws."""
DECADES = 7
"""The slowest mode is this many decades below the fastest."""


def mode_rates(n_modes: int = N_MODES, decades: float = DECADES) -> Floats:
    """Return the relaxation rates u_i, evenly spaced in the logarithm and descending from 1, of shape (n_modes,)."""
    return np.logspace(0.0, -decades, n_modes)


def mode_weights(rates: Floats, exponent: ArrayLike) -> Floats:
    """Return u^exponent over its sum.

    Args:
        rates: Relaxation rates, of shape (n_modes,).
        exponent: One number, or one for each run, of shape (n_runs,).

    Returns:
        Weights that sum to 1, of shape (n_modes,) or (n_runs, n_modes).
    """
    weights: Floats = rates ** np.asarray(exponent, dtype=np.float64)[..., None]
    weights /= weights.sum(axis=-1, keepdims=True)
    return weights


LATE_WIDTH = 0.25
"""Spread of the modes that are learnt late, in decades."""


def late_weights(rates: Floats, middle: Floats) -> Floats:
    """Return weights of the modes around the rates `middle`, of shape (n_runs, n_modes), each row summing to 1."""
    weights: Floats = np.exp(-0.5 * (np.log10(rates / middle[:, None]) / LATE_WIDTH) ** 2)
    weights /= weights.sum(axis=1, keepdims=True)
    return weights


RATE_UNIT = 1e-3
"""Learning rates inside the physics are in this unit."""
SCAR_RATE = 3.0
"""Rate, in rate units, at which a scar is measured."""
MOMENTUM_NOISE = 0.0526
"""(1 - beta1) / (1 + beta1) at beta1 = 0.9: the share of a gradient's noise power that Adam's first moment keeps."""


@dataclass(frozen=True)
class Parameter:
    """One number of the physics: positive, and drawn and fitted in the logarithm."""

    typical: float
    low: float
    high: float
    meaning: str


PARAMETERS: Mapping[str, Parameter] = {
    "spectrum": Parameter(0.35, 0.05, 2.0, "signal exponent s: the loss falls as (rate x steps)^-s"),
    "rate": Parameter(0.06, 1e-4, 30.0, "relaxation of the fastest mode per step at the rate unit"),
    "floor": Parameter(0.8, 0.2, 0.98, "loss after endless training, over the best loss seen"),
    "gradient_noise": Parameter(0.1, 1e-5, 1e6, "phi: noise over signal power of a gradient at the start, sequences"),
    "gradient_power": Parameter(0.85, 0.05, 2.0, "x: how the signal's gradient power falls with the modes"),
    "gradient_floor": Parameter(0.01, 1e-5, 1.0, "share of the gradient's power that does not fall"),
    "stall_rate": Parameter(5.0, 0.01, 60.0, "l_stall: learning rate at which steps saturate, in rate units"),
    "stall_power": Parameter(1.3, 0.5, 5.0, "p: how sharply they do"),
    "stall_batch": Parameter(1.2, 1e-3, 4.0, "b: how much a larger batch postpones it"),
    "stall_slow": Parameter(0.5, 0.003, 1.0, "d: how much earlier the slow modes stall"),
    "stall_growth": Parameter(0.3, 0.05, 3.0, "v: how much grown weights postpone it"),
    "scar": Parameter(1e-6, 1e-8, 1.0, "lasting stall that an early step of one sequence leaves at three rate units"),
    "youth": Parameter(20.0, 5.0, 100.0, "steps in which a model is that easily hurt"),
    "growth": Parameter(0.006, 1e-6, 1.0, "growth of the squared weights by a step of the rate unit"),
    "shrinking": Parameter(1.0, 0.05, 4.0, "shrinking by weight decay, over the nominal rate"),
    "growth_power": Parameter(2.0, 0.1, 3.0, "w: how much grown weights slow progress down"),
    "noise": Parameter(0.05, 1e-4, 20.0, "noise floor at the rate unit in steps of one sequence, nats/token"),
    "noise_power": Parameter(0.9, 0.1, 2.0, "e: how the noise floor rises with the learning rate"),
    "noise_growth": Parameter(1.0, 0.02, 5.0, "n: how much grown weights lower it"),
    "noise_batch": Parameter(0.5, 1e-300, 2.0, "j: how much a larger batch lowers the noise floor at the same rate"),
    "settling": Parameter(0.1, 1e-3, 1e3, "how fast the noise follows the learning rate, over the fastest mode"),
    "slow_noise": Parameter(0.01, 1e-6, 1e3, "weight of the noise that gathers in modes"),
    "slow_spectrum": Parameter(0.5, 0.2, 3.0, "kappa: its exponent"),
    "update": Parameter(9e-3, 5e-4, 5e-2, "relative size of the first update at the rate unit"),
    "edge_rate": Parameter(1e9, 1e-2, 2e9, "l_edge: rate that kills a run of one sequence per step, in rate units"),
    "edge_batch": Parameter(1e-3, 1e-4, 2.0, "h: how much a larger batch moves the edge up"),
    "edge_warmup": Parameter(1.0, 0.1, 1e6, "steps until the edge has risen to its full height"),
    "edge_patience": Parameter(10.0, 0.1, 1e6, "steps in which a run at e times the edge dies"),
    "edge_damage": Parameter(0.5, 0.01, 3.0, "loss of a dead run, over the whole signal"),
    "late": Parameter(
        0.1, 1e-300, 0.9, "share of the signal that is learnt late, in modes around one, beside the rest"
    ),
    "late_rate": Parameter(1e-3, 1e-6, 0.3, "relaxation rate of that mode, over the fastest mode's"),
    "late_noise": Parameter(10.0, 1e-300, 30.0, "how much more noise disturbs a loss whose late signal is learnt"),
}
"""Parameters of the physics of one model on one text."""

DIVERGED_FACTOR = 1.3
"""A run whose loss reaches this many times the initial one has diverged."""
DEAD = 0.1
"""A run of which learning rates beyond the edge have killed this share counts as diverged, too."""
NAMES = tuple(PARAMETERS)
EDGE: tuple[str, ...] = tuple(name for name in NAMES if name.startswith("edge_"))
"""Parameters of the edge, whose typical values put it out of reach."""
NOT_FITTED: tuple[str, ...] = ("scar", "youth", "noise_batch", *EDGE)
"""Parameters that the runs of a calibration do not determine. With `noise_batch` at 1/2, a change of the batch is
neutral to noise if the learning rate changes with its square root, as theory has it for Adam (Malladi et al. 2022)."""
LATE: tuple[str, ...] = ("late", "late_rate", "late_noise")
"""Parameters of the late signal."""
ADDED: Mapping[str, float] = {
    **{"settling": 1e9, "noise_batch": 1e-300, "late": 1e-300, "late_rate": 1e-3, "late_noise": 1e-300},
    **{name: PARAMETERS[name].typical for name in EDGE},
}
"""Parameters that older calibrations lack, with values that change nothing: noise follows at once and at any batch, and
there is neither an edge nor a late signal."""
RELATIVE_RATES = mode_rates()


@dataclass(kw_only=True)
class Physics(Rows):
    """Parameters of many runs, with derived quantities; arrays of shape (n_runs,) or (n_runs, n_modes)."""

    values: dict[str, Floats]
    """Values by the names in `PARAMETERS`; `floor` is in nats/token."""
    initial_loss: Floats
    weight_decay: Floats
    """Weight decay of the optimiser, per unit of learning rate."""
    left: InitVar[Floats | None] = None
    """What an earlier training has left of each mode, over a fresh model's, (n_runs, n_modes); `None` if there was
    none. `initial_loss` is the loss after it."""

    def __post_init__(self, left: Floats | None) -> None:
        v = self.values
        self.shares = mode_weights(RELATIVE_RATES, v["spectrum"]) * (1.0 - v["late"])[:, None]
        self.late_shares = late_weights(RELATIVE_RATES, v["late_rate"])
        self.shares += self.late_shares * v["late"][:, None]
        if left is not None:
            self.shares = self.shares * left
            self.shares /= self.shares.sum(axis=1, keepdims=True)
        self.slow_weights = mode_weights(RELATIVE_RATES, v["slow_spectrum"]) * RELATIVE_RATES
        self.stall = RELATIVE_RATES ** -v["stall_slow"][:, None]
        power = self.shares * RELATIVE_RATES
        self.gradient_shares = power / power.sum(axis=1, keepdims=True)
        self.amplitude = self.initial_loss - v["floor"]


@dataclass(kw_only=True)
class PhysicsState(Rows):
    """State of many runs."""

    signal: Floats
    """a_i, the remaining signal, 1 at the start; shape (n_runs, n_modes)."""
    noise: Floats
    """q_i, the accumulated slow noise; shape (n_runs, n_modes)."""
    growth: Floats
    """W^2, squared norm of the weights relative to the start."""
    scar: Floats
    """Permanent damage of too large early steps, added to the stall of every later step."""
    excess: Floats
    """Noise that follows the learning rate, in nats/token."""
    steps: Floats
    """Optimiser steps so far."""
    damage: Floats
    """Share of the run that learning rates beyond the edge have killed."""

    @classmethod
    def fresh(cls, n_runs: int) -> PhysicsState:
        """Return the state before the first step."""
        modes = (n_runs, len(RELATIVE_RATES))
        nothing = {name: np.zeros(n_runs) for name in ("scar", "excess", "steps", "damage")}
        return cls(signal=np.ones(modes), noise=np.zeros(modes), growth=np.ones(n_runs), **nothing)

    def restart(self, rows: Ints) -> None:
        """Reset some runs to the state before their first step."""
        self.put(rows, PhysicsState.fresh(len(rows)))


@dataclass(frozen=True, kw_only=True)
class Moments:
    """Powers of gradient and first moment over a stretch."""

    signal_power: Floats
    """g: power of the gradient's signal relative to the start."""
    noise_power: Floats
    """phi / B, in the same unit."""
    momentum_power: Floats
    """Power of Adam's first moment relative to that of a gradient: squared size of an update over the rate."""


def advance(physics: Physics, state: PhysicsState, steps: Floats, learning_rate: Floats, batch: Floats) -> Moments:
    """Train every run for a stretch of constant learning rate and batch, exactly, in place.

    Args:
        physics: Parameters.
        state: State of the runs; changed in place.
        steps: Optimiser steps, may be fractional; 0 leaves a run unchanged.
        learning_rate: Mean learning rate over the stretch.
        batch: Sequences per step.
    """
    v, signal, noise = physics.values, state.signal, state.noise
    rate = learning_rate / RATE_UNIT
    moments = _moments(physics, state, batch)
    power = moments.signal_power + moments.noise_power
    effective = rate * state.growth ** (-v["growth_power"] / 2) / np.sqrt(power)
    path = 2.0 * v["rate"] * effective * steps
    stall = (rate * state.growth ** (-v["stall_growth"] / 2) / v["stall_rate"]) ** v["stall_power"]
    quiet = batch ** -v["stall_batch"]
    stall *= quiet
    state.scar += v["scar"] * (rate / SCAR_RATE) ** 4 * quiet * _young_steps(v["youth"], state.steps, steps)
    stall += state.scar
    fading = stall[:, None] * physics.stall
    fading += 1.0
    np.divide(RELATIVE_RATES, fading, out=fading)
    fading *= -path[:, None]
    signal *= np.exp(fading, out=fading)
    _step_slow_noise(noise, path, effective**2 * moments.noise_power * steps)
    _grow(physics, state, steps, rate, moments)
    state.damage += (1.0 - state.damage) * _killed(physics, state, steps, rate, batch)
    state.steps += steps
    settled = 1.0 - np.exp(-0.02 * state.steps)
    at_one = rate * batch ** -v["noise_batch"]  # as noisy in steps of one sequence
    learnt = 1.0 - np.einsum("ij,ij->i", physics.late_shares, signal)
    settled *= 1.0 + v["late_noise"] * learnt
    noise_floor = v["noise"] * (at_one * state.growth ** (-v["noise_growth"] / 2)) ** v["noise_power"] * settled
    state.excess += (noise_floor - state.excess) * -np.expm1(-v["settling"] * path)
    return moments


def loss(physics: Physics, state: PhysicsState) -> Floats:
    """Return the expected loss of every run, in nats/token."""
    slow = np.einsum("ij,ij->i", physics.slow_weights, state.noise)
    slow *= physics.values["slow_noise"] * physics.values["rate"]
    left: Floats = np.einsum("ij,ij->i", physics.shares, state.signal)
    left += physics.values["edge_damage"] * state.damage
    total: Floats = physics.values["floor"] + physics.amplitude * left + slow + state.excess
    return total


def edge(physics: Physics, batch: Floats, steps: Floats) -> Floats:
    """Return the learning rate of every run that it does not survive for long, after `steps` steps, in rate units."""
    v = physics.values
    ready = np.clip(steps / v["edge_warmup"], 1e-12, 1.0)
    highest: Floats = v["edge_rate"] * batch ** v["edge_batch"] * ready
    return highest


def _killed(physics: Physics, state: PhysicsState, steps: Floats, rate: Floats, batch: Floats) -> Floats:
    """Return the share of what lives that dies in the next steps."""
    over = np.maximum(rate / edge(physics, batch, state.steps + steps / 2), 1.0)
    killed: Floats = -np.expm1(-(np.log(over) ** 2) * steps / physics.values["edge_patience"])
    return killed


def _moments(physics: Physics, state: PhysicsState, batch: Floats) -> Moments:
    left = np.einsum("ij,ij->i", physics.gradient_shares, state.signal)
    least = physics.values["gradient_floor"]
    signal_power = least + (1.0 - least) * np.maximum(left, 1e-12) ** physics.values["gradient_power"]
    noise_power = physics.values["gradient_noise"] / batch
    momentum = (signal_power + MOMENTUM_NOISE * noise_power) / (signal_power + noise_power)
    return Moments(signal_power=signal_power, noise_power=noise_power, momentum_power=momentum)


def _young_steps(youth: Floats, before: Floats, steps: Floats) -> Floats:
    """Return the weight of the next steps as early ones: it decreases with every step and sums to `youth`."""
    young: Floats = youth * np.exp(-before / youth) * -np.expm1(-steps / youth)
    return young


def _step_slow_noise(noise: Floats, path: Floats, injected: Floats) -> None:
    """Relax the accumulated noise over a stretch and add new noise, in place: q <- q e^-r + injected (1 - e^-r) / r."""
    r = path[:, None] * RELATIVE_RATES
    np.maximum(r, 1e-300, out=r)
    balance = injected[:, None] / r
    np.subtract(noise, balance, out=balance)
    np.negative(r, out=r)
    balance *= np.expm1(r, out=r)
    noise += balance


def _grow(physics: Physics, state: PhysicsState, steps: Floats, rate: Floats, moments: Moments) -> None:
    """Relax the squared weight norm towards the balance of steps and weight decay, exactly."""
    shrinking = 2.0 * RATE_UNIT * physics.weight_decay * physics.values["shrinking"] * rate
    faded = -np.expm1(-shrinking * steps)  # 1 - e^-st
    added = physics.values["growth"] * moments.momentum_power * rate**2
    gain = np.where(shrinking > 0, faded / np.maximum(shrinking, 1e-300), steps)
    state.growth *= 1.0 - faded
    state.growth += added * gain
