"""Bring controls into force on a model and an optimiser that belong to somebody else, and read them back."""

from __future__ import annotations

import copy
from contextlib import AbstractContextManager
from typing import Any, Literal

import torch
from torch import nn
from torch.optim import Adam, Optimizer

from trainpilot.llm_runtime import optimizer as adam
from trainpilot.llm_runtime import precision as number_format
from trainpilot.llm_runtime.controls import PRECISIONS, Controls, Precision
from trainpilot.llm_runtime.masks import WeightMasks, cubic_sparsity
from trainpilot.llm_runtime.plant import Snapshot

MaskPruning = Literal["none", "magnitude", "evolution"]
_CLAIMED = "_trainpilot_steered"


class Levers:
    """Learning rate, batch, precision and weight masks of one model and its optimiser.

    The parameter groups keep the ratios that their learning rates had at the beginning. The batch itself is the
    loop's: here only Adam's decay follows it, so that the change alone does not move the run.

    Args:
        model: What is trained.
        optimizer: Steps it.
        start: Controls at the beginning.
        pruning: What raising the sparsity does.

    Raises:
        ValueError: the optimiser is steered already, has no parameters, steps others than the model's, or none at a
            rate above 0.
    """

    def __init__(self, model: nn.Module, optimizer: Optimizer, start: Controls, pruning: MaskPruning = "none") -> None:
        if getattr(optimizer, _CLAIMED, False):
            raise ValueError(
                "optimizer must be steered by one controller, this one has one already; "
                "call close() on the other, or drop one of the two"
            )
        self.model = model
        self.optimizer = optimizer
        self.controls = start
        self.device = _device(model, optimizer)
        self.masks = None if pruning == "none" else WeightMasks(model, pruning)
        self.peak = max(_first_rate(group) for group in optimizer.param_groups)
        if self.peak <= 0:
            raise ValueError(
                "optimizer must have a learning rate above 0, the peak of the base schedule, got 0 in every "
                "parameter group; make it without a warm-up of its own"
            )
        self._ratios = [_first_rate(group) / self.peak for group in optimizer.param_groups]
        self.alone = True
        """Whether nobody else may write the learning rate; an adapter whose scheduler asks us turns it off."""
        self._set: list[float] = []
        self._output_precision: str = start.precision
        self._watched = _watch(model, self._remember)

    @property
    def changes_batch(self) -> bool:
        """Whether the batch may change: what that does to other optimisers than Adam is not known."""
        return isinstance(self.optimizer, Adam)

    @property
    def sharded(self) -> bool:
        """Whether each process holds only its part of the weights."""
        return any(hasattr(p, "full_tensor") for p in self.parameters())

    @property
    def beta1(self) -> float:
        """Adam's first-moment decay."""
        return float(self.optimizer.param_groups[0].get("betas", (0.9,))[0])

    def apply(self, controls: Controls) -> None:
        """Bring batch and precision into force; learning rate and masks follow step by step."""
        before, self.controls = self.controls, controls
        if controls.batch_size != before.batch_size:
            adam.change_batch(self.optimizer, controls.batch_size / before.batch_size)

    def set_learning_rate(self, learning_rate: float) -> None:
        """Set the learning rate, that of the group with the highest; the others keep their ratio to it.

        Raises:
            ValueError: somebody else has written the learning rate since it was last set here.
        """
        now = [float(group["lr"]) for group in self.optimizer.param_groups]
        if self.alone and self._set and now != self._set:
            raise ValueError(
                f"learning rate was set to {self._set[0]:.4g} and is now {now[0]:.4g}: something else writes it too; "
                "remove the other learning-rate scheduler, as steering has the base schedule in it"
            )
        for group, ratio in zip(self.optimizer.param_groups, self._ratios, strict=True):
            group["lr"] = float(learning_rate) * ratio
        self._set = [float(group["lr"]) for group in self.optimizer.param_groups]

    def learning_rate(self) -> float:
        """Return the learning rate in force, read from the optimiser: the highest of its groups."""
        return max(float(group["lr"]) for group in self.optimizer.param_groups)

    def autocast(self) -> AbstractContextManager[object]:
        """Return the context in which forward passes run in the controls' precision."""
        return number_format.autocast(self.controls.precision, self.device)

    def precision(self) -> str:
        """Return the number format of the last matrix product in training, read from its output."""
        return self._output_precision

    def prune_towards(self, start: float, end: float, progress: float) -> None:
        """Raise the masks to the cubic schedule's sparsity at `progress` of an interval that goes from start to end."""
        if self.masks is not None and end > start:
            self.masks.prune_to(cubic_sparsity(start, end, progress))

    def after_step(self) -> None:
        """Hold masked weights at zero; call it after every optimiser step."""
        if self.masks is not None:
            self.masks.apply()
            self.masks.observe()

    def sparsity(self) -> float:
        """Return the share of prunable weights that are zero, counted in the model."""
        return 0.0 if self.masks is None else self.masks.sparsity()

    def parameters(self) -> list[nn.Parameter]:
        """Return what the optimiser steps, in the model's order."""
        stepped = {id(p) for group in self.optimizer.param_groups for p in group["params"]}
        return [p for p in self.model.parameters() if id(p) in stepped and p.requires_grad]

    def state_dict(self) -> dict[str, Any]:
        """Return what neither the model's state nor the optimiser's holds."""
        return {
            "masks": None if self.masks is None else self.masks.state_dict(),
            "peak": self.peak,
            "ratios": list(self._ratios),
            "set": list(self._set),
            "output_precision": self._output_precision,
        }

    def load_state_dict(self, state: dict[str, Any], controls: Controls) -> None:
        """Go back to what `state_dict` returned, under the controls that were in force then."""
        if self.masks is not None:
            self.masks.load_state_dict(copy.deepcopy(state["masks"]))
        self.controls = controls
        self.peak, self._ratios, self._set = state["peak"], list(state["ratios"]), list(state["set"])
        self._output_precision = state["output_precision"]

    def snapshot(self) -> Snapshot:
        """Return a copy of weights, buffers, optimiser and masks."""
        return {
            "weights": {name: tensor.detach().clone() for name, tensor in self.model.state_dict().items()},
            "optimizer": copy.deepcopy(self.optimizer.state_dict()),
            "levers": copy.deepcopy(self.state_dict()),
        }

    def restore(self, snapshot: Snapshot, controls: Controls) -> None:
        """Go back to a snapshot, under the controls that were in force then."""
        self.model.load_state_dict(snapshot["weights"])
        self.optimizer.load_state_dict(copy.deepcopy(snapshot["optimizer"]))
        self.load_state_dict(snapshot["levers"], controls)

    def claim(self) -> None:
        """Keep other controllers from the optimiser, until `release`."""
        setattr(self.optimizer, _CLAIMED, True)

    def release(self) -> None:
        """Stop watching the model, and give the optimiser back."""
        setattr(self.optimizer, _CLAIMED, False)
        if self._watched is not None:
            self._watched.remove()

    def _remember(self, dtype: torch.dtype) -> None:
        self._output_precision = number_format.name_of(dtype, self.device)


def offered(precisions: tuple[Precision, ...], device: torch.device) -> dict[Precision, str]:
    """Return the precisions that are not offered, each with the reason, where the user lists those that are."""
    reasons = number_format.lacking(device)
    reasons.setdefault("fp16", "needs a loss scaler, which is the loop's")
    for name in PRECISIONS:
        if name not in precisions:
            reasons.setdefault(name, "not among the precisions that were offered")
    return reasons


def _first_rate(group: dict[str, Any]) -> float:
    """Return the peak of a group's learning rate: a scheduler that has warm-up leaves it in `initial_lr`."""
    return float(group.get("initial_lr", group["lr"]))


def _device(model: nn.Module, optimizer: Optimizer) -> torch.device:
    stepped = [p for group in optimizer.param_groups for p in group["params"]]
    if not stepped:
        raise ValueError("optimizer must have parameters, got none; make it from model.parameters()")
    mine = {id(p) for p in model.parameters()}
    if strange := sum(id(p) not in mine for p in stepped):
        raise ValueError(
            f"optimizer must step parameters of the model, got {strange} of {len(stepped)} that are not; "
            "make it from model.parameters(), after anything that replaces them (PEFT, .to, fully_shard)"
        )
    device: torch.device = stepped[0].device
    return device


def _watch(model: nn.Module, remember: Any) -> Any:
    """Have the first matrix product tell its output's number format."""
    first = next((m for m in model.modules() if isinstance(m, nn.Linear)), None)
    if first is None:
        return None

    def hook(module: nn.Module, _inputs: object, output: torch.Tensor) -> None:
        if module.training:
            remember(output.dtype)

    return first.register_forward_hook(hook)
