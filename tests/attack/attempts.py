"""What an attempt is: one attack on one or several promises, in a folder of its own."""

from __future__ import annotations

import hashlib
import traceback
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

from trainpilot.experiments.one_writer import NAME as LOCK

Failures = dict[str, str]
"""Why promises were broken, by the name of the promise; empty where all are held."""

Outcome = Failures | tuple[Failures, float]
"""The same, perhaps with what was measured, in the unit of the promise."""


@dataclass(frozen=True)
class Promise:
    """A promise of the documentation."""

    text: str
    """What is promised."""
    attack: str
    """How it is attacked."""


@dataclass(frozen=True, kw_only=True)
class Attempt:
    """One attack, carried out in a forked process whose current folder is a new, empty one."""

    name: str
    """What is attacked with, in one line."""
    promises: tuple[str, ...]
    """Names of the promises that it attacks."""
    run: Callable[[Path], Outcome]
    """Carries it out in the folder, and returns what failed. An exception or a death fails all of its promises."""
    limit_s: float = 60.0
    """Seconds after which it is killed."""
    memory_bytes: int = 4 * 2**30
    """Address space that it may take beyond what it begins with."""


class Kind(Protocol):
    """A kind of attack: a module with these names."""

    TITLE: str
    PROMISES: Mapping[str, Promise]

    def prepare(self, shared: Path) -> None:
        """Write what all attempts need into a folder, once."""

    def example(self, place: Path) -> Outcome:
        """Carry out one attempt that needs nothing prepared, in an empty folder."""

    def attempts(self, seed: int, shared: Path) -> Sequence[Attempt]:
        """Return the attempts, the same for the same seed."""


def one_line(text: str, most: int = 200) -> str:
    """Return text as one printable line."""
    line = " ".join(text.split())
    return "".join(c if c.isprintable() else f"\\x{ord(c):02x}" for c in line)[:most]


def last_frame(error: BaseException) -> str:
    """Return an exception with the place that raised it, as one line."""
    frames = [f for f in traceback.extract_tb(error.__traceback__) if "/tests/attack/" not in f.filename]
    where = f" ({Path(frames[-1].filename).name}:{frames[-1].lineno})" if frames else ""
    return one_line(f"{type(error).__name__}: {error}", 160) + where


CONTROL = [chr(c) for c in [*range(9), *range(11, 13), *range(14, 32), 0x7F, *range(0x80, 0xA0)]]
BIDI = [chr(c) for c in [*range(0x202A, 0x202F), *range(0x2066, 0x206A)]]


def control_characters(text: str) -> str | None:
    """Return what a terminal would obey in a text: control characters and marks of direction; `None` for nothing."""
    found = sorted({f"U+{ord(c):04X}" for c in text if c in CONTROL or c in BIDI})
    return f"printed {', '.join(found)}" if found else None


def content_of(folder: Path) -> dict[str, str]:
    """Return a digest of everything in a folder, by its path."""
    found = {}
    for path in sorted(folder.rglob("*")):
        name = str(path.relative_to(folder))
        if path.name == LOCK:  # a command holds it while it runs
            continue
        if path.is_symlink() or not path.is_file():
            found[name] = "a folder, a link or a device"
        else:
            found[name] = hashlib.blake2b(path.read_bytes(), digest_size=8).hexdigest()
    return found


def changes(before: Mapping[str, str], after: Mapping[str, str]) -> str | None:
    """Return what changed in a folder, as one line; `None` for nothing."""
    told = [f"{name} is new" for name in after if name not in before]
    told += [f"{name} is gone" for name in before if name not in after]
    told += [f"{name} changed" for name in after if name in before and before[name] != after[name]]
    return one_line(", ".join(told), 150) if told else None
