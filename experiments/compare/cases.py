"""Read the cases of a comparison, and list the static settings and model sizes that may be tried on them.

Cases come from a set that comes with trainpilot or from a YAML or JSON file of the user's. A file holds `common`
(fields that all cases share) and `cases` (a list). A case has a `name`, fields of `RunConfig` and perhaps a
`target_loss`; its `model` may be a transformers config written out in place.
"""

from __future__ import annotations

import json
import math
import re
from collections import Counter
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, field, fields, replace
from importlib.resources import files
from pathlib import Path
from typing import Any

from pydantic import ConfigDict

from trainpilot.experiments.config_files import read_mapping, run_config, validated
from trainpilot.experiments.results import Case
from trainpilot.llm_runtime.config import Precision, RunConfig
from trainpilot.llm_runtime.data.text_sources import read_documents
from trainpilot.llm_runtime.files import cache_dir, digest, write_json
from trainpilot.llm_runtime.plain_values import read_json, shown
from trainpilot.llm_runtime.schedules import ScheduleName

NAME = re.compile(r"[a-z0-9][a-z0-9.-]{0,63}")
UNKNOWN = "unknown"
"""Architecture of a model whose config is not on this machine."""
NO_CASE_FIELDS = ("seed", "teacher", "distillation_weight", "distillation_temperature")
"""Fields that a case may not set: seeds are set by the comparison, and cost tables know of no teacher."""
COMMON_FIELDS = tuple(f.name for f in fields(RunConfig) if f.name not in NO_CASE_FIELDS)
"""Fields that a case may set."""


@dataclass(frozen=True, kw_only=True)
class CaseSet:
    """The content of a file of cases."""

    __pydantic_config__ = ConfigDict(extra="forbid")

    common: dict[str, Any] = field(default_factory=dict)
    """`RunConfig` fields that all cases share."""
    cases: list[dict[str, Any]] = field(default_factory=list)
    """Name and further fields of every case; they override the common ones."""

    def __post_init__(self) -> None:
        _check_known("common", self.common, COMMON_FIELDS)
        if not self.cases:
            raise ValueError("cases must list at least one case, got none; a case looks like {name: mine, model: ...}")
        names = [case.get("name") for case in self.cases]
        for number, name in enumerate(names, start=1):
            if not (isinstance(name, str) and NAME.fullmatch(name)):
                rule = "made of at most 64 of a-z, 0-9, '.' and '-'"
                raise ValueError(f"case {number}: name must be {rule}, got {shown(name)}")
        name, times = Counter(names).most_common(1)[0]
        if times > 1:
            raise ValueError(f"case {name}: name must be its own, got it {times} times; rename the others")


def load_cases(name: str) -> tuple[Case, ...]:
    """Read a shipped set of cases (`train`, `test`, `quick`, `large`), or a YAML or JSON file.

    A model config that is written out in the file is stored in the cache folder, and the run's model is that file.
    Paths are relative to the current folder.

    Raises:
        ValueError: the file does not exist, a field is unknown, or a value is invalid.
    """
    shipped = files("trainpilot.experiments.compare").joinpath("sets")
    found = validated(CaseSet, read_mapping("cases", name, shipped), f"cases {name}")
    return tuple(_case({**found.common, **case}, f"cases {name}, case {case['name']}") for case in found.cases)


def text_digests(case: Case) -> frozenset[str]:
    """Return a digest of every document of the case's text, to detect documents shared by two cases.

    Raises:
        ValueError: the text cannot be read.
    """
    documents = read_documents(case.config.text)
    return frozenset(digest(document, 16) for document in documents)


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
        ValueError: the config is not plain JSON, or the folder cannot be written.
    """
    try:
        content = json.dumps(config, sort_keys=True, allow_nan=False)
        path = cache_dir() / "models" / f"{digest(content)}.json"
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
    """Return the value of the run's `model` field, and the model's architecture."""
    if not isinstance(given, dict):
        return given, _architecture(given, where) if isinstance(given, str) else UNKNOWN
    architecture = _model_type(given, where)
    try:
        return str(model_file(given)), architecture
    except ValueError as error:
        raise ValueError(f"{where}: {error}") from error


def _architecture(model: str, where: str) -> str:
    """Return the architecture from the config of a preset, file or folder; unknown for a Hub id (no network access)."""
    path = Path(model)
    if path.suffix == ".json":
        return _model_type(_read_config(path, where), where)
    from trainpilot.llm_runtime.models import PRESETS  # loads torch, which most cases can do without here

    if model in PRESETS:
        return str(PRESETS[model]["model_type"])
    return _model_type(_read_config(path / "config.json", where), where) if path.is_dir() else UNKNOWN


def _read_config(path: Path, where: str) -> object:
    try:
        return read_json(path)
    except (OSError, ValueError) as error:
        reason = getattr(error, "strerror", None) or error
        raise ValueError(f"{where}: model must be a readable config, got {path} ({reason}); check the path") from error


def _model_type(config: object, where: str) -> str:
    kind = config.get("model_type") if isinstance(config, dict) else None
    if not isinstance(kind, str):
        raise ValueError(f"{where}: model must have a model_type (llama, gpt2, ...), got {kind!r}")
    return kind


TUNED_SCHEDULES: tuple[ScheduleName, ...] = ("linear", "cosine", "wsd")
LEARNING_RATE_STEP = math.sqrt(10)
"""Factor between two learning rates of the grid; the refinement takes its square root, twice."""
LEARNING_RATE_GRID = (-1, 0, 1, 2, 3)
"""Steps from the case's own learning rate. Most go upwards, as small models need higher rates than common recipes; the
refinement may leave the grid."""
BATCH_GRID = (0.5, 1.0, 2.0)
"""Factors on the case's own batch."""
WARMUP_SHARES = (0.02, 0.05, 0.1, 0.2, 0.4)
"""Shares of the budget spent on warm-up. With short warm-ups only, the tuned learning rate would be too low."""
GRID_WARMUP = 0.1
RESPECTS = ("learning_rate", "batch_size", "warmup_share", "schedule")
"""Fields in which two neighbouring settings may differ."""


@dataclass(frozen=True, kw_only=True)
class StaticSetting:
    """Learning rate, batch, schedule, warm-up and precision of a run without steering."""

    learning_rate: float
    batch_size: int
    schedule: ScheduleName
    warmup_share: float
    precision: Precision

    def on(self, config: RunConfig, *, budget: float = 1.0, seed: int) -> RunConfig:
        """Return the run of this setting on a case's budget times `budget`, with at most one decision per step."""
        step = self.batch_size * config.sequence_length
        tokens = max(round(config.tokens * budget), step)
        decisions = max(1, min(math.ceil(config.decisions * budget), config.decisions, tokens // step))
        return replace(
            config,
            tokens=tokens,
            batch_size=self.batch_size,
            base_learning_rate=self.learning_rate,
            schedule=self.schedule,
            warmup_tokens=min(round(self.warmup_share * tokens), tokens - 1),
            precision=self.precision,
            decisions=decisions,
            seed=seed,
        )


def grid(config: RunConfig, precisions: Sequence[Precision]) -> list[StaticSetting]:
    """Return every combination of the grid around a case's own setting."""
    rates = [rounded(config.base_learning_rate * LEARNING_RATE_STEP**k) for k in LEARNING_RATE_GRID]
    batches = [batch for factor in BATCH_GRID if (batch := batch_near(config.batch_size * factor, config)) is not None]
    return [
        StaticSetting(
            learning_rate=rate, batch_size=batch, schedule=schedule, warmup_share=GRID_WARMUP, precision=precision
        )
        for batch in dict.fromkeys(batches)
        for rate in rates
        for schedule in TUNED_SCHEDULES
        for precision in precisions
    ]


def neighbours(
    setting: StaticSetting, step: float, config: RunConfig, respects: Collection[str] = RESPECTS
) -> list[StaticSetting]:
    """Return the settings that differ from `setting` by one step in one of `respects`; `step` is the rate's factor."""
    found: list[StaticSetting] = []
    if "learning_rate" in respects:
        rates = [rounded(setting.learning_rate * factor) for factor in (step, 1 / step)]
        found += [replace(setting, learning_rate=rate) for rate in rates]
    if "batch_size" in respects:
        batches = [batch_near(setting.batch_size * factor, config) for factor in (0.5, 2.0)]
        found += [replace(setting, batch_size=batch) for batch in batches if batch is not None]
    if "warmup_share" in respects:
        place = WARMUP_SHARES.index(setting.warmup_share)
        found += [replace(setting, warmup_share=share) for share in WARMUP_SHARES[max(place - 1, 0) : place + 2]]
    if "schedule" in respects:
        found += [replace(setting, schedule=schedule) for schedule in TUNED_SCHEDULES]
    return [neighbour for neighbour in found if neighbour != setting]


def batch_near(size: float, config: RunConfig) -> int | None:
    """Return the batch size if it leaves at least sixteen steps in the budget, else `None`."""
    whole = size >= 1 and size == int(size)
    fits = size * config.sequence_length * 16 <= config.tokens
    return int(size) if whole and fits else None


def rounded(rate: float) -> float:
    """Round to three significant digits, so that rates that differ by rounding are the same setting."""
    return float(f"{rate:.3g}")


WIDTHS = (0.5, 1.0, 1.5)
"""Factors on hidden and feed-forward size."""
DEPTHS = (-1, 0, 1)
"""Number of layers added to the case's model."""

_WIDTH_FIELDS = ("hidden_size", "intermediate_size", "n_embd", "n_inner", "ffn_dim", "word_embed_proj_dim")
_DEPTH_FIELDS = ("num_hidden_layers", "n_layer")
_HEAD_FIELDS = ("num_attention_heads", "n_head")


def with_size(config: RunConfig, width: float, depth: int) -> RunConfig:
    """Return the run with its model's sizes changed; heads stay, so every width is a multiple of twice the heads.

    Raises:
        ValueError: the model is not trained from scratch, so its size is not free.
    """
    if width == 1 and depth == 0:
        return config
    content = content_of(config.model)
    heads = next(int(content[name]) for name in _HEAD_FIELDS if name in content)
    grain = 2 * heads
    changed: dict[str, Any] = dict(content)
    for name in _WIDTH_FIELDS:
        if content.get(name) is not None:
            changed[name] = max(grain, round(content[name] * width / grain) * grain)
    for name in _DEPTH_FIELDS:
        if name in content:
            changed[name] = max(1, content[name] + depth)
    return replace(config, model=str(model_file(changed)))


def all_sizes(config: RunConfig) -> tuple[RunConfig, ...]:
    """Return the run with its model in every size, the case's own first; only that if sizes cannot be varied."""
    if not can_vary(config):
        return (config,)
    sizes = [with_size(config, width, depth) for width in WIDTHS for depth in DEPTHS]
    return tuple(dict.fromkeys([config, *sizes]))


def can_vary(config: RunConfig) -> bool:
    """Return whether the model can be resized: it is trained from scratch, and its config has a number of heads."""
    try:
        content = content_of(config.model)
    except ValueError:
        return False
    return any(name in content for name in _HEAD_FIELDS)


def content_of(model: str) -> Mapping[str, Any]:
    """Return the config of a preset or config file. Raises `ValueError` for a model that comes with its weights."""
    from trainpilot.llm_runtime.models import PRESETS  # loads torch

    if model in PRESETS:
        return PRESETS[model]
    path = Path(model)
    if path.suffix != ".json":
        raise ValueError(f"model: width and depth are free only for models trained from scratch, got {model!r}")
    content: Mapping[str, Any] = read_json(path)
    return content
