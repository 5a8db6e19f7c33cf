"""Copy the state of an optimiser, whatever it is made of."""

from __future__ import annotations

import copy
from collections.abc import Mapping
from typing import Any

from torch import Tensor


def copied(state: Any) -> Any:
    """Return a deep copy. `copy.deepcopy` fails with 8-bit states that are tensors made of tensors (torchao)."""
    if isinstance(state, Mapping):
        return {name: copied(value) for name, value in state.items()}
    if isinstance(state, list):
        return [copied(value) for value in state]
    if not isinstance(state, Tensor):
        return copy.deepcopy(state)
    try:
        return state.detach().clone()
    except NotImplementedError:
        parts, context = state.__tensor_flatten__()  # type: ignore[attr-defined]
        inner = {name: copied(getattr(state, name)) for name in parts}
        return type(state).__tensor_unflatten__(inner, context, state.size(), state.stride())  # type: ignore[attr-defined]
