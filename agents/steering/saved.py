"""Save a steered run, and go on with it where it is set up as it was."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict
from typing import TYPE_CHECKING, Any

from trainpilot.agents.steering.plan import name_of
from trainpilot.llm_runtime.config import Controls

if TYPE_CHECKING:
    from trainpilot.agents.steering.steering import Steering

_SAME = ("sequences", "batch_size", "sequence_length", "preference", "decisions", "gradient_clip", "pruning")


def state_of(steering: Steering) -> dict[str, Any]:
    """Return what, beside model, optimiser and data, decides how the run goes on."""
    return {
        "settings": _compared(steering),
        "process": [steering.ranks.rank, steering.ranks.world_size],
        "course": steering.course.state_dict(),
        "fine_tuning": steering.fine_tuning,
        "spoilt": list(steering.snapshots.spoilt),
        "validation_loss": steering.validation_loss,
        "controls": asdict(steering.controls),
        "levers": steering.levers.state_dict(),
        "readings": steering.readings.state_dict(),
        "controller": steering.controller.state_dict(),
    }


def go_on(steering: Steering, state: Mapping[str, Any]) -> None:
    """Put a steering where `state_of` was called; what a rollback would go back to is copied anew.

    Raises:
        ValueError: the run was set up in another way, or another process saved its part of a sharded model.
    """
    _check_same(state["settings"], _compared(steering))
    here = [steering.ranks.rank, steering.ranks.world_size]
    if steering.levers.sharded:
        _check_process(state["process"], here)
    steering.course.load_state_dict(state["course"])
    steering.validation_loss = state["validation_loss"]
    steering.levers.load_state_dict(state["levers"], Controls(**state["controls"]))
    steering.fine_tuning = state["fine_tuning"]  # a model from scratch has been trained too by now
    guardrails = steering.controller.guardrails
    guardrails.settings, guardrails.base_learning_rate = steering.bounds(), steering.levers.peak
    steering.controller.load_state_dict(state["controller"])
    if any(steering.ranks.gathered(state["process"] != here)):
        steering.readings.begin_anew(steering.sequences, steering.course.decision)  # each process has its own losses
    else:
        steering.readings.load_state_dict(state["readings"])
    steering.snapshots.spoilt = list(state["spoilt"])
    steering.snapshots.drop()
    if not steering.finished and steering.controller.snapshotted_here():
        steering.snapshots.take()


def _compared(steering: Steering) -> dict[str, Any]:
    """Return what must not have changed where a run goes on, as plain JSON values."""
    settings = steering.settings
    same = {name: getattr(settings, name) for name in _SAME}
    return same | {"policy": name_of(settings.policy), "base_schedule": asdict(steering.course.schedule)}


def _check_same(saved: Mapping[str, Any], now: Mapping[str, Any]) -> None:
    for name, value in now.items():
        if saved.get(name) != value:
            raise ValueError(f"{name} must be what it was when the state was saved, {saved.get(name)!r}, got {value!r}")


def _check_process(saved: list[int], here: list[int]) -> None:
    if saved != here:
        raise ValueError(
            f"state of a sharded model must be loaded by the process that saved it, {saved[0]} of {saved[1]}, "
            f"got process {here[0]} of {here[1]}; save one file per process"
        )
