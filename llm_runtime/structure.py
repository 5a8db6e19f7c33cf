"""Cut whole attention heads and whole blocks out of a causal language model.

Every block is left with the same sizes, so that an ordinary config describes the result, and plain transformers loads
it. Heads go with their group: those that share a key-value head, which goes too. What is not cut stays as it is.

Call these functions between optimiser steps, with no backward pass pending.
"""

from __future__ import annotations

import copy
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from transformers import PretrainedConfig, PreTrainedModel

from trainpilot.llm_runtime.surgery import Slice, check_state, cut, output_dim

BLOCKS = {
    "gpt2": "transformer.h",
    "gpt_neox": "gpt_neox.layers",
    "llama": "model.layers",
    "mistral": "model.layers",
    "opt": "model.decoder.layers",
    "phi": "model.layers",
    "qwen2": "model.layers",
    "qwen3": "model.layers",
}
"""Where the blocks are, by `config.model_type`."""
OUTPUT_LAYERS = {"llama": "o_proj", "mistral": "o_proj", "phi": "dense", "qwen2": "o_proj", "qwen3": "o_proj"}
"""Last layer of attention, by `config.model_type`. In other architectures a head has hidden size / heads columns."""


@dataclass(frozen=True, kw_only=True)
class Heads:
    """How many attention heads each block has, and how they share keys and values."""

    groups: int
    """Key-value heads."""
    per_group: int
    """Query heads that share a key-value head."""
    size: int
    """Columns of a head."""


def blocks(model: PreTrainedModel) -> nn.ModuleList:
    """Return the blocks. Raises `ValueError` if it is not known where the architecture has them."""
    kind = model.config.model_type
    if kind not in BLOCKS:
        raise ValueError(f"model_type must be one of {', '.join(BLOCKS)} to lose blocks, got {kind!r}")
    found = model.get_submodule(BLOCKS[kind])
    assert isinstance(found, nn.ModuleList), "that is what transformers keeps blocks in"
    return found


def depth_fault(model: PreTrainedModel) -> str | None:
    """Return why blocks cannot be cut, as the rest of a line; `None` where they can."""
    config = model.config
    if config.model_type not in BLOCKS:
        return f"can only be cut in {', '.join(BLOCKS)}, got {config.model_type!r}"
    if getattr(config, "scale_attn_by_inverse_layer_idx", False):
        return "cannot be cut where attention is scaled by the number of the block"
    return None


def heads_fault(model: PreTrainedModel) -> str | None:
    """Return why heads cannot be cut, as the rest of a line; `None` where they can."""
    config = model.config
    if config.model_type not in OUTPUT_LAYERS:
        return (
            f"can only be cut in {', '.join(OUTPUT_LAYERS)}, got {config.model_type!r}; elsewhere a head has "
            "hidden size / heads columns, so that fewer heads need a smaller hidden size"
        )
    if getattr(config, "qk_layernorm", False):
        return "cannot be cut where queries and keys have a norm as wide as hidden size / heads"
    return None


def heads_of(model: PreTrainedModel) -> Heads:
    """Return the heads of a block, of a model without a `heads_fault`."""
    config = model.config
    groups = int(config.num_key_value_heads)
    per_group = int(config.num_attention_heads) // groups
    return Heads(groups=groups, per_group=per_group, size=output_layers(model)[0].in_features // (groups * per_group))


def output_layers(model: PreTrainedModel) -> list[nn.Linear]:
    """Return the last layer of attention in each block, whose inputs are the outputs of the heads.

    Raises:
        ValueError: The heads of the architecture cannot be cut.
    """
    if fault := heads_fault(model):
        raise ValueError(f"heads {fault}")
    name = OUTPUT_LAYERS[model.config.model_type]
    return [getattr(attention, name) for attention in _attentions(model)]


def group_counts(model: PreTrainedModel) -> list[int]:
    """Return the numbers of groups that a model can be cut to, ascending; the last is the present one.

    Some architectures want a hidden size that is a multiple of the number of heads.
    """
    heads = heads_of(model)
    counts = range(1, heads.groups + 1)
    return [count for count in counts if _is_config(_with_groups(model.config, count, heads))]


@torch.no_grad()
def remove_groups(
    model: PreTrainedModel, optimizer: torch.optim.Optimizer | None, n_keep: int, importance: Sequence[Tensor]
) -> None:
    """Keep the `n_keep` most important groups of heads in every block, in their order, and remove the others.

    A group counts by the norm of the importance of its heads; of two equal ones the first is kept. The state of the
    optimiser is cut in the same way.

    Args:
        model: The model; its matrices, module attributes and config change in place.
        optimizer: The optimiser of these parameters, or `None`.
        n_keep: Groups per block to keep, one of `group_counts`.
        importance: Importance of each head, of shape (heads,) for each block, such as `head_activations` returns.

    Raises:
        ValueError: If `n_keep` is none of `group_counts`, the heads of the architecture cannot be cut, or the optimiser
            keeps factored state. The model is unchanged then.
    """
    if n_keep not in (counts := group_counts(model)):
        raise ValueError(f"n_keep must be one of {', '.join(map(str, counts))} groups of heads, got {n_keep}")
    heads = heads_of(model)
    if n_keep == heads.groups:
        return
    plans = [_slices(attention, OUTPUT_LAYERS[model.config.model_type]) for attention in _attentions(model)]
    check_state(optimizer, [each for queries, keys in plans for each in (*queries, *keys)])
    for (queries, keys), values in zip(plans, importance, strict=True):
        of_groups = values.view(heads.groups, heads.per_group).norm(dim=1)
        kept = of_groups.argsort(descending=True, stable=True)[:n_keep].sort().values.to("cpu")
        for parameter, dim in keys:
            cut(optimizer, parameter, dim, _columns(kept, heads.size))
        for parameter, dim in queries:
            cut(optimizer, parameter, dim, _columns(kept, heads.size * heads.per_group))
    for attention in _attentions(model):
        _note_sizes(attention)
    fields = _with_groups(model.config, n_keep, heads)
    for name in ("head_dim", "num_key_value_heads", "num_attention_heads"):
        setattr(model.config, name, getattr(fields, name))


@torch.no_grad()
def remove_blocks(
    model: PreTrainedModel, optimizer: torch.optim.Optimizer | None, n_keep: int, influence: Tensor
) -> None:
    """Keep the `n_keep` blocks of largest influence, in their order, and remove the others.

    Of two equal ones the first is kept. The optimiser forgets the parameters of the others.

    Args:
        model: The model; its blocks and its config change in place.
        optimizer: The optimiser of these parameters, or `None`.
        n_keep: Blocks to keep, at least 1.
        influence: Of each block, such as `block_influences` returns.

    Raises:
        ValueError: If `n_keep` is out of its range, or the blocks of the architecture cannot be cut. The model is
            unchanged then.
    """
    if fault := depth_fault(model):
        raise ValueError(f"depth {fault}")
    layers = blocks(model)
    if not 1 <= n_keep <= len(layers):
        raise ValueError(f"n_keep must be in [1, {len(layers)}], the blocks of the model, got {n_keep}")
    kept = influence.argsort(descending=True, stable=True)[:n_keep].sort().values.tolist()
    lost = [parameter for index, block in enumerate(layers) if index not in kept for parameter in block.parameters()]
    _forget(optimizer, lost)
    for index in reversed(range(len(layers))):
        if index not in kept:
            del layers[index]
    for index, block in enumerate(layers):
        for module in block.modules():
            if hasattr(module, "layer_idx"):
                setattr(module, "layer_idx", index)  # noqa: B010  mypy takes module attributes for tensors
    config = model.config
    if getattr(config, "layer_types", None):
        config.layer_types = [config.layer_types[index] for index in kept]
    config.num_hidden_layers = n_keep


def _attentions(model: PreTrainedModel) -> list[nn.Module]:
    """Return the module of each block that owns the layers of attention."""
    name = OUTPUT_LAYERS[model.config.model_type]
    wanted = {"q_proj", "k_proj", "v_proj", name}
    return [module for module in blocks(model).modules() if wanted <= {child for child, _ in module.named_children()}]


def _slices(attention: nn.Module, output: str) -> tuple[list[Slice], list[Slice]]:
    """Return the parameters that are cut by query heads, and those that are cut by key-value heads."""
    closing = getattr(attention, output)
    queries: list[Slice] = [*_rows(attention, "q_proj"), (closing.weight, 1 - output_dim(closing))]
    return queries, [*_rows(attention, "k_proj"), *_rows(attention, "v_proj")]


def _rows(attention: nn.Module, name: str) -> list[Slice]:
    linear = getattr(attention, name)
    weights: Slice = (linear.weight, output_dim(linear))
    return [weights] if linear.bias is None else [weights, (linear.bias, 0)]


def _columns(kept: Tensor, size: int) -> Tensor:
    """Return the columns of the parts `kept`, each of which has `size` of them."""
    return (kept[:, None] * size + torch.arange(size)).flatten()


def _note_sizes(attention: nn.Module) -> None:
    for linear in attention.children():
        if isinstance(linear, nn.Linear):
            linear.out_features, linear.in_features = linear.weight.shape


def _with_groups(config: PretrainedConfig, groups: int, heads: Heads) -> PretrainedConfig:
    """Return a copy of a config with another number of groups of heads, whose size it then states."""
    changed = copy.deepcopy(config)
    changed.head_dim = heads.size
    changed.num_key_value_heads = groups
    changed.num_attention_heads = groups * heads.per_group
    return changed


def _is_config(config: PretrainedConfig) -> bool:
    """Return whether transformers accepts a config when it loads a model."""
    try:
        type(config).from_dict(config.to_dict())
    except Exception:  # a class of its own for what does not divide
        return False
    return True


def _forget(optimizer: torch.optim.Optimizer | None, lost: Sequence[nn.Parameter]) -> None:
    """Let an optimiser forget parameters."""
    if optimizer is None:
        return
    identities = {id(parameter) for parameter in lost}
    for group in optimizer.param_groups:
        group["params"] = [parameter for parameter in group["params"] if id(parameter) not in identities]
    for parameter in lost:
        optimizer.state.pop(parameter, None)
