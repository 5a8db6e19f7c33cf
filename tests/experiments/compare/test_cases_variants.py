"""Other sizes of a model: heads stay, sizes divide, and every one of them can be trained."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from comparison_runs import CONFIG

from trainpilot.experiments.compare.cases import DEPTHS, WIDTHS, all_sizes, can_vary, load_cases, model_file, with_size
from trainpilot.llm_runtime.config import RunConfig
from trainpilot.llm_runtime.data.text_sources import content_digest
from trainpilot.llm_runtime.models import PRESETS, load_model

GPT2 = {"model_type": "gpt2", "n_embd": 48, "n_layer": 1, "n_head": 4, "n_positions": 64}


def of(model: dict[str, Any]) -> RunConfig:
    return replace(CONFIG, model=str(model_file(model)))


def content(config: RunConfig) -> dict[str, Any]:
    return json.loads(Path(config.model).read_text()) if config.model not in PRESETS else PRESETS[config.model]


def test_sizes_worked_out_by_hand() -> None:
    # llama-nano: hidden 64, feed-forward 192, 3 layers, 4 heads, so sizes are multiples of 8.
    config = replace(CONFIG, model="llama-nano")

    assert with_size(config, 1, 0) is config
    sizes = ("hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads", "num_key_value_heads")
    for width, depth, expected in (
        (0.5, -1, (32, 96, 2, 4, 4)),
        (1.5, 1, (96, 288, 4, 4, 4)),
        (1.0, 1, (64, 192, 4, 4, 4)),
    ):
        changed = content(with_size(config, width, depth))
        assert tuple(changed[name] for name in sizes) == expected


def test_widths_are_rounded_to_twice_the_heads_and_layers_end_at_one() -> None:
    # 48 x 1.5 = 72 = 9 x 8; 40 x 0.5 = 20 -> 2.5 x 8, rounded to the even 16; 8 x 0.5 -> not below 8.
    assert content(with_size(of(GPT2), 1.5, 0))["n_embd"] == 72
    assert content(with_size(of(GPT2 | {"n_embd": 40}), 0.5, 0))["n_embd"] == 16
    assert content(with_size(of(GPT2 | {"n_embd": 8}), 0.5, 0))["n_embd"] == 8
    assert content(with_size(of(GPT2), 1.0, -1))["n_layer"] == 1


def test_only_the_model_changes() -> None:
    config = of(GPT2)
    changed = with_size(config, 0.5, 1)

    assert replace(changed, model=config.model) == config
    assert content_digest(changed) != content_digest(config)
    assert with_size(config, 0.5, 1) == changed


def test_all_sizes_begin_with_the_cases_own_and_hold_each_once() -> None:
    config = replace(CONFIG, model="gpt2-nano")
    sizes = all_sizes(config)

    assert sizes[0] == config
    assert len(sizes) == len(set(sizes)) == len(WIDTHS) * len(DEPTHS)
    assert len(all_sizes(of(GPT2))) == 6  # one layer less than one is one


@pytest.mark.parametrize("model", ["owner/name", "some/folder"])
def test_a_model_that_is_not_trained_from_scratch_keeps_its_size(model: str) -> None:
    config = replace(CONFIG, model=model)

    assert not can_vary(config)
    assert all_sizes(config) == (config,)
    with pytest.raises(ValueError, match="width and depth are free only for models trained from scratch"):
        with_size(config, 0.5, 0)


def test_a_model_that_does_not_say_how_many_heads_it_has_keeps_its_size() -> None:
    config = of({"model_type": "llama", "hidden_size": 48})

    assert not can_vary(config)
    assert all_sizes(config) == (config,)


@pytest.mark.parametrize("case", load_cases("test"), ids=lambda case: case.name)
def test_every_size_of_the_test_models_can_be_trained(case: Any) -> None:
    parameters = {}
    for width in WIDTHS:
        for depth in DEPTHS:
            sized = with_size(case.config, width, depth)
            model = load_model(sized.model, seed=0)
            parameters[width, depth] = model.n_parameters
            assert model.model.config.hidden_size % model.model.config.num_attention_heads == 0

    for depth in DEPTHS:
        assert parameters[0.5, depth] < parameters[1.0, depth] < parameters[1.5, depth]
    for width in WIDTHS:
        assert parameters[width, -1] < parameters[width, 0] < parameters[width, 1]
