"""Say whether a saved state belongs to a run as it is set up now."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict
from typing import Any

from trainpilot.agents.steering.course import Course
from trainpilot.agents.steering.plan import name_of
from trainpilot.agents.steering.settings import SteeringSettings

_SAME = ("sequences", "batch_size", "sequence_length", "preference", "decisions", "gradient_clip", "pruning")


def compared(settings: SteeringSettings, course: Course) -> dict[str, Any]:
    """Return what must not have changed where a run goes on, as plain JSON values."""
    same = {name: getattr(settings, name) for name in _SAME}
    return same | {"policy": name_of(settings.policy), "base_schedule": asdict(course.schedule)}


def check_same(saved: Mapping[str, Any], now: Mapping[str, Any]) -> None:
    """Raise `ValueError` where a run that goes on is set up in another way than the one that was saved."""
    for name, value in now.items():
        if saved.get(name) != value:
            raise ValueError(f"{name} must be what it was when the state was saved, {saved.get(name)!r}, got {value!r}")


def check_process(saved: list[int], here: list[int]) -> None:
    """Raise `ValueError` where a process loads what another has saved; both are a rank and the number of processes."""
    if saved != here:
        raise ValueError(
            f"state of a sharded model must be loaded by the process that saved it, {saved[0]} of {saved[1]}, "
            f"got process {here[0]} of {here[1]}; save one file per process"
        )
