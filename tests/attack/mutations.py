"""Spoil valid content in systematic ways: a value in a tree of plain values and tensors, or the bytes of a file."""

from __future__ import annotations

import copy
import json
import math
import random
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from tests.attack.attempts import one_line

Path = tuple[Any, ...]
"""Keys and positions that lead from the root of a tree to a value."""
DELETED = object()
DEEP = "@deep@"
"""Stands for 3,000 nested lists, which writers cannot write."""
HOSTILE_TEXT = "\x1b]0;title\x07\x1b[2J\x1b[31m\u202e\x9b1m\x7f"
"""Sets a terminal's title, clears it, colours it and turns its direction."""
NONSENSE = ("NaN", "infinite", "negative")
"""Changes of a number that leave nothing that it could mean, where it counts or measures something."""
PLAUSIBLE = ("empty", "one shorter", "true")
"""Changes after which a state may still be that of another run, which is then gone on with."""

Change = Callable[[Any], Any]

ANYTHING: dict[str, Change] = {
    "deleted": lambda value: DELETED,
    "null": lambda value: None,
    "a text": lambda value: "text",
    "in a list": lambda value: [value],
    "an object": lambda value: {"x": value},
    "nested deep": lambda value: DEEP,
    "true": lambda value: True,
}
NUMBERS: dict[str, Change] = {
    "NaN": lambda value: math.nan,
    "infinite": lambda value: math.inf,
    "negative": lambda value: -abs(value) - 1,
    "1e308": lambda value: 1e308,
    "10^400": lambda value: 10**400,
    "its text": str,
}
TEXTS: dict[str, Change] = {
    "empty": lambda value: "",
    "control characters": lambda value: HOSTILE_TEXT,
    "control characters added": lambda value: value + HOSTILE_TEXT,
    "a million letters": lambda value: "x" * 1_000_000,
    "half a character": lambda value: "\ud800",
    "7": lambda value: 7,
}
LISTS: dict[str, Change] = {
    "empty": lambda value: [],
    "of nulls": lambda value: [None] * len(value),
    "one shorter": lambda value: value[:-1],
    "twice": lambda value: [*value, *value],
    "10,000 longer": lambda value: [*value, *([value[-1] if value else 0] * 10_000)],
    "of objects": lambda value: [{} for _ in value],
}
OBJECTS: dict[str, Change] = {
    "empty": lambda value: {},
    "a list": list,
    "an unknown name": lambda value: {**value, "nosuch": 1},
    "a hostile name": lambda value: {**value, HOSTILE_TEXT: 1},
    "20,000 names": lambda value: {**value, **{f"name{i}": i for i in range(20_000)}},
}
TENSORS: dict[str, Change] = {
    "full of NaN": lambda value: torch.full_like(value.float(), math.nan),
    "flat": lambda value: value.flatten()[: max(value.numel() - 1, 0)],
    "one dimension more": lambda value: value[None],
    "empty": lambda value: value[:0] if value.ndim else torch.zeros(0),
    "whole numbers": lambda value: value.to(torch.int64),
    "complex": lambda value: value.to(torch.complex64),
    "a list": lambda value: value.tolist(),
}


def changes_of(value: Any) -> Mapping[str, Change]:
    """Return the changes that a value can suffer, by name."""
    if isinstance(value, torch.Tensor):
        return {"deleted": ANYTHING["deleted"], "null": ANYTHING["null"], **TENSORS}
    kinds: Sequence[tuple[Any, dict[str, Change]]] = (
        (bool, {}), ((int, float), NUMBERS), (str, TEXTS), ((list, tuple), LISTS), (dict, OBJECTS),
    )  # fmt: skip
    own = next((found for kind, found in kinds if isinstance(value, kind)), {})
    return ANYTHING | own


@dataclass(frozen=True)
class Mutation:
    """One change of one value in a tree."""

    path: Path
    change: str

    def __str__(self) -> str:
        where = ".".join(str(part) for part in self.path) or "everything"
        return one_line(f"{where}: {self.change}", 100)

    def of(self, tree: Any) -> Any:
        """Return a copy of a tree with the change."""
        holder = [copy.deepcopy(tree)]
        place, key = holder, 0
        for part in self.path:
            if isinstance(place[key], tuple):
                place[key] = list(place[key])
            place, key = place[key], part
        new = changes_of(place[key])[self.change](place[key])
        if new is DELETED:
            del place[key]
        else:
            place[key] = new
        return holder[0] if holder else None


def paths(tree: Any, before: Path = ()) -> list[Path]:
    """Return the paths to all values of a tree, those of long lists but for their first, second and last."""
    found = [before]
    if isinstance(tree, dict):
        inside = list(tree.items())
    elif isinstance(tree, list | tuple):
        few = sorted({0, 1, len(tree) - 1} & set(range(len(tree))))
        inside = [(index, tree[index]) for index in few]
    else:
        inside = []
    for key, value in inside:
        found += paths(value, (*before, key))
    return found


def value_at(tree: Any, path: Path) -> Any:
    """Return the value at a path."""
    for part in path:
        tree = tree[part]
    return tree


def mutations(tree: Any, count: int, seed: int, *, written: bool = True) -> list[Mutation]:
    """Return `count` different mutations of a tree: all changes alike, and the parts at its top alike.

    Args:
        tree: Plain values and tensors.
        count: Number of mutations.
        seed: Seeds their choice.
        written: Whether the tree becomes text, which alone can be nested deeply.
    """
    chance = random.Random(seed)
    by_change: dict[str, dict[Any, list[Path]]] = {}
    for path in paths(tree):
        for change in changes_of(value_at(tree, path)):
            if (path or change != "deleted") and (written or change != "nested deep"):
                by_change.setdefault(change, {}).setdefault(path[:1], []).append(path)
    found: dict[Mutation, None] = {}
    for number in range(50 * count):
        if len(found) == count:
            break
        change = list(by_change)[number % len(by_change)]
        parts = by_change[change]
        found[Mutation(chance.choice(parts[chance.choice(list(parts))]), change)] = None
    return list(found)


# Text and bytes -------------------------------------------------------------------------------------------------------


def as_json(tree: Any) -> str:
    """Return a tree as JSON, which may hold NaN and be nested deeply."""
    return json.dumps(tree).replace(json.dumps(DEEP), "[" * 3_000 + "]" * 3_000)


def as_yaml(tree: Any) -> str:
    """Return a tree as YAML, which may be nested deeply."""
    import yaml

    text = yaml.safe_dump(tree, sort_keys=False, default_flow_style=True, width=10**9)
    return text.replace(f"'{DEEP}'", "[" * 3_000 + "]" * 3_000)


def spoilt_bytes(content: bytes, count: int, seed: int) -> list[tuple[str, bytes]]:
    """Return names and contents of `count` damaged files, besides those that are not drawn."""
    chance = random.Random(seed)
    found = [
        ("empty", b""),
        ("its first byte", content[:1]),
        ("zeros", bytes(len(content))),
        ("its last byte missing", content[:-1]),
        ("UTF-16", content.decode("utf-8", "replace").encode("utf-16")),
        ("NUL in front", b"\0" + content),
    ]
    for _ in range(count):
        at = chance.randrange(len(content))
        if chance.random() < 0.5:
            found.append((f"cut short at byte {at}", content[:at]))
        else:
            flipped = bytearray(content)
            flipped[at] ^= 1 << chance.randrange(8)
            found.append((f"a bit flipped in byte {at}", bytes(flipped)))
    return found
