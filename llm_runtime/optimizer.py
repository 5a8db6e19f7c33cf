"""Make AdamW, schedule-free AdamW or Prodigy, read their state, and adjust Adam's decay to a change of batch size.

`JointOptimizer` makes one of several that step a model together, such as Muon and AdamW.

The tensors may be plain or sharded over processes (FSDP2).
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Adam, AdamW, Optimizer

from trainpilot.llm_runtime.config import RunConfig
from trainpilot.llm_runtime.plain_values import is_number, shown

MOMENTS = ("exp_avg", "exp_avg_sq")
"""Names of Adam's moments."""
MOVING = ("lr", "initial_lr", "betas")
"""Settings of Adam that change in the course of a run."""
BETAS = (0.9, 0.999)
"""Decay rates that both packages recommend; a beta2 as short as AdamW's 0.95 would also shorten Prodigy's estimate."""


def make_schedule_free(groups: list[dict[str, Any]], config: RunConfig) -> Optimizer:
    """Return schedule-free AdamW, ready to train.

    Gradients are computed at a point between the weights that take the steps and their running average; the average
    is the result (`averaged_weights`). The package's own warm-up stays off: it is a factor on the learning rate,
    which is set in every step. In the average, a step has the weight of the square of the largest rate so far.

    Defazio et al. 2024, "The road less scheduled", arXiv 2405.15682.
    """
    try:
        from schedulefree import AdamWScheduleFree
    except ImportError:
        raise _missing(config, "schedulefree") from None
    optimizer: Any = AdamWScheduleFree(groups, lr=config.base_learning_rate, betas=BETAS, eps=1e-8, warmup_steps=0)
    optimizer.train()
    return optimizer  # type: ignore[no-any-return]


def greedy_schedule(
    start: float, limits: tuple[float, float], *, factor: float, patience: int
) -> Callable[[float], float]:
    """Return transformers' GreedyLR (arXiv 2512.14527) as a function from the newest loss to the next learning rate.

    Args:
        start: The first learning rate.
        limits: Lowest and highest learning rate.
        factor: What the rate is divided by after a rise, and multiplied by after a fall.
        patience: Losses in a row in one direction that do not yet lead to a change.
    """
    from transformers import get_scheduler

    optimizer = torch.optim.SGD([torch.zeros(1)], lr=start)
    settings = {"factor": factor, "patience": patience, "min_lr": limits[0], "max_lr": limits[1]}
    scheduler: Any = get_scheduler("greedy", optimizer, scheduler_specific_kwargs=settings)

    def step(loss: float) -> float:
        scheduler.step(loss)
        return float(optimizer.param_groups[0]["lr"])

    return step


def make_prodigy(groups: list[dict[str, Any]], config: RunConfig) -> Optimizer:
    """Return Prodigy: AdamW that estimates its learning rate; the rate that is set is a factor on the estimate.

    With warm-up the estimate would come out too high; Prodigy's safeguard against that is switched on then.

    Mishchenko and Defazio 2024, "Prodigy: an expeditiously adaptive parameter-free learner", arXiv 2306.06101.
    """
    try:
        from prodigyopt import Prodigy
    except ImportError:
        raise _missing(config, "prodigyopt") from None
    optimizer: Optimizer = Prodigy(
        groups,
        lr=config.base_learning_rate,
        betas=BETAS,
        eps=1e-8,
        decouple=True,
        use_bias_correction=True,
        safeguard_warmup=config.warmup() > 0,
    )
    return optimizer


@contextmanager
def averaged_weights(optimizer: Optimizer) -> Iterator[None]:
    """Put schedule-free's averaged weights into the model; afterwards the training weights are back, bit for bit.

    The package would compute the training weights again, which rounds, so that an evaluation would change the run;
    they are copied instead. With any other optimiser, and inside another such block, nothing happens.
    """
    switch: Any = optimizer
    if not optimizer.param_groups[0].get("train_mode", False):
        yield
        return
    parameters = [p for group in optimizer.param_groups for p in group["params"]]
    saved = [p.detach().clone() for p in parameters]
    switch.eval()
    try:
        yield
    finally:
        switch.train()
        with torch.no_grad():
            torch._foreach_copy_(parameters, saved)


def _missing(config: RunConfig, package: str) -> ValueError:
    return ValueError(f"optimizer {config.optimizer!r} needs the package {package}; run: pip install {package}")


def full_tensor(tensor: Tensor) -> Tensor:
    """Return the full tensor; if it is sharded, all processes must call this together."""
    full: Tensor = tensor.full_tensor() if hasattr(tensor, "full_tensor") else tensor
    return full


def laid_out_like(pattern: Tensor, tensor: Tensor) -> Tensor:
    """Return `tensor`, of which every process holds a full copy, sharded like `pattern`."""
    if not hasattr(pattern, "full_tensor"):
        return tensor
    from torch.distributed.tensor import DTensor, distribute_tensor

    assert isinstance(pattern, DTensor)
    return distribute_tensor(tensor, pattern.device_mesh, pattern.placements, src_data_rank=None)


def make_optimizer(model: nn.Module, config: RunConfig) -> Optimizer:
    """Return the optimiser of the run's configuration, by default fused AdamW, with weight decay on matrices only."""
    parameters = [p for p in model.parameters() if p.requires_grad]
    groups = [
        {"params": [p for p in parameters if p.ndim >= 2], "weight_decay": config.weight_decay},
        {"params": [p for p in parameters if p.ndim < 2], "weight_decay": 0.0},
    ]
    if config.optimizer == "schedule-free":
        return make_schedule_free(groups, config)
    if config.optimizer == "prodigy":
        return make_prodigy(groups, config)
    betas = (config.beta1, config.beta2)
    return AdamW(groups, lr=config.base_learning_rate, betas=betas, eps=1e-8, fused=True)


class JointOptimizer(Optimizer):
    """Several optimizers that step one model together, seen as one: Muon for the matrices and AdamW for the rest.

    Parameter groups and states are those of the optimizers themselves, so each may still be saved and loaded alone.

    Args:
        optimizers: At least one. No parameter may belong to two of them.

    Raises:
        ValueError: there is none, or a parameter belongs to two.
    """

    def __init__(self, optimizers: Sequence[Optimizer]) -> None:
        # Not Optimizer.__init__, which would make groups and states of its own.
        self.optimizers = tuple(optimizers)
        if not self.optimizers:
            raise ValueError("optimizer must be an optimizer, or several, got an empty list")
        stepped = [id(p) for group in self.param_groups for p in group["params"]]
        if twice := len(stepped) - len(set(stepped)):
            raise ValueError(f"optimizers must step different parameters, got {twice} that two of them step")
        self.adam_gradient_norm: Tensor | None = None
        """Norm of the gradient that the Adam among them saw in the last step, a scalar; `None` without an Adam."""

    @property
    def param_groups(self) -> list[dict[str, Any]]:  # type: ignore[override]
        """Parameter groups of all optimizers, one after the other."""
        return [group for each in self.optimizers for group in each.param_groups]

    @property
    def state(self) -> Mapping[Tensor, Any]:  # type: ignore[override]
        """State of every parameter that has been stepped."""
        return {parameter: held for each in self.optimizers for parameter, held in each.state.items()}

    def step(self, closure: None = None) -> None:  # type: ignore[override]
        """Let every optimizer make its step."""
        adam = adam_of(self)
        if adam is not None:
            gradients = [p.grad for group in adam.param_groups for p in group["params"] if p.grad is not None]
            self.adam_gradient_norm = norm_of(gradients) if gradients else None
        for each in self.optimizers:
            each.step()

    def zero_grad(self, set_to_none: bool = True) -> None:
        """Drop all gradients."""
        for each in self.optimizers:
            each.zero_grad(set_to_none=set_to_none)

    def state_dict(self) -> dict[str, Any]:
        """Return the states of the optimizers, in their order."""
        return {"optimizers": [each.state_dict() for each in self.optimizers]}

    def load_state_dict(self, state_dict: Mapping[str, Any]) -> None:
        """Load what `state_dict` returned."""
        for each, state in zip(self.optimizers, state_dict["optimizers"], strict=True):
            each.load_state_dict(state)

    def __repr__(self) -> str:
        return name_of(self)


def parts_of(optimizer: Optimizer) -> tuple[Optimizer, ...]:
    """Return the optimizers that a joint one consists of, or the one itself."""
    return optimizer.optimizers if isinstance(optimizer, JointOptimizer) else (optimizer,)


def name_of(optimizer: Optimizer) -> str:
    """Return the name of an optimizer's class, or the names of several, such as `Muon + AdamW`."""
    return " + ".join(type(each).__name__ for each in parts_of(optimizer))


def adam_of(optimizer: Optimizer) -> Adam | None:
    """Return the Adam or AdamW in an optimizer, the first of several; `None` without one."""
    return next((each for each in parts_of(optimizer) if isinstance(each, Adam)), None)


def follows_batch(optimizer: Optimizer) -> bool:
    """Return whether it is known how to make a change of the batch neutral: for Adam, AdamW and Muon.

    Muon is known by its name, as it is often the loop's own. Its updates have a fixed size, as those of Adam have
    about, so the same rule for the learning rate is taken, and its momentum stays, as Adam's first decay does.
    """
    return all(isinstance(each, Adam) or type(each).__name__ == "Muon" for each in parts_of(optimizer))


def change_batch(optimizer: Optimizer, ratio: float) -> None:
    """Adjust Adam to a batch that grows by `ratio`, with its bias-corrected moments unchanged.

    The decay becomes beta2^ratio, which keeps its half-life in tokens (Marek et al. 2025), and the step count is
    divided by `ratio`, which keeps the bias correction 1 - beta2^step. The correction 1 - beta1^step changes; the
    first moment is scaled with it, as the first steps after a change during warm-up would be too large otherwise.
    Of several optimizers, those that are no Adam stay as they are.
    """
    if ratio == 1:
        return
    assert follows_batch(optimizer), "only the buffers of Adam and Muon are known"
    for each in parts_of(optimizer):
        if isinstance(each, Adam):
            _change_adam(each, ratio)


def _change_adam(optimizer: Adam, ratio: float) -> None:
    for group in optimizer.param_groups:
        beta1, beta2 = group["betas"]
        group["betas"] = (beta1, float(beta2**ratio))
        for state in _states(optimizer, group):
            before = 1 - beta1 ** state["step"]
            state["step"] /= ratio
            state["exp_avg"] *= (1 - beta1 ** state["step"]) / before


def set_learning_rate(optimizer: Optimizer, learning_rate: float) -> None:
    """Set the learning rate of every parameter group."""
    for group in optimizer.param_groups:
        group["lr"] = float(learning_rate)


def effective_learning_rate(optimizer: Optimizer) -> float:
    """Return the learning rate in force, read from the optimizer: the highest of its groups.

    For Prodigy, the rate that was set times its estimate `d`.
    """
    return max(float(group["lr"]) * float(group.get("d", 1.0)) for group in optimizer.param_groups)


def update_direction(optimizer: Optimizer) -> list[tuple[nn.Parameter, torch.Tensor]]:
    """Return the last update of each parameter, computed from AdamW's buffers, with weight decay.

    The decay is computed from the weights after the step instead of before it: a relative error of lr x decay.
    The list is empty for other optimisers and for several, whose buffers have another meaning.
    """
    updates: list[tuple[nn.Parameter, torch.Tensor]] = []
    if not isinstance(optimizer, AdamW):
        return updates
    for group in optimizer.param_groups:
        beta1, beta2 = group["betas"]
        for parameter in group["params"]:
            state = optimizer.state.get(parameter) or {"step": 0.0}
            step = float(state["step"])
            if step == 0:  # never stepped, or every step was skipped by the loss scaler
                continue
            first = state["exp_avg"] / (1 - beta1**step)
            second = (state["exp_avg_sq"] / (1 - beta2**step)).sqrt_().add_(group["eps"])
            update = first.div_(second).add_(parameter.detach(), alpha=group["weight_decay"]).mul_(-group["lr"])
            updates.append((parameter, update))
    return updates


def first_moment_norm(optimizer: Optimizer) -> torch.Tensor | None:
    """Return |m| of AdamW's bias-corrected first moment over all parameters, a scalar on the device.

    `None` before the first step, and for other optimisers. Of several, that of the first Adam among them.
    """
    adam = adam_of(optimizer)
    if adam is None:
        return None
    moments: list[torch.Tensor] = []
    correction = 1.0
    for group in adam.param_groups:
        states = _states(adam, group)
        moments += [state["exp_avg"] for state in states]
        if states:
            correction = 1 - group["betas"][0] ** float(states[0]["step"])
    return norm_of(moments) / correction if moments else None


def norm_of(tensors: Iterable[torch.Tensor]) -> torch.Tensor:
    """Return the Euclidean norm of all tensors taken as one vector, a scalar on the device."""
    return full_tensor(torch.linalg.vector_norm(torch.stack(torch._foreach_norm(list(tensors)))))


def _states(optimizer: Adam, group: dict[str, Any]) -> list[dict[str, torch.Tensor]]:
    """Return the state of those parameters of a group that have been stepped."""
    return [optimizer.state[p] for p in group["params"] if optimizer.state.get(p)]


def check_state(optimizer: Optimizer, state: Mapping[str, Any], *, resized: bool = False) -> None:
    """Raise `ValueError` for an optimizer's state from a file that does not fit it; `load_state_dict` looks at less.

    Args:
        optimizer: The optimizer, with its parameters.
        state: What `optimizer.state_dict` returned.
        resized: Whether parameters have other sizes by now.
    """
    own = optimizer.state_dict()
    groups, moments = state.get("param_groups"), state.get("state")
    if not isinstance(groups, list) or not isinstance(moments, Mapping) or len(groups) != len(own["param_groups"]):
        raise ValueError(f"optimizer must have {len(own['param_groups'])} parameter groups, each with its settings")
    for group, wanted in zip(groups, own["param_groups"], strict=True):
        for name, value in wanted.items():
            given = group.get(name, value) if isinstance(group, Mapping) else None
            moves = name != "params" and (name in MOVING or not isinstance(optimizer, Adam))
            if not (_alike(given, value) if moves else given == value):
                raise ValueError(f"optimizer must have {name} {'like ' * moves}{shown(value)} in its parameter groups")
        if not (0 <= group.get("lr", 0) < math.inf and all(0 <= beta < 1 for beta in group.get("betas", ()))):
            raise ValueError("optimizer must have lr >= 0 and betas in [0, 1) in its parameter groups")
    parameters = [each for group in optimizer.param_groups for each in group["params"]]
    for index, each in moments.items():
        if not (isinstance(index, int) and 0 <= index < len(parameters) and isinstance(each, Mapping)):
            raise ValueError(f"optimizer must hold states of {len(parameters)} parameters, got {shown(index)}")
        if isinstance(optimizer, Adam) and (missing := {"step", *MOMENTS} - {*each}):
            raise ValueError(f"optimizer must hold {', '.join(sorted(missing))} for parameter {index}")
        _check_moments(each, parameters[index], index, resized=resized)


def _check_moments(state: Mapping[str, Any], parameter: Tensor, index: int, *, resized: bool) -> None:
    """Raise `ValueError` for moments or a step count that cannot be those of a parameter."""
    for name in MOMENTS:
        tensor, shape = state.get(name, parameter), parameter.shape
        if not isinstance(tensor, Tensor) or tensor.dtype != parameter.dtype or not (resized or tensor.shape == shape):
            raise ValueError(
                f"optimizer must hold {name} of shape {tuple(shape)} in {parameter.dtype} for parameter {index}"
            )
        if not bool(torch.isfinite(tensor).all()):
            raise ValueError(f"optimizer holds {name} with values that are not finite for parameter {index}")
    if bool((state.get("exp_avg_sq", parameter**2) < 0).any()):
        raise ValueError(f"optimizer holds exp_avg_sq with negative values for parameter {index}")
    step = state.get("step", 0)
    if isinstance(step, Tensor) and step.is_floating_point() and step.ndim == 0:
        step = float(step)
    if not (is_number(step) and 0 <= step < math.inf):
        raise ValueError(f"optimizer must hold step as a count of steps for parameter {index}, got {shown(step)}")


def _alike(value: Any, wanted: Any) -> bool:
    """Return whether a setting of an optimizer has the form of another, and is finite where it is a number."""
    if isinstance(wanted, list | tuple):
        return isinstance(value, list | tuple) and len(value) == len(wanted) and all(map(_alike, value, wanted))
    if isinstance(wanted, float) or (isinstance(wanted, int) and not isinstance(wanted, bool)):
        return isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)
    return wanted is None or isinstance(value, type(wanted))
