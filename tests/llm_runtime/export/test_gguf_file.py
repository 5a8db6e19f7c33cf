"""A GGUF file holds the model as llama.cpp expects it, and transformers reads it back."""

from __future__ import annotations

import json
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from transformers import AutoModelForCausalLM, PreTrainedTokenizerFast

from trainpilot.llm_runtime.data.corpus import ByteTokenizer, PretrainedTokenizer
from trainpilot.llm_runtime.export.gguf_file import GgufType, gguf_fault, vocabulary_of, write_gguf
from trainpilot.llm_runtime.models import LoadedModel, load_model

LLAMA: dict[str, Any] = {
    "model_type": "llama",
    "hidden_size": 32,
    "intermediate_size": 96,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 64,
}
TOKENS = torch.arange(40).reshape(2, 20)

needs_gguf = pytest.mark.skipif(find_spec("gguf") is None, reason="needs the package gguf")


def llama(folder: Path, **changes: Any) -> LoadedModel:
    file = folder / "model.json"
    file.write_text(json.dumps(LLAMA | changes), encoding="utf-8")
    return load_model(str(file), 0)


def read_back(folder: Path, kind: GgufType, loaded: LoadedModel) -> Any:
    write_gguf(loaded.model, loaded.tokenizer, folder / "model.gguf", kind)
    return AutoModelForCausalLM.from_pretrained(folder, gguf_file="model.gguf", dtype=torch.float32)


@needs_gguf
@pytest.mark.parametrize("changes", [{}, {"tie_word_embeddings": True}, {"head_dim": 16}])
def test_transformers_reads_the_same_model_back(tmp_path: Path, changes: dict[str, Any]) -> None:
    loaded = llama(tmp_path, **changes)

    again = read_back(tmp_path, "F32", loaded)

    with torch.inference_mode():
        assert torch.allclose(again(TOKENS).logits, loaded.model(TOKENS).logits, atol=1e-6)
    assert again.config.num_key_value_heads == 2
    assert again.config.rms_norm_eps == pytest.approx(loaded.model.config.rms_norm_eps)


@needs_gguf
@pytest.mark.parametrize(("kind", "steps"), [("Q8_0", 127), ("Q4_0", 8)])
def test_weights_are_at_most_a_step_away(tmp_path: Path, kind: GgufType, steps: int) -> None:
    loaded = llama(tmp_path)
    again = read_back(tmp_path, kind, loaded).state_dict()

    for name, exact in loaded.model.state_dict().items():
        if exact.ndim == 1:
            assert torch.equal(again[name], exact), name
            continue
        largest = exact.reshape(-1, 32).abs().amax(dim=1, keepdim=True)
        away = (again[name] - exact).reshape(-1, 32).abs()
        assert (away <= 1.01 * largest / steps).all(), name
        assert away.max() > 0, name


@needs_gguf
def test_the_file_holds_sizes_and_bytes(tmp_path: Path) -> None:
    import gguf

    loaded = llama(tmp_path)
    write_gguf(loaded.model, loaded.tokenizer, tmp_path / "model.gguf", "Q4_0")

    reader = gguf.GGUFReader(tmp_path / "model.gguf")
    fields = {name: field.contents() for name, field in reader.fields.items()}
    assert fields["general.architecture"] == "llama"
    assert fields["llama.block_count"] == 2
    assert fields["llama.attention.head_count_kv"] == 2
    assert fields["llama.rope.dimension_count"] == 8
    assert len(fields["tokenizer.ggml.tokens"]) == 256
    assert fields["tokenizer.ggml.tokens"][ord("a")] == "a"
    kinds = {tensor.name: tensor.tensor_type.name for tensor in reader.tensors}
    assert kinds["token_embd.weight"] == kinds["blk.1.ffn_down.weight"] == "Q4_0"
    assert kinds["output_norm.weight"] == "F32"


@needs_gguf
@pytest.mark.skipif(find_spec("xllamacpp") is None, reason="needs the package xllamacpp")
def test_llama_cpp_continues_a_text_as_transformers_does(tmp_path: Path) -> None:
    from trainpilot.llm_runtime.export.inference import LlamaCpp

    loaded = llama(tmp_path)
    write_gguf(loaded.model, loaded.tokenizer, tmp_path / "model.gguf", "F32")
    prompt = np.frombuffer(b"a prompt of bytes", np.uint8).astype(np.int64)

    ids = torch.from_numpy(prompt)[None]
    for _ in range(8):
        with torch.inference_mode():
            ids = torch.cat([ids, loaded.model(ids).logits[:, -1:].argmax(-1)], dim=1)
    expected = bytes(ids[0, len(prompt) :].tolist())
    found = LlamaCpp(tmp_path / "model.gguf", prompt, 7).complete(8)

    assert expected.decode("utf-8", "replace").startswith(found.rstrip("\ufffd")), (expected, found)


def test_bytes_have_the_characters_of_gpt2() -> None:
    vocabulary = vocabulary_of(ByteTokenizer(), 256)

    assert vocabulary.tokens[ord("A")] == "A"
    assert vocabulary.tokens[ord(" ")] == "\u0120"
    assert vocabulary.tokens[ord("\n")] == "\u010a"
    assert len(set(vocabulary.tokens)) == 256


def bpe(pre: dict[str, Any] | None) -> PretrainedTokenizer:
    """Return a tokenizer of three tokens and an end, with the given rule for words."""
    from tokenizers import Tokenizer, models

    rules = json.loads(Tokenizer(models.BPE({"a": 0, "b": 1, "ab": 2}, [("a", "b")])).to_str())
    added = {"id": 3, "content": "<end>", "special": True, "single_word": False, "lstrip": False, "rstrip": False}
    rules |= {"pre_tokenizer": pre, "added_tokens": [added | {"normalized": False}]}
    fast = PreTrainedTokenizerFast(tokenizer_object=Tokenizer.from_str(json.dumps(rules)), eos_token="<end>")
    return PretrainedTokenizer(fast)


BYTE_LEVEL = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True, "use_regex": True}
DIGITS = {"type": "Digits", "individual_digits": True}


def test_a_byte_level_bpe_is_written_with_its_merges() -> None:
    found = vocabulary_of(bpe(BYTE_LEVEL), 6)

    assert found.tokens == ["a", "b", "ab", "<end>", "[PAD4]", "[PAD5]"]
    assert found.types == [1, 1, 1, 3, 5, 5]
    assert found.merges == ["a b"]
    assert (found.pre, found.end) == ("gpt-2", 3)
    assert vocabulary_of(bpe({"type": "Sequence", "pretokenizers": [DIGITS, BYTE_LEVEL]}), 6).pre == "smollm"


def test_other_tokenizers_and_models_are_refused(tmp_path: Path) -> None:
    loaded = llama(tmp_path)
    other = bpe({"type": "Whitespace"})

    assert gguf_fault(loaded.model, loaded.tokenizer) is None
    assert (gguf_fault(loaded.model, other) or "").startswith("is only written with byte-level BPE tokenizers")
    biased = llama(tmp_path, attention_bias=True)
    assert gguf_fault(biased.model, biased.tokenizer) == "is only written for Llamas without biases and with SiLU"
