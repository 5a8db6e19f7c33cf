"""Compare a run with those that a policy was trained on, and warn where it differs."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields
from typing import Any

from trainpilot.agents.bundle import BaseSchedule, PolicyBundle
from trainpilot.llm_runtime.plain_values import printable
from trainpilot.llm_runtime.schedules import FactorOf

SHIPPED_PARAMETERS = (130_000, 240_000)
"""Parameters of the models behind the calibrations that come with trainpilot."""
SIMULATED_BATCHES = (4, 32)
"""Starting batches that the simulator draws, in sequences."""
LARGER_MODELS, LARGER_BATCHES, LARGER_BUDGETS = (1e7, 1e10), (1, 16_384), (1e3, 2e9)
"""Weights, starting batches and sequences that the simulator draws beyond the calibrations, where it is asked to."""
SIMULATED_OPTIMIZERS = ("Adam", "AdamW")

_UNLIKE = "its observations are ratios, so it may carry over, but that was not measured"
EXPECT: Mapping[str, str] = {
    "n_parameters": f"{_UNLIKE}; compare one run with the base schedule",
    "budget_tokens": f"{_UNLIKE}; a longer run leaves it more time, a shorter one less than it counts on",
    "sequences": "what it expects of an interval in steps and noise is off; a longer run is the safer side",
    "batch_size": "it may ask for batches that do not pay; bound them by batch_size_range",
    "sequence_length": f"{_UNLIKE}; steps are cheaper or dearer than it knows",
    "optimizer": "its learning-rate factors and neutral batch changes are Adam's; expect poor choices",
    "decisions": "its factors per decision add up to more or fewer; set decisions to what it was trained with",
    "device_type": "what pays in time and energy differs; its learning rates do not depend on it",
    "base_schedule": "it multiplies another curve than it learnt on; take its own base schedule",
    "fine_tuning": "it learnt on training from scratch; the learning rate stays within a factor of 2 of yours",
}
"""What to expect of a run outside of a field's range."""


@dataclass(frozen=True, kw_only=True)
class RunFacts:
    """Facts about a run before it starts; those that are `None` are not compared."""

    n_parameters: int | None = None
    budget_tokens: int | None = None
    sequences: int | None = None
    """Budget in sequences."""
    batch_size: int | None = None
    """Starting batch, in sequences."""
    sequence_length: int | None = None
    optimizer: str | None = None
    """Name of its class."""
    decisions: int | None = None
    device_type: str | None = None
    base_schedule: BaseSchedule | FactorOf | None = None
    fine_tuning: bool | None = None
    """Whether the model was trained before."""


def check_domain(bundle: PolicyBundle, facts: RunFacts, *, require: bool = False) -> list[str]:
    """Return a warning for every fact outside of what the bundle was trained on.

    Raises:
        ValueError: `require` is set, and there is a warning.
    """
    domain = domain_of(bundle.provenance)
    warnings = []
    for each in fields(RunFacts):
        value, known = getattr(facts, each.name), domain.get(each.name)
        if value is not None and known is not None and not _fits(value, known):
            outside = f"{_text(value)} is outside of {_text(known)}"
            warnings.append(printable(f"{each.name} {outside}: {EXPECT[each.name]}"))
    if warnings and require:
        raise ValueError(f"run must be like those that the policy was trained on, got {'; '.join(warnings)}")
    return warnings


def domain_of(provenance: Mapping[str, Any]) -> dict[str, Any]:
    """Return what a bundle was trained on, by fact: its own statement, or what follows from its simulator's settings.

    A range is two numbers, a choice a list of names; `base_schedule` and `fine_tuning` are single values.
    """
    derived: dict[str, Any] = {}
    for name in ("decisions", "base_schedule"):
        if provenance.get(name) is not None:
            derived[name] = provenance[name]
    if isinstance(simulator := provenance.get("simulator"), Mapping):
        derived |= _of_simulator(simulator)
    stated = provenance.get("domain")
    return derived | dict(stated) if isinstance(stated, Mapping) else derived


def _of_simulator(simulator: Mapping[str, Any]) -> dict[str, Any]:
    known: dict[str, Any] = {
        "batch_size": list(SIMULATED_BATCHES),
        "optimizer": list(SIMULATED_OPTIMIZERS),
        "fine_tuning": False,
    }
    widening = simulator.get("widening") or {}
    if budget := widening.get("budget"):
        known["sequences"] = list(budget)
    if simulator.get("calibrations") == "shipped":
        known["n_parameters"] = list(SHIPPED_PARAMETERS)
    scratch, fine_tuning = (widening.get(name, 0.0) for name in ("scratch", "fine_tuning"))
    if scratch or fine_tuning:
        larger = {"batch_size": LARGER_BATCHES, "n_parameters": LARGER_MODELS, "sequences": LARGER_BUDGETS}
        for name, (low, high) in larger.items():
            known[name] = [min(known.get(name, [low])[0], low), high]
    if fine_tuning:
        del known["fine_tuning"]  # it learnt on both
    return known


def _fits(value: Any, known: Any) -> bool:
    if isinstance(value, BaseSchedule):
        return value == BaseSchedule(**known)
    if callable(value):
        return False
    if isinstance(known, str | bool | int | float):
        return bool(value == known)
    if isinstance(value, str):
        return value in known
    return bool(known[0] <= value <= known[1])


def _text(value: Any) -> str:
    if isinstance(value, BaseSchedule):
        return f"{value.schedule} with {value.warmup_share:.0%} warm-up"
    if isinstance(value, Mapping):
        return _text(BaseSchedule(**value))
    if callable(value):
        return "of your own"
    if isinstance(value, bool | str):
        return str(value)
    if isinstance(value, Sequence):
        named = all(isinstance(each, str) for each in value)
        return ", ".join(value) if named else f"[{_text(value[0])}, {_text(value[1])}]"
    return f"{value:,.0f}" if value == round(value) else f"{value:,g}"
