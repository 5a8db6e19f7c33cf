"""Collect what somebody else's loop tells, step by step, and make the telemetry of an interval of it."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import replace
from typing import Any

import torch
from torch import nn

from trainpilot.agents.steering.levers import Levers
from trainpilot.agents.steering.ranks import Ranks, Share
from trainpilot.agents.steering.stopwatch import Stopwatch
from trainpilot.llm_runtime.energy import EnergyMeter, EnergyReading
from trainpilot.llm_runtime.interval import Interval, StepRecord
from trainpilot.llm_runtime.measure import memory_share
from trainpilot.llm_runtime.precision import synchronise
from trainpilot.llm_runtime.probe import ProbeResult, probe_curvature
from trainpilot.llm_runtime.probe_plan import probe_due, sequences_probed
from trainpilot.llm_runtime.telemetry import Telemetry


class Readings:
    """The meters of a steered loop.

    The probe takes the update of the last step but one of an interval, and the beginning of the first micro-batch of
    its last step, before that is trained on: fresh text, without taking any from the loop.

    Args:
        levers: Model and optimiser.
        meter: Energy meter.
        clock: Returns seconds.
        ranks: The processes that train together.
        sequences: Budget of the run.
        sequence_length: Tokens of a sequence.
        gradient_clip: Largest norm of a gradient, or None for no limit.
        probe: Whether to probe the curvature.
    """

    def __init__(
        self,
        levers: Levers,
        meter: EnergyMeter,
        clock: Callable[[], float],
        ranks: Ranks,
        *,
        sequences: int,
        sequence_length: int,
        gradient_clip: float | None,
        probe: bool,
    ) -> None:
        self.levers, self.ranks = levers, ranks
        self.sequences, self.sequence_length = sequences, sequence_length
        self.gradient_clip, self.probe = gradient_clip, probe
        self.watch = Stopwatch(clock, meter)
        self.start_sequences = 0
        self.start_sparsity = 0.0
        self.mask_updates = 0
        self.switch_s = 0.0
        self.evaluation_s = 0.0
        self.probe_wanted = False
        self.probe_sequences = 1
        """Sequences that a probe is to look at, in this process."""
        self.micro_batches = 1
        self._taken = 0
        self._decision = 0
        self._before: list[tuple[nn.Parameter, torch.Tensor]] = []
        self._losses: list[tuple[torch.Tensor, float]] = []
        self._interval: Interval | None = None
        self._begun: tuple[float, EnergyReading] | None = None

    def clock(self) -> float:
        """Return the seconds of the run, without its pauses."""
        return self.watch.seconds()

    def pause(self) -> None:
        """Stop clock and meter: what comes now is no cost of the interval. Once is enough."""
        self.watch.pause()

    def go_on(self) -> None:
        """Let clock and meter go on; nothing happens where they do."""
        self.evaluation_s += self.watch.go_on()

    def begin_interval(self, sequences: int) -> None:
        """Forget the interval before; `sequences` have been trained on so far."""
        synchronise(self.levers.device)
        self.start_sequences, self._taken = sequences, 0
        self.start_sparsity, self.mask_updates, self.switch_s = self.levers.sparsity(), 0, 0.0
        self._interval = None
        self._begun = self.watch.read() if sequences else None  # what comes before a run is not its own

    def begin_anew(self, sequences: int, decision: int) -> None:
        """Begin the interval of a decision again, in the midst of it."""
        self.begin_interval(sequences)
        self._decision, self._before, self._begun = decision, [], None

    def begin_step(self, batch_size: int, *, last: bool) -> None:
        """Get ready for a step of so many sequences; the `last` of an interval may begin with a probe."""
        if self._interval is None:
            start, reading = self._begun or self.watch.read()
            controls = self.levers.controls
            self._interval = Interval(controls, start, reading, self.start_sequences, self.start_sparsity)
        self._losses = []
        self.probe_wanted = bool(last and self._before and self._interval.probe is None)
        if self.probe_wanted:
            self.probe_sequences = -(-int(sequences_probed(self._taken + batch_size)) // self.ranks.world_size)

    def keep_weights(self, *, next_is_last: bool) -> None:
        """Keep the weights where the next step may begin with a probe: what this step changes is the update."""
        if not self.probe_wanted:
            due = probe_due(self._decision, self.start_sequences / self.sequences)
            wanted = next_is_last and self.probe and bool(due)
            self._before = [(p, p.detach().clone()) for p in self.levers.parameters()] if wanted else []

    def note_loss(self, loss: torch.Tensor, share: float) -> None:
        """Take in the mean loss of a micro-batch and its share of the step."""
        self._losses.append((loss.detach().float(), share))
        self.micro_batches = len(self._losses)

    def probe(self, loss: Callable[[], torch.Tensor]) -> None:
        """Measure slope and curvature along the last update on what `loss` looks at."""
        interval = self._open()
        synchronise(self.levers.device)
        start = self.clock()
        updates = [(parameter, parameter.detach() - before) for parameter, before in self._before]
        self._before, self.probe_wanted = [], False
        with looking(self.levers.model), self.levers.autocast("fp32"):
            try:
                found = probe_curvature(updates, lambda: self._looked_at(loss))
                interval.probe = found if found.finite else None
            except torch.OutOfMemoryError:  # then the run goes without, but the others would wait for this one
                if self.ranks.world_size > 1:
                    raise
        interval.probe_s = self.clock() - start

    def _looked_at(self, loss: Callable[[], torch.Tensor]) -> torch.Tensor:
        device = self.levers.device
        with torch.random.fork_rng(devices=[device] if device.type == "cuda" else []):  # the same noise three times
            value = loss().detach().float()
        self.ranks.settle(self.levers.model)
        return value

    def end_step(self, gradient_norm: torch.Tensor, sequences: int) -> None:
        """Take in a step that has been made."""
        interval = self._open()
        if not self._losses:
            raise ValueError("a step must tell its loss; call note_loss, or step.backward, for every micro-batch")
        loss = torch.stack([value * share for value, share in self._losses]).sum()
        record = StepRecord(loss, self.ranks.whole(gradient_norm.detach()))
        interval.note_step(record, self.levers.optimizer)
        self._taken += sequences
        self._losses = []

    def drop_step(self) -> None:
        """Forget a step that was not made."""
        self._losses, self._before, self.probe_wanted = [], [], False

    def telemetry(self, *, decision: int, tokens: int, finished: bool, finishing: bool, budget_used: float,
                  validation_loss: float | None) -> Telemetry:  # fmt: skip
        """Return what the interval measured."""
        interval, levers = self._open(), self.levers
        self._decision = decision + 1
        interval.note_moment(levers.optimizer)
        interval.switch_s = self.switch_s
        cost = self._cost(interval)
        batch_size = self._taken / len(interval.steps)
        clip = self.gradient_clip
        learned = interval.losses_and_gradients(
            batch_size, gradient_clip=float("inf") if clip is None else clip, beta1=levers.beta1
        )
        evaluation_s, self.evaluation_s = self.evaluation_s, 0.0
        return Telemetry(
            **learned,
            **cost,
            decision=decision,
            budget_used=budget_used,
            tokens=tokens,
            interval_tokens=self._taken * self.sequence_length,
            steps=len(interval.steps),
            epochs_seen=0.0,
            validation_loss=validation_loss,
            requested=interval.controls,
            learning_rate=levers.learning_rate(),
            batch_size=batch_size,
            micro_batch_size=max(1, round(batch_size / self.ranks.world_size / self.micro_batches)),
            precision=levers.precision(),
            sparsity=levers.sparsity(),
            finishing=finishing,
            finished=finished,
            evaluation_time_s=evaluation_s,
            memory_share=memory_share(levers.device),
        )

    def _cost(self, interval: Interval) -> dict[str, Any]:
        """Return what the interval cost; of several processes, in all, whose mean losses and probe it has then."""
        synchronise(self.levers.device)
        cost = interval.cost(*self.watch.read())
        if self.ranks.world_size == 1:
            return cost
        losses = torch.stack([step.loss for step in interval.steps]).tolist()
        mine = Share(losses=losses, probe=interval.probe, time_s=cost["time_s"], energy_j=cost["energy_j"])
        share = self.ranks.together(mine, self.watch.meter)
        means = torch.tensor(share.losses, device=self.levers.device)
        interval.steps = [StepRecord(loss, s.gradient_norm) for loss, s in zip(means, interval.steps, strict=True)]
        interval.probe = share.probe
        known = share.energy_j is not None and share.time_s > 0
        power_w = share.energy_j / share.time_s if known else None  # type: ignore[operator]
        return cost | {"time_s": share.time_s, "energy_j": share.energy_j, "power_w": power_w}

    def _open(self) -> Interval:
        if self._interval is None:
            raise ValueError("a step must be begun before it ends; call begin_step, or use `with steering.step()`")
        return self._interval

    def let_go(self) -> None:
        """Drop the copy of the weights."""
        self._before = []

    def state_dict(self) -> dict[str, Any]:
        """Return what has been collected of the interval so far."""
        names = ("start_sequences", "start_sparsity", "mask_updates", "switch_s", "evaluation_s", "micro_batches")
        state: dict[str, Any] = {name: getattr(self, name) for name in names}
        state |= {"taken": self._taken, "decision": self._decision, "before": [b.clone() for _, b in self._before]}
        state["evaluation_s"] += self.watch.paused_s()
        now = self.watch.read()
        state["begun"] = None if self._begun is None else _since(self._begun, now)
        if (interval := self._interval) is not None:
            state["interval"] = {
                "losses": [float(step.loss) for step in interval.steps],
                "norms": [float(step.gradient_norm) for step in interval.steps],
                "moments": [float(norm) for norm in interval.moment_norms],
                "since": _since((interval.start_s, interval.reading), now),
                "probe": None if interval.probe is None else vars(interval.probe),
                "probe_s": interval.probe_s,
            }
        return state

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go on in the midst of the interval; seconds and joules up to here are kept, the pause is left out."""
        for name in ("start_sequences", "start_sparsity", "mask_updates", "switch_s", "evaluation_s", "micro_batches"):
            setattr(self, name, state[name])
        device = self.levers.device
        self._taken, self._decision = state["taken"], state["decision"]
        before = [tensor.clone().to(device) for tensor in state["before"]]
        self._before = list(zip(self.levers.parameters(), before, strict=True)) if before else []
        self._interval, self._losses, self.probe_wanted = None, [], False
        now = self.watch.read()
        self._begun = None if state["begun"] is None else _before(state["begun"], now)
        if (kept := state.get("interval")) is None:
            return
        start, begun = _before(kept["since"], now)
        self._interval = Interval(self.levers.controls, start, begun, self.start_sequences, self.start_sparsity)
        pairs = zip(kept["losses"], kept["norms"], strict=True)
        self._interval.steps = [
            StepRecord(torch.tensor(a, device=device), torch.tensor(b, device=device)) for a, b in pairs
        ]
        self._interval.moment_norms = [torch.tensor(norm, device=device) for norm in kept["moments"]]
        self._interval.probe = None if kept["probe"] is None else ProbeResult(**kept["probe"])
        self._interval.probe_s = kept["probe_s"]


@contextmanager
def looking(model: nn.Module) -> Iterator[None]:
    """Put a model into evaluation mode, and each of its modules back into its own."""
    modes = [(module, module.training) for module in model.modules()]
    model.eval()
    try:
        yield
    finally:
        for module, training in modes:
            module.training = training


Moment = tuple[float, EnergyReading]


def _since(then: Moment, now: Moment) -> tuple[float, float | None]:
    """Return the seconds and joules between two moments."""
    one, other = then[1].energy_j, now[1].energy_j
    return now[0] - then[0], None if one is None or other is None else other - one


def _before(since: tuple[float, float | None], now: Moment) -> Moment:
    """Return the moment so many seconds and joules ago."""
    time_s, energy_j = since
    known = energy_j is not None and now[1].energy_j is not None
    return now[0] - time_s, replace(now[1], energy_j=now[1].energy_j - energy_j if known else None)  # type: ignore[operator]
