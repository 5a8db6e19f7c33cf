"""Steer a fit of Lightning's Trainer by a callback.

    trainer = Trainer(max_steps=10_000, gradient_clip_val=1.0, callbacks=[LightningSteering()])
    trainer.fit(module, loader)

It works with `lightning.pytorch` and automatic optimisation, on one device or under DDP.
"""

from __future__ import annotations

import sys
import warnings
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager
from functools import partial
from typing import Any

import torch
from torch import Tensor
from torch.optim import Optimizer

try:
    import lightning.pytorch as pl
    from lightning.pytorch.plugins.precision import Precision
    from lightning.pytorch.utilities.data import extract_batch_size
    from lightning.pytorch.utilities.signature_utils import is_param_in_hook_signature
    from lightning.pytorch.utilities.types import LRSchedulerConfig
except ImportError as error:
    raise ImportError("steering a Lightning Trainer needs Lightning; pip install lightning") from error

from trainpilot.agents.controller import DecisionRecord
from trainpilot.agents.integrations.common import GivenSettings, ranks_of
from trainpilot.agents.integrations.lightning_settings import LoaderInfo, OriginalSettings, check_fit, settings_for
from trainpilot.agents.logging.run_log import scalars
from trainpilot.agents.steering.loader_batches import first_sequences
from trainpilot.agents.steering.steering import Steering
from trainpilot.llm_runtime.energy.meter import EnergyMeter
from trainpilot.llm_runtime.optimizer import change_batch
from trainpilot.llm_runtime.process_group import OneProcess, ProcessGroup

ProbeLoss = Callable[[pl.LightningModule, Any], Tensor]
"""Returns the mean loss of a batch in nats/token."""


class LightningSteering(pl.Callback):
    """Steers learning rate, batch, precision and pruning of a fit, and ends it with its budget.

    The batch changes by whole batches of the data loader, the micro-batches, so make those small. The gradient of a
    shorter step, such as the last one of an epoch, is the mean over the sequences of that step; under the mode `advise`
    it is what Lightning makes of it.

    A learning-rate scheduler that `configure_optimizers` returns becomes the base schedule, unless `base_schedule` is
    given; it is not stepped itself.

    Decisions go to the Trainer's loggers, under the names of the table in `docs/metrics.md`.

    The budget is `max_steps` or `max_epochs` at the starting batch, unless `sequences` is given. With smaller batches
    the run takes more steps than `max_steps`. Under a `budget` in seconds or joules set `max_epochs=-1`, so that the
    data do not end before it.

    A checkpoint between two steps is complete: `Trainer.fit(..., ckpt_path=...)` resumes bit for bit if the data loader
    has `__len__`, `state_dict` and `load_state_dict`. For other loaders Lightning starts the data of the epoch again,
    and from loaders without a length it has drawn one batch ahead. A checkpoint within a step (validation every few
    batches, `trainer.save_checkpoint`) loses the gradients accumulated so far, with or without steering. With several
    processes, Lightning saves the state of rank 0 only; the interval is then measured anew from the checkpoint on.

    With `fast_dev_run` the policy makes no decisions: the fit is one interval at the smallest batch.

    Args:
        settings: `SteeringSettings`, or some of its fields; the Trainer's arguments give the others.
        micro_batch_size: Sequences of a batch of the data loader; needed if the loader has no `batch_size`.
        sequences_in: Counts the sequences of a batch; by default the length of the first tensor in it.
        probe_loss: Loss of a batch for the curvature probe. By default `training_step` itself, which then now and then
            runs three more times on the first sequences of a batch: its calls of `self.log` are dropped, but metrics
            that it updates and loggers that it calls directly see those sequences again.
        monitor: Name under which the module logs its validation loss in nats/token; with several processes the value
            of rank 0 counts, so log it with `sync_dist=True`.
        meter: Energy meter; by default the best one that the device has.
        ranks: Returns the collective operations of the processes, once these run; by default the process group's.
        on_decision: Called with the record of each interval and the decision before it.

    Raises:
        ValueError: a fit begins that cannot be steered; the message says what to do.
    """

    def __init__(
        self,
        settings: GivenSettings = None,
        *,
        micro_batch_size: int | None = None,
        sequences_in: Callable[[Any], int] | None = None,
        probe_loss: ProbeLoss | None = None,
        monitor: str | None = None,
        meter: EnergyMeter | None = None,
        ranks: Callable[[], ProcessGroup] | None = None,
        on_decision: Callable[[DecisionRecord], None] | None = None,
    ) -> None:
        self.steering: Steering | None = None
        """Steering of the present fit, or of the last one with its records."""
        self._settings, self._micro, self._monitor = settings, micro_batch_size, monitor
        self._sequences_in = sequences_in or sequences_in_first
        self._probe_loss = probe_loss
        self._meter, self._make_ranks, self._on_decision = meter, ranks, on_decision
        self._original: OriginalSettings | None = None
        self._scheduler: LRSchedulerConfig | None = None
        """What `configure_optimizers` returned."""
        self._ranks: ProcessGroup = OneProcess()
        self._state: dict[str, Any] = {}
        """State while no fit is steered: the loaded one, or that at the end of the last fit."""
        self._began_at = (0, 0)
        """Steps and epochs of the Trainer before this run: its limits count them too."""
        self._open = self._made = False
        self._unit = 1
        self._total = 0.0
        """Sequences of a step, as the mean over the processes."""
        self._losses: list[tuple[Tensor, int]] = []
        """Losses of the open step's micro-batches, each with its number of sequences."""
        self._norm: Tensor | None = None
        self._close_window()

    @property
    def state_key(self) -> str:
        """Name of the state in a checkpoint: that of version 0.1, whose checkpoints still load."""
        return "SteeringCallback"

    # The fit ---------------------------------------------------------------------------------------------------------

    def setup(self, trainer: pl.Trainer, pl_module: pl.LightningModule, stage: str) -> None:
        """Drop the last fit's state, and move to the front, so that callbacks that save find the state up to date."""
        if stage == "fit":
            self._state = {}
            trainer.callbacks = [self, *(other for other in trainer.callbacks if other is not self)]  # type: ignore[attr-defined]

    def on_fit_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Raise for a fit that cannot be steered, and lift the limit on steps: the run ends with its budget."""
        check_fit(trainer, pl_module)
        self.steering = None
        self._scheduler = next(iter(trainer.lr_scheduler_configs), None)
        trainer.strategy.lr_scheduler_configs = []  # steering writes the learning rate, with this schedule in it
        epochs = trainer.fit_loop.epoch_loop
        plugin = trainer.strategy.precision_plugin
        self._original = OriginalSettings(
            max_steps=epochs.max_steps, accumulate=trainer.accumulate_grad_batches, precision=plugin
        )
        if epochs.max_steps != -1 and (self._state or epochs.global_step < epochs.max_steps):
            epochs.max_steps = sys.maxsize

    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Take control of model and optimiser, and resume if a checkpoint was loaded."""
        assert self._original is not None, "on_fit_start comes first"
        self._close_window()
        state, now = self._state, (trainer.global_step, trainer.current_epoch)
        self._began_at = state["began_at"] if state else now
        if state:
            set_rates(trainer.optimizers[0], Steering.saved_peaks(state["steering"]))
        self.steering = steering = self._make_steering(trainer, pl_module, self._original)
        if state:
            resume(steering, trainer.optimizers[0], state)
        trainer.strategy.precision_plugin = SteeredPrecision(steering, self._original.precision)
        ready = trainer.fit_loop.epoch_loop.batch_progress.current.ready
        trainer.accumulate_grad_batches = Window(2, ready + 1) if state and state["open"] else Window(1)
        self._after_step(trainer, steering)

    def _make_steering(self, trainer: pl.Trainer, module: pl.LightningModule, original: OriginalSettings) -> Steering:
        self._ranks = ranks = self._make_ranks() if self._make_ranks else ranks_of(trainer.world_size)
        info = LoaderInfo.of(trainer, self._micro, original.max_steps, original.accumulate, self._began_at)
        info = ranks.broadcast(info)
        self._unit = info.micro_batch_size
        settings = settings_for(trainer, self._settings, info, original.precision, self._scheduler)
        log = partial(self._log, trainer)
        return Steering(module, trainer.optimizers[0], settings, meter=self._meter, ranks=ranks, on_decision=log)

    def _log(self, trainer: pl.Trainer, record: DecisionRecord) -> None:
        """Log a decision to the loggers of the module's own metrics."""
        for logger in trainer.loggers:
            logger.log_metrics(scalars(record), step=trainer.global_step)
        if self._on_decision is not None:
            self._on_decision(record)

    def on_train_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Warn if the data ended before the budget."""
        steering = self.steering
        if steering is not None and not steering.finished and not trainer.should_stop:
            warnings.warn(
                f"the run ended at {steering.sequences:,} of its {steering.end_sequences:,} sequences, before the "
                "learning rate came down: the data gave fewer than the budget",
                stacklevel=2,
            )

    def teardown(self, trainer: pl.Trainer, pl_module: pl.LightningModule, stage: str) -> None:
        """Give model, optimiser and Trainer back."""
        self._give_back(trainer)

    def on_exception(self, trainer: pl.Trainer, pl_module: pl.LightningModule, exception: BaseException) -> None:
        """Give model, optimiser and Trainer back."""
        self._give_back(trainer)

    def _give_back(self, trainer: pl.Trainer) -> None:
        original, steering = self._original, self.steering
        if original is None:
            return
        trainer.fit_loop.epoch_loop.max_steps = original.max_steps
        trainer.accumulate_grad_batches = original.accumulate
        trainer.strategy.precision_plugin = original.precision
        if steering is not None:
            self._state = self.state_dict() | {"given_back": True}
        self._original = None
        if steering is not None:
            steering.close()

    # A step ----------------------------------------------------------------------------------------------------------

    def on_train_epoch_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Discard a step that was begun in an epoch whose rest was skipped."""
        if self.steering is not None and self._open:
            self.steering.drop_step()
            self._close_window()

    def on_train_batch_start(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, batch: Any, batch_idx: int
    ) -> None:
        """Count the sequences of a micro-batch; the first one of a step begins the step."""
        assert self.steering is not None, "on_train_start makes it"
        self._here = self._sequences_in(batch)
        if not 0 < self._here <= self._unit:
            raise ValueError(
                f"micro_batch_size must be at least the {self._here} sequences of every batch of the data loader, got "
                f"{self._unit}; LightningSteering takes micro_batch_size, and sequences_in to count them"
            )
        if not self._open:
            self._begin_step(trainer, self.steering, batch_idx)
            if self.steering.probe_wanted:
                self._probe(self.steering, pl_module, batch, batch_idx)

    def _begin_step(self, trainer: pl.Trainer, steering: Steering, batch_idx: int) -> None:
        wanted, every = steering.begin_step(), self._unit * self._ranks.world_size
        if steering.advises:  # a short step has the gradient that Lightning gives it
            count = steering.settings.batch_size // every
        else:
            left = trainer.num_training_batches - batch_idx  # Lightning always steps at the end of an epoch
            count = int(min(-(-wanted // every), left))
        trainer.accumulate_grad_batches = Window(count, batch_idx)
        self._open = True

    def on_before_backward(self, trainer: pl.Trainer, pl_module: pl.LightningModule, loss: Tensor) -> None:
        """Record the loss, which Lightning has divided by the number of micro-batches; a short batch weighs less."""
        self._losses.append((loss.detach() * int(trainer.accumulate_grad_batches), self._here))
        weight = self._here / self._unit
        if weight != 1 and self.steering is not None and not self.steering.advises:
            loss.register_hook(lambda gradient: gradient * weight)  # type: ignore[no-untyped-call]

    def on_before_optimizer_step(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, optimizer: Optimizer
    ) -> None:
        """Scale the gradient to the mean over the step's sequences, and measure its norm before clipping."""
        if self._made:
            raise ValueError(
                f"optimizer must evaluate a step once, as Adam does, got {type(optimizer).__name__}, which calls its "
                "closure again; leave LightningSteering out, or take another optimizer"
            )
        self._made = True
        if self.steering is None or not self._losses:
            return
        mine = sum(sequences for _, sequences in self._losses)
        self._total = float(self._ranks.all_reduce_mean(torch.tensor(float(mine), dtype=torch.float64)))
        expected = int(trainer.accumulate_grad_batches) * self._unit
        if self._total != expected and not self.steering.advises:
            self.steering.scale_gradients(expected / self._total)
        self._norm = self.steering.gradient_norm()
        self.steering.drop_lost_gradients(self._norm)
        for loss, sequences in self._losses:
            self.steering.note_loss(loss, sequences / self._total)

    def on_train_batch_end(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Record the step that was made; at an interval's end, decide."""
        steering = self.steering
        if steering is None or not self._made:
            return
        if self._norm is None:  # training_step returned no loss
            steering.drop_step()
        else:
            steering.end_step(self._norm, round(self._total * self._ranks.world_size))
        self._close_window()
        self._after_step(trainer, steering)

    def _after_step(self, trainer: pl.Trainer, steering: Steering) -> None:
        """Set the next step's learning rate now, so that callbacks that log it before the step log the one in use."""
        if steering.finished:
            trainer.should_stop = True
        else:
            steering.apply_learning_rate()

    def _close_window(self) -> None:
        self._open = self._made = False
        self._here = 0
        self._losses, self._norm = [], None

    def _probe(self, steering: Steering, module: pl.LightningModule, batch: Any, batch_idx: int) -> None:
        loss, few = self._probe_loss, first_sequences(batch, steering.probe_sequences, self._here)
        with without_log(module):
            steering.probe(lambda: loss(module, few) if loss else training_loss(module, few, batch_idx))

    # Validation ------------------------------------------------------------------------------------------------------

    def on_validation_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Stop the clock: validation is no cost of the interval that it falls into."""
        if self._original is not None and self.steering is not None:
            self.steering.pause()

    def on_validation_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Start the clock again, and record the validation loss."""
        if self._original is None or self.steering is None:
            return
        self.steering.resume()
        value = trainer.callback_metrics.get(self._monitor) if self._monitor else None
        if value is not None and torch.isfinite(value):
            self.steering.validation_loss = float(value)

    # Saving and resuming ---------------------------------------------------------------------------------------------

    def state_dict(self) -> dict[str, Any]:
        """Return the steering state; within a step, that before it, as Lightning saves no gradients either."""
        if self._original is None or self.steering is None:
            return dict(self._state)
        saved = self.steering.state_dict(within_step=True)
        return {"steering": saved, "open": self._open, "began_at": self._began_at}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Keep the state until Lightning has loaded model and optimiser."""
        self._state = dict(state_dict)


SteeringCallback = LightningSteering
"""The name of `LightningSteering` in version 0.1."""


class Window(int):
    """Number of micro-batches of an optimiser step, counted from the step's first one.

    Lightning steps where the number of batches so far, modulo `accumulate_grad_batches`, is 0. This number takes the
    remainder from `start` on, so that steps of any length may follow one another.
    """

    start: int

    def __new__(cls, count: int, start: int = 0) -> Window:
        """Return `count`, to be counted from batch number `start`."""
        window = super().__new__(cls, count)
        window.start = start
        return window

    def __rmod__(self, number: int, /) -> int:
        return (number - self.start) % int(self)


class SteeredPrecision(Precision):
    """Trains in the precision of the present controls, and validates in the Trainer's own.

    Args:
        steering: Holds the controls.
        original: The Trainer's plugin.
    """

    def __init__(self, steering: Steering, original: Precision) -> None:
        self._steering, self._original = steering, original
        self.precision = original.precision

    def forward_context(self) -> AbstractContextManager[Any]:
        """Return the Trainer's own context, for validation."""
        return self._original.forward_context()

    def train_step_context(self) -> AbstractContextManager[Any]:  # type: ignore[override]
        """Return the context of the controls' precision."""
        return self._steering.autocast()


def sequences_in_first(batch: Any) -> int:
    """Return the length of the first tensor in a batch."""
    return int(extract_batch_size(batch))


def training_loss(module: pl.LightningModule, batch: Any, batch_idx: int) -> Tensor:
    """Return the loss of the module's own training step. Raises `ValueError` if it returns none."""
    numbered = is_param_in_hook_signature(module.training_step, "batch_idx", min_args=2)
    output = module.training_step(batch, batch_idx) if numbered else module.training_step(batch)
    loss = output["loss"] if isinstance(output, Mapping) else output
    if not isinstance(loss, Tensor):
        raise ValueError(
            f"training_step must return a loss for the curvature probe, got {type(loss).__name__}; "
            "give LightningSteering(probe_loss=...), or set probe=False in its settings"
        )
    return loss


@contextmanager
def without_log(module: pl.LightningModule) -> Iterator[None]:
    """Disable `self.log` and `self.log_dict`."""
    vars(module)["log"] = lambda *_, **__: None
    try:
        yield
    finally:
        del vars(module)["log"]


def set_rates(optimizer: Optimizer, rates: Iterable[float]) -> None:
    """Set the learning rate of each parameter group."""
    for group, rate in zip(optimizer.param_groups, rates, strict=True):
        group["lr"] = rate


def resume(steering: Steering, optimizer: Optimizer, state: Mapping[str, Any]) -> None:
    """Continue at the point of `LightningSteering.state_dict`; the optimiser is loaded from the same checkpoint.

    A checkpoint that was written after a fit has the optimiser with its original settings.
    """
    saved = state["steering"]
    if state.get("given_back"):
        change_batch(optimizer, Steering.saved_batch_factor(saved))
    set_rates(optimizer, Steering.saved_learning_rates(saved))
    steering.load_state_dict(saved)
