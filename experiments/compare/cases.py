"""Read the cases of a comparison: a set that comes with trainpilot, or a YAML or JSON file of the user's.

A file holds `common` (fields that all cases share) and `cases` (a list). A case has a `name`, fields of `RunConfig`
and perhaps a `target_loss`; its `model` may be a transformers config written out in place.
"""

from __future__ import annotations

import json
import math
import re
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass, field, fields
from hashlib import blake2b
from importlib.resources import files
from pathlib import Path
from typing import Any

from pydantic import ConfigDict

from trainpilot.experiments.compare.comparison import Case
from trainpilot.experiments.validated import read_mapping, run_config, validated
from trainpilot.llm_runtime.config import RunConfig
from trainpilot.llm_runtime.data.text_sources import read_documents
from trainpilot.llm_runtime.files import cache_dir, write_json

NAME = re.compile(r"[a-z0-9][a-z0-9.-]*")
UNKNOWN = "unknown"
"""Architecture of a model whose config is not on this machine."""
COMMON_FIELDS = tuple(f.name for f in fields(RunConfig) if f.name != "seed")
"""What a case may set; its seeds are the comparison's."""


@dataclass(frozen=True, kw_only=True)
class CaseSet:
    """The content of a file of cases."""

    __pydantic_config__ = ConfigDict(extra="forbid")

    common: dict[str, Any] = field(default_factory=dict)
    """Fields that all cases share; names are `RunConfig`'s."""
    cases: list[dict[str, Any]] = field(default_factory=list)
    """Name and further fields of every case; they go before the common ones."""

    def __post_init__(self) -> None:
        _check_known("common", self.common, COMMON_FIELDS)
        if not self.cases:
            raise ValueError("cases must list at least one case, got none; a case looks like {name: mine, model: ...}")
        names = [case.get("name") for case in self.cases]
        for number, name in enumerate(names, start=1):
            if not (isinstance(name, str) and NAME.fullmatch(name)):
                raise ValueError(f"case {number}: name must be made of a-z, 0-9, '.' and '-', got {name!r}")
        name, times = Counter(names).most_common(1)[0]
        if times > 1:
            raise ValueError(f"case {name}: name must be its own, got it {times} times; rename the others")


def load_cases(name: str) -> tuple[Case, ...]:
    """Read a set that comes with trainpilot (`train`, `test`, `quick`), or the user's YAML or JSON file.

    A model's config that stands in the file is written to the cache folder, and the run's model is that file. Paths are
    relative to the current folder.

    Raises:
        ValueError: no such file, an unknown name in it, or a value that is wrong.
    """
    shipped = files("trainpilot.experiments.compare").joinpath("sets")
    found = validated(CaseSet, read_mapping("cases", name, shipped), f"cases {name}")
    return tuple(_case({**found.common, **case}, f"cases {name}, case {case['name']}") for case in found.cases)


def text_digests(case: Case) -> frozenset[str]:
    """Return a digest of every document of the case's text, to tell whether two cases share any.

    Raises:
        ValueError: the text cannot be read.
    """
    documents = read_documents(case.config.text)
    return frozenset(blake2b(document.encode("utf-8"), digest_size=16).hexdigest() for document in documents)


def _case(content: dict[str, Any], where: str) -> Case:
    own = {name: content.pop(name, None) for name in ("name", "target_loss")}
    _check_known(where, content, COMMON_FIELDS)
    model, architecture = _model(content.get("model", RunConfig.model), where)
    config = run_config({**content, "model": model}, where)
    case = validated(Case, {**own, "config": config, "architecture": architecture}, where)
    if case.target_loss is not None and not 0 < case.target_loss < math.inf:
        raise ValueError(f"{where}: target_loss must be a positive number of nats/token, got {case.target_loss}")
    return case


def _check_known(where: str, content: Mapping[str, Any], known: tuple[str, ...]) -> None:
    if "seed" in content:
        raise ValueError(f"{where}: seed is set by the comparison, got {content['seed']!r}; leave it out, use --seeds")
    if unknown := sorted(map(str, set(content) - set(known))):
        raise ValueError(f"{where}: {unknown[0]!r} is unknown; known are {', '.join(known)}, and a case's target_loss")


# Models -----------------------------------------------------------------------------------------------------


def model_file(config: Mapping[str, Any]) -> Path:
    """Write a transformers config to the cache folder, under a name that is the same on every machine.

    Raises:
        ValueError: the config is no plain JSON, or the folder cannot be written.
    """
    try:
        content = json.dumps(config, sort_keys=True, allow_nan=False)
        path = cache_dir() / "models" / f"{blake2b(content.encode(), digest_size=8).hexdigest()}.json"
        if not path.is_file():
            write_json(path, json.loads(content))
    except (TypeError, ValueError) as error:
        raise ValueError(f"model must hold plain JSON values: {error}") from error
    except OSError as error:
        raise ValueError(
            f"model cannot be written to {path.parent} ({error.strerror or error}); "
            "set TRAINPILOT_CACHE to a folder of yours"
        ) from error
    return path


def _model(given: object, where: str) -> tuple[Any, str]:
    """Return what the run's `model` is, and the architecture."""
    if not isinstance(given, dict):
        return given, _architecture(given, where) if isinstance(given, str) else UNKNOWN
    architecture = _model_type(given, where)
    try:
        return str(model_file(given)), architecture
    except ValueError as error:
        raise ValueError(f"{where}: {error}") from error


def _architecture(model: str, where: str) -> str:
    """Look into the config of a preset, a file or a folder; a Hub id stays unknown, for that would need the network."""
    path = Path(model)
    if path.suffix == ".json":
        return _model_type(_read_config(path, where), where)
    from trainpilot.llm_runtime.models import PRESETS  # loads torch, which most cases can do without here

    if model in PRESETS:
        return str(PRESETS[model]["model_type"])
    return _model_type(_read_config(path / "config.json", where), where) if path.is_dir() else UNKNOWN


def _read_config(path: Path, where: str) -> object:
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        reason = getattr(error, "strerror", None) or error
        raise ValueError(f"{where}: model must be a readable config, got {path} ({reason}); check the path") from error


def _model_type(config: object, where: str) -> str:
    kind = config.get("model_type") if isinstance(config, dict) else None
    if not isinstance(kind, str):
        raise ValueError(f"{where}: model must have a model_type (llama, gpt2, ...), got {kind!r}")
    return kind
