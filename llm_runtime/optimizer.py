"""Make the optimiser, read it, and change AdamW's batch so that the change alone does not move the run.

Make the optimisers that ask for less tuning than AdamW, and look at the weights that schedule-free averages.

Gather and lay out tensors of which each process may hold only its shard (FSDP2); plain tensors pass through.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Adam, AdamW, Optimizer

from trainpilot.llm_runtime.config import RunConfig

BETAS = (0.9, 0.999)
"""What both packages recommend; a beta2 as short as AdamW's 0.95 would also shorten Prodigy's estimate."""


def make_schedule_free(groups: list[dict[str, Any]], config: RunConfig) -> Optimizer:
    """Return schedule-free AdamW, ready to train.

    Gradients are taken at a point between the weights that take the steps and their running average; the average is
    what counts (`averaged_weights`). The package's own warm-up stays off: it is a factor on the learning rate, and
    that comes with every step. In the average a step weighs as the square of the largest rate so far.

    Defazio et al. 2024, "The road less scheduled", arXiv 2405.15682.
    """
    try:
        from schedulefree import AdamWScheduleFree
    except ImportError:
        raise _missing(config, "schedulefree") from None
    optimizer: Any = AdamWScheduleFree(groups, lr=config.base_learning_rate, betas=BETAS, eps=1e-8, warmup_steps=0)
    optimizer.train()
    return optimizer  # type: ignore[no-any-return]


def make_prodigy(groups: list[dict[str, Any]], config: RunConfig) -> Optimizer:
    """Return Prodigy, AdamW with a learning rate of its own estimate; the rate that is set is a factor on it.

    Warm-up would make it overestimate: it has a safeguard for that.

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

    The package would compute the training weights anew, which rounds: a look would change the run. So they are kept
    aside. With any other optimiser, and inside another such block, nothing happens.
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
    """Return the full tensor; where it is sharded, a collective operation that all processes must call."""
    full: Tensor = tensor.full_tensor() if hasattr(tensor, "full_tensor") else tensor
    return full


def laid_out_like(pattern: Tensor, tensor: Tensor) -> Tensor:
    """Return `tensor`, which every process holds whole, sharded as `pattern` is."""
    if not hasattr(pattern, "full_tensor"):
        return tensor
    from torch.distributed.tensor import DTensor, distribute_tensor

    assert isinstance(pattern, DTensor)
    return distribute_tensor(tensor, pattern.device_mesh, pattern.placements, src_data_rank=None)


def make_optimizer(model: nn.Module, config: RunConfig) -> Optimizer:
    """Return a fused AdamW, or what the run asks for in its place, with weight decay on matrices only."""
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


def change_batch(optimizer: Optimizer, ratio: float) -> None:
    """Keep Adam's moments, bias correction included, as they are when the batch grows by `ratio`.

    The decay becomes beta2^ratio, so that its half-life in tokens stays (Marek et al. 2025), and the step count is
    divided by `ratio`, so that the bias correction 1 - beta2^step stays as it was. The correction 1 - beta1^step
    does move: the first moment moves with it, or the first steps after a change in warm-up would be too large.
    """
    if ratio == 1:
        return
    assert isinstance(optimizer, Adam), "the buffers of other optimisers mean other things"
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
    """Return, for each parameter, the last update as AdamW's buffers tell it (weight decay included).

    The decay is taken of the weights after the step instead of before it: an error of lr x decay of the update.
    Nothing for other optimisers: their buffers mean other things.
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

    `None` before the first step, and for other optimisers.
    """
    if not isinstance(optimizer, Adam):
        return None
    moments: list[torch.Tensor] = []
    correction = 1.0
    for group in optimizer.param_groups:
        states = _states(optimizer, group)
        moments += [state["exp_avg"] for state in states]
        if states:
            correction = 1 - group["betas"][0] ** float(states[0]["step"])
    return norm_of(moments) / correction if moments else None


def norm_of(tensors: Iterable[torch.Tensor]) -> torch.Tensor:
    """Return the Euclidean norm of all tensors taken as one vector, a scalar on the device."""
    return full_tensor(torch.linalg.vector_norm(torch.stack(torch._foreach_norm(list(tensors)))))


def _states(optimizer: Adam, group: dict[str, Any]) -> list[dict[str, torch.Tensor]]:
    """Return the buffers of a group's parameters that have been stepped."""
    return [optimizer.state[p] for p in group["params"] if optimizer.state.get(p)]
