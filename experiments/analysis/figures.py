"""Define the records of a comparison's figures, which the report shows and `figures.json` stores."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import ClassVar, Literal

from trainpilot.llm_runtime.json_records import JsonRecord

PRESUMED_BUG = 1.05
"""A gain over the tuned static above this factor is presumed to be a bug in the baseline."""
AXES = ("tokens", "time_s", "energy_j")
"""Units of a budget: tokens, modelled seconds, modelled joules."""
BASELINES = ("untuned", "tuned", "tuned_with_sweep")
"""Baselines: the untuned default, the tuned static, and the tuned static with the cost of its sweep."""
PARTS = ("training", "probe", "evaluation", "switching")

Censored = Literal["", "<", ">"]


@dataclass(frozen=True, kw_only=True)
class Estimate:
    """A median with its bootstrap 95 % interval."""

    value: float | None
    """The median. `None` without any numbers; with `censored` `>`, the event never happens."""
    low: float | None = None
    high: float | None = None
    n: int = 0
    """Sample size: seeds for a single case, cases for all of them."""
    censored: Censored = ""
    """`<` or `>` if `value` is only an upper or a lower bound."""


@dataclass(frozen=True, kw_only=True)
class TargetFigures:
    """Costs of reaching the case's target loss. For seeds that never reached it, the costs used are a lower bound."""

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
    """Runs that neither finished nor diverged, because a worker was killed or memory ran out."""
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
    """Whether parallel runs are part of the measured figures, so that conclusions use the modelled ones."""
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
    """P^1.5 (a T + b E) against the untuned default; 1 is equal, lower is better."""


@dataclass(frozen=True, kw_only=True)
class SignTest:
    """Number of cases in which the method needed less than the baseline, with the two-sided p-value."""

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
    """Steered runs after which the policy's training energy has been saved, against the tuned static including its
    sweep; `None` if it is unknown or there is no policy."""


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
    """Whether no other point of the case dominates it in loss and joules (seconds if joules are unknown)."""


USE_AXES = ("training_j", "use_j", "weight_bytes", "latency_s")
"""What a method's loss is weighed against: joules of training and of each generated token, bytes, seconds per token."""


@dataclass(frozen=True, kw_only=True)
class UsePoint:
    """One method on one case: how good its model is, what making it cost, and what it costs in use."""

    case: str
    method: str
    validation_loss: float
    """Median over seeds, in the format in which the model is used."""
    n_parameters: int
    weight_bytes: int
    bits_per_weight: float
    training_time_s: float | None
    """Modelled, median over seeds; all that the row needed, a teacher or a whole model before the cut included."""
    training_j: float | None
    """The same in joules; `None` where they are unknown."""
    latency_s: float | None
    """Seconds per generated token; `None` where nothing runs the format."""
    use_j: float | None
    """Joules per generated token; `None` likewise."""
    energy_source: str | None
    """Where the joules per generated token come from."""
    on_front: tuple[str, ...]
    """Those of `USE_AXES` on which no other method of the case is as good in both, and better in one."""


@dataclass(frozen=True, kw_only=True)
class FamilyFront:
    """Quality of a family's set of points, as medians over cases. Objectives are relative to the tuned static."""

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
    """Budgets in the axis's unit, ascending."""
    losses: tuple[float, ...]
    """Fitted losses in nats/token: medians over seeds, monotonically decreasing with the budget."""


@dataclass(frozen=True, kw_only=True)
class SanityCheck:
    """An expectation from the literature, with the finding of this comparison."""

    name: str
    expected: str
    found: str
    passed: bool | None
    """`None` where the methods it needs were not compared."""


@dataclass(frozen=True, kw_only=True)
class Figures(JsonRecord):
    """Everything that the report shows as a number."""

    left_out_at_default: ClassVar[tuple[str, ...]] = ("uses",)

    cases: tuple[CaseFigures, ...]
    methods: tuple[MethodFigures, ...]
    points: tuple[FrontPoint, ...]
    fronts: tuple[FamilyFront, ...]
    curves: tuple[BaselineCurve, ...]
    checks: tuple[SanityCheck, ...]
    targets: Mapping[str, float | None]
    """Target loss by case, in nats/token."""
    sweep_costs: Mapping[str, Mapping[str, float | None]]
    """Costs of the tuned static's search, by case and axis."""
    rests_on: str
    """Which time and energy the conclusions rest on, and why, in one or two sentences."""
    notes: tuple[str, ...] = field(default_factory=tuple)
    """Caveats for the reader, such as extrapolated curves, optima on an edge of the grid, or shared meters."""
    uses: tuple[UsePoint, ...] = ()
    """What the models cost in use; empty where that was not measured."""
