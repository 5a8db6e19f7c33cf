"""Bring controls into force on a model and an optimiser that belong to somebody else, and read them back."""

from __future__ import annotations

import copy
import weakref
from contextlib import AbstractContextManager
from dataclasses import replace
from typing import Any, Literal

import torch
from torch import nn
from torch.optim import Adam, Optimizer
from torch.utils.hooks import RemovableHandle

from trainpilot.agents.steering.copied import copied
from trainpilot.llm_runtime import optimizer as adam
from trainpilot.llm_runtime import precision as number_format
from trainpilot.llm_runtime.controls import PRECISIONS, Controls, Precision
from trainpilot.llm_runtime.masks import WeightMasks
from trainpilot.llm_runtime.plant import Snapshot
from trainpilot.llm_runtime.schedules import cubic_sparsity

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
        owner = getattr(optimizer, _CLAIMED, None)
        if owner is not None and owner() is not None:
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
        stepped = {id(p) for group in optimizer.param_groups for p in group["params"]}
        self._stepped = [p for p in model.parameters() if id(p) in stepped]
        self._start_batch = start.batch_size
        self._ratios = [_first_rate(group) / self.peak for group in optimizer.param_groups]
        self.alone = True
        """Whether nobody else may write the learning rate; an adapter whose scheduler asks us turns it off."""
        self.switches_matmul = False
        """Whether float32 and tf32 are told apart, by a setting of the whole process."""
        self._set: list[float] = []
        self._output_precision: str = start.precision
        self._hook: RemovableHandle | None = None
        self._matmul_precision = torch.get_float32_matmul_precision()

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
        if len(now) != len(self._ratios):
            raise ValueError(
                f"optimizer must keep its {len(self._ratios)} parameter groups, got {len(now)}; add parameters before "
                "it is steered"
            )
        if self.alone and self._set and now != self._set:
            raise ValueError(
                f"learning rate was set to {self._set[0]:.4g} and is now {now[0]:.4g}: something else writes it too; "
                "remove the other learning-rate scheduler, as steering has the base schedule in it"
            )
        for group, ratio in zip(self.optimizer.param_groups, self._ratios, strict=True):
            _write_rate(group, float(learning_rate) * ratio)
        self._set = [float(group["lr"]) for group in self.optimizer.param_groups]

    def learning_rate(self) -> float:
        """Return the learning rate in force, read from the optimiser: the highest of its groups."""
        return max(float(group["lr"]) for group in self.optimizer.param_groups)

    def autocast(self, precision: Precision | None = None) -> AbstractContextManager[object]:
        """Return the context in which forward passes run in `precision`, by default the controls'.

        Unless tf32 is offered, float32 is whatever the user's own setting of matrix products makes of it.
        """
        wanted = precision or self.controls.precision
        if wanted == "fp32" and not self.switches_matmul:
            return torch.autocast(self.device.type, enabled=False)
        return number_format.autocast(wanted, self.device)

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
        return [p for p in self._stepped if p.requires_grad]

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
        """Return a copy of what training changes: weights that are stepped, buffers, optimiser and masks."""
        return {
            "tensors": [tensor.detach().clone() for tensor in self._moving()],
            "optimizer": copied(self.optimizer.state_dict()),
            "levers": copy.deepcopy(self.state_dict()),
        }

    def _moving(self) -> list[torch.Tensor]:
        weights = self.parameters() if self.masks is None else list(self.model.parameters())
        return [*weights, *self.model.buffers()]

    def restore(self, snapshot: Snapshot, controls: Controls) -> None:
        """Go back to a snapshot, under the controls that were in force then."""
        with torch.no_grad():
            for tensor, before in zip(self._moving(), snapshot["tensors"], strict=True):
                tensor.copy_(before)
        self.optimizer.load_state_dict(copied(snapshot["optimizer"]))
        self.load_state_dict(snapshot["levers"], controls)

    def claim(self) -> None:
        """Keep other controllers from the optimiser, and see the model's number format, until `release`."""
        setattr(self.optimizer, _CLAIMED, weakref.ref(self))
        first = next((m for m in self.model.modules() if isinstance(m, nn.Linear)), None)
        if first is not None:
            self._hook = first.register_forward_hook(_Watcher(self))

    def release(self) -> None:
        """Give model and optimiser back: the batch's decay and the peak learning rate as they were at the start."""
        setattr(self.optimizer, _CLAIMED, None)
        self.apply(replace(self.controls, batch_size=self._start_batch))
        for group, ratio in zip(self.optimizer.param_groups, self._ratios, strict=False):  # some may have been added
            _write_rate(group, self.peak * ratio)
        if self.switches_matmul:
            torch.set_float32_matmul_precision(self._matmul_precision)
        if self._hook is not None:
            self._hook.remove()

    def remember(self, dtype: torch.dtype) -> None:
        """Keep the number format of a matrix product's output."""
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


def _write_rate(group: dict[str, Any], learning_rate: float) -> None:
    """Write the learning rate of a parameter group; some optimisers keep it in a tensor, which must stay the same."""
    if isinstance(group["lr"], torch.Tensor):
        group["lr"].fill_(learning_rate)
    else:
        group["lr"] = learning_rate


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


class _Watcher:
    """Has the model's first matrix product tell its output's number format.

    A model may be copied or pickled with it, and is then not watched.
    """

    def __init__(self, levers: Levers) -> None:
        self._levers: weakref.ref[Levers] | None = weakref.ref(levers)

    def __call__(self, module: nn.Module, _inputs: object, output: torch.Tensor) -> None:
        levers = self._levers() if self._levers is not None else None
        if levers is not None and module.training:
            levers.remember(output.dtype)

    def __getstate__(self) -> dict[str, Any]:
        return {"_levers": None}
