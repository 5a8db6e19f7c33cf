"""Tiny random models of each supported family, and training steps on them, for the tests of pruning."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from transformers import (
    AutoModelForCausalLM,
    GPT2Config,
    GPTNeoXConfig,
    LlamaConfig,
    MistralConfig,
    OPTConfig,
    PhiConfig,
    PretrainedConfig,
    PreTrainedModel,
    Qwen2Config,
    Qwen3Config,
)

from trainpilot.llm_runtime.structure import blocks

VOCABULARY = 32
WIDTH = 24
_SHARED: dict[str, Any] = {
    "vocab_size": VOCABULARY,
    "hidden_size": 16,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
}
_GATED: dict[str, Any] = {
    **_SHARED,
    "intermediate_size": WIDTH,
    "num_key_value_heads": 1,
    "max_position_embeddings": 32,
}

CONFIGS: dict[str, PretrainedConfig] = {
    "llama": LlamaConfig(**_GATED, mlp_bias=True, tie_word_embeddings=True),
    "qwen2": Qwen2Config(**_GATED),
    "qwen3": Qwen3Config(**_GATED, head_dim=8),
    "mistral": MistralConfig(**_GATED),
    "gpt2": GPT2Config(
        vocab_size=VOCABULARY, n_embd=16, n_layer=2, n_head=2, n_inner=WIDTH, n_positions=32,
        resid_pdrop=0.0, embd_pdrop=0.0, attn_pdrop=0.0,
    ),
    "gpt_neox": GPTNeoXConfig(**_SHARED, intermediate_size=WIDTH, max_position_embeddings=32),
    "phi": PhiConfig(
        **_GATED | {"partial_rotary_factor": 0.5}, resid_pdrop=0.0, embd_pdrop=0.0, attention_dropout=0.0
    ),
    "opt": OPTConfig(
        **_SHARED, ffn_dim=WIDTH, word_embed_proj_dim=12, max_position_embeddings=32, dropout=0.0
    ),
}  # fmt: skip
FAMILIES = sorted(CONFIGS)


def model_of(config: PretrainedConfig) -> PreTrainedModel:
    """Return a random model as `config` describes it."""
    model: PreTrainedModel = AutoModelForCausalLM.from_config(config)  # type: ignore[no-untyped-call]
    return model


def tiny_model(family: str, seed: int = 0) -> PreTrainedModel:
    """Return a random model with biases away from zero, so that a forgotten bias shows."""
    torch.manual_seed(seed)
    model = model_of(CONFIGS[family].__class__(**CONFIGS[family].to_dict()))
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.1 * torch.randn_like(parameter))
    return model


def layers(model: PreTrainedModel) -> list[Any]:
    """Return the blocks of a model, whose parts mypy does not know."""
    return list(blocks(model))


def tokens(seed: int = 0) -> Tensor:
    """Return token ids, [2, 8]."""
    return torch.randint(3, VOCABULARY, (2, 8), generator=torch.Generator().manual_seed(seed))


def logits(model: PreTrainedModel) -> Tensor:
    """Return the logits of `tokens()`, [2, 8, vocabulary], without dropout."""
    with torch.no_grad():
        result: Tensor = model.train(mode=False)(tokens()).logits
    return result


def train_step(model: PreTrainedModel, optimizer: torch.optim.Optimizer, seed: int = 0) -> Tensor:
    """Make one optimiser step and return its loss, whose graph is still alive."""
    batch = tokens(seed)
    loss: Tensor = model.train()(batch, labels=batch).loss
    torch.autograd.backward(loss)
    optimizer.step()
    optimizer.zero_grad()
    return loss
