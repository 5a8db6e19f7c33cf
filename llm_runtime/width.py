"""Prune a causal language model while it trains by removing whole feed-forward channels.

A channel is one inner unit of the feed-forward block: a row of each opening matrix, its bias there, and a
column of the closing matrix. Removing it makes the matrices, their optimiser state and the step time smaller,
and the saved model is an ordinary narrower one. `Parameter` objects are kept, so the parameter groups of an
optimiser stay valid.

Call these functions between optimiser steps, with no backward pass pending. A wrapper that keeps the shapes of
parameters, such as DistributedDataParallel, must be made again afterwards.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from trainpilot.llm_runtime.layers import is_transposed
from trainpilot.llm_runtime.surgery import Slice, check_state, cut, output_dim, replace_content

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
    "phi": FfnLayout(opening=("fc1",), closing="fc2"),
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
    parameter, dim = _channel_parameters(ffn_blocks(model)[0], layout)[0]
    return parameter.shape[dim]


def ffn_blocks(model: PreTrainedModel) -> list[nn.Module]:
    """Return the modules that own the feed-forward layers, in the order of the model.

    Raises:
        ValueError: If the model type has no layout here.
    """
    layout = _layout(model)
    names = {*layout.opening, layout.closing}
    return [module for module in model.modules() if names <= {name for name, _ in module.named_children()}]


def closing_layers(model: PreTrainedModel) -> list[nn.Module]:
    """Return the last layer of each feed-forward block, whose inputs are the activations of the channels.

    Raises:
        ValueError: If the model type has no layout here.
    """
    name = _layout(model).closing
    return [getattr(block, name) for block in ffn_blocks(model)]


@torch.no_grad()
def remove_channels(
    model: PreTrainedModel,
    optimizer: torch.optim.Optimizer | None,
    n_keep: int,
    importance: Sequence[Tensor] | None = None,
) -> None:
    """Keep the `n_keep` most important channels in every layer, in their order, and remove the others.

    Of two equal ones the lower index is kept. Optimiser state tensors that have the shape of a parameter are cut
    in the same way; the gradients of cut parameters become `None`.

    Args:
        model: The model; its matrices, module attributes and config change in place.
        optimizer: The optimiser of these parameters, or `None`.
        n_keep: Channels per layer to keep, in [1, `ffn_width(model)`].
        importance: Importance of each channel, of shape [width] for each layer, such as `channel_activations`
            returns. By default the norm of its weights: the root of the sum of the squared weights that a channel
            has in all matrices and biases of its block.

    Raises:
        ValueError: If the model type has no layout here, `n_keep` or the shape of `importance` is wrong, or the
            optimiser keeps factored state, which cannot be cut. The model is unchanged then.
    """
    layout, width = _layout(model), ffn_width(model)
    if not 1 <= n_keep <= width:
        raise ValueError(f"n_keep must be in [1, {width}], the channels of the model, got {n_keep}")
    groups = [_channel_parameters(block, layout) for block in ffn_blocks(model)]
    if importance is not None and [tuple(each.shape) for each in importance] != [(width,)] * len(groups):
        raise ValueError(
            f"importance must be a number for each of {width} channels in each of {len(groups)} layers, got "
            f"{[tuple(each.shape) for each in importance]}"
        )
    if n_keep == width:
        return
    check_state(optimizer, [each for group in groups for each in group])
    if importance is None:
        importance = [_channel_norms(group) for group in groups]
    for group, values in zip(groups, importance, strict=True):
        order = values.argsort(descending=True, stable=True)
        kept = order[:n_keep].sort().values  # [n_keep]
        for parameter, dim in group:
            cut(optimizer, parameter, dim, kept)
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
    for block in ffn_blocks(model):
        for parameter, dim in _channel_parameters(block, layout):
            shape = list(parameter.shape)
            shape[dim] = width
            replace_content(parameter, parameter.new_zeros(shape))
    _note_width(model, layout, width)


def _layout(model: PreTrainedModel) -> FfnLayout:
    kind = model.config.model_type
    if kind not in FFN_LAYOUTS:
        raise ValueError(f"model_type must be one of {', '.join(FFN_LAYOUTS)} to change its width, got {kind!r}")
    return FFN_LAYOUTS[kind]


def _channel_parameters(block: nn.Module, layout: FfnLayout) -> list[Slice]:
    """List the parameters of a block that hold channels, each with the dimension the channels lie along."""
    found: list[Slice] = []
    for name in layout.opening:
        linear = getattr(block, name)
        found.append((linear.weight, output_dim(linear)))
        if linear.bias is not None:
            found.append((linear.bias, 0))
    closing = getattr(block, layout.closing)
    return [*found, (closing.weight, 1 - output_dim(closing))]


def _channel_norms(group: list[Slice]) -> Tensor:
    """Return the L2 norm of each channel over the parameters of its block, [width]."""
    squares = [
        parameter.detach().movedim(dim, 0).reshape(parameter.shape[dim], -1).float().square().sum(dim=1)
        for parameter, dim in group
    ]
    return torch.stack(squares).sum(dim=0).sqrt()


def _note_width(model: PreTrainedModel, layout: FfnLayout, width: int) -> None:
    """Write the new width where modules and config state it."""
    for block in ffn_blocks(model):
        for name in layout.opening:
            linear = getattr(block, name)
            setattr(linear, "nf" if is_transposed(linear) else "out_features", width)
        closing = getattr(block, layout.closing)
        setattr(closing, "nx" if is_transposed(closing) else "in_features", width)
        if hasattr(block, "intermediate_size"):
            setattr(block, "intermediate_size", width)  # noqa: B010  mypy takes module attributes for tensors
    setattr(model.config, layout.width_field, width)
