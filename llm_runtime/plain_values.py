"""Read plain values that somebody else wrote: bounded in size, depth and number, and printed without harm.

A file from elsewhere may be made to harm: nested a thousand levels deep, with numbers of a million digits, or with text
that moves the cursor of a terminal. What is read here is small enough to be worked with, and `printable` is the one
function by which its text reaches a terminal, an error message or a page.
"""

from __future__ import annotations

import json
import reprlib
import unicodedata
from collections.abc import Mapping
from importlib.resources.abc import Traversable
from pathlib import Path
from typing import Any

MAX_BYTES = 16 * 2**20
"""Largest JSON file that is read."""
MAX_DEPTH = 32
"""Deepest nesting of lists and mappings that is read."""
MAX_VALUES = 100_000
"""Largest number of values in a file whose form is free."""
MAX_TEXT = 100_000
"""Longest text among them, in characters."""
MAX_INT = 2**63 - 1
"""Largest whole number that arrays hold."""
BOUNDED = frozenset({float, bool, type(None)})
"""Types of plain values of which none is too large."""
MAX_SHOWN = 300
"""Longest value that an error message repeats, in characters."""


def printable(text: object) -> str:
    r"""Return a text in which nothing acts on a terminal: control and direction characters are written as escapes.

    ESC becomes `\x1b`, a right-to-left override `\u202e`, a lone surrogate `\ud800`, a line break `\n`.
    """
    plain = str(text)
    return plain if plain.isprintable() else "".join(map(_printable, plain))


def _printable(character: str) -> str:
    if character.isprintable() or unicodedata.category(character) == "Zs":  # a space of any width
        return character
    return character.encode("unicode_escape").decode("ascii")


def shown(value: object) -> str:
    """Return a value as an error message repeats it: like `repr`, but short, printable and of any depth."""
    try:
        text = repr(value) if not isinstance(value, str | bytes) or len(value) < MAX_SHOWN else reprlib.repr(value)
    except (RecursionError, ValueError):  # nested too deep, or a number of more digits than Python writes
        return f"{type(value).__name__} that is too large to be shown"
    return printable(text if len(text) <= MAX_SHOWN else f"{text[: MAX_SHOWN - 3]}...")


def is_number(value: object) -> bool:
    """Return whether a value is a number; True and False are none."""
    return isinstance(value, int | float) and not isinstance(value, bool)


def check_plain(content: object, *, most: int = MAX_VALUES) -> None:
    """Check that content is plain values - mappings, lists, texts, numbers, booleans, None - within the bounds.

    It looks at one level after the other, and at a value as often as it is referred to, so that neither depth nor
    references to references cost more than the bounds allow.

    Args:
        content: The values.
        most: Largest number of values.

    Raises:
        ValueError: there is something else, or too much.
    """
    level: list[Any] = [content]
    count = 1
    for _ in range(MAX_DEPTH):
        below: list[Any] = []
        for value in level:
            kind = type(value)
            if kind in BOUNDED or (kind is str and value.isascii() and len(value) <= MAX_TEXT):
                continue  # nearly all values: most of the time of reading a long run went into them
            inside = _inside(value)
            count += len(inside)
            if count > most:
                raise ValueError(f"it holds more than {most:,} values")
            below += inside
        if not below:
            return
        level = below
    raise ValueError(f"it is nested more than {MAX_DEPTH} levels deep")


def _inside(value: object) -> list[Any]:
    """Return what a container holds, nothing for a plain value."""
    if isinstance(value, Mapping):
        names = [key for key in value if isinstance(key, str)]
        if len(names) < len(value) and (odd := [key for key in value if not isinstance(key, str | int)]):
            raise ValueError(f"its names must be text, got {shown(odd[0])}")
        return [*names, *value.values()]
    if isinstance(value, list | tuple):
        return list(value)
    if isinstance(value, str):
        _check_text(value)
    elif isinstance(value, int) and not abs(value) <= MAX_INT:
        raise ValueError(f"whole numbers must be at most {MAX_INT}, got one of {value.bit_length()} bits")
    elif value is not None and not isinstance(value, int | float):
        raise ValueError(f"it holds a {type(value).__name__}, which is no plain value")
    return []


def _check_text(value: str) -> None:
    if len(value) > MAX_TEXT:
        raise ValueError(f"texts must have at most {MAX_TEXT:,} characters, got one of {len(value):,}")
    try:
        value.encode("utf-8")
    except UnicodeEncodeError:
        raise ValueError(f"texts must be Unicode, got a lone surrogate in {shown(value)}") from None


def parse_json(text: str | bytes, most: int = MAX_VALUES) -> Any:
    """Return the values of a JSON text, within the bounds and at most `most`.

    Raises:
        ValueError: it is no JSON, is nested too deep, or holds too much.
    """
    try:
        content = json.loads(text)
    except RecursionError:
        raise ValueError(f"it is nested more than {MAX_DEPTH} levels deep") from None
    check_plain(content, most=most)
    return content


def read_bytes(path: Path | Traversable, most: int = MAX_BYTES) -> bytes:
    """Return the content of a file of at most `most` bytes.

    Raises:
        OSError: it cannot be read.
        ValueError: it is larger, or a pipe.
    """
    if isinstance(path, Path) and path.is_fifo():  # reading waits until somebody writes into it
        raise ValueError("it is a pipe; save what comes out of it in a file")
    with path.open("rb") as file:
        content = file.read(most + 1)
    if len(content) > most:
        raise ValueError(f"it is larger than {most / 2**20:g} MiB")
    return content


def read_text(path: Path | Traversable, most: int = MAX_BYTES) -> str:
    """Return the content of a UTF-8 file of at most `most` bytes. Raises `OSError` or `ValueError`."""
    return read_bytes(path, most).decode("utf-8")


def read_json(path: Path | Traversable, most: int = MAX_VALUES) -> Any:
    """Return the values in a JSON file, within the bounds. Raises `OSError`, or `ValueError` as `parse_json`."""
    return parse_json(read_text(path), most)


def printable_values(content: Any) -> Any:
    """Return plain values with every text and name printable. They must be within the bounds."""
    if isinstance(content, str):
        return printable(content)
    if isinstance(content, Mapping):
        return {printable(key): printable_values(value) for key, value in content.items()}
    if isinstance(content, list | tuple):
        return [printable_values(value) for value in content]
    return content


def one_line(text: object) -> str:
    """Return a text as one printable line: every run of white space becomes one space."""
    return printable(" ".join(str(text).split()))
