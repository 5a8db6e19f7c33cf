"""Train a real model interval by interval, under controls that may change at every border, and measure it.

Take optimiser steps on a real model, and bring the controls into force.

Shapes: B sequences, b sequences of a micro-batch, T tokens of a sequence, V vocabulary.
"""

from __future__ import annotations

import copy
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import nn
from torch.nn import functional as F
from transformers import PreTrainedModel
from transformers.pytorch_utils import Conv1D

from trainpilot.llm_runtime import optimizer as adam
from trainpilot.llm_runtime import precision as number_format
from trainpilot.llm_runtime import width as channels
from trainpilot.llm_runtime.config import ControlLimits, Controls, Precision, RunConfig, batch_limits
from trainpilot.llm_runtime.data.batches import BatchStream, fixed_batch
from trainpilot.llm_runtime.data.corpus import Corpus, load_corpus
from trainpilot.llm_runtime.energy import select_meter
from trainpilot.llm_runtime.energy.meter import EnergyMeter
from trainpilot.llm_runtime.interval import Interval, StepRecord, memory_share
from trainpilot.llm_runtime.masks import WeightMasks
from trainpilot.llm_runtime.models import LoadedModel, context_length, load_model
from trainpilot.llm_runtime.optimizer import averaged_weights
from trainpilot.llm_runtime.precision import lacking, masked_precisions, synchronise
from trainpilot.llm_runtime.probe import ProbeResult, probe_curvature
from trainpilot.llm_runtime.process import RandomState
from trainpilot.llm_runtime.schedules import (
    MASK_UPDATES,
    BudgetProgress,
    cubic_sparsity,
    learning_rate,
    mask_updates_due,
    probe_due,
    sequences_probed,
)
from trainpilot.llm_runtime.telemetry import Snapshot, Telemetry


class Trainer:
    """A model, its optimiser and the controls in force. Knows neither corpus nor budget."""

    def __init__(self, model: PreTrainedModel, config: RunConfig, device: torch.device) -> None:
        self.model = model.to(device)  # type: ignore[arg-type]
        self.model.train()
        self.config = config
        self.device = device
        self.optimizer = adam.make_optimizer(self.model, config)
        self.scaler = torch.amp.GradScaler(device.type, enabled=False)
        self.precision: Precision = config.precision
        self.batch_size = config.batch_size
        self.micro_batch_size: int | None = None
        self.masks: WeightMasks | None = None
        self.width_start = 0
        if config.pruning in ("magnitude", "evolution"):
            self.masks = WeightMasks(self.model, config.pruning)
        elif config.pruning == "width":
            self.width_start = channels.ffn_width(self.model)
        self._effective_precision: str = config.precision
        self._watch_a_matrix_product()
        self.set_precision(config.precision)

    def step(self, sequences: np.ndarray, learning_rate: float) -> StepRecord:
        """Train on one batch.

        Args:
            sequences: Token ids, int64 of shape (B, T + 1).
            learning_rate: Of this step.
        """
        batch = torch.from_numpy(sequences).to(self.device)  # (B, T + 1)
        adam.set_learning_rate(self.optimizer, learning_rate)
        loss = self._gradient(batch, self.precision)
        self.scaler.unscale_(self.optimizer)
        norm = nn.utils.clip_grad_norm_(self.model.parameters(), self.config.gradient_clip)
        self.scaler.step(self.optimizer)
        self.scaler.update()
        self.optimizer.zero_grad(set_to_none=True)
        if self.masks is not None:
            self.masks.apply()
            self.masks.observe()
        return StepRecord(loss, norm)

    def _gradient(self, batch: torch.Tensor, precision: Precision) -> torch.Tensor:
        """Accumulate the batch's gradient; out of memory halves the micro-batch and starts this batch again."""
        while True:
            micro = min(self.micro_batch_size or len(batch), len(batch))
            try:
                return self._accumulate(batch, micro, precision)
            except (torch.OutOfMemoryError, RuntimeError) as error:
                if not _is_out_of_memory(error):
                    raise
            self._shrink_micro_batch(micro)

    def _accumulate(self, batch: torch.Tensor, micro: int, precision: Precision) -> torch.Tensor:
        total = torch.zeros((), device=self.device)
        for part in torch.split(batch, micro):  # (b, T + 1)
            with number_format.autocast(precision, self.device):
                loss = self.loss(part) * (len(part) / len(batch))
            torch.autograd.backward(self.scaler.scale(loss))
            total += loss.detach()
        return total

    def loss(self, sequences: torch.Tensor) -> torch.Tensor:
        """Return the mean cross-entropy of the next token, in nats/token, for sequences of shape (b, T + 1)."""
        logits = self.model(input_ids=sequences[:, :-1], use_cache=False).logits  # (b, T, V)
        return F.cross_entropy(logits.float().flatten(0, 1), sequences[:, 1:].flatten())

    def _shrink_micro_batch(self, micro: int) -> None:
        self.optimizer.zero_grad(set_to_none=True)
        if self.device.type == "cuda":
            torch.cuda.empty_cache()
        if micro == 1:
            raise ValueError(
                "out of memory with a micro-batch of one sequence; lower sequence_length or take a smaller model"
            )
        self.micro_batch_size = micro // 2

    def rehearse(self, sequences: np.ndarray, precision: Precision) -> None:
        """Run one forward and backward pass in `precision` and forget its gradient: for timing only."""
        self._gradient(torch.from_numpy(sequences).to(self.device), precision)
        self.optimizer.zero_grad(set_to_none=True)

    def evaluate(self, sequences: np.ndarray) -> float:
        """Return the mean loss over sequences of shape (n, T + 1) in float32, in nats/token."""
        with self._evaluating():
            return float(self._mean_loss(torch.from_numpy(sequences).to(self.device)))

    def probe(self, sequences: np.ndarray) -> ProbeResult | None:
        """Probe the curvature along the last update on sequences of shape (n, T + 1); `None` if it cannot be done.

        The probe needs room for two copies of the weights: it may never be what stops a run.
        """
        batch = torch.from_numpy(sequences).to(self.device)
        try:
            updates = adam.update_direction(self.optimizer)
            with self._evaluating():
                return probe_curvature(updates, lambda: self._mean_loss(batch)) if updates else None
        except (torch.OutOfMemoryError, RuntimeError) as error:
            if not _is_out_of_memory(error):
                raise
        return None

    def _mean_loss(self, batch: torch.Tensor) -> torch.Tensor:
        """Return the mean loss of a batch of any size, taken through the model in micro-batches, a scalar."""
        parts = torch.split(batch, min(self.micro_batch_size or self.batch_size, self.batch_size))
        losses = [self.loss(part).double() * (len(part) / len(batch)) for part in parts]
        return torch.stack(losses).sum()

    @contextmanager
    def _evaluating(self) -> Iterator[None]:
        """Switch dropout and gradients off and float32 on; under schedule-free, take the averaged weights."""
        self.model.eval()
        try:
            with averaged_weights(self.optimizer), torch.no_grad(), number_format.autocast("fp32", self.device):
                yield
        finally:
            self.model.train()

    def apply(self, controls: Controls) -> None:
        """Bring batch size, precision and width into force; masks follow along the interval with `prune_towards`.

        Raises:
            ValueError: a control cannot be used here; nothing has changed then.
        """
        if controls.sparsity and self.config.pruning == "none":
            raise ValueError(f"sparsity must be 0 in a run whose pruning is 'none', got {controls.sparsity}")
        if controls.batch_size != self.batch_size and self.config.optimizer != "adamw":
            raise ValueError(
                f"batch_size changes need optimizer 'adamw', got {controls.batch_size} after {self.batch_size} "
                f"under {self.config.optimizer!r}; keep the batch or take 'adamw'"
            )
        if controls.precision != self.precision:
            self.set_precision(controls.precision)
        adam.change_batch(self.optimizer, controls.batch_size / self.batch_size)
        self.batch_size = int(controls.batch_size)
        if self.width_start:
            keep = channels.channels_for(controls.sparsity, self.width_start)
            if keep < channels.ffn_width(self.model):
                channels.remove_channels(self.model, self.optimizer, keep)

    def set_precision(self, precision: Precision) -> None:
        """Switch the matrix products to `precision`; float16 gets a fresh loss scaler."""
        if reason := number_format.lacking(self.device).get(precision):
            raise ValueError(f"precision {precision} cannot be used: {reason}; try fp32")
        self.precision = precision
        self.scaler = torch.amp.GradScaler(self.device.type, enabled=precision == "fp16")

    def prune_towards(self, start: float, end: float, progress: float) -> None:
        """Raise the masks to the cubic schedule's sparsity at `progress` of an interval that goes from start to end."""
        if self.masks is not None and end > start:
            self.masks.prune_to(cubic_sparsity(start, end, progress))
            self.masks.apply()

    def sparsity(self) -> float:
        """Return the share of zero weights, or of removed feed-forward channels, counted in the model."""
        if self.masks is not None:
            return self.masks.sparsity()
        if self.width_start:
            return 1 - channels.ffn_width(self.model) / self.width_start
        return 0.0

    def effective_precision(self) -> str:
        """Return the number format of the last matrix product in training, read from its output."""
        return self._effective_precision

    def _watch_a_matrix_product(self) -> None:
        first = next(m for m in self.model.modules() if isinstance(m, nn.Linear | Conv1D))

        def remember(_module: nn.Module, _inputs: object, output: torch.Tensor) -> None:
            if self.model.training:
                self._effective_precision = number_format.name_of(output.dtype, self.device)

        first.register_forward_hook(remember)

    def snapshot(self) -> Snapshot:
        """Return a copy of weights, optimiser, masks and settings."""
        return {
            "weights": {name: tensor.detach().clone() for name, tensor in self.model.state_dict().items()},
            "width": channels.ffn_width(self.model) if self.width_start else 0,
            "optimizer": copy.deepcopy(self.optimizer.state_dict()),
            "scaler": self.scaler.state_dict(),
            "precision": self.precision,
            "batch_size": self.batch_size,
            "micro_batch_size": self.micro_batch_size,
            "masks": copy.deepcopy(self.masks.state_dict()) if self.masks is not None else {},
            "effective_precision": self._effective_precision,
        }

    def restore(self, snapshot: Snapshot) -> None:
        """Go back to a state that `snapshot` returned, bit for bit."""
        if snapshot["width"]:
            channels.resize(self.model, snapshot["width"])
        self.model.load_state_dict(snapshot["weights"])
        self.optimizer.load_state_dict(copy.deepcopy(snapshot["optimizer"]))
        self.set_precision(snapshot["precision"])
        self.scaler.load_state_dict(snapshot["scaler"])
        self.batch_size = snapshot["batch_size"]
        self.micro_batch_size = snapshot["micro_batch_size"]
        if self.masks is not None:
            self.masks.load_state_dict(copy.deepcopy(snapshot["masks"]))
        self._effective_precision = snapshot["effective_precision"]


def _is_out_of_memory(error: Exception) -> bool:
    return isinstance(error, torch.OutOfMemoryError) or "can't allocate memory" in str(error)


TokenArray = NDArray[np.unsignedinteger[Any]]

EVALUATION_SHARE = 0.02
"""An evaluation takes this share of the budget in tokens, within the two bounds below."""
MIN_EVALUATION_TOKENS, MAX_EVALUATION_TOKENS = 8_192, 262_144


class LiveRun:
    """One real training run. It is a `Plant`: the environment, the controller and the simulator share its methods.

    Args:
        config: What is trained, on what, and how it starts.
        meter: Energy meter; by default the best one that the device has.
        clock: Returns seconds; replaced in tests.
        probe: Whether to probe the curvature now and then (`probe_plan`).

    Raises:
        ValueError: the model, the text or a setting cannot be used; the message says what to do.
    """

    def __init__(
        self,
        config: RunConfig,
        *,
        meter: EnergyMeter | None = None,
        clock: Callable[[], float] = time.perf_counter,
        probe: bool = True,
    ) -> None:
        self.config = config
        self.device = resolve_device(config.device)
        self.clock = clock
        self.probing = probe and config.optimizer == "adamw"  # only its buffers tell the last update
        self.random_state = RandomState(self.device, config.seed)
        with self.random_state.apart():
            self.loaded: LoadedModel = load_model(config.model, config.seed)
        _check_context(self.loaded, config)
        self.corpus: Corpus = load_corpus(config.text, self.loaded.tokenizer)
        self.stream = BatchStream(self.corpus.train, config.sequence_length, config.seed)
        self.trainer = Trainer(self.loaded.model, config, self.device)
        self.meter = meter if meter is not None else select_meter(str(self.device))
        self.progress = BudgetProgress(
            schedule=config.base_schedule(),
            budget=config.n_sequences(),
            sequence_length=config.sequence_length,
            decisions=config.decisions,
        )
        self.target_share = 0.0
        self.sequences_probed = 0
        """Sequences that the curvature probe of the last interval looked at; 0 where there was none."""
        self.validation_loss: float | None = None
        self._evaluation_s = 0.0

    @property
    def finished(self) -> bool:
        """Whether the budget is used up or the cool-down complete."""
        return self.progress.finished

    @property
    def evaluation_sequences(self) -> int:
        """Sequences that one evaluation looks at."""
        wanted = min(max(EVALUATION_SHARE * self.config.tokens, MIN_EVALUATION_TOKENS), MAX_EVALUATION_TOKENS)
        return max(1, int(wanted) // self.config.sequence_length)

    def limits(self) -> ControlLimits:
        """Return what may be asked of this run; the first call measures which precisions pay (cached per device)."""
        return replace(self.base_limits(), masked_precisions=self._masked_precisions())

    def base_limits(self) -> ControlLimits:
        """Return the same without measuring: no precision is masked but what the device lacks."""
        config = self.config
        smallest, largest = batch_limits(config.batch_size, config.n_sequences() // config.decisions)
        if config.optimizer != "adamw":  # only AdamW can take another batch
            smallest = largest = config.batch_size
        return ControlLimits(
            start=config.start(),
            min_batch_size=smallest,
            max_batch_size=largest,
            masked_precisions=lacking(self.device),
            pruning=config.pruning,
            decisions=config.decisions,
        )

    def advance(self, controls: Controls, share: float) -> Telemetry:
        """Train on `share` of the budget under `controls`, at least one step, and return what was measured.

        Raises:
            ValueError: the run has finished, or a control cannot be used.
        """
        if self.finished:
            raise ValueError("advance needs a run that has not finished; make a new LiveRun or restore a snapshot")
        interval = self._begin(controls)
        self.target_share += share
        target = self.progress.end_after(self.target_share)
        span = max(target - self.progress.sequences, 1)
        with self.random_state.in_force():
            while self.progress.sequences < target or not interval.steps:
                self._prune(interval, (self.progress.sequences - interval.start_sequences) / span)
                self._step(interval)
        self._prune(interval, 1.0)
        self._probe(interval)
        return self._end(interval)

    def _begin(self, controls: Controls) -> Interval:
        synchronise(self.device)
        reading = self.meter.read()
        start = self.clock()
        interval = Interval(controls, start, reading, self.progress.sequences, self.trainer.sparsity())
        self.trainer.apply(controls)
        if controls.finish:
            self.progress.begin_cooldown(controls.batch_size)
        interval.switch_s = self.clock() - start
        return interval

    def _step(self, interval: Interval) -> None:
        batch_size = min(self.trainer.batch_size, self.progress.end - self.progress.sequences)
        learning_rate = self.learning_rate(interval.controls)
        interval.note_step(self.trainer.step(self.stream.take(batch_size), learning_rate), self.trainer.optimizer)
        self.progress.sequences += batch_size

    def learning_rate(self, controls: Controls) -> float:
        """Return the learning rate of the next step: base schedule x scale x the batch's neutral factor."""
        base, scale, factor = self.config.base_learning_rate, controls.learning_rate_scale, self.progress.factor
        return learning_rate(base, scale, factor(controls.batch_size), controls.batch_size, self.config.batch_size)

    def _prune(self, interval: Interval, done: float) -> None:
        """Raise the masks when the next of the interval's mask updates is due; `done` is its progress in [0, 1]."""
        due = mask_updates_due(done)
        if due > interval.mask_updates:
            interval.mask_updates = due
            start, end = interval.start_sparsity, interval.controls.sparsity
            self.trainer.prune_towards(start, end, due / MASK_UPDATES)

    def _probe(self, interval: Interval) -> None:
        self.sequences_probed = 0
        begun_at = interval.start_sequences / self.config.n_sequences()
        if not self.probing or not probe_due(self.progress.decision, begun_at):
            return
        self.sequences_probed = int(sequences_probed(self.progress.sequences - interval.start_sequences))
        synchronise(self.device)  # or the steps still under way would count as the probe's time
        start = self.clock()
        interval.probe = self.trainer.probe(self.stream.peek(self.sequences_probed))
        interval.probe_s = self.clock() - start

    def _end(self, interval: Interval) -> Telemetry:
        interval.note_moment(self.trainer.optimizer)
        config, trainer = self.config, self.trainer
        taken = self.progress.sequences - interval.start_sequences
        batch_size = taken / len(interval.steps)
        learned = interval.losses_and_gradients(  # waits for the device, so the clock comes after
            batch_size, gradient_clip=config.gradient_clip, beta1=config.beta1
        )
        cost = interval.cost(self.clock(), self.meter.read())
        self.progress.decision += 1
        evaluation_s, self._evaluation_s = self._evaluation_s, 0.0
        return Telemetry(
            **learned,
            **cost,
            decision=self.progress.decision - 1,
            budget_used=self.progress.used,
            tokens=self.progress.tokens,
            interval_tokens=taken * config.sequence_length,
            steps=len(interval.steps),
            epochs_seen=self.stream.epochs_seen,
            validation_loss=self.validation_loss,
            requested=interval.controls,
            learning_rate=adam.effective_learning_rate(trainer.optimizer),
            batch_size=batch_size,
            micro_batch_size=min(trainer.micro_batch_size or trainer.batch_size, trainer.batch_size),
            precision=trainer.effective_precision(),
            sparsity=trainer.sparsity(),
            finishing=self.progress.cooldown is not None,
            finished=self.finished,
            evaluation_time_s=evaluation_s,
            memory_share=memory_share(self.device),
        )

    def evaluate(self) -> float:
        """Return the validation loss on fixed windows in float32, in nats/token."""
        self.validation_loss = self._evaluate(self.corpus.validation)
        return self.validation_loss

    def test(self) -> float:
        """Return the loss on the test split, in nats/token. For reports only: no decision may see it."""
        return self._evaluate(self.corpus.test)

    def _evaluate(self, tokens: TokenArray) -> float:
        start = self.clock()
        loss = self.trainer.evaluate(fixed_batch(tokens, self.config.sequence_length, self.evaluation_sequences))
        self._evaluation_s += self.clock() - start
        return loss

    def save(self, folder: Path) -> None:
        """Write the model as `evaluate` sees it (schedule-free's averaged weights), for plain transformers."""
        with averaged_weights(self.trainer.optimizer):
            self.loaded.save(folder)

    def snapshot(self) -> Snapshot:
        """Return a copy of everything that decides how the run goes on; `torch.save` can write it."""
        return {
            "trainer": self.trainer.snapshot(),
            "stream": self.stream.state_dict(),
            "random_state": self.random_state.state_dict(),
            **self.progress.state_dict(),
            "target_share": self.target_share,
            "validation_loss": self.validation_loss,
        }

    def restore(self, snapshot: Snapshot) -> None:
        """Go back to a state that `snapshot` returned; on a CPU the run then goes on bit for bit as it did."""
        self.trainer.restore(snapshot["trainer"])
        self.stream.load_state_dict(snapshot["stream"])
        self.random_state.load_state_dict(snapshot["random_state"])
        self.progress.load_state_dict(snapshot)
        self.target_share = snapshot["target_share"]
        self.validation_loss = snapshot["validation_loss"]

    def _masked_precisions(self) -> dict[Precision, str]:
        config = self.config
        batch = self.stream.peek(config.batch_size)
        key = f"{self.loaded.model.config.to_json_string()}|{config.batch_size}|{config.sequence_length}"
        with self.random_state.apart():
            reasons = masked_precisions(self.device, lambda precision: self.trainer.rehearse(batch, precision), key)
        reasons.pop(config.precision, None)
        return reasons


def resolve_device(name: str) -> torch.device:
    """Return the device called `name`; `auto` takes a GPU if there is one. Raises `ValueError` if it is not there."""
    if name == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    if name.startswith("cuda") and not torch.cuda.is_available():
        raise ValueError(f"device: {name!r} needs an NVIDIA GPU that torch can see, found none; use 'cpu' or 'auto'")
    try:
        return torch.device(name)
    except RuntimeError:
        raise ValueError(f"device must be auto, cpu or cuda, got {name!r}") from None


def _check_context(loaded: LoadedModel, config: RunConfig) -> None:
    limit = context_length(loaded.model.config)
    if limit is not None and config.sequence_length > limit:
        raise ValueError(
            f"sequence_length must not exceed the model's context of {limit} tokens, got {config.sequence_length}"
        )
