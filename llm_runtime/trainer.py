"""Take optimiser steps on a real model, and bring the controls into force.

Shapes: B sequences, b sequences of a micro-batch, T tokens of a sequence, V vocabulary.
"""

from __future__ import annotations

import copy
from collections.abc import Iterator
from contextlib import contextmanager

import numpy as np
import torch
from torch import nn
from torch.nn import functional as F
from transformers import PreTrainedModel
from transformers.pytorch_utils import Conv1D

from trainpilot.llm_runtime import optimizer as adam
from trainpilot.llm_runtime import precision as number_format
from trainpilot.llm_runtime import width as channels
from trainpilot.llm_runtime.controls import Controls, Precision
from trainpilot.llm_runtime.interval import StepRecord
from trainpilot.llm_runtime.masks import WeightMasks
from trainpilot.llm_runtime.plant import Snapshot
from trainpilot.llm_runtime.probe import ProbeResult, probe_curvature
from trainpilot.llm_runtime.run_config import RunConfig
from trainpilot.llm_runtime.schedules import cubic_sparsity
from trainpilot.llm_runtime.tuning_free import averaged_weights


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
