"""Define the methods that make a model cheaper to use: small from scratch, cut, distilled, stopped early, quantised.

A name is one or several elements joined by `+`, such as `minitron+quantise-int4`. They train with the tuned static's
setting where its search is part of the comparison, and otherwise with the case's own. A row that cuts or teaches has
the same budget as all others, of which the whole model takes a part; only `distil-2x` has twice as much.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cache
from typing import TYPE_CHECKING, Any, Literal

from trainpilot.experiments.compare.cases import StaticSetting, content_of, model_file
from trainpilot.experiments.results import Case, Compression, MethodNote, RunSpec, SteeringSpec
from trainpilot.llm_runtime.config import RunConfig

if TYPE_CHECKING:
    from trainpilot.llm_runtime.cuts import Part  # loads torch
    from trainpilot.llm_runtime.models import LoadedModel

KIND = "compressed"
KEEP = "keep="
WHOLE = 0.6
"""Share of the budget on which the whole model is trained before it is cut, or teaches."""
FFN, HEADS, DEPTH = 0.5, 0.5, 0.67
"""Shares of channels, groups of heads and blocks that are kept by default."""
Way = Literal["stays", "small", "cut", "student"]


@dataclass(frozen=True, kw_only=True)
class Element:
    """What one part of a name stands for."""

    title: str
    about: str
    way: Way = "stays"
    """Where the small model comes from: there is none, it is trained from scratch, cut, or taught from scratch."""
    parts: Mapping[Part, float] = field(default_factory=dict)
    """Share that is kept of each part."""
    taught: bool = False
    whole: float = WHOLE
    rest: float = 1 - WHOLE
    early_stop: bool = False
    format: str | None = None


_BOTH: Mapping[Part, float] = {"ffn": FFN, "depth": DEPTH}
ELEMENTS: Mapping[str, Element] = {
    "small": Element(
        title="small", about="the shape of minitron's end from scratch on the whole budget", way="small", parts=_BOTH
    ),
    "small-ffn": Element(
        title="small ffn", about="the shape of prune-ffn's end from scratch", way="small", parts={"ffn": FFN}
    ),
    "small-heads": Element(
        title="small heads", about="the shape of prune-heads' end from scratch", way="small", parts={"heads": HEADS}
    ),
    "small-depth": Element(
        title="small depth", about="the shape of prune-depth's end from scratch", way="small", parts={"depth": DEPTH}
    ),
    "prune-ffn": Element(
        title="prune ffn", about="feed-forward channels cut by activation", way="cut", parts={"ffn": FFN}
    ),
    "prune-heads": Element(
        title="prune heads", about="groups of heads cut by activation", way="cut", parts={"heads": HEADS}
    ),
    "prune-depth": Element(
        title="prune depth", about="blocks cut by their influence", way="cut", parts={"depth": DEPTH}
    ),
    "minitron": Element(
        title="Minitron",
        about="channels and blocks cut, then distilled from the state before the cut",
        way="cut",
        parts=_BOTH,
        taught=True,
    ),
    "distil": Element(
        title="distil",
        about="a small model from scratch under the teaching of the whole one, which is trained first",
        way="student",
        parts=_BOTH,
        taught=True,
    ),
    "distil-2x": Element(
        title="distil 2x",
        about="the same with the whole budget for the teacher and as much again for the small model",
        way="student",
        parts=_BOTH,
        taught=True,
        whole=1.0,
        rest=1.0,
    ),
    "early-stop": Element(
        title="early stop", about="stopped when the validation loss no longer falls", early_stop=True
    ),
    "quantise-int8": Element(title="int8", about="rounded to 8-bit integers after training", format="int8"),
    "quantise-int4": Element(title="int4", about="rounded to 4-bit integers after training", format="int4"),
    "shift-add": Element(title="shift-add", about="rounded to binary codes of three bits after training", format="bcq"),
    "shift-add-pot": Element(
        title="shift-add PoT", about="rounded to signed powers of two after training", format="pot"
    ),
}
"""By name. `small` and its kind are the controls of the rows that end in the same shape."""
HELP = f"{', '.join(ELEMENTS)}, or several of these with + between them, and @keep=0.25 for another share that is kept"
EVALUATE_EVERY = 2
"""Decisions between two evaluations of a run that may stop early."""


def is_compressed(name: str) -> bool:
    """Return whether a method's name begins like one of these."""
    return name.partition("+")[0].partition("@")[0] in ELEMENTS


@dataclass(frozen=True, kw_only=True)
class CompressedMethod:
    """A method that makes the model, or its training, cheaper."""

    note: MethodNote
    way: Way
    parts: Mapping[Part, float]
    """Share that is kept of each part."""
    taught: bool
    whole: float
    rest: float
    early_stop: bool
    format: str | None

    @classmethod
    def parse(cls, name: str) -> CompressedMethod:
        """Read a method's name.

        Raises:
            ValueError: an element is unknown, cannot be combined with the others, or has no such option.
        """
        named = [_element(name, part) for part in name.split("+")]
        shapes = [each for each in named if each.way != "stays"]
        ways, formats = {each.way for each in shapes}, [each.format for each in named if each.format is not None]
        stops = [each for each in named if each.early_stop]
        parts = [part for each in shapes for part in each.parts]
        alone = any(each.taught for each in shapes) and len(shapes) > 1
        if len(ways) > 1 or len(parts) > len(set(parts)) or alone or len(formats) > 1 or len(stops) > 1:
            raise ValueError(
                "methods: + may join one way to a small model (or several prune-, or several small-) with early-stop "
                f"and one rounding, got {name!r}; leave one of them out"
            )
        if stops and ways - {"small"}:
            raise ValueError(
                f"methods: early-stop cannot be joined with a cut or a teacher, got {name!r}; leave one out"
            )
        first = shapes[0] if shapes else named[0]
        note = MethodNote(
            name=name,
            title=" + ".join(_titled(each, part) for each, part in zip(named, name.split("+"), strict=True)),
            kind=KIND,
            description=_sentence("; ".join(each.about for each in named)),
            family=name.partition("@")[0] if len(named) == 1 else name,
        )
        return cls(
            note=note,
            way=first.way,
            parts={part: share for each in shapes for part, share in each.parts.items()},
            taught=first.taught,
            whole=first.whole,
            rest=first.rest,
            early_stop=bool(stops),
            format=formats[0] if formats else None,
        )

    @property
    def budget(self) -> float:
        """Budget of a run over the case's own, the whole model's part included."""
        return self.whole + self.rest if self.way == "student" else 1.0

    def fault(self, config: RunConfig) -> str | None:
        """Return why the method cannot be run on a case's config, as one clause; `None` where it can."""
        from trainpilot.llm_runtime.export.formats import format_fault

        if self.parts:
            try:
                self.sizes(config)
            except ValueError as error:
                return str(error)
        if self.way == "cut" and config.decisions < 2:
            return f"decisions must be at least 2 for a cut between them, got {config.decisions}"
        if self.parts and config.pruning != "none":
            return f"pruning must be 'none' where a method cuts the model itself, got {config.pruning!r}"
        if self.format is not None and (why := format_fault(self.format, _loaded(config.model))):
            return f"format {self.format!r} {why}"
        return None

    def sizes(self, config: RunConfig) -> dict[Part, int]:
        """Return the size of each part of the small model.

        Raises:
            ValueError: a part cannot be cut, or not so far.
        """
        from trainpilot.llm_runtime.cuts import PARTS, UNITS, part_fault, part_size, size_of_share

        try:
            content_of(config.model)
        except ValueError:
            raise ValueError(
                f"model must be a preset or a config, so that its small shape can be trained, got {config.model!r}"
            ) from None
        model = _loaded(config.model).model
        found: dict[Part, int] = {}
        for part in PARTS:
            if part not in self.parts:
                continue
            share = self.parts[part]
            if why := part_fault(model, part):
                raise ValueError(f"{part} {why}")
            present = part_size(model, part)
            if part != "ffn" and (present == 1 or share * present < 0.5):
                raise ValueError(
                    f"{part} must keep at least one and cut at least one of {present} {UNITS[part]}, got {share:g} of "
                    "them; give another @keep="
                )
            found[part] = size_of_share(model, part, share)
        return found

    def small(self, config: RunConfig) -> RunConfig:
        """Return a run on the small model; on the model itself where its shape stays."""
        if not self.parts:
            return config
        changes = _changes(config.model, tuple(self.sizes(config).items()))
        return replace(config, model=str(model_file({**content_of(config.model), **changes})))

    def models(self, config: RunConfig) -> list[RunConfig]:
        """Return runs on every model that is trained, for cost tables."""
        small = self.small(config)
        return [small] if small == config or self.way == "small" else [config, small]

    def spec(self, case: Case, setting: StaticSetting | None, seed: int) -> RunSpec:
        """Return the run on a case with a seed.

        Args:
            case: The case.
            setting: The tuned static's setting; `None` where nothing was tuned.
            seed: Seed of the run.
        """
        own = replace(case.config, seed=seed)
        config = own if setting is None else setting.on(case.config, seed=seed)
        steering = SteeringSpec()
        if self.early_stop:
            steering = SteeringSpec(kind="early-stop", settings={"patience": 3}, evaluate_every=EVALUATE_EVERY)
        if self.way == "small":
            config = self.small(config)
        made: dict[str, Any] = {"format": self.format}
        if self.way in ("cut", "student"):
            made |= {
                "sizes": self.sizes(config),
                "small": self.small(config).model,
                "new": self.way == "student",
                "taught": self.taught,
                "whole": self.whole,
                "rest": self.rest,
            }
        compression = Compression(**made)
        plain = compression == Compression()
        return RunSpec(config=config, steering=steering, compression=None if plain else compression)


def check_compressed(cases: Sequence[Case], methods: Sequence[CompressedMethod]) -> None:
    """Raise `ValueError` for a method that cannot be run on one of the cases."""
    for case in cases:
        for method in methods:
            if why := method.fault(case.config):
                raise ValueError(f"case {case.name}: method {method.note.name}: {why}; or leave the method out")


def _element(name: str, text: str) -> Element:
    word, *options = text.split("@")
    if word not in ELEMENTS:
        raise ValueError(f"methods: the elements of {name!r} must be among {HELP}; got {word!r}")
    element = ELEMENTS[word]
    if not options:
        return element
    if len(options) > 1 or not options[0].startswith(KEEP) or not element.parts:
        raise ValueError(f"methods: only one @{KEEP}SHARE may follow what has a small model, got {text!r} in {name!r}")
    try:
        share = float(options[0].removeprefix(KEEP))
    except ValueError:
        share = math.nan
    if not 0 < share < 1:
        raise ValueError(f"methods: keep must be a share in (0, 1), as in @{KEEP}0.25, got {text!r} in {name!r}")
    return replace(element, parts=dict.fromkeys(element.parts, share))


def _titled(element: Element, text: str) -> str:
    option = text.partition(f"@{KEEP}")[2]
    return f"{element.title} {option}" if option else element.title


def _sentence(text: str) -> str:
    return f"{text[0].upper()}{text[1:]}."


@cache
def _loaded(model: str) -> LoadedModel:
    """Return a model with any weights, to look at its shape."""
    from trainpilot.llm_runtime.models import load_model

    return load_model(model, 0)


@cache
def _changes(model: str, sizes: tuple[tuple[Part, int], ...]) -> dict[str, Any]:
    """Return what a cut changes in the model's config."""
    from trainpilot.llm_runtime.cuts import config_changes

    return config_changes(_loaded(model).model, dict(sizes))
