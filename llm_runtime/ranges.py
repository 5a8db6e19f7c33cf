"""Declare the range of a number where the number is declared: `Annotated[int, Range(1, 512)]`.

A dataclass checks all of its ranges with `check_ranges(self)` in `__post_init__`, the records of files are checked by
pydantic as they are read, and the command line shows the same ranges in its help.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from functools import lru_cache
from typing import Any, get_args, get_type_hints

from trainpilot.llm_runtime.plain_values import MAX_INT, shown


@dataclass(frozen=True)
class Range:
    """The numbers that a value may have; NaN and infinity are none of them."""

    low: float = -math.inf
    high: float = math.inf
    above: bool = False
    """Whether `low` itself is left out."""
    below: bool = False
    """Whether `high` itself is left out."""

    def __contains__(self, value: object) -> bool:
        """Return whether a value is a number in the range; True and False are none."""
        if isinstance(value, bool) or not isinstance(value, int | float):
            return False
        over = value > self.low if self.above else value >= self.low
        under = value < self.high if self.below else value <= self.high
        return over and under and (isinstance(value, int) or math.isfinite(value))

    def __str__(self) -> str:
        """Return the range as text: `[1, 512]`, `(0, 1)`, `>= 0`, `> 0`."""
        low, high = _number(self.low), _number(self.high)
        if self.high in (math.inf, MAX_INT):
            return "any number" if self.low == -math.inf else f"{'>' if self.above else '>='} {low}"
        return f"{'(' if self.above else '['}{low}, {high}{')' if self.below else ']'}"

    @property
    def rule(self) -> str:
        """What a number in the range must be, for error messages."""
        if self.high in (math.inf, MAX_INT):
            return (
                "a number" if self.low == -math.inf else f"{'above' if self.above else 'at least'} {_number(self.low)}"
            )
        return f"in {self}"

    def check(self, name: str, value: object) -> None:
        """Raise `ValueError` for a value that is not in the range."""
        if value not in self:
            raise ValueError(f"{name} must be {self.rule}, got {shown(value)}")

    def __get_pydantic_core_schema__(self, source: Any, handler: Callable[[Any], Any]) -> Any:
        """Return pydantic's schema of a number in the range; `None` passes where the type has it."""
        from pydantic_core import core_schema

        def checked(value: object) -> object:
            if value is not None and value not in self:
                raise ValueError(f"must be {self.rule}, got {shown(value)}")
            return value

        return core_schema.no_info_after_validator_function(checked, handler(source))


COUNT = Range(0, MAX_INT)
"""Whole numbers from 0 on that arrays hold."""


def _number(value: float) -> str:
    return f"{value:,.0f}" if value == round(value) and abs(value) < 1e12 else f"{value:g}"


@lru_cache(maxsize=64)
def ranges_of(kind: type) -> dict[str, Range]:
    """Return the ranges that a dataclass declares, by field."""
    found = {name: _declared(hint) for name, hint in get_type_hints(kind, include_extras=True).items()}
    return {name: each for name, each in found.items() if each is not None}


def _declared(hint: Any) -> Range | None:
    """Return the range in a type, or in the types that it is made of: `Annotated[int, Range(...)] | None`."""
    own = [each for each in getattr(hint, "__metadata__", ()) if isinstance(each, Range)]
    return own[0] if own else next((found for each in get_args(hint) if (found := _declared(each)) is not None), None)


def check_ranges(record: object, prefix: str = "") -> None:
    """Check every number of a dataclass whose type declares a range; `None` and words, such as `auto`, pass.

    Args:
        record: The dataclass.
        prefix: Put before the field's name in the message, as in `ppo.`.

    Raises:
        ValueError: a number is out of its range.
    """
    for name, allowed in ranges_of(type(record)).items():
        value = getattr(record, name)
        for each in value if isinstance(value, tuple) else (value,):
            if each is not None and not isinstance(each, str):
                allowed.check(f"{prefix}{name}", each)
