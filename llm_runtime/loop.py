"""Apply controls to a model in training, measure its intervals, and copy and restore its state.

`ControlledLoop` is the one engine of trainpilot. `LiveRun` trains a model of ours on it, and `agents.steering.Steering`
attaches a controller to somebody else's training loop with it. A step of either:

    batch_size = loop.begin_step()                          # sets the learning rate, raises the masks
    ...                                                     # gradient of batch_size sequences, then optimizer.step()
    loop.end_step(gradient_norm, batch_size, loss)          # holds masked weights at zero, records the step

and an interval is `begin_interval(controls)`, steps, `end_interval()`, which returns its `Telemetry`.
"""

from __future__ import annotations

import copy
import math
import random
import time
import weakref
from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager
from dataclasses import asdict, fields, replace
from functools import partial
from typing import TYPE_CHECKING, Any, Literal, cast

import numpy as np
import torch
from torch import Tensor, nn
from torch.optim import Optimizer
from torch.utils.hooks import RemovableHandle

from trainpilot.llm_runtime import optimizer as adam
from trainpilot.llm_runtime import precision as number_format
from trainpilot.llm_runtime import width as channels
from trainpilot.llm_runtime.budget import Gauge
from trainpilot.llm_runtime.clock import trusted_clock
from trainpilot.llm_runtime.config import Controls, Precision, Pruning
from trainpilot.llm_runtime.energy import select_meter
from trainpilot.llm_runtime.energy.meter import EnergyMeter
from trainpilot.llm_runtime.energy.plausible import plausible_meter
from trainpilot.llm_runtime.interval import IntervalRecorder, memory_share
from trainpilot.llm_runtime.layers import is_linear
from trainpilot.llm_runtime.masks import WeightMasks
from trainpilot.llm_runtime.plain_values import shown
from trainpilot.llm_runtime.precision import synchronise
from trainpilot.llm_runtime.probe import ProbeResult, probe_curvature
from trainpilot.llm_runtime.process import random_apart
from trainpilot.llm_runtime.process_group import IntervalShare, OneProcess, ProcessGroup
from trainpilot.llm_runtime.progress import BudgetProgress, MeasuredProgress
from trainpilot.llm_runtime.saved_loop import SavedLoop, SavedSnapshot
from trainpilot.llm_runtime.schedules import (
    MASK_UPDATES,
    cubic_sparsity,
    learning_rate,
    mask_updates_due,
    probe_due,
    sequences_probed,
)
from trainpilot.llm_runtime.telemetry import Snapshot, Telemetry
from trainpilot.llm_runtime.timing import Stopwatch

if TYPE_CHECKING:
    from transformers import PreTrainedModel

MaskPruning = Literal["none", "magnitude", "evolution"]
_OWNER = "_trainpilot_loop"


class ControlledLoop:
    """A model and its optimizer in training, under controls that may change between two intervals.

    The parameter groups of the optimizer keep the ratios that their learning rates have at the beginning. When the
    batch size changes, Adam's decay and the learning rate follow it, so that the change alone does not move the run.

    Args:
        model: The model in training.
        optimizer: Steps the model, at the peak learning rate of the base schedule; a `JointOptimizer` for several.
        progress: The budget and the base schedule.
        start: Controls at the beginning, those of the untouched base schedule.
        pruning: What the sparsity control does. `width` needs a transformers model.
        meter: Energy meter; by default the best one that the device has.
        clock: Returns seconds.
        ranks: The processes that train the model together; by default this one alone.
        gradient_clip: Largest norm of a gradient; `None` where nothing clips it. Telemetry needs it.
        sets_matmul_precision: Whether `autocast` sets torch's global precision of float32 matrix products. Without it
            fp32 is whatever the user's own setting makes of it, and tf32 must not be among the controls.
        probes: Whether steps begin with a curvature probe where one is due: `probe_wanted` then says so.

    Raises:
        ValueError: the optimizer belongs to another loop, has no parameters, has parameters that are not the model's,
            or has no learning rate above 0; or the budget is in joules, and no meter counts them.
    """

    def __init__(
        self,
        model: nn.Module,
        optimizer: Optimizer,
        progress: BudgetProgress,
        start: Controls,
        *,
        pruning: Pruning = "none",
        meter: EnergyMeter | None = None,
        clock: Callable[[], float] = time.perf_counter,
        ranks: ProcessGroup | None = None,
        gradient_clip: float | None = None,
        sets_matmul_precision: bool = True,
        probes: bool = False,
    ) -> None:
        owners = [getattr(each, _OWNER, None) for each in adam.parts_of(optimizer)]
        if any(owner is not None and owner() is not None for owner in owners):
            raise ValueError(
                "optimizer must be steered by one controller, this one has one already; "
                "call close() on the other, or make the optimizer anew, as in a notebook cell that is run twice"
            )
        self.model, self.optimizer, self.progress = model, optimizer, progress
        self.optimizer_name = adam.name_of(optimizer)
        """Name of the optimizer, for error messages."""
        self.controls = start
        """Controls in force."""
        self.device = _device(model, optimizer)
        self.pruning = pruning
        self.masks = WeightMasks(model, pruning) if pruning in ("magnitude", "evolution") else None
        self.start_width = channels.ffn_width(self._transformer()) if pruning == "width" else 0
        self.channel_importance: Callable[[], list[Tensor]] | None = None
        """Measures the importance of each feed-forward channel, layer by layer; by default the norm of its weights."""
        rates = [_first_rate(group) for group in optimizer.param_groups]
        self.peak = max(rates)
        """Peak of the base schedule: the highest learning rate among the optimizer's groups at the beginning."""
        if not (all(map(math.isfinite, rates)) and self.peak > 0):
            raise ValueError(
                "optimizer must have finite learning rates, the largest above 0, the peak of the base schedule, got "
                f"{', '.join(f'{rate:g}' for rate in rates)}; make it without a warm-up of its own"
            )
        stepped = {id(p) for group in optimizer.param_groups for p in group["params"]}
        self._stepped = [(name, p) for name, p in model.named_parameters() if id(p) in stepped]
        self._start = start
        self._ratios = [_first_rate(group) / self.peak for group in optimizer.param_groups]
        self._rates: list[float] = []
        """Learning rates that were set last, group by group."""
        self.exclusive_learning_rate = True
        """Raise if another component changes the learning rate. Adapters that install a scheduler which takes the
        learning rate from here set this to False."""
        self.sets_matmul_precision, self.probes = sets_matmul_precision, probes
        self.ranks: ProcessGroup = ranks if ranks is not None else OneProcess()
        clock = trusted_clock(clock)
        stopwatch = Stopwatch(clock, plausible_meter(meter if meter is not None else select_meter(str(self.device))))
        self.recorder = IntervalRecorder(
            optimizer, self.device, stopwatch, gradient_clip=gradient_clip, ranks=self.ranks
        )
        if isinstance(progress, MeasuredProgress):
            wait = partial(synchronise, self.device)
            progress.gauge = Gauge(progress.currency, clock, stopwatch.meter, total=self._of_all_processes, wait=wait)
        self.probe_wanted = False
        """Whether the curvature is to be probed before this step's first backward pass."""
        self.probe_sequences = 1
        """Number of sequences that are enough for a probe in this process."""
        self._before: list[tuple[nn.Parameter, Tensor]] = []
        """Weights before the newest step, where the next step may begin with a probe."""
        self._output_precision: str = start.precision
        self._hook: RemovableHandle | None = None
        self._matmul_precision = torch.get_float32_matmul_precision()

    def _transformer(self) -> PreTrainedModel:
        return cast("PreTrainedModel", self.model)

    # Facts -----------------------------------------------------------------------------------------------------------

    @property
    def changes_batch(self) -> bool:
        """Whether the batch size may change: only for Adam, AdamW and Muon is it known how to make that neutral."""
        return adam.follows_batch(self.optimizer)

    @property
    def sharded(self) -> bool:
        """Whether each process holds only its part of the weights."""
        return any(hasattr(p, "full_tensor") for p in self.parameters())

    def parameters(self) -> list[nn.Parameter]:
        """Return the parameters that the optimizer steps, in the model's order."""
        return [p for _, p in self._stepped if p.requires_grad]

    def sparsity(self) -> float:
        """Return the share of prunable weights that are zero, or of removed channels, counted in the model."""
        if self.masks is not None:
            return self.masks.sparsity()
        if self.start_width:
            return 1 - channels.ffn_width(self._transformer()) / self.start_width
        return 0.0

    def effective_precision(self) -> str:
        """Return the number format of the last matrix product in training, read from its output."""
        return self._output_precision

    def autocast(self, precision: Precision | None = None) -> AbstractContextManager[object]:
        """Return the context of a forward pass in `precision`, by default the one in force."""
        wanted = precision or self.controls.precision
        if wanted == "fp32" and not self.sets_matmul_precision:
            return torch.autocast(self.device.type, enabled=False)
        return number_format.autocast(wanted, self.device)

    # Controls --------------------------------------------------------------------------------------------------------

    def apply(self, controls: Controls) -> None:
        """Bring batch size, precision and width into force. Learning rate and masks follow step by step.

        Raises:
            ValueError: a control cannot be used here; nothing has changed then.
        """
        before = self.controls
        if controls.sparsity and self.pruning == "none":
            raise ValueError(f"sparsity must be 0 in a run whose pruning is 'none', got {controls.sparsity}")
        if controls.batch_size != before.batch_size and not self.changes_batch:
            raise ValueError(
                f"batch_size changes need optimizer 'adamw', got {controls.batch_size} after {before.batch_size} "
                f"under {self.optimizer_name!r}; keep the batch or take 'adamw'"
            )
        if controls.precision != before.precision:
            self.check_precision(controls.precision)
        if controls.batch_size != before.batch_size:
            adam.change_batch(self.optimizer, controls.batch_size / before.batch_size)
        self.controls = controls
        if self.start_width:
            keep = channels.channels_for(controls.sparsity, self.start_width)
            if keep < channels.ffn_width(self._transformer()):
                importance = None if self.channel_importance is None else self.channel_importance()
                channels.remove_channels(self._transformer(), self.optimizer, keep, importance)

    def check_precision(self, precision: Precision) -> None:
        """Raise `ValueError` if the device lacks a precision."""
        if reason := number_format.lacking(self.device).get(precision):
            raise ValueError(f"precision {precision} cannot be used: {reason}; try fp32")

    def learning_rate(self, controls: Controls | None = None) -> float:
        """Return the learning rate of the next step under `controls`, by default those in force.

        Base schedule x scale x the neutral factor of the batch (`schedules.learning_rate`).
        """
        wanted = controls or self.controls
        scale, batch_size = wanted.learning_rate_scale, wanted.batch_size
        return learning_rate(self.peak, scale, self.progress.factor(batch_size), batch_size, self._start.batch_size)

    def set_learning_rate(self, value: float) -> None:
        """Write the learning rate of the highest parameter group; the others keep their ratio to it.

        Raises:
            ValueError: something else has written the learning rate since it was last set here.
        """
        now = [float(group["lr"]) for group in self.optimizer.param_groups]
        if len(now) != len(self._ratios):
            raise ValueError(
                f"optimizer must keep its {len(self._ratios)} parameter groups, got {len(now)}; add parameters before "
                "it is steered"
            )
        if self.exclusive_learning_rate and self._rates and now != self._rates:
            raise ValueError(
                f"learning rate was set to {self._rates[0]:.4g} and is now {now[0]:.4g}: something else writes it too; "
                "remove the other learning-rate scheduler, as steering has the base schedule in it"
            )
        for group, ratio in zip(self.optimizer.param_groups, self._ratios, strict=True):
            _write_rate(group, float(value) * ratio)
        self._rates = [float(group["lr"]) for group in self.optimizer.param_groups]

    def current_learning_rate(self) -> float:
        """Return the learning rate that the optimizer has now: the highest of its groups."""
        return max(float(group["lr"]) for group in self.optimizer.param_groups)

    def raise_masks(self, progress: float) -> None:
        """Raise the masks if one of the interval's mask updates is due at `progress`, its share in [0, 1]."""
        recorder, due = self.recorder, mask_updates_due(progress)
        if due <= recorder.mask_updates:
            return
        recorder.mask_updates = due
        start, end = recorder.start_sparsity, self.controls.sparsity
        if self.masks is not None and end > start:
            self.masks.prune_to(cubic_sparsity(start, end, due / MASK_UPDATES))

    def apply_masks(self) -> None:
        """Hold masked weights at zero; called after every optimizer step."""
        if self.masks is not None:
            self.masks.apply()
            self.masks.observe()

    # An interval -----------------------------------------------------------------------------------------------------

    def begin_interval(
        self,
        controls: Controls,
        *,
        end_share: float | None = None,
        at_first_step: bool = False,
        before_apply: Callable[[], None] | None = None,
    ) -> None:
        """Begin to measure an interval, and bring its controls into force.

        Args:
            controls: Controls of the interval.
            end_share: Share of the budget at which the interval ends; by default all intervals are equal.
            at_first_step: Begin to measure time and energy with the first step instead of now.
            before_apply: Called before the controls come into force, to copy the run; the interval pays for it.

        Raises:
            ValueError: a control cannot be used here.
        """
        start_s = self.recorder.begin(self.progress.sequences, self.sparsity(), at_first_step=at_first_step)
        if before_apply is not None:
            before_apply()
            start_s = self.recorder.seconds()
        self.apply(controls)
        if controls.finish:
            self.progress.begin_cooldown(controls.batch_size)
        self.progress.begin_interval(end_share, reading=not at_first_step)
        self.recorder.switch_s = self.recorder.seconds() - start_s

    def begin_step(self) -> int:
        """Set the learning rate of the next step, raise the masks where that is due, and return the step's batch size.

        The last step before the end of the run may be smaller than the batch size in force.

        Raises:
            ValueError: something else writes the learning rate.
        """
        self.ranks.reshard(self.model)
        progress = self.progress
        batch_size = progress.step_sequences(int(self.controls.batch_size))
        self.recorder.begin_step()
        progress.begin_step()
        if self.probes:
            self._prepare_probe(batch_size)
        self.set_learning_rate(self.learning_rate())
        self.raise_masks(progress.interval_progress)
        return batch_size

    def end_step(self, gradient_norm: Tensor, sequences: int, loss: Tensor | None = None) -> None:
        """Hold masked weights at zero, and record a step that the optimizer has made.

        Args:
            gradient_norm: Euclidean norm of the gradient before clipping, a scalar.
            sequences: Sequences of the step, in all processes together.
            loss: Mean loss of the step, a scalar in nats/token; by default the mean of those of `recorder.note_loss`.

        Raises:
            ValueError: the step was not begun, or it has no loss.
        """
        self.apply_masks()
        self.progress.end_step(sequences)
        self.recorder.end_step(gradient_norm, sequences, loss)

    def drop_lost_gradients(self, gradient_norm: Tensor) -> None:
        """Make the coming optimizer step do nothing where the gradient is not finite.

        From the first call on, such steps are left out of the losses of their interval, and counted.

        Args:
            gradient_norm: Norm of the gradient of all processes, a scalar.
        """
        self.recorder.skips = True
        finite = torch.isfinite(self.ranks.full_tensor(gradient_norm.detach())).to(self.device)
        if self.device.type == "cpu":  # reading it costs nothing
            if not finite:
                for parameter in self.parameters():
                    parameter.grad = None
            return
        if self.changes_batch and all(group.get("fused") for group in self.optimizer.param_groups):
            for each in adam.parts_of(self.optimizer):
                each.found_inf = (~finite).float()  # type: ignore[attr-defined]
            return
        for parameter in self.parameters():
            if parameter.grad is not None:
                own = parameter.grad.to_local() if hasattr(parameter.grad, "to_local") else parameter.grad
                own.masked_fill_(~finite, 0.0)

    def drop_step(self) -> None:
        """Forget a step that was begun and not made."""
        self.recorder.drop_step()
        self._before, self.probe_wanted = [], False

    def end_interval(
        self, *, validation_loss: float | None, epochs_seen: float | None = None, micro_batch_size: int | None = None
    ) -> Telemetry:
        """End the interval, and return what was measured; in several processes that of rank 0. Waits for the device.

        Args:
            validation_loss: Latest validation loss, in nats/token.
            epochs_seen: Passes over the training data; `None` where that is unknown.
            micro_batch_size: Sequences that go through the model at once; by default that of the newest step.
        """
        recorder, progress = self.recorder, self.progress
        fields = recorder.telemetry_fields()
        if micro_batch_size is None:
            per_process = fields["batch_size"] / self.ranks.world_size
            micro_batch_size = max(1, round(per_process / recorder.micro_batches))
        telemetry = Telemetry(
            **fields,
            decision=progress.decision,
            budget_used=progress.used,
            tokens=progress.tokens,
            interval_tokens=recorder.sequences * progress.sequence_length,
            epochs_seen=epochs_seen,
            validation_loss=validation_loss,
            requested=self.controls,
            learning_rate=adam.effective_learning_rate(self.optimizer),
            micro_batch_size=micro_batch_size,
            precision=self.effective_precision(),
            sparsity=self.sparsity(),
            finishing=progress.cooldown is not None,
            finished=progress.finished,
            memory_share=memory_share(self.device),
        )
        progress.decision += 1
        recorder.decision = progress.decision
        return self.ranks.broadcast(telemetry)

    def pause(self) -> None:
        """Stop the clock and the energy meter: what happens now is no cost of the interval."""
        self.recorder.stopwatch.pause()

    def resume(self) -> None:
        """Start the clock and the energy meter again; does nothing where they run."""
        self.recorder.evaluation_s += self.recorder.stopwatch.resume()

    @contextmanager
    def evaluation(self, *, counts: bool = True) -> Iterator[None]:
        """Measure the time of an evaluation between two intervals.

        Args:
            counts: Whether a budget in seconds or joules pays for it, and keeps as much for the one after the end.
        """
        start_s = self.recorder.seconds()
        before = self.progress.read()
        if not counts:
            self.progress.suspend()
        yield
        self.recorder.evaluation_s += self.recorder.seconds() - start_s
        if counts:
            self.progress.end_evaluation(before)

    def _of_all_processes(self, time_s: float, energy_j: float | None) -> tuple[float, float | None]:
        mine = IntervalShare(losses=[], probe=None, time_s=time_s, energy_j=energy_j)
        share = self.ranks.all_reduce_interval(mine, self.recorder.stopwatch.meter)
        return share.time_s, share.energy_j

    # The curvature probe ---------------------------------------------------------------------------------------------

    def probe_due(self) -> bool:
        """Return whether the present interval is one of those that are probed."""
        return bool(probe_due(self.recorder.decision, self.progress.begun_share))

    def curvature(
        self, updates: Callable[[], list[tuple[nn.Parameter, Tensor]]], loss: Callable[[], Tensor]
    ) -> ProbeResult | None:
        """Return slope and curvature of the loss along an update; `None` without an update, or where memory runs out.

        The probe needs room for two copies of the weights. It must not be what stops a run, so it does without them in
        a single process; in several the others would wait for this one, and the error goes on.

        Args:
            updates: Returns each parameter with its update.
            loss: Returns the mean loss of some sequences in nats/token, a scalar; called three times.
        """
        with eval_mode(self.model), torch.no_grad(), self.autocast("fp32"):
            try:
                along = updates()
                return probe_curvature(along, loss) if along else None
            except (torch.OutOfMemoryError, RuntimeError) as error:
                if not is_out_of_memory(error) or self.ranks.world_size > 1:
                    raise
        return None

    def record_probe(self, probe: Callable[[], ProbeResult | None]) -> None:
        """Make the interval's probe, and measure the time that it takes."""
        synchronise(self.device)  # or the steps still under way would count as the probe's time
        start_s = self.recorder.seconds()
        self.recorder.probe = probe()
        self.recorder.probe_s = self.recorder.seconds() - start_s

    def probe(
        self, loss: Callable[[], Tensor], *, first: Callable[[Callable[[], Tensor]], Tensor] | None = None
    ) -> None:
        """Probe the curvature along the last update, on sequences that have not been trained on.

        Args:
            loss: Returns the mean loss of `probe_sequences` sequences in nats/token, a scalar; called three times.
            first: Returns the first of the three from a function that calls `loss` under the same random numbers.
        """
        before = self._before
        self._before, self.probe_wanted = [], False

        def updates() -> list[tuple[nn.Parameter, Tensor]]:
            return [(parameter, parameter.detach() - weights) for parameter, weights in before]

        def probe() -> ProbeResult | None:
            def measured() -> Tensor:
                nonlocal first
                check, first = first, None
                return self._probe_loss(loss) if check is None else check(lambda: self._probe_loss(loss))

            found = self.curvature(updates, measured)
            return found if found is not None and found.finite else None  # text may have nothing to predict

        self.record_probe(probe)

    def _probe_loss(self, loss: Callable[[], Tensor]) -> Tensor:
        with random_apart(self.device):  # equal noise, thrice
            value = loss().detach().float()
        self.ranks.reshard(self.model)
        return value

    def _prepare_probe(self, batch_size: int) -> None:
        """Before a step: ask for a probe in the last one of an interval, along the update of the one before it.

        The probe takes the beginning of the first micro-batch of that step, which has not been trained on: fresh text,
        without taking any from the loop. So the weights are kept before the last step but one.
        """
        progress, recorder = self.progress, self.recorder
        last = progress.ends_within(1, batch_size)
        self.probe_wanted = bool(last and self._before and recorder.probe is None)
        if self.probe_wanted:
            wanted = int(sequences_probed(recorder.sequences + batch_size))
            self.probe_sequences = -(-wanted // self.ranks.world_size)
            return
        keep = progress.ends_within(2, batch_size) and self.probe_due()
        self._before = [(p, p.detach().clone()) for p in self.parameters()] if keep else []

    # Copies ----------------------------------------------------------------------------------------------------------

    def snapshot(self) -> Snapshot:
        """Return a copy of what training changes: weights, buffers, optimizer, masks, width and controls."""
        return {
            "weights": {name: tensor.detach().clone() for name, tensor in self._changing().items()},
            "width": channels.ffn_width(self._transformer()) if self.start_width else 0,
            "optimizer": clone_state(self.optimizer.state_dict()),
            "masks": self.masks.state_dict() if self.masks is not None else {},
            "effective_precision": self._output_precision,
            **{name: _plain(value) for name, value in asdict(self.controls).items()},
        }

    def check_snapshot(self, snapshot: Snapshot) -> None:
        """Raise `ValueError` for a snapshot from a file that `restore` cannot go back to, or that is no snapshot."""
        saved = SavedSnapshot.from_json(snapshot)
        own = {name: each for name, each in self._changing().items() if isinstance(each, nn.Parameter)}
        for name, parameter in own.items():
            weights = saved.weights.get(name)
            if not isinstance(weights, Tensor) or (weights.ndim, weights.dtype) != (parameter.ndim, parameter.dtype):
                raise ValueError(f"weights must hold {name} in {parameter.dtype} and {parameter.ndim} dimensions")
            if not saved.width and weights.shape != parameter.shape:
                raise ValueError(f"{name} must have shape {tuple(parameter.shape)}, got {tuple(weights.shape)}")
            if not bool(torch.isfinite(weights).all()):
                raise ValueError(f"{name} holds values that are not finite")
        for name, buffer in self.model.named_buffers():
            if name in saved.weights and form_of(saved.weights[name]) != form_of(buffer):
                raise ValueError(f"weights must hold {name} as {form_of(buffer)}, got {form_of(saved.weights[name])}")
        adam.check_state(self.optimizer, saved.optimizer, resized=bool(saved.width))
        if self.masks is not None:
            self.masks.check_state(saved.masks)

    def restore(self, snapshot: Snapshot) -> None:
        """Go back to a state that `snapshot` returned, bit for bit."""
        if snapshot["width"]:
            channels.resize(self._transformer(), snapshot["width"])
        weights = snapshot["weights"]
        with torch.no_grad():
            for name, tensor in self._changing().items():
                if name in weights or isinstance(tensor, nn.Parameter):  # version 0.1 left out some buffers
                    tensor.copy_(weights[name])
        self.optimizer.load_state_dict(clone_state(snapshot["optimizer"]))
        if self.masks is not None:
            self.masks.load_state_dict(clone_state(snapshot["masks"]))
        names = {each.name for each in fields(Controls)}
        self.controls = replace(self.controls, **{name: snapshot[name] for name in names & snapshot.keys()})
        self._output_precision = snapshot["effective_precision"]
        self._rates = [float(group["lr"]) for group in self.optimizer.param_groups]

    def _changing(self) -> dict[str, Tensor]:
        """Return the tensors that training changes: weights that are stepped or masked, and buffers."""
        weights = self._stepped if self.masks is None else self.model.named_parameters()
        moving: dict[str, Tensor] = {name: p for name, p in weights if self.masks is not None or p.requires_grad}
        return moving | dict(self.model.named_buffers())

    def state_dict(self) -> dict[str, Any]:
        """Return what the states of model and optimizer do not hold, for a loop that goes on from a file.

        The keys are those of version 0.1, so that checkpoints of either version can be read.
        """
        return {
            "course": self.progress.state_dict(),
            "controls": asdict(self.controls),
            "levers": {
                "masks": None if self.masks is None else self.masks.state_dict(),
                "peak": self.peak,
                "ratios": list(self._ratios),
                "set": list(self._rates),
                "output_precision": self._output_precision,
            },
            "readings": self.recorder.state_dict() | {"before": [weights.clone() for _, weights in self._before]},
        }

    def check_state(self, state: Mapping[str, Any], *, same_interval: bool = True) -> None:
        """Raise `ValueError` for a state that `load_state_dict` cannot load: of another run, or no such state."""
        saved = SavedLoop.from_json(state)
        self.progress.check_state(saved.course)
        levers, n_groups = saved.levers, len(self._ratios)
        if len(levers.ratios) != n_groups or len(levers.set) not in (0, n_groups):
            raise ValueError(
                f"levers must be of {n_groups} parameter groups, got {len(levers.ratios)} and {len(levers.set)}"
            )
        if saved.controls.sparsity and self.pruning == "none":
            raise ValueError(f"sparsity must be 0 where pruning is 'none', got {saved.controls.sparsity}")
        self.check_precision(saved.controls.precision)
        if self.masks is not None:
            self.masks.check_state(levers.masks)
        if same_interval and saved.readings.before:
            wanted = [form_of(each) for each in self.parameters()]
            if (got := [form_of(each) for each in saved.readings.before]) != wanted:
                raise ValueError(f"before must hold the weights of the {len(wanted)} parameters, got {shown(got)}")

    def load_state_dict(self, state: Mapping[str, Any], *, same_interval: bool = True) -> None:
        """Go on where `state_dict` was called; load model and optimizer before.

        Args:
            state: From `state_dict`.
            same_interval: Go on within the interval. Without it, the interval is measured anew from here on.

        Raises:
            ValueError: it is of another run, or no such state; nothing has changed then.
        """
        self.check_state(state, same_interval=same_interval)
        start = state["readings"]["start_sequences"] * self.progress.sequence_length
        self.progress.load_state_dict({"begun": start, **state["course"]})  # version 0.1 did not write it
        self.controls = Controls(**state["controls"])
        own = state["levers"]
        if self.masks is not None:
            self.masks.load_state_dict(clone_state(own["masks"]))
        self.peak, self._ratios, self._rates = own["peak"], list(own["ratios"]), list(own["set"])
        self._output_precision = own["output_precision"]
        self._before, self.probe_wanted = [], False
        if not same_interval:
            self.recorder.begin(self.progress.sequences, self.sparsity(), at_first_step=True)
            self.recorder.decision = self.progress.decision
            self.progress.begun = self.progress.position
            return
        self.recorder.load_state_dict(state["readings"])
        before = [weights.clone().to(self.device) for weights in state["readings"]["before"]]
        if before:
            self._before = list(zip(self.parameters(), before, strict=True))

    # Ownership -------------------------------------------------------------------------------------------------------

    def attach(self) -> None:
        """Keep other loops from the optimizer, and watch the model's number format, until `detach`."""
        for each in adam.parts_of(self.optimizer):
            setattr(each, _OWNER, weakref.ref(self))
        first = next((m for m in self.model.modules() if is_linear(m)), None)
        if first is not None:
            self._hook = first.register_forward_hook(_PrecisionHook(self))

    def detach(self) -> None:
        """Give model and optimizer back, with the batch's decay and the peak learning rate as at the beginning."""
        for each in adam.parts_of(self.optimizer):
            setattr(each, _OWNER, None)
            vars(each).pop("found_inf", None)
        self._before = []
        self.apply(replace(self.controls, batch_size=self._start.batch_size))
        for group, ratio in zip(self.optimizer.param_groups, self._ratios, strict=False):  # some may have been added
            _write_rate(group, self.peak * ratio)
        if self.sets_matmul_precision:
            torch.set_float32_matmul_precision(self._matmul_precision)
        if self._hook is not None:
            self._hook.remove()

    def note_output(self, dtype: torch.dtype) -> None:
        """Note the number format of a matrix product's output in training."""
        self._output_precision = number_format.name_of(dtype, self.device)


class _PrecisionHook:
    """Tells a loop the number format of its model's first matrix product.

    A model may be copied or pickled with this hook, and is then not watched.
    """

    def __init__(self, loop: ControlledLoop) -> None:
        self._loop: weakref.ref[ControlledLoop] | None = weakref.ref(loop)

    def __call__(self, module: nn.Module, _inputs: object, output: Tensor) -> None:
        loop = self._loop() if self._loop is not None else None
        if loop is not None and module.training:
            loop.note_output(output.dtype)

    def __getstate__(self) -> dict[str, Any]:
        return {"_loop": None}


def form_of(value: object) -> str:
    """Return number format and shape of a tensor, or the type of anything else, in words."""
    return f"{value.dtype} of shape {tuple(value.shape)}" if isinstance(value, Tensor) else type(value).__name__


def clone_state(state: Any) -> Any:
    """Return a deep copy. `copy.deepcopy` fails with 8-bit states that are tensors made of tensors (torchao)."""
    if isinstance(state, Mapping):
        return {name: clone_state(value) for name, value in state.items()}
    if isinstance(state, list):
        return [clone_state(value) for value in state]
    if not isinstance(state, Tensor):
        return copy.deepcopy(state)
    try:
        return state.detach().clone()
    except NotImplementedError:
        parts, context = state.__tensor_flatten__()  # type: ignore[attr-defined]
        inner = {name: clone_state(getattr(state, name)) for name in parts}
        return type(state).__tensor_unflatten__(inner, context, state.size(), state.stride())  # type: ignore[attr-defined]


@contextmanager
def eval_mode(model: nn.Module) -> Iterator[None]:
    """Put a model into evaluation mode, and afterwards each of its modules back into its own mode."""
    modes = [(module, module.training) for module in model.modules()]
    model.eval()
    try:
        yield
    finally:
        for module, training in modes:
            module.training = training


@contextmanager
def unchanged(model: nn.Module, device: torch.device) -> Iterator[None]:
    """Put the model's buffers and the random numbers of Python, numpy and torch back after a `with` block.

    Args:
        model: The model.
        device: Device of the model, whose random numbers are put back too.
    """
    buffers = [(buffer, buffer.detach().clone()) for buffer in model.buffers()]
    python, arrays = random.getstate(), np.random.get_state()
    try:
        with random_apart(device):
            yield
    finally:
        random.setstate(python)
        np.random.set_state(arrays)
        with torch.no_grad():
            for buffer, before in buffers:
                buffer.copy_(before)


def _plain(value: Any) -> Any:
    """Return a number of numpy as one of Python, which any `torch.load` reads."""
    return value.item() if isinstance(value, np.generic) else value


def is_out_of_memory(error: Exception) -> bool:
    """Return whether an error says that the memory of the GPU or of the host is full."""
    return isinstance(error, torch.OutOfMemoryError) or "can't allocate memory" in str(error)


def _first_rate(group: dict[str, Any]) -> float:
    """Return the peak of a group's learning rate: a scheduler that has warm-up leaves it in `initial_lr`."""
    return float(group.get("initial_lr", group["lr"]))


def _write_rate(group: dict[str, Any], value: float) -> None:
    """Write the learning rate of a parameter group; some optimizers keep it in a tensor, which must stay the same."""
    if isinstance(group["lr"], Tensor):
        group["lr"].fill_(value)
    else:
        group["lr"] = value


def _device(model: nn.Module, optimizer: Optimizer) -> torch.device:
    stepped = [p for group in optimizer.param_groups for p in group["params"]]
    if not stepped:
        raise ValueError("optimizer must have parameters, got none; make it from model.parameters()")
    known = {id(p) for p in model.parameters()}
    if strange := sum(id(p) not in known for p in stepped):
        raise ValueError(
            f"optimizer must step parameters of the model, got {strange} of {len(stepped)} that are not; "
            "make it from model.parameters(), after anything that replaces them (PEFT, .to, fully_shard)"
        )
    device: torch.device = stepped[0].device
    return device
