"""Take the first sequences of a batch, whatever a framework's data loader has made of it."""

from __future__ import annotations

import copy
from collections.abc import MutableMapping
from typing import Any

from torch import Tensor


def first_sequences(batch: Any, count: int, of: int) -> Any:
    """Return the first `count` of a batch's `of` sequences, or the batch itself where that cannot be told.

    Args:
        batch: A tensor with a row for each sequence, or dictionaries, tuples and lists of such tensors.
        count: How many are wanted.
        of: How many there are.
    """
    return _cut(batch, count) if 0 < count < of and _has_rows(batch, of) else batch


def _has_rows(value: Any, of: int) -> bool:
    """Return whether all tensors in it have a row for each sequence, but for single numbers."""
    if isinstance(value, Tensor):
        positions = value.ndim > 2 and not value.is_floating_point()  # three-part ones have another first dimension
        return value.ndim == 0 or (len(value) == of and not positions)
    if isinstance(value, MutableMapping):
        return all(_has_rows(each, of) for each in value.values())
    if isinstance(value, (tuple, list)):
        return all(_has_rows(each, of) for each in value)
    return value is None or isinstance(value, (bool, int, float))


def _cut(value: Any, count: int) -> Any:
    if isinstance(value, Tensor):
        return value[:count] if value.ndim else value
    if isinstance(value, MutableMapping):
        cut = copy.copy(value)  # of the same class: a tokenizer's has attributes
        for name, each in value.items():
            cut[name] = _cut(each, count)
        return cut
    if isinstance(value, (tuple, list)):
        parts = [_cut(each, count) for each in value]
        return type(value)(*parts) if hasattr(value, "_fields") else type(value)(parts)
    return value
