"""Prune a causal language model while it trains by removing whole feed-forward channels.

A channel is one inner unit of the feed-forward block: a row of each opening matrix, its bias there, and a
column of the closing matrix. Removing it makes the matrices, their optimiser state and the step time smaller,
and the saved model is an ordinary narrower one. `Parameter` objects are kept, so the parameter groups of an
optimiser stay valid.

Call these functions between optimiser steps, with no backward pass pending. A wrapper that keeps the shapes of
parameters, such as DistributedDataParallel, must be made again afterwards.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from trainpilot.llm_runtime.layers import is_transposed

if TYPE_CHECKING:
    from transformers import PreTrainedModel


@dataclass(frozen=True, kw_only=True)
class FfnLayout:
    """Where a family of models keeps its feed-forward channels."""

    opening: tuple[str, ...]
    """Linear layers of the block from the hidden size to the channels."""
    closing: str
    """Linear layer of the block from the channels back to the hidden size."""
    width_field: str = "intermediate_size"
    """Field of the model's config that holds the number of channels."""


_GATED = FfnLayout(opening=("gate_proj", "up_proj"), closing="down_proj")

FFN_LAYOUTS: dict[str, FfnLayout] = {
    "gpt2": FfnLayout(opening=("c_fc",), closing="c_proj", width_field="n_inner"),
    "gpt_neox": FfnLayout(opening=("dense_h_to_4h",), closing="dense_4h_to_h"),
    "llama": _GATED,
    "mistral": _GATED,
    "opt": FfnLayout(opening=("fc1",), closing="fc2", width_field="ffn_dim"),
    "qwen2": _GATED,
    "qwen3": _GATED,
}
"""Layouts by `config.model_type`."""


def channels_for(sparsity: float, width0: int, multiple: int = 8) -> int:
    """Return how many of `width0` channels to keep: width0 * (1 - sparsity), to the nearest multiple.

    At least one multiple and at most `width0` are kept; a sparsity of 0 keeps all.

    Args:
        sparsity: Share of the channels to remove, in [0, 1).
        width0: Channels per layer before any removal.
        multiple: The count kept is a multiple of this.

    Raises:
        ValueError: If an argument is out of its range.
    """
    if not 0 <= sparsity < 1:
        raise ValueError(f"sparsity must be in [0, 1), got {sparsity}")
    if width0 < 1 or multiple < 1:
        raise ValueError(f"width0 and multiple must be at least 1, got {width0} and {multiple}")
    if sparsity == 0:
        return width0
    nearest = int(width0 * (1 - sparsity) / multiple + 0.5) * multiple
    return min(width0, max(multiple, nearest))


def ffn_width(model: PreTrainedModel) -> int:
    """Return the number of channels of a feed-forward block.

    Raises:
        ValueError: If the model type has no layout here.
    """
    layout = _layout(model)
    parameter, dim = _channel_parameters(_blocks(model, layout)[0], layout)[0]
    return parameter.shape[dim]


@torch.no_grad()
def remove_channels(model: PreTrainedModel, optimizer: torch.optim.Optimizer | None, n_keep: int) -> None:
    """Keep the `n_keep` channels of largest norm in every layer, in their order, and remove the others.

    The norm of a channel is the root of the sum of the squared weights it has in all matrices and biases of
    its block; of two equal ones the lower index is kept. Optimiser state tensors that have the shape of a
    parameter are cut in the same way; the gradients of cut parameters become `None`.

    Args:
        model: The model; its matrices, module attributes and config change in place.
        optimizer: The optimiser of these parameters, or `None`.
        n_keep: Channels per layer to keep, in [1, `ffn_width(model)`].

    Raises:
        ValueError: If the model type has no layout here, `n_keep` is out of its range, or the optimiser keeps
            factored state, which cannot be cut. The model is unchanged then.
    """
    layout, width = _layout(model), ffn_width(model)
    if not 1 <= n_keep <= width:
        raise ValueError(f"n_keep must be in [1, {width}], the channels of the model, got {n_keep}")
    if n_keep == width:
        return
    groups = [_channel_parameters(block, layout) for block in _blocks(model, layout)]
    _check_state(optimizer, groups)
    for group in groups:
        order = _channel_norms(group).argsort(descending=True, stable=True)
        kept = order[:n_keep].sort().values  # [n_keep]
        for parameter, dim in group:
            _cut_state(optimizer, parameter, dim, kept)
            _replace(parameter, parameter.detach().index_select(dim, kept))
    _note_width(model, layout, n_keep)


@torch.no_grad()
def resize(model: PreTrainedModel, width: int) -> None:
    """Give every feed-forward block `width` channels of arbitrary content, so that a snapshot can be loaded.

    The state of an optimiser is not touched: load the snapshot's own state into it afterwards.

    Raises:
        ValueError: If the model type has no layout here or `width` is below 1.
    """
    if width < 1:
        raise ValueError(f"width must be at least 1 channel, got {width}")
    layout = _layout(model)
    if width == ffn_width(model):
        return
    for block in _blocks(model, layout):
        for parameter, dim in _channel_parameters(block, layout):
            shape = list(parameter.shape)
            shape[dim] = width
            _replace(parameter, parameter.new_zeros(shape))
    _note_width(model, layout, width)


def _layout(model: PreTrainedModel) -> FfnLayout:
    kind = model.config.model_type
    if kind not in FFN_LAYOUTS:
        raise ValueError(f"model_type must be one of {', '.join(FFN_LAYOUTS)} to change its width, got {kind!r}")
    return FFN_LAYOUTS[kind]


def _blocks(model: PreTrainedModel, layout: FfnLayout) -> list[nn.Module]:
    """List the modules that own the layout's layers, in the order of the model."""
    names = {*layout.opening, layout.closing}
    return [module for module in model.modules() if names <= {name for name, _ in module.named_children()}]


def _channel_parameters(block: nn.Module, layout: FfnLayout) -> list[tuple[nn.Parameter, int]]:
    """List the parameters of a block that hold channels, each with the dimension the channels lie along."""
    found: list[tuple[nn.Parameter, int]] = []
    for name in layout.opening:
        linear = getattr(block, name)
        found.append((linear.weight, _output_dim(linear)))
        if linear.bias is not None:
            found.append((linear.bias, 0))
    closing = getattr(block, layout.closing)
    return [*found, (closing.weight, 1 - _output_dim(closing))]


def _output_dim(linear: nn.Module) -> int:
    """Return the dimension of the outputs: weights are [out, in] in `nn.Linear` and [in, out] in `Conv1D`."""
    if is_transposed(linear):
        return 1
    if isinstance(linear, nn.Linear):
        return 0
    raise ValueError(f"feed-forward layers must be nn.Linear or Conv1D, got {type(linear).__name__}")


def _channel_norms(group: list[tuple[nn.Parameter, int]]) -> Tensor:
    """Return the L2 norm of each channel over the parameters of its block, [width]."""
    squares = [
        parameter.detach().movedim(dim, 0).reshape(parameter.shape[dim], -1).float().square().sum(dim=1)
        for parameter, dim in group
    ]
    return torch.stack(squares).sum(dim=0).sqrt()


def _check_state(optimizer: torch.optim.Optimizer | None, groups: list[list[tuple[nn.Parameter, int]]]) -> None:
    if optimizer is None:
        return
    for parameter, _ in (pair for group in groups for pair in group):
        for name, value in optimizer.state.get(parameter, {}).items():
            if isinstance(value, Tensor) and value.numel() > 1 and value.shape != parameter.shape:
                raise ValueError(
                    f"optimizer state must have its parameter's shape {tuple(parameter.shape)} to be cut, "
                    f"{type(optimizer).__name__} keeps {name!r} as {tuple(value.shape)}"
                )


def _cut_state(optimizer: torch.optim.Optimizer | None, parameter: nn.Parameter, dim: int, kept: Tensor) -> None:
    """Cut the state tensors of `parameter`, which still has its old shape, to the channels `kept`."""
    if optimizer is None or parameter not in optimizer.state:
        return
    state = optimizer.state[parameter]
    for name, value in state.items():
        if isinstance(value, Tensor) and value.shape == parameter.shape:
            state[name] = value.index_select(dim, kept.to(value.device))


def _replace(parameter: nn.Parameter, data: Tensor) -> None:
    """Give `parameter` new content of another shape and drop its gradient."""
    parameter.grad = None
    # Autograd keeps the old shape as long as any loss of this model exists, and the next backward pass would
    # fail on it. Only a change of dtype or device clears it: hence the empty tensor in between.
    passing = torch.float32 if data.dtype == torch.float16 else torch.float16
    parameter.data = data.new_empty(0, dtype=passing)
    parameter.data = data


def _note_width(model: PreTrainedModel, layout: FfnLayout, width: int) -> None:
    """Write the new width where modules and config state it."""
    for block in _blocks(model, layout):
        for name in layout.opening:
            linear = getattr(block, name)
            setattr(linear, "nf" if is_transposed(linear) else "out_features", width)
        closing = getattr(block, layout.closing)
        setattr(closing, "nx" if is_transposed(closing) else "in_features", width)
        if hasattr(block, "intermediate_size"):
            setattr(block, "intermediate_size", width)  # noqa: B010  mypy takes module attributes for tensors
    setattr(model.config, layout.width_field, width)
