"""Load a transformers causal language model and its tokenizer by name: a preset, a config, a folder or a Hub id."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer, PretrainedConfig, PreTrainedModel

from trainpilot.llm_runtime.data.corpus import ByteTokenizer, PretrainedTokenizer, Tokenizer

_LLAMA = {
    "model_type": "llama",
    "max_position_embeddings": 1024,
    "tie_word_embeddings": False,
    "attention_dropout": 0.0,
}
_GPT2 = {
    "model_type": "gpt2",
    "n_positions": 1024,
    "resid_pdrop": 0.0,
    "embd_pdrop": 0.0,
    "attn_pdrop": 0.0,
}


def _llama(hidden: int, width: int, layers: int, heads: int) -> dict[str, Any]:
    sizes = {"hidden_size": hidden, "intermediate_size": width, "num_hidden_layers": layers}
    return {**_LLAMA, **sizes, "num_attention_heads": heads, "num_key_value_heads": heads}


PRESETS: dict[str, dict[str, Any]] = {
    "llama-nano": _llama(64, 192, 3, 4),
    "llama-micro": _llama(128, 384, 4, 4),
    "llama-mini": _llama(256, 704, 6, 8),
    "gpt2-nano": {**_GPT2, "n_embd": 64, "n_layer": 3, "n_head": 4},
    "gpt2-micro": {**_GPT2, "n_embd": 128, "n_layer": 4, "n_head": 4},
    "phi-nano": {
        "model_type": "phi",
        "hidden_size": 64,
        "intermediate_size": 256,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "partial_rotary_factor": 0.5,
        "max_position_embeddings": 512,
        "resid_pdrop": 0.0,
        "embd_pdrop": 0.0,
        "attention_dropout": 0.0,
    },
}
"""Models trained from scratch on bytes: nano 0.1 to 0.2 M parameters, micro about 1 M, mini about 5 M."""

_TOKENIZER_FILES = ("tokenizer.json", "tokenizer_config.json", "tokenizer.model", "vocab.json")


@dataclass(frozen=True)
class LoadedModel:
    """A causal language model in float32, ready to train, and its tokenizer."""

    model: PreTrainedModel
    tokenizer: Tokenizer
    pretrained: bool

    @property
    def n_parameters(self) -> int:
        """Number of trainable parameters."""
        return sum(p.numel() for p in self.model.parameters() if p.requires_grad)

    def save(self, folder: Path) -> None:
        """Write the model, and its tokenizer if it has one, so that plain transformers loads them."""
        self.model.save_pretrained(folder)
        if isinstance(self.tokenizer, PretrainedTokenizer):
            self.tokenizer.tokenizer.save_pretrained(folder)


def load_model(name: str, seed: int) -> LoadedModel:
    """Return a model: a preset, a config JSON or folder with new weights, or a model folder or Hub id with its weights.

    Args:
        name: Name of a preset, path of a config or of a model folder, or Hub id.
        seed: Seed of the new weights.

    Raises:
        ValueError: there is no such model, the config is wrong, or the Hub cannot be reached.
    """
    config = _config_from_scratch(name)
    return _from_pretrained(name) if config is None else _from_scratch(config, seed)


def load_saved(folder: Path) -> LoadedModel:
    """Return a model from the folder that `LoadedModel.save` or plain transformers wrote.

    One without a tokenizer is taken for a model of bytes if its vocabulary is theirs.

    Raises:
        ValueError: the model cannot be loaded, is quantised already, or has no tokenizer.
    """
    config = _read_json(folder / "config.json")
    if "quantization_config" in config:
        raise ValueError(f"model: {folder} is quantised already; give the model that it was made from")
    if any((folder / name).is_file() for name in _TOKENIZER_FILES):
        return _from_pretrained(str(folder))
    if config.get("vocab_size") != ByteTokenizer.vocabulary:
        raise ValueError(f"model: {folder} has no tokenizer; save it there with tokenizer.save_pretrained")
    try:
        model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    except Exception as error:  # as below
        raise ValueError(f"model: {folder} cannot be loaded ({type(error).__name__}: {_one_line(error)})") from error
    return LoadedModel(model, ByteTokenizer(), pretrained=True)


def _config_from_scratch(name: str) -> PretrainedConfig | None:
    """Return the config of a model that gets new weights; `None` for one that comes with its weights."""
    if name in PRESETS:
        return _build_config(PRESETS[name], name)
    path = Path(name)
    if path.suffix == ".json":
        return _read_config(path)
    if path.is_dir() and not _has_weights(path):
        return _read_config(path / "config.json")
    return None


def body_parameters(model: nn.Module) -> int:
    """Return the number of parameters without all embeddings and the output layer, which is the N of scaling laws."""
    embeddings = [module for module in model.modules() if isinstance(module, nn.Embedding)]
    last = [module for module in model.modules() if isinstance(module, nn.Linear)][-1:]
    outputs = [module for module in last if module.out_features in {each.num_embeddings for each in embeddings}]
    left_out = {id(p) for module in (*embeddings, *outputs) for p in module.parameters()}
    return sum(p.numel() for p in model.parameters() if id(p) not in left_out)


def body_parameters_of(name: str) -> int | None:
    """Return the same of a model by its name, without making its weights; `None` for one that comes with its weights.

    Raises:
        ValueError: there is no such model, or the config is wrong.
    """
    config = _config_from_scratch(name)
    if config is None:
        return None
    try:
        with torch.device("meta"):
            model = AutoModelForCausalLM.from_config(config)  # type: ignore[no-untyped-call]
    except Exception as error:  # as below
        raise ValueError(f"model: no causal model can be built from this config: {_one_line(error)}") from error
    return body_parameters(model)


def context_length(config: PretrainedConfig) -> int | None:
    """Return the longest sequence that the model accepts, in tokens, or `None` if its config states no limit."""
    return getattr(config, "max_position_embeddings", None)


def _has_weights(folder: Path) -> bool:
    return any(folder.glob("*.safetensors")) or any(folder.glob("*.bin"))


def _read_config(path: Path) -> PretrainedConfig:
    return _build_config(_read_json(path), str(path))


def _read_json(path: Path) -> dict[str, Any]:
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise ValueError(f"model: no file {path}; presets are {', '.join(PRESETS)}") from None
    except (OSError, UnicodeDecodeError, json.JSONDecodeError) as error:
        raise ValueError(f"model: {path} is not readable JSON: {error}") from error
    if not isinstance(content, dict) or "model_type" not in content:
        raise ValueError(f"model: {path} must be a transformers config with a 'model_type' (llama, gpt2, ...)")
    return content


def _build_config(content: dict[str, Any], name: str) -> PretrainedConfig:
    """Make the config of a model trained from scratch on bytes: its vocabulary is always 256."""
    options = {key: value for key, value in content.items() if key != "model_type"}
    options |= {"vocab_size": ByteTokenizer.vocabulary}
    options |= dict.fromkeys(("bos_token_id", "eos_token_id", "pad_token_id"))
    try:
        return AutoConfig.for_model(content["model_type"], **options)
    except Exception as error:  # transformers raises many kinds for a wrong config
        raise ValueError(f"model: {name} is not a usable config: {_one_line(error)}") from error


def _from_scratch(config: PretrainedConfig, seed: int) -> LoadedModel:
    state = torch.get_rng_state()
    torch.manual_seed(seed)
    try:
        model = AutoModelForCausalLM.from_config(config, dtype=torch.float32)  # type: ignore[no-untyped-call]
        model(input_ids=torch.zeros((1, 2), dtype=torch.long))  # some sizes only show here that they do not divide
    except Exception as error:  # sizes that do not divide, architectures without a causal head, ...
        raise ValueError(f"model: no causal model can be built from this config: {_one_line(error)}") from error
    finally:
        torch.set_rng_state(state)
    return LoadedModel(model, ByteTokenizer(), pretrained=False)


def _from_pretrained(name: str) -> LoadedModel:
    try:
        model = AutoModelForCausalLM.from_pretrained(name, dtype=torch.float32)
        tokenizer = AutoTokenizer.from_pretrained(name)
    except Exception as error:  # offline, gated, missing, damaged: the Hub client has a class for each
        raise ValueError(
            f"model: {name!r} is neither a preset ({', '.join(PRESETS)}) nor a folder, and could not be loaded as a "
            f"Hub id ({type(error).__name__}: {_one_line(error)}); download it first and give its folder"
        ) from error
    return LoadedModel(model, PretrainedTokenizer(tokenizer), pretrained=True)


def _one_line(error: Exception) -> str:
    return " ".join(str(error).split())[:200] or type(error).__name__
