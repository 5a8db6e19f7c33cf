"""Find out how the model of a Hugging Face Trainer computes its loss, and on which data it can be validated."""

from __future__ import annotations

import contextlib
import copy
import math
from collections.abc import Callable, Iterator
from itertools import islice
from typing import Any

import torch
from torch import nn
from transformers import Trainer
from transformers.loss.loss_utils import ForCausalLMLoss
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

VALIDATION_BATCHES = 8
"""Batches of the evaluation data that the validation loss is measured on."""


def divides_by_items(model: nn.Module, loss: Callable[[Any], torch.Tensor], items: Any) -> bool | None:
    """Return whether a loss is divided by the items it is told; some models take their number and leave it unused.

    Args:
        model: Computes the loss.
        loss: Returns the loss of a micro-batch, given the items of the whole step.
        items: Their number.

    Returns:
        `None` where the loss is 0 or not finite, which says nothing.
    """
    training = model.training
    model.eval()
    try:
        device = next(model.parameters()).device.type
        with torch.no_grad(), torch.autocast(device, enabled=False):
            one, other = float(loss(items)), float(loss(2 * items))
    finally:
        model.train(training)
    return not math.isclose(one, other, rel_tol=1e-4) if one and math.isfinite(one) else None


def shifts_labels(model: Any) -> bool:
    """Return whether the loss leaves out the first label of a sequence: GPT-2's does, and names no loss type."""
    base = model.get_base_model() if hasattr(model, "get_base_model") else model
    known = type(base).__name__ in MODEL_FOR_CAUSAL_LM_MAPPING_NAMES.values()
    return known and getattr(base, "loss_function", None) is ForCausalLMLoss


def labelled_batches(trainer: Trainer) -> list[dict[str, Any]]:
    """Return the first batches of the evaluation data, those that have a loss."""
    names = list(trainer.eval_dataset) if isinstance(trainer.eval_dataset, dict) else [None]
    batches, labels = [], trainer.label_names
    with torch.random.fork_rng(devices=[]):
        for batch in islice(trainer.get_eval_dataloader(names[0]), VALIDATION_BATCHES):
            if all(batch.get(name) is not None for name in labels) if labels else trainer.can_return_loss:
                batches.append(dict(batch))
    return batches


@contextlib.contextmanager
def looking(trainer: Any) -> Iterator[None]:
    """Keep what is only looked at out of the figures that a Trainer gathers of itself."""
    kept = copy.deepcopy(getattr(trainer, "_metrics", None))
    try:
        yield
    finally:
        if kept is not None:
            trainer._metrics = kept
