"""The layers of a model: which are linear, and how many weights its body has. Loads torch, but not transformers."""

from __future__ import annotations

import sys
from typing import TypeGuard

from torch import nn


def is_transposed(module: nn.Module) -> bool:
    """Return whether a module is transformers' `Conv1D`: a linear layer whose weights are [in, out], as in GPT-2.

    A model has one only where transformers is loaded.
    """
    layers = sys.modules.get("transformers.pytorch_utils")
    return layers is not None and isinstance(module, layers.Conv1D)


def is_linear(module: nn.Module) -> TypeGuard[nn.Linear]:
    """Return whether a module is a linear layer, of torch or of transformers."""
    return isinstance(module, nn.Linear) or is_transposed(module)


def body_parameters(model: nn.Module) -> int:
    """Return the number of parameters without all embeddings and the output layer, which is the N of scaling laws."""
    embeddings = [module for module in model.modules() if isinstance(module, nn.Embedding)]
    last = [module for module in model.modules() if isinstance(module, nn.Linear)][-1:]
    outputs = [module for module in last if module.out_features in {each.num_embeddings for each in embeddings}]
    left_out = {id(p) for module in (*embeddings, *outputs) for p in module.parameters()}
    return sum(p.numel() for p in model.parameters() if id(p) not in left_out)
