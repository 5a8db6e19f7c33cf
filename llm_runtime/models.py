"""Load a transformers causal language model and its tokenizer by name: a preset, a config, a folder or a Hub id."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from difflib import get_close_matches
from pathlib import Path
from typing import Any

import torch
import transformers
from safetensors import SafetensorError
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer, PretrainedConfig, PreTrainedModel

from trainpilot.llm_runtime.config import RunConfig
from trainpilot.llm_runtime.data.bpe import trained_tokenizer
from trainpilot.llm_runtime.data.corpus import ByteTokenizer, PretrainedTokenizer, Tokenizer
from trainpilot.llm_runtime.files import system_errors
from trainpilot.llm_runtime.hub import asked_once
from trainpilot.llm_runtime.layers import body_parameters
from trainpilot.llm_runtime.model_folder import holds_tokenizer, holds_weights
from trainpilot.llm_runtime.plain_values import one_line, read_json, shown

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
"""Models trained from scratch: on bytes, nano has 0.1 to 0.2 M parameters, micro about 1 M, mini about 5 M."""


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
        """Write the model and its tokenizer so that plain transformers loads them, and `generate` works.

        Raises:
            OSError: they cannot be written, for example on a full disk.
        """
        generation = self.model.generation_config
        if isinstance(self.tokenizer, ByteTokenizer) and generation is not None:
            generation.eos_token_id = self.tokenizer.document_end  # the tokenizer names no such token
        with system_errors(folder, SafetensorError):
            self.model.save_pretrained(folder)
        self.tokenizer.save(folder)


def load_model(name: str, seed: int) -> LoadedModel:
    """Return a model: a preset, a config JSON or folder with new weights, or a model folder or Hub id with its weights.

    A folder without weights brings its tokenizer, if it holds one; other models with new weights read bytes.

    Args:
        name: Name of a preset, path of a config or of a model folder, or Hub id.
        seed: Seed of the new weights.

    Raises:
        ValueError: there is no such model, the config is wrong, or the Hub cannot be reached.
    """
    blueprint = _blueprint(name)
    if blueprint is None:
        return load_saved(Path(name)) if Path(name).is_dir() else _from_pretrained(name)
    return blueprint.build(seed, blueprint.tokenizer or ByteTokenizer())


def load_saved(folder: Path, *, own_precision: bool = False) -> LoadedModel:
    """Return a model from the folder that `LoadedModel.save` or plain transformers wrote.

    One without a tokenizer is taken for a model of bytes if its vocabulary is theirs.

    Args:
        folder: The folder.
        own_precision: Keep the number format that the weights are stored in, instead of float32.

    Raises:
        ValueError: the model cannot be loaded, is quantised already, or has no tokenizer.
    """
    config = _read_config(folder / "config.json")
    if "quantization_config" in config:
        raise ValueError(f"model: {folder} is quantised already; give the model that it was made from")
    if holds_tokenizer(folder):
        of_bytes = ByteTokenizer.lies_in(folder)
        return _from_pretrained(str(folder), of_bytes=of_bytes, own_precision=own_precision)
    if config.get("vocab_size") != ByteTokenizer.vocabulary:
        raise ValueError(f"model: {folder} has no tokenizer; save it there with tokenizer.save_pretrained")
    return _from_pretrained(str(folder), of_bytes=True, own_precision=own_precision)


def load_model_of(config: RunConfig) -> LoadedModel:
    """Return the model of a run; with a `vocabulary` beyond bytes, its tokenizer is trained on the run's text.

    Raises:
        ValueError: as `load_model`; the text cannot be read, or is too short for the vocabulary.
    """
    if config.vocabulary == ByteTokenizer.vocabulary:
        return load_model(config.model, config.seed)
    blueprint = _blueprint(config.model)
    if blueprint is None or blueprint.tokenizer is not None:
        raise ValueError(
            f"vocabulary must be left out for {config.model!r}, as only a preset, a config JSON or a folder with "
            f"neither weights nor tokenizer gets a new tokenizer, got {config.vocabulary}"
        )
    return blueprint.build(config.seed, trained_tokenizer(config.text, config.vocabulary))


def _blueprint(name: str) -> _Blueprint | None:
    """Return what a model that gets new weights is built from; `None` for one that comes with its weights."""
    if name in PRESETS:
        return _Blueprint(name, PRESETS[name])
    path = Path(name)
    if path.suffix == ".json":
        return _Blueprint(name, _read_config(path))
    if path.is_dir() and not holds_weights(path):
        return _Blueprint(name, _read_config(path / "config.json"), _tokenizer_in(path))
    return None


def body_parameters_of(name: str) -> int | None:
    """Return the same of a model by its name, without making its weights; `None` for one that comes with its weights.

    Raises:
        ValueError: there is no such model, or the config is wrong.
    """
    blueprint = _blueprint(name)
    if blueprint is None:
        return None
    config = blueprint.config(blueprint.tokenizer or ByteTokenizer())
    try:
        with torch.device("meta"), _unremarked():
            model = AutoModelForCausalLM.from_config(config)  # type: ignore[no-untyped-call]
    except Exception as error:  # as below
        raise ValueError(f"model: no causal model can be built from this config: {_one_line(error)}") from error
    return body_parameters(model)


def context_length(config: PretrainedConfig) -> int | None:
    """Return the longest sequence that the model accepts, in tokens, or `None` if its config states no limit."""
    return getattr(config, "max_position_embeddings", None)


def _tokenizer_in(folder: Path) -> PretrainedTokenizer | None:
    if not holds_tokenizer(folder) or ByteTokenizer.lies_in(folder):
        return None
    try:
        return PretrainedTokenizer(AutoTokenizer.from_pretrained(folder))
    except Exception as error:  # transformers raises many kinds for a damaged tokenizer
        raise ValueError(f"model: the tokenizer in {folder} cannot be loaded: {_one_line(error)}") from error


def _read_config(path: Path) -> dict[str, Any]:
    try:
        content = read_json(path)
    except FileNotFoundError:
        raise ValueError(f"model: no file {path}; presets are {', '.join(PRESETS)}") from None
    except (OSError, ValueError) as error:
        raise ValueError(f"model: {path} is not readable JSON: {error}") from error
    if not isinstance(content, dict) or not isinstance(content.get("model_type"), str):
        raise ValueError(f"model: {path} must be a transformers config with a 'model_type' (llama, gpt2, ...)")
    return content


@dataclass(frozen=True)
class _Blueprint:
    """What a model with new weights is built from."""

    name: str
    content: dict[str, Any]
    """Fields of a transformers config."""
    tokenizer: PretrainedTokenizer | None = None
    """The tokenizer that comes with the config."""

    def config(self, tokenizer: Tokenizer) -> PretrainedConfig:
        """Return the config for a tokenizer, from which vocabulary and special ids come.

        Beside a tokenizer of its own, the config's vocabulary and ids stay as far as it states them.
        """
        stated = {key: value for key, value in self.content.items() if key != "model_type"}
        of_tokenizer: dict[str, Any] = {"vocab_size": tokenizer.vocabulary, **_special_ids(tokenizer)}
        options = stated | of_tokenizer if self.tokenizer is None else of_tokenizer | stated
        try:
            config = AutoConfig.for_model(self.content["model_type"], **options)
            typos = _typos(config, stated)
        except Exception as error:  # transformers raises many kinds for a wrong config
            raise ValueError(f"model: {self.name} is not a usable config: {_one_line(error)}") from error
        if typos:
            name, meant = next(iter(typos.items()))
            kind = self.content["model_type"]
            raise ValueError(
                f"model: {shown(name)} in {self.name} is unknown to {kind}, which has {meant!r}; correct it"
            )
        if not getattr(config, "num_hidden_layers", 1) >= 1:
            raise ValueError(f"model: {self.name} must have at least one layer, got {config.num_hidden_layers}")
        size = getattr(config, "vocab_size", None)
        if size is not None and size < tokenizer.vocabulary:
            raise ValueError(
                f"model: vocab_size in {self.name} must be at least {tokenizer.vocabulary}, the vocabulary of its "
                f"tokenizer, got {size}; correct it or leave it out"
            )
        return config

    def build(self, seed: int, tokenizer: Tokenizer) -> LoadedModel:
        """Return the model for a tokenizer, with new weights."""
        config = self.config(tokenizer)
        state = torch.get_rng_state()
        torch.manual_seed(seed)
        try:
            with _unremarked():
                model = AutoModelForCausalLM.from_config(config, dtype=torch.float32)  # type: ignore[no-untyped-call]
            fault = _fault(model)  # some sizes only show there that they do not divide
        except Exception as error:  # sizes that do not divide, architectures without a causal head, ...
            raise ValueError(f"model: no causal model can be built from this config: {_one_line(error)}") from error
        finally:
            torch.set_rng_state(state)
        if fault is not None:
            raise ValueError(f"model: {self.name} {fault}")
        return LoadedModel(model, tokenizer, pretrained=False)


@contextmanager
def _unremarked() -> Iterator[None]:
    """Keep transformers from remarking on a config, of an encoder for example, whose model we look at ourselves."""
    before = transformers.logging.get_verbosity()
    transformers.logging.set_verbosity_error()  # type: ignore[no-untyped-call]
    try:
        yield
    finally:
        transformers.logging.set_verbosity(before)


def _special_ids(tokenizer: Tokenizer) -> dict[str, int | None]:
    """Return the ids that a config states. None is for padding: its embedding would not be trained."""
    own = tokenizer.tokenizer if isinstance(tokenizer, PretrainedTokenizer) else None
    begin, end = (own.bos_token_id, own.eos_token_id) if own is not None else (None, None)
    return {"bos_token_id": begin, "eos_token_id": end, "pad_token_id": None}


def _from_pretrained(name: str, *, of_bytes: bool = False, own_precision: bool = False) -> LoadedModel:
    try:
        with nullcontext() if Path(name).is_dir() else asked_once(name, "model"):
            model = AutoModelForCausalLM.from_pretrained(name, dtype="auto" if own_precision else torch.float32)
            tokenizer = ByteTokenizer() if of_bytes else PretrainedTokenizer(AutoTokenizer.from_pretrained(name))
    except Exception as error:  # offline, gated, missing, damaged: the Hub client has a class for each
        if Path(name).is_dir():
            raise ValueError(f"model: {name} cannot be loaded ({type(error).__name__}: {_one_line(error)})") from error
        raise ValueError(
            f"model: {name!r} is neither a preset ({', '.join(PRESETS)}) nor a folder, and could not be loaded as a "
            f"Hub id ({type(error).__name__}: {_one_line(error)}); download it first and give its folder"
        ) from error
    if fault := _fault(model):
        raise ValueError(f"model: {name!r} {fault}")
    embedding: Any = model.get_input_embeddings()
    rows = int(embedding.num_embeddings)
    if tokenizer.vocabulary > rows:
        raise ValueError(
            f"model: {name!r} must have an embedding for {tokenizer.vocabulary} tokens of its tokenizer, got {rows}"
        )
    return LoadedModel(model, tokenizer, pretrained=True)


def _typos(config: PretrainedConfig, stated: Mapping[str, Any]) -> dict[str, str]:
    """Return the fields of a config that its class does not know but for a spelling, and the known ones they mean.

    Others that it does not know stay: older versions of transformers wrote many that later ones do not read.
    """
    known = {*type(config)().to_dict(), *config.attribute_map}
    strange = [name for name in stated if name not in known and not name.startswith("_")]
    near = {name: get_close_matches(name, known, n=1, cutoff=0.85) for name in strange}
    return {name: found[0] for name, found in near.items() if found and found[0] not in stated}


@torch.no_grad()
def _fault(model: PreTrainedModel) -> str | None:
    """Return why a model cannot be trained to predict the next token: it sees that token, or computes no numbers."""
    training = model.training
    model.eval()  # type: ignore[no-untyped-call]
    try:
        tokens = torch.zeros((2, min(3, context_length(model.config) or 3)), dtype=torch.long)
        tokens[1, -1] = 1
        logits = model(input_ids=tokens, use_cache=False).logits
    finally:
        model.train(training)
    if not bool(torch.isfinite(logits).all()):
        return "computes values that are not finite; look for a number in its config that is none"
    before = logits[:, :-1]
    noise = max(NOISE, 4 * torch.finfo(logits.dtype).eps)
    if before.numel() and float((before[0] - before[1]).abs().max()) > noise * float(logits.abs().max()):
        return "sees the tokens that it is to predict, as an encoder does; take a causal model (llama, gpt2, ...)"
    return None


NOISE = 1e-4
"""Largest change of logits, over the largest of them, that is put down to rounding, at least."""


def _one_line(error: Exception) -> str:
    return one_line(error)[:200] or type(error).__name__
