"""Steered runs of a second in which meter, clock, data, callbacks and policy can be made to fail."""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import numpy as np
import torch
from _hostile import BASE, BATCH, DECISIONS, LENGTH, SEQUENCES, TUNED_RATE, Bytes, NextByte, text_rows
from torch import Tensor

from tests.attack.valid_runs import digest_of
from trainpilot import Steering, SteeringSettings
from trainpilot.envs.action import KEEP, Action
from trainpilot.llm_runtime.energy.meter import SOURCES, NoMeter
from trainpilot.llm_runtime.telemetry import Telemetry

SHORT: dict[str, Any] = {"sequences": 480, "decisions": 12}
"""A run of 60 steps, for faults that must not touch the weights at all."""
Spoil = Callable[["FaultyRun", int, Any, Tensor], None]
"""Makes the backward pass of a step, from its number, the open step and the rows that are due."""


def keep(observation: np.ndarray, masks: np.ndarray) -> Action:
    """Change nothing, within guardrails."""
    return KEEP


def plain(run: FaultyRun, number: int, step: Any, rows: Tensor) -> None:
    """Make the backward pass of a step as it should be."""
    step.backward(run.model, batch=rows)


class FaultyRun:
    """A steered run of a small network, in a loop that goes on after an exception.

    Args:
        policy: As `SteeringSettings.policy`.
        seed: Decides the initial weights and the order of the data.
        data: Position of the data for rollbacks; `True` for the run's own.
        around: Further arguments of `Steering`.
        settings: Further fields of `SteeringSettings`.
    """

    def __init__(
        self, policy: Any, *, seed: int = 0, data: Any = None, around: Mapping[str, Any] | None = None, **settings: Any
    ) -> None:
        torch.manual_seed(seed)
        self.model = NextByte()
        optimizer = torch.optim.AdamW(self.model.parameters(), lr=TUNED_RATE, betas=(0.9, 0.95))
        train, self.validation = text_rows()
        self.data = Bytes(train, seed)
        options: dict[str, Any] = {
            "sequences": SEQUENCES, "batch_size": BATCH, "sequence_length": LENGTH, "decisions": DECISIONS,
            "base_schedule": BASE, "policy": policy,
        }  # fmt: skip
        given = {"meter": NoMeter("an attack"), **(around or {})}
        rewinds = self.data if data is True else data
        self.steering = Steering(self.model, optimizer, SteeringSettings(**options | settings), data=rewinds, **given)
        self.errors = 0
        """Exceptions that the loop has seen."""

    def train(self, backward: Spoil = plain) -> FaultyRun:
        """Train to the end of the run.

        Raises:
            RuntimeError: the run does not come to its end.
        """
        most = 4 * self.steering.settings.known_sequences() // BATCH + 100
        for number in range(most):
            if self.steering.finished:
                return self
            try:
                with self.steering.step() as step:
                    backward(self, number, step, self.data.take(step.batch_size))
            except Exception:
                self.errors += 1
        raise RuntimeError(f"the run has not ended after {most} steps, {self.errors} of them refused")

    def loss(self) -> float:
        """Return the validation loss, in nats/token."""
        with torch.no_grad():
            return float(self.model(self.validation))

    def weights(self) -> str:
        """Return a digest of the weights."""
        return digest_of({name: value.detach() for name, value in self.model.state_dict().items()})


def implausible(run: FaultyRun, most_w: float = math.inf) -> str | None:
    """Return what no meter and no clock can have measured in a run's records and summary; `None` for nothing."""
    summary, told = run.steering.summary(), [record.telemetry for record in run.steering.records]
    faults = itertools.chain.from_iterable(_faults(each, most_w) for each in told)
    totals = (_not_an_amount(name, summary[name], "the summary") for name in ("time_s", "energy_j", "validation_loss"))
    nothing = [] if told else ["no interval was recorded"]
    return next((fault for fault in itertools.chain(nothing, faults, totals) if fault), None)


AMOUNTS = (
    "time_s", "probe_time_s", "switch_time_s", "evaluation_time_s", "energy_j", "power_w", "validation_loss",
)  # fmt: skip


def _faults(told: Telemetry, most_w: float) -> Iterator[str | None]:
    """Yield what is implausible in an interval."""
    where = f"interval {told.decision}"
    yield from (_not_an_amount(name, getattr(told, name), where) for name in AMOUNTS)
    joules, seconds, source = told.energy_j, told.time_s, told.energy_source
    if joules is None or seconds is None:
        return
    if source not in SOURCES:
        yield f"{joules:.3g} J from the source {source!r} in {where}"
    if joules > most_w * seconds:
        yield f"{joules:.3g} J in {seconds:.3g} s as {source} in {where}, at a limit of {most_w:g} W"
    if joules == 0 and seconds > 0:
        yield f"0 J in {seconds:.3g} s as {source} in {where}"
    if (seen := told.epochs_seen) is not None:
        yield _not_an_amount("epochs_seen", seen, where)


def _not_an_amount(name: str, value: Any, where: str) -> str | None:
    known = isinstance(value, int | float) and math.isfinite(value) and value >= 0
    return None if value is None or known else f"{name} is {value!r} in {where}"
