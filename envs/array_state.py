"""Take the state out of many simulated runs, and put it back, so that training on them goes on exactly where it was.

The state is that of the objects which hold the runs: their arrays, numbers and random generators, found by their
attributes. What never changes is left where it is: frozen records, spaces, tuples and lists.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from copy import copy
from dataclasses import is_dataclass
from typing import Any

import numpy as np

from trainpilot.llm_runtime.simulator.records import Rows

_PLAIN = (bool, int, float, str, type(None))
COMPUTED = ("_over_present", "_masks")
"""Attributes that are computed from the others where they are `None`. They are no part of a state."""
NOT_USED = ("_np_random_seed",)
"""Attributes that nothing depends on, neither."""


def state_of(owner: object) -> dict[str, Any]:
    """Return copies of the arrays, numbers and generators that an object holds, by attribute, nested like its parts.

    An object that is met again is left out, records of arrays apart: whoever refers to it, it is saved once.
    """
    return _taken(owner, set())


def check_state(owner: object, state: object) -> None:
    """Raise `ValueError` for a state from a file that is not one of an object of this kind and size."""
    _check(state_of(owner), state, "state")


def _check(own: Any, other: Any, name: str) -> None:
    """Raise `ValueError` where a part of a state has another form than our own."""
    if _form(own) != _form(other):
        raise ValueError(f"{name} must be {_form(own)}, got {_form(other)}")
    if isinstance(own, bool | int | float) and own != other:  # a setting: what changes is in arrays
        raise ValueError(f"{name} must be {own}, got {other}")
    if isinstance(own, dict):
        for each, value in own.items():
            _check(value, other[each], f"{name}.{each}")


def _form(value: object) -> str:
    """Return the form of a part of a state in words."""
    if isinstance(value, np.ndarray):
        return f"{value.dtype} of shape {value.shape}"
    return f"a dictionary of {', '.join(map(str, value))}" if isinstance(value, dict) else type(value).__name__


def restore_state(owner: object, state: Mapping[str, Any]) -> None:
    """Put back what `state_of` returned for an object of the same kind and size."""
    vars(owner).update(dict.fromkeys(vars(owner).keys() & COMPUTED))
    for name, value in state.items():
        vars(owner)[name] = _restored(vars(owner).get(name), value)


def _taken(owner: object, seen: set[int]) -> dict[str, Any]:
    seen.add(id(owner))
    state = {}
    for name, value in vars(owner).items():
        if name not in COMPUTED + NOT_USED and (kept := _kept(value, seen)) is not _NOTHING:
            state[name] = kept
    return state


_NOTHING = object()


def _kept(value: Any, seen: set[int]) -> Any:
    if isinstance(value, np.ndarray):
        return np.array(value, order="C")
    if isinstance(value, np.random.Generator):
        return json.dumps(value.bit_generator.state)
    if isinstance(value, _PLAIN):
        return value
    if isinstance(value, dict):
        return {name: kept for name, each in value.items() if (kept := _kept(each, seen)) is not _NOTHING}
    if isinstance(value, Rows) or (_ours(value) and id(value) not in seen):
        return _taken(value, seen)
    return _NOTHING


def _ours(value: object) -> bool:
    """Return whether a value is an object of this package, and no record."""
    return type(value).__module__.startswith("trainpilot.") and not is_dataclass(value) and hasattr(value, "__dict__")


def _restored(now: Any, value: Any) -> Any:
    if isinstance(value, np.ndarray):
        return value.copy()
    if isinstance(now, np.random.Generator):
        now.bit_generator.state = json.loads(value)
        return now
    if not isinstance(value, Mapping):
        return value
    if isinstance(now, dict):
        return now | {name: _restored(now.get(name), each) for name, each in value.items()}
    if isinstance(now, Rows):  # a record may be shared by two owners of which one has replaced its own
        now = copy(now)
    restore_state(now, value)
    return now
