"""Check the model and the optimizer that a loop brings: are they pretrained, wrapped, or shared by processes?"""

from __future__ import annotations

import inspect
import math
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.fsdp import FSDPModule, FullyShardedDataParallel
from torch.nn.parallel import DistributedDataParallel
from torch.optim import Optimizer

from trainpilot.agents.steering.guardrails import GuardrailSettings
from trainpilot.llm_runtime.optimizer import JointOptimizer

MAX_RISE = 2.0
"""Largest factor above the user's learning rate on a pretrained model: a much higher one undoes what it has learnt."""
MAX_FALL = 1e-3
"""Smallest factor: a learning rate that is too low costs time and nothing else."""


def own_optimizer(optimizer: Optimizer | Sequence[Optimizer]) -> Optimizer:
    """Return the optimizer that steering steps: the given one, without Accelerate's wrapper, or several as one.

    Raises:
        ValueError: it cannot be steered; the message says what to do.
    """
    given = list(optimizer) if isinstance(optimizer, Sequence) else [optimizer]
    parts = [_unwrapped(each) for each in given]
    if strange := [each for each in parts if not (hasattr(each, "step") and hasattr(each, "param_groups"))]:
        raise ValueError(f"optimizer must be a torch optimizer, or several, got {type(strange[0]).__name__}")
    for part in parts:
        check_optimizer(part)
        if type(part).__module__.startswith("deepspeed.runtime"):  # by name, as DeepSpeed need not be installed
            raise ValueError(_shared_otherwise("optimizer", f"{type(part).__name__} (DeepSpeed)"))
    return parts[0] if len(parts) == 1 else JointOptimizer(parts)


def rounded_weights(optimizer: Optimizer) -> str | None:
    """Return a remark about weights that have fewer digits than float32, or `None` where none are stepped."""
    kinds = {weight.dtype for group in optimizer.param_groups for weight in group["params"]}
    few = sorted(str(kind).removeprefix("torch.") for kind in kinds if kind.is_floating_point and kind.itemsize < 4)
    if not few:
        return None
    return (
        f"weights are {', '.join(few)}, in which small updates are lost and the curvature probe sees rounding; the "
        "policy was trained on float32: load the model in it, and take precisions=('bf16',) for bf16 in the products"
    )


def _unwrapped(optimizer: Optimizer) -> Optimizer:
    """Return the optimizer that Accelerate has wrapped, or the given one.

    Raises:
        ValueError: Accelerate scales the loss for float16.
    """
    if type(optimizer).__name__ != "AcceleratedOptimizer":  # by name, as Accelerate need not be installed
        return optimizer
    wrapper: Any = optimizer
    if wrapper.scaler is not None:
        raise ValueError(
            "mixed_precision of the Accelerator must not be 'fp16', whose loss scaler step.backward does not use; "
            "take 'no', and offer bf16 in SteeringSettings(precisions=...)"
        )
    inner: Optimizer = wrapper.optimizer
    return inner


def check_optimizer(optimizer: Optimizer) -> None:
    """Raise `ValueError` for an optimizer that steering cannot step, or whose peak learning rate cannot be read.

    A step that needs a closure evaluates the loss several times. `OneCycleLR` leaves a fraction of its peak in
    `initial_lr`, where other schedulers leave the peak.
    """
    closure = inspect.signature(optimizer.step).parameters.get("closure")
    if closure is not None and closure.default is inspect.Parameter.empty:
        raise ValueError(
            f"optimizer must evaluate a step once, as Adam does, got {type(optimizer).__name__}, whose step calls a "
            "closure; take another one"
        )
    cycled = [group for group in optimizer.param_groups if {"initial_lr", "max_lr", "min_lr"} <= group.keys()]
    if cycled:
        raise ValueError(
            f"optimizer must come without a scheduler of its own, got one with a OneCycleLR, which hides its peak "
            f"{float(cycled[0]['max_lr']):.4g}; make the optimizer at that rate and leave the scheduler out, as "
            "steering has the base schedule in it"
        )


def check_parallel(model: nn.Module) -> None:
    """Raise `ValueError` for what is no model, or one that processes share in another way than by DDP or `fully_shard`.

    Under tensor parallelism a tensor is divided by more than the one dimension of `fully_shard`, or without that.
    """
    if not isinstance(model, nn.Module):
        raise ValueError(f"model must be a torch.nn.Module, got {type(model).__name__}; give the model that is trained")
    if any(each.__module__.partition(".")[0] == "deepspeed" for each in type(model).__mro__):
        raise ValueError(_shared_otherwise("model", f"{type(model).__name__} (DeepSpeed)"))
    modules = list(model.modules())
    if any(isinstance(module, FullyShardedDataParallel) for module in modules):
        raise ValueError(_shared_otherwise("model", "FullyShardedDataParallel (FSDP1)"))
    fully_sharded = any(isinstance(module, FSDPModule) for module in modules)
    for name, parameter in model.named_parameters():
        divided = [str(each) for each in getattr(parameter, "placements", ()) if not each.is_replicate()]
        if len(divided) > fully_sharded:
            raise ValueError(_shared_otherwise("model", f"tensor parallelism, {name} in {' and '.join(divided)}"))


def _shared_otherwise(name: str, got: str) -> str:
    return (
        f"{name} must be shared by processes in DistributedDataParallel or fully_shard (FSDP2), got {got}; "
        "train in one of these two, or without steering"
    )


def check_alone(model: nn.Module) -> None:
    """Raise `ValueError` if several processes train the model together, each of which would steer for itself."""
    if not (dist.is_available() and dist.is_initialized()) or dist.get_world_size() == 1:
        return
    if any(isinstance(module, DistributedDataParallel | FSDPModule) for module in model.modules()):
        raise ValueError(
            f"ranks must be given where {dist.get_world_size()} processes train one model, got None; "
            "pass ranks=ProcessGroupRanks() of trainpilot.agents.integrations"
        )


def is_pretrained(model: nn.Module) -> bool:
    """Return whether a model says where it was loaded from, and its weights are not those of a new model.

    The name alone would not do: a model made by `from_config` has it too, with random weights. The gains of
    normalization layers are one in every new transformer, and in no trained one.
    """
    named = any(getattr(module, "name_or_path", None) for module in model.modules())
    return named and any(not _is_new(gain) for gain in _gains(model))


TRAINED = 0.6
"""A first loss below this share of the logarithm of the vocabulary is that of a trained model; a new one's is at 1."""


def looks_trained(model: nn.Module, first_loss: float) -> bool:
    """Return whether a language model's first loss shows that it comes trained, whatever it says of itself.

    Args:
        model: Its vocabulary is known if its last linear layer has as many outputs as an embedding has rows.
        first_loss: Mean loss of the first step, before any update, in nats/token.
    """
    vocabulary = _vocabulary(model)
    return vocabulary is not None and 0 <= first_loss < TRAINED * math.log(vocabulary)


def _vocabulary(model: nn.Module) -> int | None:
    outputs = [module.out_features for module in model.modules() if isinstance(module, nn.Linear)]
    rows = {module.num_embeddings for module in model.modules() if isinstance(module, nn.Embedding)}
    return outputs[-1] if outputs and outputs[-1] in rows else None


def _gains(model: nn.Module) -> list[torch.Tensor]:
    names = ("norm", "ln_", "layernorm")
    return [
        parameter.detach()
        for name, parameter in model.named_parameters()
        if parameter.ndim == 1 and name.endswith("weight") and any(part in name.lower() for part in names)
    ]


def _is_new(gain: torch.Tensor) -> bool:
    own = gain.to_local() if hasattr(gain, "to_local") else gain
    return bool((own == 1).all()) or bool((own == 0).all())  # some count from zero: 1 + gain


def near_learning_rate(bounds: GuardrailSettings, learning_rate: float) -> GuardrailSettings:
    """Return bounds that keep the learning rate near the user's, unless they have a `learning_rate_range`."""
    if bounds.learning_rate_range is not None:
        return bounds
    return replace(bounds, learning_rate_range=(MAX_FALL * learning_rate, MAX_RISE * learning_rate))
