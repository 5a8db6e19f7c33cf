"""Measure how much the parts of a causal language model do on a text, so that those which do least can be cut.

A feed-forward channel counts by its mean absolute activation, an attention head by the norm of those of its columns,
and a block by how far it turns the hidden state: one minus the cosine of the state before and after it. The scores are
those of Minitron (Muralidharan et al. 2024). Weights are not changed, and no random numbers are drawn.

Letters: n sequences, T tokens of a sequence, F feed-forward channels, H attention heads, L blocks.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.hooks import RemovableHandle
from transformers import PreTrainedModel

from trainpilot.llm_runtime.loop import eval_mode
from trainpilot.llm_runtime.precision import double_device
from trainpilot.llm_runtime.structure import blocks, output_layers
from trainpilot.llm_runtime.width import closing_layers


def channel_activations(model: PreTrainedModel, sequences: Tensor, at_once: int) -> list[Tensor]:
    """Return the mean absolute activation of each feed-forward channel, a tensor of shape (F,) for each block.

    Args:
        model: The model.
        sequences: Token ids on the model's device, of shape (n, T).
        at_once: Sequences that go through the model together.

    Raises:
        ValueError: The architecture is not known here.
    """
    return _mean_inputs(model, closing_layers(model), sequences, at_once)


def head_activations(model: PreTrainedModel, sequences: Tensor, at_once: int) -> list[Tensor]:
    """Return the norm of the mean absolute outputs of each attention head, a tensor of shape (H,) for each block.

    Args:
        model: The model.
        sequences: Token ids on the model's device, of shape (n, T).
        at_once: Sequences that go through the model together.

    Raises:
        ValueError: The heads of the architecture cannot be cut.
    """
    columns = _mean_inputs(model, output_layers(model), sequences, at_once)
    return [each.view(model.config.num_attention_heads, -1).norm(dim=1) for each in columns]


@torch.no_grad()
def block_influences(model: PreTrainedModel, sequences: Tensor, at_once: int) -> Tensor:
    """Return one minus the mean cosine of the hidden states before and after each block, of shape (L,).

    Args:
        model: The model.
        sequences: Token ids on the model's device, of shape (n, T).
        at_once: Sequences that go through the model together.

    Raises:
        ValueError: The architecture is not known here.
    """
    layers = blocks(model)
    sums = torch.zeros(len(layers), dtype=torch.float64, device=double_device(sequences.device))

    def note(index: int, _block: nn.Module, positional: Sequence[Tensor], named: dict[str, Any], output: Any) -> None:
        before = positional[0] if positional else named["hidden_states"]
        after = output[0] if isinstance(output, tuple) else output
        one, other = before.to(sums.device).double(), after.to(sums.device).double()
        sums[index] += F.cosine_similarity(one, other, dim=-1).sum()

    handles = [
        block.register_forward_hook(partial(note, index), with_kwargs=True) for index, block in enumerate(layers)
    ]
    with _watched(handles):
        _run(model, sequences, at_once)
    return 1 - sums / sequences.numel()


@torch.no_grad()
def _mean_inputs(model: PreTrainedModel, layers: Sequence[nn.Module], sequences: Tensor, at_once: int) -> list[Tensor]:
    """Return the mean absolute input of each layer over all positions, a tensor of shape (columns,) for each."""
    sums: list[Tensor] = [torch.zeros(())] * len(layers)

    def note(index: int, _layer: nn.Module, inputs: Sequence[Tensor]) -> None:
        sizes = inputs[0].detach().abs().flatten(0, -2)
        own = sizes.to(double_device(sizes.device)).sum(dim=0, dtype=torch.float64)
        sums[index] = sums[index].to(own.device) + own

    with _watched([layer.register_forward_pre_hook(partial(note, index)) for index, layer in enumerate(layers)]):
        _run(model, sequences, at_once)
    return [each / sequences.numel() for each in sums]


def _run(model: PreTrainedModel, sequences: Tensor, at_once: int) -> None:
    with eval_mode(model):
        for part in torch.split(sequences, at_once):
            model(input_ids=part, use_cache=False)


@contextmanager
def _watched(handles: Sequence[RemovableHandle]) -> Iterator[None]:
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()
