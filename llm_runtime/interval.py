"""Record losses, gradient norms, time and energy of the steps of an interval, and aggregate them for its telemetry.

`IntervalRecorder` does the recording. The functions above it turn what was recorded into numbers: statistics of the
losses, and the gradient noise scale, which is estimated from Adam's buffers without a second backward pass.
"""

from __future__ import annotations

import math
import os
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch
from torch.optim import Optimizer

from trainpilot.llm_runtime import optimizer as adam
from trainpilot.llm_runtime.energy.meter import EnergyReading, energy_between
from trainpilot.llm_runtime.energy.plausible import too_much
from trainpilot.llm_runtime.precision import synchronise
from trainpilot.llm_runtime.probe import ProbeResult
from trainpilot.llm_runtime.process_group import IntervalShare, OneProcess, ProcessGroup
from trainpilot.llm_runtime.timing import Stopwatch


def noise_scale_from_moments(
    gradient_norm_squared: float, moment_norm_squared: float, beta1: float, batch_size: float
) -> float | None:
    """Return the gradient noise scale tr(Sigma)/|G|^2 in sequences, or `None` where the estimate has no meaning.

    With m the exponential mean of gradients g of batch B, in a stationary stretch

        E|m|^2 = |G|^2 + (1 - b)/(1 + b) tr(Sigma)/B    and    E|g|^2 = |G|^2 + tr(Sigma)/B

    hence tr(Sigma)/B = (|g|^2 - |m|^2) (1 + b)/(2 b) and |G|^2 = |m|^2 - (1 - b)/(1 + b) tr(Sigma)/B.
    The noise scale itself: McCandlish et al. 2018, "An empirical model of large-batch training". Where the signal is
    lost in the noise the value saturates at some hundred batches; it is a trend, not a set-point.

    Args:
        gradient_norm_squared: Mean of |g|^2 over the last steps, of the gradients that Adam saw.
        moment_norm_squared: |m|^2 after the last of these steps, bias-corrected.
        beta1: Adam's first-moment decay, in (0, 1).
        batch_size: Sequences per step.
    """
    if not 0 < beta1 < 1 or moment_norm_squared <= 0:
        return None
    noise = (gradient_norm_squared - moment_norm_squared) * (1 + beta1) / (2 * beta1)
    signal = moment_norm_squared - (1 - beta1) / (1 + beta1) * noise
    if noise <= 0:
        return 0.0
    return noise / max(signal, 1e-2 * moment_norm_squared) * batch_size


MOMENT_EVERY = 10
"""The norm of Adam's first moment is taken once in this many steps, which is about the memory of the moment."""


@dataclass(frozen=True)
class LossStatistics:
    """Loss of an interval, in nats/token."""

    mean: float
    std: float
    """Standard deviation around a straight line, so that progress does not count as noise."""
    maximum: float
    finite: bool


def loss_statistics(losses: Sequence[float]) -> LossStatistics:
    """Return mean, spread around the trend and maximum of per-step losses."""
    values = np.asarray(losses, dtype=np.float64)
    if not np.isfinite(values).all():
        return LossStatistics(float("nan"), float("nan"), float("nan"), finite=False)
    std = 0.0
    if len(values) > 2:
        steps = np.arange(len(values))
        residuals = values - np.polyval(np.polyfit(steps, values, 1), steps)
        std = float(np.sqrt((residuals**2).sum() / (len(values) - 2)))
    return LossStatistics(float(values.mean()), std, float(values.max()), finite=True)


def mean_finite(values: Sequence[float]) -> float:
    """Return the mean of the finite values, NaN if there are none: float16 skips a step whose gradient overflowed."""
    finite = [value for value in values if math.isfinite(value)]
    return sum(finite) / len(finite) if finite else math.nan


def interval_noise_scale(
    gradient_norms: Sequence[float],
    moment_norms: Sequence[float],
    batch_size: float,
    *,
    gradient_clip: float,
    beta1: float,
) -> float | None:
    """Return the gradient noise scale in sequences from the norms of gradients and of Adam's first moment."""
    seen = [min(norm, gradient_clip) ** 2 for norm in gradient_norms if norm != math.inf]
    moments = [norm**2 for norm in moment_norms]
    if not (seen and moments and math.isfinite(sum(seen) + sum(moments))):
        return None
    gradient, moment = sum(seen) / len(seen), sum(moments) / len(moments)
    return noise_scale_from_moments(gradient, moment, beta1, batch_size)


def memory_share(device: torch.device) -> float | None:
    """Return peak memory in use over the device's memory; for a CPU, this process's resident memory over the RAM."""
    if device.type == "cuda":
        peak = torch.cuda.max_memory_allocated(device)
        torch.cuda.reset_peak_memory_stats(device)
        return peak / torch.cuda.get_device_properties(device).total_memory
    if device.type == "cpu" and sys.platform == "linux":
        import resource  # not there on Windows

        total = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024 / total
    return None


@dataclass(frozen=True)
class StepRecord:
    """One optimizer step. The tensors stay on the device, so that nothing waits for it."""

    loss: torch.Tensor
    """Mean training loss of the batch, a scalar in nats/token."""
    gradient_norm: torch.Tensor
    """Euclidean norm of the gradient before clipping, a scalar."""
    adam_gradient_norm: torch.Tensor | None = None
    """Norm of the gradient that Adam saw, where it steps only a part of the model; a scalar."""


Moment = tuple[float, EnergyReading]
"""Seconds on the run's clock, and the energy meter's reading at that time."""

_SAVED = ("start_sequences", "start_sparsity", "mask_updates", "switch_s", "evaluation_s", "micro_batches")


class IntervalRecorder:
    """Records one interval after the other: losses and gradient norms of its steps, its probe, its time and energy.

    Args:
        optimizer: Steps the model. The norm of Adam's first moment is read from it.
        device: Where the model is.
        stopwatch: Clock and energy meter of the run.
        gradient_clip: Largest norm of a gradient; `None` where nothing clips it.
        ranks: The processes that train the model together.
    """

    def __init__(
        self,
        optimizer: Optimizer,
        device: torch.device,
        stopwatch: Stopwatch,
        *,
        gradient_clip: float | None,
        ranks: ProcessGroup | None = None,
    ) -> None:
        self.optimizer, self.device, self.stopwatch = optimizer, device, stopwatch
        self.gradient_clip = gradient_clip
        self.ranks: ProcessGroup = ranks if ranks is not None else OneProcess()
        self.decision = 0
        """Decision that follows the interval that was recorded last. A rollback of the run leaves it as it is."""
        self.evaluation_s = 0.0
        """Seconds spent on evaluation since the last interval."""
        self.micro_batches = 1
        """Micro-batches of the newest step."""
        self.skips = False
        """Whether steps whose gradient is not finite are not made; they are then left out of the interval's losses."""
        self.skipped_steps = 0
        """How many steps were not made, in the intervals that have ended."""
        self._losses: list[tuple[torch.Tensor, float]] = []
        self._clear(0, 0.0)

    def _clear(self, start_sequences: int, start_sparsity: float) -> None:
        self.start_sequences = start_sequences
        """Sequences trained on before the interval."""
        self.start_sparsity = start_sparsity
        """Sparsity before the interval."""
        self.sequences = 0
        """Sequences trained on in the interval."""
        self.mask_updates = 0
        """How often the masks have been raised in the interval."""
        self.switch_s = 0.0
        """Seconds of the interval spent on changing controls."""
        self.probe: ProbeResult | None = None
        """Result of the interval's curvature probe."""
        self.probe_s = 0.0
        """Seconds of the interval spent on the curvature probe."""
        self.steps: list[StepRecord] = []
        self._moment_norms: list[torch.Tensor] = []
        self._start: Moment | None = None
        self._open = False

    def seconds(self) -> float:
        """Return the seconds on the run's clock, pauses left out."""
        return self.stopwatch.seconds()

    def begin(self, start_sequences: int, start_sparsity: float, *, at_first_step: bool = False) -> float:
        """Begin an interval and forget the one before.

        Args:
            start_sequences: Sequences trained on so far.
            start_sparsity: Sparsity of the model now.
            at_first_step: Begin to measure time and energy with the first step instead of now.

        Returns:
            The seconds on the run's clock.
        """
        synchronise(self.device)
        self._clear(start_sequences, start_sparsity)
        if at_first_step:
            return self.seconds()
        self._start = self.stopwatch.read()
        return self._start[0]

    def begin_step(self) -> None:
        """Begin a step; the first one of an interval opens it."""
        if self._start is None:
            self._start = self.stopwatch.read()
        self._open = True
        self._losses = []

    def note_loss(self, loss: torch.Tensor, share: float) -> None:
        """Record the mean loss of a micro-batch and its share of the step's sequences."""
        self._losses.append((loss.detach().float(), share))
        self.micro_batches = len(self._losses)

    def drop_step(self) -> None:
        """Forget a step that was begun and not made."""
        self._losses = []

    def end_step(self, gradient_norm: torch.Tensor, sequences: int, loss: torch.Tensor | None = None) -> None:
        """Record a step that has been made; now and then take the norm of Adam's first moment.

        Args:
            gradient_norm: Euclidean norm of the gradient before clipping, a scalar.
            sequences: Sequences of the step, in all processes together.
            loss: Mean loss of the step, a scalar in nats/token; by default the mean of those of `note_loss`.

        Raises:
            ValueError: the step was not begun, or it has no loss.
        """
        if not self._open:
            raise ValueError("a step must be begun before it ends; call begin_step, or use `with steering.step()`")
        if loss is None:
            if not self._losses:
                raise ValueError("a step must have a loss; call note_loss, or step.backward, for every micro-batch")
            loss = torch.stack([value * share for value, share in self._losses]).sum()
            self._losses = []
        seen = self.optimizer.adam_gradient_norm if isinstance(self.optimizer, adam.JointOptimizer) else None
        self.steps.append(StepRecord(loss, self.ranks.full_tensor(gradient_norm.detach()), seen))
        self.sequences += sequences
        if len(self.steps) % MOMENT_EVERY == 0:
            self._note_moment()

    def _note_moment(self) -> None:
        norm = adam.first_moment_norm(self.optimizer)
        if norm is not None:
            self._moment_norms.append(norm)

    def telemetry_fields(self) -> dict[str, Any]:
        """End the interval, and return the telemetry fields of its steps, losses, gradients, probe, time and energy.

        Waits for the device. Of several processes: mean losses, the longest time, the joules of all.

        Raises:
            ValueError: the interval has no step.
        """
        if not self._open:
            raise ValueError("an interval must have a step before it ends; call begin_step and end_step")
        self._note_moment()
        synchronise(self.device)
        cost = self._cost()
        evaluation_s, self.evaluation_s = self.evaluation_s, 0.0
        return {
            **self._losses_and_gradients(),
            **cost,
            "steps": len(self.steps),
            "batch_size": self.batch_size,
            "evaluation_time_s": evaluation_s,
        }

    @property
    def batch_size(self) -> float:
        """Mean sequences per step of the interval."""
        return self.sequences / len(self.steps)

    def _losses_and_gradients(self) -> dict[str, Any]:
        moments = torch.stack(self._moment_norms).tolist() if self._moment_norms else []
        losses = torch.stack([record.loss for record in self.steps]).tolist()
        norms = torch.stack([record.gradient_norm for record in self.steps]).tolist()
        if self.skips:
            losses, norms = self._without_skipped(losses, norms)
        statistics = loss_statistics(losses)
        clip = math.inf if self.gradient_clip is None else self.gradient_clip
        stepped = adam.adam_of(self.optimizer) or self.optimizer
        beta1 = float(stepped.param_groups[0].get("betas", (0.9,))[0])
        seen, bound = norms, clip
        if parts := [record.adam_gradient_norm for record in self.steps if record.adam_gradient_norm is not None]:
            seen, bound = torch.stack(parts).tolist(), math.inf  # as Adam saw them: clipped
        scale = interval_noise_scale(seen, moments, self.batch_size, gradient_clip=bound, beta1=beta1)
        return {
            "train_loss": statistics.mean,
            "train_loss_std": statistics.std,
            "train_loss_max": statistics.maximum,
            "diverged": not statistics.finite,
            "gradient_norm": mean_finite(norms),
            "clipped_share": sum(norm > clip for norm in norms) / len(norms),
            "noise_scale": scale,
            "relative_update": self.probe.relative_update if self.probe else None,
            "probe_linear": self.probe.linear if self.probe else None,
            "probe_quadratic": self.probe.quadratic if self.probe else None,
        }

    def _without_skipped(self, losses: list[float], norms: list[float]) -> tuple[list[float], list[float]]:
        """Return the losses and norms of the steps that were made, and count the others.

        Where more than half of an interval was skipped all are returned: the weights are lost, and it has diverged.
        """
        made = [(loss, norm) for loss, norm in zip(losses, norms, strict=True) if math.isfinite(loss + norm)]
        self.skipped_steps += len(losses) - len(made)
        if 2 * len(made) < len(losses):
            return losses, norms
        return [loss for loss, _ in made], [norm for _, norm in made]

    def _cost(self) -> dict[str, Any]:
        """Return the fields of time and energy; of several processes, average their losses and probes too.

        Joules are unknown where they cannot be those of the interval: none in a positive time, which is a counter that
        stands still, or more than the power limit allows in that time, which is a meter or a clock that is wrong.
        """
        assert self._start is not None, "an open interval has begun"
        start_s, before = self._start
        end_s, after = self.stopwatch.read()
        time_s, (energy_j, source) = end_s - start_s, energy_between(before, after)
        power_w = after.power_w
        if energy_j is not None and too_much(energy_j, time_s, before, after, self.stopwatch.meter.resolution_s):
            energy_j = None
        if self.ranks.world_size > 1:
            time_s, energy_j = self._all_reduce(time_s, energy_j)
            power_w = None
        if energy_j is not None and energy_j <= 0 < time_s:
            energy_j = None
        if energy_j is None:
            source = None
        return {
            "time_s": time_s,
            "probe_time_s": self.probe_s,
            "switch_time_s": self.switch_s,
            "energy_j": energy_j,
            "energy_source": source,
            "power_w": energy_j / time_s if energy_j is not None and time_s > 0 else power_w,
        }

    def _all_reduce(self, time_s: float, energy_j: float | None) -> tuple[float, float | None]:
        """Take the mean losses and the mean probe of all processes, and return their time and their joules."""
        losses = torch.stack([step.loss for step in self.steps]).tolist()
        mine = IntervalShare(losses=losses, probe=self.probe, time_s=time_s, energy_j=energy_j)
        share = self.ranks.all_reduce_interval(mine, self.stopwatch.meter)
        means = torch.tensor(share.losses, device=self.device)
        self.steps = [replace(step, loss=loss) for loss, step in zip(means, self.steps, strict=True)]
        self.probe = share.probe
        return share.time_s, share.energy_j

    def state_dict(self) -> dict[str, Any]:
        """Return what has been recorded of the interval so far; `torch.save` can write it."""
        state: dict[str, Any] = {name: getattr(self, name) for name in _SAVED}
        state |= {"taken": self.sequences, "decision": self.decision, "skipped_steps": self.skipped_steps}
        state["evaluation_s"] += self.stopwatch.paused_s()
        now = self.stopwatch.read()
        state["begun"] = None if self._start is None else _since(self._start, now)
        if self._open:
            state["interval"] = {
                "losses": [float(step.loss) for step in self.steps],
                "norms": [float(step.gradient_norm) for step in self.steps],
                "adam_norms": [_number(step.adam_gradient_norm) for step in self.steps],
                "moments": [float(norm) for norm in self._moment_norms],
                "since": state["begun"],
                "probe": None if self.probe is None else vars(self.probe),
                "probe_s": self.probe_s,
            }
        return state

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go on within an interval. Its seconds and joules so far are kept; the time between is left out."""
        self._clear(state["start_sequences"], state["start_sparsity"])
        for name in _SAVED:
            setattr(self, name, state[name])
        self.sequences, self.decision, self._losses = state["taken"], state["decision"], []
        self.skipped_steps = state.get("skipped_steps", 0)  # versions before did not write it
        saved = state.get("interval")
        begun = state["begun"] if saved is None else saved["since"]
        self._start = None if begun is None else _before(begun, self.stopwatch.read())
        self._open = saved is not None
        if saved is None:
            return
        seen = saved.get("adam_norms") or [None] * len(saved["losses"])  # version 0.1 did not write them
        self.steps = [
            StepRecord(self._scalar(loss), self._scalar(norm), None if part is None else self._scalar(part))
            for loss, norm, part in zip(saved["losses"], saved["norms"], seen, strict=True)
        ]
        self._moment_norms = [self._scalar(norm) for norm in saved["moments"]]
        self.probe = None if saved["probe"] is None else ProbeResult(**saved["probe"])
        self.probe_s = saved["probe_s"]

    def _scalar(self, value: float) -> torch.Tensor:
        return torch.tensor(value, device=self.device)


def _number(value: torch.Tensor | None) -> float | None:
    return None if value is None else float(value)


def _since(then: Moment, now: Moment) -> tuple[float, float | None]:
    """Return the seconds and joules between two moments."""
    one, other = then[1].energy_j, now[1].energy_j
    return now[0] - then[0], None if one is None or other is None else other - one


def _before(since: tuple[float, float | None], now: Moment) -> Moment:
    """Return the moment that lies so many seconds and joules before `now`."""
    time_s, energy_j = since
    known = energy_j is not None and now[1].energy_j is not None
    return now[0] - time_s, replace(now[1], energy_j=now[1].energy_j - energy_j if known else None)  # type: ignore[operator]
