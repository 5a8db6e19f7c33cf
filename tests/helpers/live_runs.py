"""Tiny live runs for the tests: a text made by a fixed rule, models of a few thousand weights, and their weights."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from trainpilot.llm_runtime.config import Controls, RunConfig
from trainpilot.llm_runtime.energy.meter import EnergyMeter, NoMeter
from trainpilot.llm_runtime.live_run import LiveRun
from trainpilot.llm_runtime.telemetry import Telemetry

LLAMA: dict[str, Any] = {
    "model_type": "llama",
    "hidden_size": 16,
    "intermediate_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
    "max_position_embeddings": 64,
}
GPT2: dict[str, Any] = {
    "model_type": "gpt2",
    "n_embd": 16,
    "n_layer": 2,
    "n_head": 2,
    "n_positions": 64,
    "resid_pdrop": 0.0,
    "embd_pdrop": 0.0,
    "attn_pdrop": 0.0,
}
DROPOUT: dict[str, Any] = {"resid_pdrop": 0.1, "embd_pdrop": 0.1, "attn_pdrop": 0.1}

SENTENCE = "the pilot reads loss noise and power then sets rate batch format for one more stretch of this run ."


def text_by_rule(n_characters: int) -> str:
    """Return words chosen by a linear congruential generator: the same text on every machine."""
    choices = SENTENCE.split()
    state, length = 1, 0
    words: list[str] = []
    while length < n_characters:
        state = (1_103_515_245 * state + 12_345) % 2**31
        words.append(choices[state // 65_536 % len(choices)])
        length += len(words[-1]) + 1
    return " ".join(words)[:n_characters]


def case(folder: Path, model: dict[str, Any] | str = LLAMA, **options: Any) -> RunConfig:
    """Return a run of 100 steps of 2 sequences of 16 tokens, in 10 intervals; text and model lie in `folder`."""
    text = folder / "text.txt"
    text.write_text(text_by_rule(8_192), encoding="utf-8")
    name = model
    if isinstance(model, dict):
        name = str(folder / f"{model['model_type']}.json")
        Path(name).write_text(json.dumps(model), encoding="utf-8")
    usual = {"tokens": 3_200, "batch_size": 2, "sequence_length": 16, "decisions": 10, "base_learning_rate": 1e-2}
    return RunConfig(**({"model": name, "text": (str(text),), "device": "cpu"} | usual | options))


def live_run(config: RunConfig, *, probe: bool = False, meter: EnergyMeter | None = None) -> LiveRun:
    """Return a run that measures no energy unless a meter is given."""
    return LiveRun(config, probe=probe, meter=meter or NoMeter("a test"))


def advance(run: LiveRun, **changes: Any) -> Telemetry:
    """Train one interval under the starting controls with `changes`."""
    options = {"batch_size": run.config.batch_size, "precision": run.config.precision} | changes
    return run.advance(Controls(**options), 1 / run.config.decisions)


def weights(run: LiveRun) -> dict[str, Tensor]:
    """Return a copy of the model's weights by name."""
    return {name: tensor.detach().clone() for name, tensor in run.loaded.model.state_dict().items()}


def same_bits(left: dict[str, Tensor], right: dict[str, Tensor]) -> bool:
    """Say whether two sets of weights are equal, bit for bit."""
    return left.keys() == right.keys() and all(torch.equal(left[name], right[name]) for name in left)
