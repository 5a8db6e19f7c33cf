"""The figures of a comparison, as the report shows them and `figures.json` holds them."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Literal

from trainpilot.llm_runtime.json_records import JsonRecord

PRESUMED_BUG = 1.05
"""A gain over the tuned static above this factor is presumed to be a bug in the baseline."""
AXES = ("tokens", "time_s", "energy_j")
"""What a budget is counted in: tokens, modelled seconds, modelled joules."""
BASELINES = ("untuned", "tuned", "tuned_with_sweep")
"""Against what: the untuned default, the tuned static, and the tuned static with its sweep paid for."""
PARTS = ("training", "probe", "evaluation", "switching")

Censored = Literal["", "<", ">"]


@dataclass(frozen=True, kw_only=True)
class Estimate:
    """A median with its bootstrap 95 % interval."""

    value: float | None
    """`None` where there is nothing to take a median of; with `censored` `>`, never."""
    low: float | None = None
    high: float | None = None
    n: int = 0
    """Numbers behind it: seeds for one case, cases for all of them."""
    censored: Censored = ""
    """`<` or `>` where the truth is known to lie below or above `value` only."""


@dataclass(frozen=True, kw_only=True)
class TargetFigures:
    """What it took to reach the case's target loss. Seeds that never reached it count as more than they used."""

    n_reached: int
    n_runs: int
    tokens: Estimate
    time_s: Estimate
    """Modelled."""
    energy_j: Estimate
    """Modelled."""


@dataclass(frozen=True, kw_only=True)
class CaseFigures:
    """One method on one case, over its seeds."""

    case: str
    method: str
    n_runs: int
    n_diverged: int
    n_failed: int
    """Neither finished nor diverged: a worker was killed, memory ran out."""
    n_stopped_early: int
    validation_loss: Estimate
    """Final, in nats/token."""
    test_loss: Estimate
    """Final, in nats/token."""
    tokens: Estimate
    measured_time_s: Estimate
    measured_energy_j: Estimate
    energy_source: str | None
    energy_shared: bool
    """Runs beside it put their share into the measured figures: conclusions rest on the modelled ones."""
    time_s: Estimate
    """Modelled."""
    energy_j: Estimate
    """Modelled."""
    time_parts_s: Mapping[str, float]
    """Modelled seconds of each of `PARTS`, mean over seeds."""
    energy_parts_j: Mapping[str, float] | None
    """Modelled joules of each of `PARTS`, mean over seeds."""
    to_target: TargetFigures
    multipliers: Mapping[str, Mapping[str, Estimate]]
    """Compute multiplier by baseline (`BASELINES`) and axis (`AXES`)."""
    product_score: Estimate
    """P^1.5 (a T + b E) against the untuned default; 1 is as good, lower is better."""


@dataclass(frozen=True, kw_only=True)
class SignTest:
    """In how many cases the method needed less than the baseline, and how likely that is by chance (two-sided)."""

    wins: int
    losses: int
    ties: int
    p_value: float


@dataclass(frozen=True, kw_only=True)
class MethodFigures:
    """One method over all cases."""

    method: str
    n_runs: int
    n_diverged: int
    n_failed: int
    multipliers: Mapping[str, Mapping[str, Estimate]]
    """Median over cases, by baseline and axis."""
    sign_tests: Mapping[str, Mapping[str, SignTest]]
    """By baseline and axis."""
    product_score: Estimate
    break_even_runs: Estimate | None
    """Steered runs after which the policy's own training energy is earned back against the tuned static with its
    sweep paid for; `None` where it is unknown or there is no policy."""


@dataclass(frozen=True, kw_only=True)
class FrontPoint:
    """One method, or one trial, on one case's plane of loss against modelled cost."""

    case: str
    method: str
    family: str
    role: str
    """As a row's: `method`, `sweep` or `curve`."""
    validation_loss: float
    """Median over seeds."""
    time_s: float
    energy_j: float | None
    on_front: bool
    """Nothing else of this case is at least as good in both and better in one (loss, and joules or else seconds)."""


@dataclass(frozen=True, kw_only=True)
class FamilyFront:
    """How good a family's set of points is, median over cases. Objectives are ratios to the tuned static's."""

    family: str
    hypervolume: Estimate
    igd_plus: Estimate
    expected_utility: Estimate
    n_points: int


@dataclass(frozen=True, kw_only=True)
class BaselineCurve:
    """Final loss of a baseline at several budgets of one case."""

    case: str
    baseline: str
    """`untuned`, `tuned`, `tuned-time` or `tuned-energy`."""
    axis: str
    budgets: tuple[float, ...]
    """In the axis's unit, rising."""
    losses: tuple[float, ...]
    """In nats/token, as fitted: medians over seeds, made to fall with the budget."""


@dataclass(frozen=True, kw_only=True)
class SanityCheck:
    """Something that the literature leads to expect, and what was found."""

    name: str
    expected: str
    found: str
    passed: bool | None
    """`None` where the methods it needs were not compared."""


@dataclass(frozen=True, kw_only=True)
class Figures(JsonRecord):
    """Everything that the report shows as a number."""

    cases: tuple[CaseFigures, ...]
    methods: tuple[MethodFigures, ...]
    points: tuple[FrontPoint, ...]
    fronts: tuple[FamilyFront, ...]
    curves: tuple[BaselineCurve, ...]
    checks: tuple[SanityCheck, ...]
    targets: Mapping[str, float | None]
    """Target loss by case, in nats/token."""
    sweep_costs: Mapping[str, Mapping[str, float | None]]
    """What the tuned static's search used, by case and axis."""
    rests_on: str
    """Which time and energy the conclusions rest on, and why, in one or two sentences."""
    notes: tuple[str, ...] = field(default_factory=tuple)
    """What a reader must know: extrapolated curves, optima on an edge, shared meters."""
