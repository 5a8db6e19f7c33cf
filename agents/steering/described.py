"""Describe a steered run: what is known of it before it starts, and what it came to."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from trainpilot.agents.bundle import BaseSchedule
from trainpilot.agents.steering.domain import RunFacts
from trainpilot.agents.steering.plan import name_of
from trainpilot.llm_runtime.energy.meter import sum_known

if TYPE_CHECKING:
    from trainpilot.agents.steering.steering import Steering


def facts_of(steering: Steering, base: BaseSchedule) -> RunFacts:
    """Return what a policy's training is compared with."""
    settings, levers, course = steering.settings, steering.levers, steering.course
    return RunFacts(
        n_parameters=sum(p.numel() for p in levers.model.parameters()),
        budget_tokens=course.schedule.budget_tokens,
        sequences=settings.sequences,
        batch_size=settings.batch_size,
        sequence_length=settings.sequence_length,
        optimizer=type(levers.optimizer).__name__,
        decisions=course.decisions,
        device_type=levers.device.type,
        base_schedule=base,
        fine_tuning=steering.fine_tuning,
    )


def summary_of(steering: Steering) -> dict[str, Any]:
    """Return what was steered and what it came to, as plain JSON values."""
    settings, told = steering.settings, [record.telemetry for record in steering.records]
    return {
        "policy": name_of(settings.policy),
        "preference": settings.preference,
        "decisions": len(told),
        "sequences": steering.sequences,
        "tokens": steering.tokens,
        "time_s": sum(each.time_s for each in told),
        "energy_j": sum_known(each.energy_j for each in told),
        "energy_source": told[-1].energy_source if told else None,
        "validation_loss": steering.validation_loss,
        "domain_warnings": list(steering.domain_warnings),
        **steering.controller.summary(),
    }
