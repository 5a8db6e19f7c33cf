"""Steer a fit of Lightning's Trainer by a callback.

    trainer = Trainer(max_steps=10_000, gradient_clip_val=1.0, callbacks=[LightningSteering()])
    trainer.fit(module, loader)

For `lightning.pytorch`, with automatic optimisation, on one device or under DDP.

Parts put into a Lightning Trainer: how it counts, in which precision it trains, its loss without a trace.

Go on with a steered fit where its checkpoint was written.
"""

from __future__ import annotations

import sys
import warnings
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

try:
    import lightning.pytorch as pl
    from lightning.pytorch.plugins.precision import Precision
    from lightning.pytorch.utilities.data import extract_batch_size
    from lightning.pytorch.utilities.signature_utils import is_param_in_hook_signature
except ImportError as error:
    raise ImportError("steering a Lightning Trainer needs Lightning; pip install lightning") from error

from trainpilot.agents.controller import DecisionRecord
from trainpilot.agents.integrations.common import first_sequences
from trainpilot.agents.integrations.lightning_settings import Feed, Own, check_fit, ranks_of, settings_for
from trainpilot.agents.logging.run_log import scalars
from trainpilot.agents.steering.settings import SteeringSettings
from trainpilot.agents.steering.steering import Steering
from trainpilot.llm_runtime.energy.meter import EnergyMeter
from trainpilot.llm_runtime.loop import Levers
from trainpilot.llm_runtime.optimizer import change_batch
from trainpilot.llm_runtime.process_group import Ranks


class Window(int):
    """How many micro-batches an optimiser step has, counted from its first one.

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
    """Runs training in the precision that steering has in force, the rest in the Trainer's own.

    Args:
        levers: Know the precision.
        own: The Trainer's plugin.
    """

    def __init__(self, levers: Levers, own: Precision) -> None:
        self._levers, self._own = levers, own
        self.precision = own.precision

    def forward_context(self) -> AbstractContextManager[Any]:
        """Return the Trainer's own context, for validation."""
        return self._own.forward_context()

    def train_step_context(self) -> AbstractContextManager[Any]:  # type: ignore[override]
        """Return the context of the precision in force."""
        return self._levers.autocast()


def sequences_in_first(batch: Any) -> int:
    """Return the length of the first tensor in a batch."""
    return int(extract_batch_size(batch))


def training_loss(module: pl.LightningModule, batch: Any, batch_idx: int) -> Tensor:
    """Return the loss of the module's own training step. Raises `ValueError` where it has none."""
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
    """Have `self.log` and `self.log_dict` do nothing."""
    vars(module)["log"] = lambda *_, **__: None
    try:
        yield
    finally:
        del vars(module)["log"]


def peaks(steered: Mapping[str, Any]) -> list[float]:
    """Return the peak of each parameter group's learning rate, from a state of `Steering`."""
    levers = steered["levers"]
    return [levers["peak"] * ratio for ratio in levers["ratios"]]


def set_rates(optimizer: Optimizer, rates: Iterable[float]) -> None:
    """Set the learning rate of each parameter group."""
    for group, rate in zip(optimizer.param_groups, rates, strict=True):
        group["lr"] = rate


def go_on(steering: Steering, state: Mapping[str, Any]) -> None:
    """Go to where `LightningSteering.state_dict` was called; the optimiser has been loaded from the same checkpoint.

    A checkpoint written after a fit has the optimiser as it was given back.
    """
    steered = state["steering"]
    optimizer = steering.levers.optimizer
    if state.get("given_back"):
        change_batch(optimizer, steered["controls"]["batch_size"] / steered["settings"]["batch_size"])
    set_rates(optimizer, steered["levers"]["set"])
    steering.load_state_dict(steered)


ProbeLoss = Callable[[pl.LightningModule, Any], Tensor]
"""Returns the mean loss of a batch in nats/token."""


class LightningSteering(pl.Callback):
    """Steers learning rate, batch, precision and pruning of a fit, and ends it with its budget.

    The batch changes by whole batches of the data loader, the micro-batches, so make those small. A step at the end of
    an epoch, or with a short last batch, is the mean over the sequences that it has.

    Decisions go to the Trainer's loggers, under the names of the table in `docs/metrics.md`.

    The budget is `max_steps` or `max_epochs` at the starting batch, unless `sequences` is given. With smaller batches
    the run takes more steps than `max_steps`.

    A checkpoint between two steps holds all of it, and `Trainer.fit(..., ckpt_path=...)` goes on bit for bit where the
    data loader has `__len__`, `state_dict` and `load_state_dict`. Lightning starts the epoch's data anew for other
    loaders, and has drawn one batch ahead from those without a length. A checkpoint within a step (validation every so
    many batches, `trainer.save_checkpoint`) loses the gradients gathered up to there, with or without steering. Of
    several processes Lightning saves the first one's state: there the interval is measured anew from the checkpoint on.

    With `fast_dev_run` no policy is asked: the loop is tried out at the smallest batch, as one interval.

    Args:
        settings: What is asked of the steering, or some of its fields; the rest comes from the Trainer.
        micro_batch_size: Sequences of a batch of the data loader; needed where it has no `batch_size`.
        sequences_in: Counts the sequences of a batch; by default the length of the first tensor in it.
        probe_loss: Loss of a batch for the curvature probe. By default `training_step`, which then runs three times
            more now and then, on the first sequences of a batch: what it sends to `self.log` is dropped, but metrics
            that it updates and loggers that it calls itself see them again.
        monitor: Name under which the module logs its validation loss in nats/token; in several processes the first
            one's counts, so log it with `sync_dist=True`.
        meter: Energy meter; by default the best one that the device has.
        ranks: Makes the link between the processes, once they run; by default that of the process group.
        on_decision: Called with the record of each interval and the decision before it.

    Raises:
        ValueError: a fit begins that cannot be steered; the message says what to do.
    """

    def __init__(
        self,
        settings: SteeringSettings | Mapping[str, Any] | None = None,
        *,
        micro_batch_size: int | None = None,
        sequences_in: Callable[[Any], int] | None = None,
        probe_loss: ProbeLoss | None = None,
        monitor: str | None = None,
        meter: EnergyMeter | None = None,
        ranks: Callable[[], Ranks] | None = None,
        on_decision: Callable[[DecisionRecord], None] | None = None,
    ) -> None:
        self.steering: Steering | None = None
        """Steers the fit; after it, holds its records."""
        self._settings, self._micro, self._monitor = settings, micro_batch_size, monitor
        self._sequences_in = sequences_in or sequences_in_first
        self._probe_loss = probe_loss
        self._meter, self._make_ranks, self._on_decision = meter, ranks, on_decision
        self._own: Own | None = None
        self._state: dict[str, Any] = {}
        """Where steering stands while no fit steers: what was loaded, or the end of the last fit."""
        self._began_at = (0, 0)
        """Steps and epochs that the Trainer had made before: its limits count them."""
        self._open = self._made = False
        self._unit = 1
        self._total = 0.0
        """Sequences of a step in the mean over the processes."""
        self._losses: list[tuple[Tensor, int]] = []
        """Of the micro-batches of the open step, each with its sequences."""
        self._norm: Tensor | None = None
        self._close_window()

    @property
    def state_key(self) -> str:
        """Name of the state in a checkpoint: that of version 0.1, whose checkpoints still load."""
        return "SteeringCallback"

    # The fit ---------------------------------------------------------------------------------------------------------

    def setup(self, trainer: pl.Trainer, pl_module: pl.LightningModule, stage: str) -> None:
        """Begin anew unless a checkpoint is loaded next, and go first: what other callbacks save is up to date then."""
        if stage == "fit":
            self._state = {}
            trainer.callbacks = [self, *(other for other in trainer.callbacks if other is not self)]  # type: ignore[attr-defined]

    def on_fit_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Refuse what cannot be steered, and lift the limit on steps: the run ends with its budget."""
        check_fit(trainer, pl_module)
        self.steering = None
        epochs = trainer.fit_loop.epoch_loop
        plugin = trainer.strategy.precision_plugin
        self._own = Own(max_steps=epochs.max_steps, accumulate=trainer.accumulate_grad_batches, precision=plugin)
        if epochs.max_steps != -1 and (self._state or epochs.global_step < epochs.max_steps):
            epochs.max_steps = sys.maxsize

    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Take model and optimiser under control; go on where a checkpoint was loaded."""
        assert self._own is not None, "a fit has started"
        self._close_window()
        state, now = self._state, (trainer.global_step, trainer.current_epoch)
        self._began_at = state["began_at"] if state else now
        if state:
            set_rates(trainer.optimizers[0], peaks(state["steering"]))
        self.steering = steering = self._make_steering(trainer, pl_module, self._own)
        if state:
            go_on(steering, state)
        trainer.strategy.precision_plugin = SteeredPrecision(steering.levers, self._own.precision)
        ready = trainer.fit_loop.epoch_loop.batch_progress.current.ready
        trainer.accumulate_grad_batches = Window(2, ready + 1) if state and state["open"] else Window(1)
        self._after_step(trainer, steering)

    def _make_steering(self, trainer: pl.Trainer, module: pl.LightningModule, own: Own) -> Steering:
        ranks = self._make_ranks() if self._make_ranks else ranks_of(trainer)
        feed = ranks.of_first(Feed.of(trainer, self._micro, own.max_steps, own.accumulate, self._began_at))
        self._unit = feed.micro_batch_size
        settings = settings_for(trainer, self._settings, feed, own.precision)
        tell = partial(self._tell, trainer)
        return Steering(module, trainer.optimizers[0], settings, meter=self._meter, ranks=ranks, on_decision=tell)

    def _tell(self, trainer: pl.Trainer, record: DecisionRecord) -> None:
        """Log a decision where the module's own figures are logged."""
        for logger in trainer.loggers:
            logger.log_metrics(scalars(record), step=trainer.global_step)
        if self._on_decision is not None:
            self._on_decision(record)

    def on_train_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Warn where the data came to an end before the budget."""
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
        own, steering = self._own, self.steering
        if own is None:
            return
        trainer.fit_loop.epoch_loop.max_steps = own.max_steps
        trainer.accumulate_grad_batches = own.accumulate
        trainer.strategy.precision_plugin = own.precision
        if steering is not None:
            self._state = self.state_dict() | {"given_back": True}
        self._own = None
        if steering is not None:
            steering.close()

    # A step ----------------------------------------------------------------------------------------------------------

    def on_train_epoch_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Forget a step that was begun in an epoch whose rest was skipped."""
        if self.steering is not None and self._open:
            self.steering.drop_step()
            self._close_window()

    def on_train_batch_start(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, batch: Any, batch_idx: int
    ) -> None:
        """Count a micro-batch; the first of a step begins it."""
        assert self.steering is not None, "training has started"
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
        wanted = steering.begin_step()
        count = -(-wanted // (self._unit * steering.ranks.world_size))
        left = trainer.num_training_batches - batch_idx  # Lightning steps at the end of an epoch, come what may
        trainer.accumulate_grad_batches = Window(int(min(count, left)), batch_idx)
        self._open = True

    def on_before_backward(self, trainer: pl.Trainer, pl_module: pl.LightningModule, loss: Tensor) -> None:
        """Note the loss, which Lightning has divided by the number of micro-batches; a short batch weighs less."""
        self._losses.append((loss.detach() * int(trainer.accumulate_grad_batches), self._here))
        weight = self._here / self._unit
        if weight != 1:
            loss.register_hook(lambda gradient: gradient * weight)  # type: ignore[no-untyped-call]

    def on_before_optimizer_step(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, optimizer: Optimizer
    ) -> None:
        """Make the gradient the mean over the step's sequences, however many came, and measure it before clipping."""
        if self._made:
            raise ValueError(
                f"optimizer must evaluate a step once, as Adam does, got {type(optimizer).__name__}, which calls its "
                "closure again; leave LightningSteering out, or take another optimizer"
            )
        self._made = True
        if self.steering is None or not self._losses:
            return
        mine = sum(sequences for _, sequences in self._losses)
        self._total = float(self.steering.ranks.mean(torch.tensor(float(mine), dtype=torch.float64)))
        gradients = [p.grad for p in self.steering.levers.parameters() if p.grad is not None]
        expected = int(trainer.accumulate_grad_batches) * self._unit
        if self._total != expected:
            for gradient in gradients:
                gradient.mul_(expected / self._total)
        self._norm = nn.utils.get_total_norm(gradients)
        for loss, sequences in self._losses:
            self.steering.note_loss(loss, sequences / self._total)

    def on_train_batch_end(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Tell steering of a step that has been made: it masks, and at an interval's end decides."""
        steering = self.steering
        if steering is None or not self._made:
            return
        if self._norm is None:  # training_step returned no loss
            steering.drop_step()
        else:
            steering.end_step(self._norm, round(self._total * steering.ranks.world_size))
        self._close_window()
        self._after_step(trainer, steering)

    def _after_step(self, trainer: pl.Trainer, steering: Steering) -> None:
        """Set the next step's learning rate now, so that whoever logs it before the step logs what it uses."""
        if steering.finished:
            trainer.should_stop = True
        else:
            steering.levers.set_learning_rate(steering.learning_rate)

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
        if self._own is not None and self.steering is not None:
            self.steering.readings.pause()

    def on_validation_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Let the clock go on, and take in the validation loss."""
        if self._own is None or self.steering is None:
            return
        self.steering.readings.go_on()
        value = trainer.callback_metrics.get(self._monitor) if self._monitor else None
        if value is not None and torch.isfinite(value):
            self.steering.validation_loss = float(value)

    # Saving and going on ---------------------------------------------------------------------------------------------

    def state_dict(self) -> dict[str, Any]:
        """Return where steering stands. Within a step it is as before it: Lightning keeps no gradients either."""
        if self._own is None or self.steering is None:
            return dict(self._state)
        steered = self.steering.state_dict(within_step=True)
        return {"steering": steered, "open": self._open, "began_at": self._began_at}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Keep the state until model and optimiser are loaded."""
        self._state = dict(state_dict)
