"""Convert dataclasses to plain JSON values and back, checked by pydantic, which is loaded when it is first needed.

`class Run(JsonRecord)` gives a dataclass `to_json` and `from_json`. A field whose JSON form differs from its value says
how in its type: `Annotated[..., JsonForm(...)]`, as `Float` does.
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass, fields
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, ClassVar, Self

from trainpilot.llm_runtime.files import write_json
from trainpilot.llm_runtime.plain_values import is_number, printable, read_json, shown

if TYPE_CHECKING:
    from pydantic import TypeAdapter, ValidationError


MOST_VALUES = 1_000_000
"""Largest number of values in the file of a record, which has a number for each interval of a run."""


class JsonRecord:
    """Base of dataclasses that are written as JSON. Nested dataclasses, tuples and mappings are converted too."""

    __pydantic_config__: ClassVar[Mapping[str, str]] = {"extra": "forbid"}
    left_out_at_default: ClassVar[tuple[str, ...]] = ()
    """Fields that JSON leaves out at their default: those that version 0.1 did not have. So its files stay the same."""

    @classmethod
    def __get_pydantic_core_schema__(cls, source: Any, handler: Callable[[Any], Any]) -> Any:
        """Return pydantic's schema of the record."""
        schema, names = handler(source), cls.left_out_at_default
        if names:
            from pydantic_core import core_schema

            defaults = {each.name: each.default for each in fields(source) if each.name in names}

            def written(record: Any, write: Callable[[Any], dict[str, Any]]) -> dict[str, Any]:
                dull = {name for name, default in defaults.items() if getattr(record, name) == default}
                return {name: value for name, value in write(record).items() if name not in dull}

            schema["serialization"] = core_schema.wrap_serializer_function_ser_schema(written)
        return schema

    def to_json(self) -> dict[str, Any]:
        """Return plain JSON values, the fields in their order."""
        values: dict[str, Any] = _adapter(type(self)).dump_python(self, mode="json", warnings=False)
        return values

    @classmethod
    def from_json(cls, content: Mapping[str, Any]) -> Self:
        """Return the record that `to_json` gave; fields with a default may be missing.

        Raises:
            ValueError: fields are missing or unknown, or a value has another type or breaks a rule of the record.
        """
        from pydantic import ValidationError

        try:
            record: Self = _adapter(cls).validate_python(content)
        except ValidationError as error:
            name = re.sub(r"(?<!^)(?=[A-Z])", " ", cls.__name__).lower()
            raise ValueError(_odd_fields(error, name) or first_fault(error, name)) from error
        return record

    def write(self, path: Path) -> None:
        """Write a file of the record, whole."""
        write_json(path, self.to_json())

    @classmethod
    def read(cls, path: Path) -> Self | None:
        """Return the record in a file that `write` made; `None` where there is no such file or it is damaged."""
        try:
            return cls.from_json(read_json(path, MOST_VALUES))
        except (OSError, ValueError, KeyError, TypeError, AttributeError):
            return None


@dataclass(frozen=True)
class JsonForm:
    """How JSON holds a field, as metadata of its type."""

    write: Callable[[Any], Any]
    """Turns the value into plain JSON values."""
    read: Callable[[Any], Any] | None = None
    """Turns these into what the field's type accepts; by default they are that already."""
    checked: bool = True
    """Whether the field's type is checked; not for types that pydantic does not know."""

    def __get_pydantic_core_schema__(self, source: Any, handler: Callable[[Any], Any]) -> Any:
        """Return pydantic's schema of the field."""
        from pydantic_core import core_schema

        schema = handler(source) if self.checked else core_schema.any_schema()
        if self.read is not None:
            schema = core_schema.no_info_before_validator_function(self.read, schema)
        schema["serialization"] = core_schema.plain_serializer_function_ser_schema(self.write)
        return schema


LARGEST = 1e39
"""No number in float32 is as large; what is measured counts as not finite from here on."""


def null_if_not_finite(value: float | None, least: float = -LARGEST) -> float | None:
    """Return the number; `None` for NaN, which JSON does not have, and for what is infinite or as good as that."""
    return value if value is not None and least <= value < LARGEST else None


def _measured(value: Any, least: float = -LARGEST) -> Any:
    """Return a value from JSON; raise `ValueError` for a number that `null_if_not_finite` does not write."""
    if isinstance(value, str) or (is_number(value) and not least <= value < LARGEST):
        raise ValueError(f"must be {'a finite number' if least < 0 else 'a number >= 0'} or null, got {shown(value)}")
    return value


def _nan_if_null(value: Any, least: float = -LARGEST) -> Any:
    return math.nan if value is None else _measured(value, least)


Float = Annotated[float, JsonForm(write=null_if_not_finite, read=_nan_if_null)]
"""A number that JSON holds as null where it is not finite; read back as NaN."""
KnownFloat = Annotated[float | None, JsonForm(write=null_if_not_finite, read=_measured)]
"""A number that is `None` where it is unknown, and after JSON also where it was not finite."""
_amount_or_null = partial(null_if_not_finite, least=0.0)
Amount = Annotated[float, JsonForm(write=_amount_or_null, read=partial(_nan_if_null, least=0.0))]
"""The same as `Float`, of what cannot be negative."""
KnownAmount = Annotated[float | None, JsonForm(write=_amount_or_null, read=partial(_measured, least=0.0))]
"""The same as `KnownFloat`, of what cannot be negative."""


def first_fault(error: ValidationError, where: str) -> str:
    """Return the first fault that pydantic found as one line: place, field, rule and value."""
    first = error.errors(include_url=False)[0]
    place = printable(".".join(str(part) for part in first["loc"]))
    own = first["type"] == "value_error"  # a dataclass's own message, which says what it got
    message = first["msg"].removeprefix("Value error, ") + ("" if own else f", got {shown(first['input'])}")
    if place and message.startswith("must be "):  # the rule of a range, which goes with the name
        return f"{where}: {place} {message}"
    return f"{where}: {place + ': ' if place else ''}{message}"


def _odd_fields(error: ValidationError, name: str) -> str | None:
    """Return a line that names all fields that are missing or unknown, or `None`."""
    kinds = ("missing", "unexpected_keyword_argument")
    odd = sorted({".".join(map(str, each["loc"])) for each in error.errors() if each["type"] in kinds})
    listed = ", ".join(printable(each) for each in odd[:MOST_NAMED])
    more = f" and {len(odd) - MOST_NAMED} more" if len(odd) > MOST_NAMED else ""
    return f"{name} fields missing or unknown: {listed}{more}" if odd else None


MOST_NAMED = 20
"""Fields that an error message lists."""

_adapters: dict[type[Any], TypeAdapter[Any]] = {}


def _adapter(kind: type[Any]) -> TypeAdapter[Any]:
    if kind not in _adapters:
        from pydantic import TypeAdapter

        _adapters[kind] = TypeAdapter(kind)
    return _adapters[kind]
