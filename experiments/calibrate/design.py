"""Choose the live runs of a calibration and their controls, so that they determine every number of the physics."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Literal

from trainpilot.experiments.options import Effort
from trainpilot.llm_runtime.config import ControlLimits, Controls, Precision, RunConfig
from trainpilot.llm_runtime.schedules import ScheduleName
from trainpilot.llm_runtime.simulator.evidence import Role

ControlPlan = Literal["ramp", "middle-ramp", "early-ramp", "half-ramp", "drop", "swell", "hot-tenth", "hot-twentieth"]
"""`...-ramp`: the batch grows from an eighth of the starting batch to all or half of it, as under policies that save
time. `drop`: the batch shrinks to an eighth. `swell`: it grows from an eighth to eight times the starting batch and
shrinks to an eighth again, which physics that were never shown it take for a gain. `hot-...`: the learning rate starts
far too high and falls to that fraction within three decisions, at an eighth of the batch."""

PLAN_RATES: Mapping[ControlPlan, tuple[float, ...]] = {
    "ramp": (7 / 6,),
    "middle-ramp": (1 / 2,),
    "early-ramp": (1 / 3, 2 / 3),
    "half-ramp": (1 / 2,),
    "drop": (7 / 6,),
    "swell": (1.0,),
    "hot-tenth": (35 / 3,),
    "hot-twentieth": (35 / 3,),
}
"""Factors on the learning rate."""
HALVINGS = 3
"""Number of halvings of the batch in a plan, one per decision."""
RAMP_SHARES: Mapping[ControlPlan, tuple[float, ...]] = {
    "ramp": (0.3, 0.6, 0.8),
    "middle-ramp": (0.2, 0.4, 0.6),
    "early-ramp": (0.12, 0.24, 0.4),
    "half-ramp": (0.12, 0.3),
}
"""Shares of the budget at which a plan doubles the batch again."""
SWELL_SHARES = ((0.08, 0.12, 0.16, 0.2, 0.24, 0.28), (0.68, 0.72, 0.76, 0.8, 0.84, 0.88))
"""Shares of the budget at which `swell` doubles and halves the batch, beside the halvings of its beginning."""
DROP_SHARE = 0.4
"""Share of the budget at which `drop` begins to halve the batch."""
COOLING = (0.71, 0.355, 0.177)
"""Scales of the learning rate in the first intervals of a hot start."""
COOLED: Mapping[ControlPlan, float] = {"hot-tenth": 0.1, "hot-twentieth": 0.05}
"""Scales of the learning rate after the first intervals of a hot start."""


def planned(plan: ControlPlan, decision: int, config: RunConfig, limits: ControlLimits) -> Controls:
    """Return the controls of an interval. The batch changes by factors of two, as a policy can change it."""
    scale = 1.0
    if plan in COOLED:
        scale = COOLING[decision] if decision < len(COOLING) else COOLED[plan]
    halvings = _halvings(plan, decision, config.decisions)
    batch_size = config.batch_size >> halvings if halvings >= 0 else config.batch_size << -halvings
    batch_size = min(max(limits.min_batch_size, batch_size), max(limits.max_batch_size, config.batch_size))
    return replace(config.start(), learning_rate_scale=scale, batch_size=batch_size)


def _halvings(plan: ControlPlan, decision: int, decisions: int) -> int:
    begin = math.ceil(DROP_SHARE * decisions) if plan == "drop" else 0
    halved = min(max(decision - begin + 1, 0), HALVINGS)
    if plan == "swell":
        rising, falling = (sum(decision >= share * decisions for share in shares) for shares in SWELL_SHARES)
        return halved - rising + falling
    doubled = sum(decision >= math.ceil(share * decisions) for share in RAMP_SHARES.get(plan, ()))
    return max(halved - doubled, 0)


GRID_WARMUP = 0.1
"""Warm-up of the grid and the walks as a share of the budget: long enough to show low learning rates, too."""
SCHEDULE_WARMUP = 0.02
PRUNED_SHARE = 0.2
"""Share of the feed-forward channels removed in the pruning run at half its budget."""
SCHEDULES: tuple[ScheduleName, ...] = ("cosine", "constant", "linear")
HELD_OUT_SCHEDULES: tuple[tuple[ScheduleName, float], ...] = (("cosine", 1 / 3), ("linear", 2.0))
"""Schedules with the factors on the learning rate at which they are held out."""
LONGER = 8
"""Budget of the longer runs, over that of the others."""
LONGER_RATE = 3 / 5
"""Factor on the learning rate of the longer runs whose controls change."""
HELD_OUT_WALK = 1
HELD_OUT_PLAN: ControlPlan = "half-ramp"
RATE_DIGITS = 12
"""Significant digits to which learning rates are rounded, to remove rounding errors of products."""


@dataclass(frozen=True, kw_only=True)
class Amount:
    """Settings of a calibration. Rates are factors on the base learning rate, batches on the starting batch."""

    rates: tuple[float, ...]
    batches: tuple[float, ...]
    held_out: tuple[tuple[float, float], ...]
    """Rates and batches of the grid that are held out; each lies between fitted ones."""
    schedule_rates: tuple[float, ...]
    walk_rates: tuple[float, ...]
    between: tuple[tuple[float, float], ...]
    """Further rates and batches outside of the grid, near the best settings."""
    plans: tuple[ControlPlan, ...]
    doubled_budget: bool
    """Whether there is a run of twice the budget."""
    longer: tuple[tuple[float, float], ...] = ()
    """Rates and batches of runs of `LONGER` times the budget; with them come three whose controls change."""
    longer_held_out: tuple[tuple[float, float], ...] = ()


_STANDARD = Amount(
    rates=(1 / 30, 1 / 10, 1 / 3, 1.0, 10 / 3, 10.0),
    batches=(1 / 8, 1 / 2, 2.0),
    held_out=((1 / 10, 1 / 2), (1 / 3, 1 / 2), (1.0, 1 / 8), (1.0, 2.0), (10 / 3, 1 / 2)),
    schedule_rates=(1 / 3, 2.0),
    walk_rates=(1 / 10, 2 / 3, 20 / 3),
    between=((1 / 2, 1.0), (1 / 3, 1 / 4)),
    plans=("ramp", "middle-ramp", "early-ramp", "half-ramp", "drop", "hot-tenth", "hot-twentieth"),
    doubled_budget=True,
)
AMOUNTS: Mapping[Effort, Amount] = {
    "quick": Amount(
        rates=(1 / 30, 1 / 5, 3 / 2, 10.0),
        batches=(1 / 8, 2.0),
        held_out=((1 / 5, 1 / 8), (3 / 2, 2.0)),
        schedule_rates=(1 / 3,),
        walk_rates=(1 / 10, 2 / 3),
        between=(),
        plans=(),
        doubled_budget=False,
    ),
    "standard": _STANDARD,
    "long": replace(
        _STANDARD,
        doubled_budget=False,
        longer=((3 / 5, 1.0), (1 / 3, 1 / 4), (9 / 5, 1.0), (1.0, 1 / 4), (1 / 5, 1.0), (1.0, 4.0)),
        longer_held_out=((1.0, 1 / 4), (1 / 5, 1.0)),
    ),
}


@dataclass(frozen=True, kw_only=True)
class CalibrationSetting:
    """One live run of a calibration."""

    name: str
    """Name of its file."""
    config: RunConfig
    role: Role
    """Whether the run is fitted or held out; about a quarter are held out to measure the error."""
    grid: bool = False
    """Whether it belongs to the grid of learning rates and batches."""
    walk: int | None = None
    """Number of the random walk of its learning rate and batch."""
    plan: ControlPlan | None = None
    """Plan of its controls."""
    prune: bool = False
    """Whether channels are removed at half its budget."""


def design(
    base: RunConfig, effort: Effort, *, precisions: Sequence[Precision] = (), prunes: bool = True
) -> tuple[CalibrationSetting, ...]:
    """Return the runs of a calibration. Which runs are held out depends only on the effort.

    Args:
        base: Run with model, text, budget, starting batch, and the base learning rate.
        effort: Determines the number of settings.
        precisions: Precisions to try besides the base's own.
        prunes: Whether channels of the model can be removed.

    Raises:
        ValueError: the budget is too small for the largest batch.
    """
    amount = AMOUNTS[effort]
    _check_budget(base, max(amount.batches))
    groups = (
        _grid(base, amount),
        _between(base, amount),
        _schedules(base, amount),
        _walks(base, amount),
        _planned(base, amount),
        _singles(base, amount, precisions, prunes),
        _longer(base, amount),
    )
    return tuple(setting for group in groups for setting in group)


def _check_budget(base: RunConfig, largest: float) -> None:
    batch = _scaled(base.batch_size, largest)
    needed = base.decisions * batch * base.sequence_length
    if base.tokens < needed:
        raise ValueError(
            f"tokens must give every decision a step of the largest batch tried, {largest:g} x batch_size: "
            f"{base.decisions} decisions x {batch} x sequence_length {base.sequence_length} = {needed:,}, got "
            f"{base.tokens:,}; raise the budget or lower one of the three"
        )


def _grid(base: RunConfig, amount: Amount) -> Iterator[CalibrationSetting]:
    """Yield every rate at every batch, without duplicates from rounding small batches."""
    batches: dict[int, float] = {}
    for factor in amount.batches:
        batches.setdefault(_scaled(base.batch_size, factor), factor)
    for rate in amount.rates:
        for batch, factor in batches.items():
            config = _wsd(base, rate, batch)
            role: Role = "held-out" if (rate, factor) in amount.held_out else "fit"
            yield CalibrationSetting(name=_name("wsd", config), config=config, role=role, grid=True)


def _between(base: RunConfig, amount: Amount) -> Iterator[CalibrationSetting]:
    tried = [setting.config for setting in _grid(base, amount)]
    for rate, factor in amount.between:
        config = _wsd(base, rate, _scaled(base.batch_size, factor))
        if config not in tried:
            yield CalibrationSetting(name=_name("between", config), config=config, role="fit")


def _schedules(base: RunConfig, amount: Amount) -> Iterator[CalibrationSetting]:
    for schedule in SCHEDULES:
        for rate in amount.schedule_rates:
            config = replace(
                base,
                schedule=schedule,
                base_learning_rate=_rate(base, rate),
                warmup_tokens=int(SCHEDULE_WARMUP * base.tokens),
            )
            role: Role = "held-out" if (schedule, rate) in HELD_OUT_SCHEDULES else "fit"
            yield CalibrationSetting(name=_name(schedule, config), config=config, role=role)


def _walks(base: RunConfig, amount: Amount) -> Iterator[CalibrationSetting]:
    for number, rate in enumerate(amount.walk_rates):
        config = _wsd(base, rate, base.batch_size)
        role: Role = "held-out" if number == HELD_OUT_WALK else "fit"
        yield CalibrationSetting(name=_name(f"walk{number}", config), config=config, role=role, walk=number)


def _planned(base: RunConfig, amount: Amount) -> Iterator[CalibrationSetting]:
    for plan in amount.plans:
        role: Role = "held-out" if plan == HELD_OUT_PLAN else "fit"
        for rate in PLAN_RATES[plan]:
            config = _wsd(base, rate, base.batch_size)
            yield CalibrationSetting(name=_name(plan, config), config=config, role=role, plan=plan)


def _singles(
    base: RunConfig, amount: Amount, precisions: Sequence[Precision], prunes: bool
) -> Iterator[CalibrationSetting]:
    """Yield runs that differ from an unpruned run at the base's precision in one thing each."""
    plain = _wsd(base, 2 / 3, base.batch_size)
    if prunes:
        yield CalibrationSetting(
            name=_name("prune", plain), config=replace(plain, pruning="width"), role="fit", prune=True
        )
    for precision in precisions:
        if precision != base.precision:
            config = _wsd(replace(base, precision=precision), 1.0, _scaled(base.batch_size, 0.5))
            yield CalibrationSetting(name=_name(precision, config), config=config, role="fit")
    if amount.doubled_budget:
        longer = _wsd(replace(base, tokens=2 * base.tokens), 2 / 3, _scaled(base.batch_size, 0.5))
        yield CalibrationSetting(name=_name("double", longer), config=longer, role="fit")


def _longer(base: RunConfig, amount: Amount) -> Iterator[CalibrationSetting]:
    """Yield runs of a far larger budget: shorter ones do not say how far the loss falls, nor at which rates."""
    long = replace(base, tokens=LONGER * base.tokens)
    for rate, factor in amount.longer:
        config = _wsd(long, rate, _scaled(base.batch_size, factor))
        role: Role = "held-out" if (rate, factor) in amount.longer_held_out else "fit"
        yield CalibrationSetting(name=_name("longer", config), config=config, role=role)
    if amount.longer:
        config = _wsd(long, LONGER_RATE, base.batch_size)
        yield CalibrationSetting(name=_name("longer-walk", config), config=config, role="fit", walk=0)
        yield CalibrationSetting(name=_name("longer-drop", config), config=config, role="fit", plan="drop")
        yield CalibrationSetting(name=_name("longer-swell", config), config=config, role="fit", plan="swell")


def _wsd(base: RunConfig, rate: float, batch_size: int) -> RunConfig:
    return replace(
        base,
        schedule="wsd",
        base_learning_rate=_rate(base, rate),
        batch_size=batch_size,
        warmup_tokens=int(GRID_WARMUP * base.tokens),
    )


def _rate(base: RunConfig, factor: float) -> float:
    return float(f"{base.base_learning_rate * factor:.{RATE_DIGITS}g}")


def _scaled(batch_size: int, factor: float) -> int:
    return max(1, round(batch_size * factor))


def _name(what: str, config: RunConfig) -> str:
    return f"{what}-lr{config.base_learning_rate:.4g}-batch{config.batch_size}"
