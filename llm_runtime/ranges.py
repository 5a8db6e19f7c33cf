"""Declare the range of a number where the number is declared: `Annotated[int, Range(1, 512)]`.

A dataclass checks all of its ranges with `check_ranges(self)` in `__post_init__`, the records of files are checked by
pydantic as they are read, and the command line shows the same ranges in its help.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from functools import lru_cache
from typing import Any, Literal, get_args, get_origin, get_type_hints

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

    def rule(self, value: object) -> str:
        """Return what a number in the range must be, for the error message about one that is not."""
        if isinstance(value, int | float) and 100 < self.high < value < math.inf:
            return f"at most {_number(self.high)}"
        if self.low == 0 and self.high > 100:
            return "a positive number" if self.above else "a number >= 0"
        return "a finite number" if (self.low, self.high) == (-math.inf, math.inf) else f"in {self}"

    def check(self, name: str, value: object) -> None:
        """Raise `ValueError` for a value that is not in the range."""
        if value not in self:
            raise ValueError(f"{name} must be {self.rule(value)}, got {shown(value)}")

    def __get_pydantic_core_schema__(self, source: Any, handler: Callable[[Any], Any]) -> Any:
        """Return pydantic's schema of a number in the range; `None` passes where the type has it."""
        from pydantic_core import core_schema

        def checked(value: object) -> object:
            if value is not None and value not in self:
                raise ValueError(f"must be {self.rule(value)}, got {shown(value)}")
            return value

        def refused_if_bool(value: object) -> object:
            return checked(value) if isinstance(value, bool) else value  # pydantic would take True for 1

        after = core_schema.no_info_after_validator_function(checked, handler(source))
        return core_schema.no_info_before_validator_function(refused_if_bool, after)


@dataclass(frozen=True)
class Whole(Range):
    """The whole numbers that a value may have."""

    def __contains__(self, value: object) -> bool:
        """Return whether a value is a whole number in the range."""
        return isinstance(value, int) and super().__contains__(value)

    def rule(self, value: object) -> str:
        """Return what a number in the range must be, for the error message about one that is not."""
        if isinstance(value, int) and not isinstance(value, bool) and value > self.high:
            return f"a whole number of at most {_number(self.high)}"
        return f"a whole number of at least {_number(self.low)}"


COUNT = Whole(0, MAX_INT)
"""Whole numbers from 0 on that arrays hold."""


def _number(value: float) -> str:
    return f"{value:.0f}" if abs(value) < 1e7 and value == round(value) else f"{value:g}"


@lru_cache(maxsize=64)
def ranges_of(kind: type) -> dict[str, Range]:
    """Return the ranges that a dataclass declares, by field."""
    return {name: declared for name, (declared, _, _) in _declarations(kind).items()}


@lru_cache(maxsize=64)
def _declarations(kind: type) -> dict[str, tuple[Range, bool, bool]]:
    """Return the ranges that a dataclass declares, by field, and whether a word or `None` may stand for the number."""
    hints = get_type_hints(kind, include_extras=True)
    ranges = {name: found for name, hint in hints.items() if (found := range_in(hint)) is not None}
    return {name: (found, _takes_words(hints[name]), _takes_none(hints[name])) for name, found in ranges.items()}


def range_in(hint: Any) -> Range | None:
    """Return the range in a type, or in the types that it is made of: `Annotated[int, Range(...)] | None`."""
    own = [each for each in getattr(hint, "__metadata__", ()) if isinstance(each, Range)]
    return own[0] if own else next((found for each in get_args(hint) if (found := range_in(each)) is not None), None)


def _takes_words(hint: Any) -> bool:
    return get_origin(hint) is Literal or any(map(_takes_words, get_args(hint)))


def _takes_none(hint: Any) -> bool:
    return hint is type(None) or any(map(_takes_none, get_args(hint)))


def check_ranges(record: Any, prefix: str = "") -> None:
    """Check every number of a dataclass whose type declares a range; `None` and a word pass where the type has them.

    Args:
        record: The dataclass.
        prefix: Put before the field's name in the message, as in `ppo.`.

    Raises:
        ValueError: a number is out of its range.
    """
    kind: Any = type(record)
    for name, (allowed, words, none) in _declarations(kind).items():
        value = getattr(record, name)
        for each in value if isinstance(value, tuple) else (value,):
            if not (none and each is None) and not (words and isinstance(each, str)):
                allowed.check(f"{prefix}{name}", each)
