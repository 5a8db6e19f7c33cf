"""Cut rows and columns out of parameters in place, with the state that an optimiser keeps of them.

`Parameter` objects are kept, so that the parameter groups of an optimiser stay valid. Call these functions between
optimiser steps, with no backward pass pending.
"""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch import Tensor, nn

from trainpilot.llm_runtime.layers import is_transposed

Slice = tuple[nn.Parameter, int]
"""A parameter, and the dimension along which it is cut."""


def output_dim(linear: nn.Module) -> int:
    """Return the dimension of the outputs: weights are [out, in] in `nn.Linear` and [in, out] in `Conv1D`.

    Raises:
        ValueError: If the layer is of another kind.
    """
    if is_transposed(linear):
        return 1
    if isinstance(linear, nn.Linear):
        return 0
    raise ValueError(f"layers that are cut must be nn.Linear or Conv1D, got {type(linear).__name__}")


def check_state(optimizer: torch.optim.Optimizer | None, slices: Iterable[Slice]) -> None:
    """Raise `ValueError` where an optimiser keeps factored state of parameters, which cannot be cut."""
    if optimizer is None:
        return
    for parameter, _ in slices:
        for name, value in optimizer.state.get(parameter, {}).items():
            if isinstance(value, Tensor) and value.numel() > 1 and value.shape != parameter.shape:
                raise ValueError(
                    f"optimizer state must have its parameter's shape {tuple(parameter.shape)} to be cut, "
                    f"{type(optimizer).__name__} keeps {name!r} as {tuple(value.shape)}"
                )


def cut(optimizer: torch.optim.Optimizer | None, parameter: nn.Parameter, dim: int, kept: Tensor) -> None:
    """Keep the indices `kept` of a parameter along `dim`, and of its optimiser state; its gradient becomes `None`.

    Args:
        optimizer: The optimiser of the parameter, or `None`.
        parameter: The parameter; it keeps its identity.
        dim: The dimension that gets shorter.
        kept: Indices along it, ascending.
    """
    kept = kept.to(parameter.device)
    state = optimizer.state[parameter] if optimizer is not None and parameter in optimizer.state else {}
    for name, value in state.items():
        if isinstance(value, Tensor) and value.shape == parameter.shape:
            state[name] = value.index_select(dim, kept.to(value.device))
    replace_content(parameter, parameter.detach().index_select(dim, kept))


def replace_content(parameter: nn.Parameter, data: Tensor) -> None:
    """Give `parameter` new content of another shape and drop its gradient."""
    parameter.grad = None
    # Autograd keeps the old shape as long as any loss of this model exists, and the next backward pass would
    # fail on it. Only a change of dtype or device clears it: hence the empty tensor in between.
    passing = torch.float32 if data.dtype == torch.float16 else torch.float16
    parameter.data = data.new_empty(0, dtype=passing)
    parameter.data = data
