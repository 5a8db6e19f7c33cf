"""Narrower, wider, shallower and deeper versions of a model: a small architecture search."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

from trainpilot.experiments.compare.cases import model_file
from trainpilot.llm_runtime.config import RunConfig

WIDTHS = (0.5, 1.0, 1.5)
"""Factors on hidden and feed-forward size."""
DEPTHS = (-1, 0, 1)
"""Layers more than the case's model has."""

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
    content = _content(config.model)
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
    """Return the run with its model in every size, the case's own first; that alone where sizes are not free."""
    if not can_vary(config):
        return (config,)
    sizes = [with_size(config, width, depth) for width in WIDTHS for depth in DEPTHS]
    return tuple(dict.fromkeys([config, *sizes]))


def can_vary(config: RunConfig) -> bool:
    """Return whether the model is trained from scratch and says how many heads it has, so that it can be resized."""
    try:
        content = _content(config.model)
    except ValueError:
        return False
    return any(name in content for name in _HEAD_FIELDS)


def _content(model: str) -> Mapping[str, Any]:
    from trainpilot.llm_runtime.models import PRESETS  # loads torch

    if model in PRESETS:
        return PRESETS[model]
    path = Path(model)
    if path.suffix != ".json":
        raise ValueError(f"model: width and depth are free only for models trained from scratch, got {model!r}")
    content: Mapping[str, Any] = json.loads(path.read_text(encoding="utf-8"))
    return content
