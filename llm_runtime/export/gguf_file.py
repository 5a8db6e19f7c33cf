"""Write a Llama as a GGUF file, which llama.cpp runs and plain transformers loads.

The file holds the model, its sizes and its vocabulary. Matrices are quantised by the package `gguf`, embeddings
and output layer included; vectors stay in float32. Models of bytes get the vocabulary of GPT-2's bytes.

Format: https://github.com/ggml-org/ggml/blob/master/docs/gguf.md
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import numpy as np
import numpy.typing as npt

from trainpilot.llm_runtime.data.corpus import PretrainedTokenizer, Tokenizer, byte_characters

if TYPE_CHECKING:
    from transformers import PreTrainedModel

GgufType = Literal["F32", "Q8_0", "Q4_0"]

BLOCK = 32
"""Weights of a row that share a scale in Q8_0 and Q4_0; rows of another length stay in float32."""
BITS_PER_WEIGHT: dict[GgufType, float] = {"F32": 32, "Q8_0": 8 + 16 / BLOCK, "Q4_0": 4 + 16 / BLOCK}
ARCHITECTURES = ("llama",)

_FILE_TYPES: dict[GgufType, int] = {"F32": 0, "Q8_0": 7, "Q4_0": 2}
_NORMAL, _CONTROL, _USER_DEFINED, _UNUSED = 1, 3, 4, 5
_NAMES = {
    "self_attn.q_proj": "attn_q",
    "self_attn.k_proj": "attn_k",
    "self_attn.v_proj": "attn_v",
    "self_attn.o_proj": "attn_output",
    "mlp.gate_proj": "ffn_gate",
    "mlp.up_proj": "ffn_up",
    "mlp.down_proj": "ffn_down",
    "input_layernorm": "attn_norm",
    "post_attention_layernorm": "ffn_norm",
}
_OUTER_NAMES = {"model.embed_tokens": "token_embd", "model.norm": "output_norm", "lm_head": "output"}

Array = npt.NDArray[Any]


@dataclass(frozen=True, kw_only=True)
class Vocabulary:
    """What a GGUF file says about the tokens, as llama.cpp's byte-level BPE understands it."""

    tokens: list[str]
    types: list[int]
    merges: list[str]
    pre: str
    """llama.cpp's name for the rule that cuts text into words."""
    end: int
    chat_template: str | None = None


def gguf_fault(model: PreTrainedModel, tokenizer: Tokenizer) -> str | None:
    """Return why the model cannot be written as GGUF, or `None` where it can."""
    config = model.config
    if config.model_type not in ARCHITECTURES:
        return f"is only written for the architecture {', '.join(ARCHITECTURES)}, got {config.model_type!r}"
    if config.attention_bias or config.mlp_bias or config.hidden_act != "silu":
        return "is only written for Llamas without biases and with SiLU"
    if (kind := config.rope_parameters.get("rope_type", "default")) != "default":
        return f"is only written for plain rotary positions, got rope_type {kind!r}"
    if config.hidden_size % BLOCK:
        return f"needs rows of a multiple of {BLOCK} weights, got hidden_size {config.hidden_size}"
    try:
        vocabulary_of(tokenizer, config.vocab_size)
    except ValueError as error:
        return str(error)
    return None


def write_gguf(model: PreTrainedModel, tokenizer: Tokenizer, path: Path, kind: GgufType) -> None:
    """Write the model, which `gguf_fault` has no fault to find with; needs the package `gguf`."""
    import gguf

    config, vocabulary = model.config, vocabulary_of(tokenizer, model.config.vocab_size)
    writer = gguf.GGUFWriter(path, "llama")
    _write_sizes(writer, config)
    writer.add_file_type(_FILE_TYPES[kind])
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre(vocabulary.pre)
    writer.add_token_list(vocabulary.tokens)
    writer.add_token_types(vocabulary.types)
    writer.add_token_merges(vocabulary.merges)
    writer.add_bos_token_id(vocabulary.end)
    writer.add_eos_token_id(vocabulary.end)
    writer.add_add_bos_token(False)
    if vocabulary.chat_template is not None:
        writer.add_chat_template(vocabulary.chat_template)
    quantised = gguf.GGMLQuantizationType[kind]
    for name, tensor in model.state_dict().items():
        if name == "lm_head.weight" and config.tie_word_embeddings:
            continue
        array = np.ascontiguousarray(_permuted(name, tensor.detach().float().cpu().numpy(), config))
        if array.ndim == 1 or kind == "F32" or array.shape[-1] % BLOCK:
            writer.add_tensor(_gguf_name(name), array)
        else:
            writer.add_tensor(_gguf_name(name), gguf.quants.quantize(array, quantised), raw_dtype=quantised)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def _write_sizes(writer: Any, config: Any) -> None:
    head = head_size(config)
    writer.add_name("trainpilot")
    writer.add_block_count(config.num_hidden_layers)
    writer.add_context_length(config.max_position_embeddings)
    writer.add_embedding_length(config.hidden_size)
    writer.add_feed_forward_length(config.intermediate_size)
    writer.add_head_count(config.num_attention_heads)
    writer.add_head_count_kv(config.num_key_value_heads)
    writer.add_key_length(head)
    writer.add_value_length(head)
    writer.add_rope_dimension_count(head)
    writer.add_rope_freq_base(config.rope_parameters["rope_theta"])
    writer.add_layer_norm_rms_eps(config.rms_norm_eps)
    writer.add_vocab_size(config.vocab_size)


def head_size(config: Any) -> int:
    """Return the columns of an attention head."""
    return int(getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads)


def _gguf_name(name: str) -> str:
    """Return the GGUF name of a weight, such as `blk.0.attn_q.weight` for `model.layers.0.self_attn.q_proj.weight`."""
    stem = name.removesuffix(".weight")
    if stem in _OUTER_NAMES:
        return f"{_OUTER_NAMES[stem]}.weight"
    _, _, layer, rest = stem.split(".", 3)
    return f"blk.{layer}.{_NAMES[rest]}.weight"


def _permuted(name: str, array: Array, config: Any) -> Array:
    """Bring the rows of queries and keys into llama.cpp's order: a rotary pair side by side, not half a head apart."""
    heads = {"q_proj.weight": config.num_attention_heads, "k_proj.weight": config.num_key_value_heads}
    n = next((heads[end] for end in heads if name.endswith(end)), None)
    if n is None:
        return array
    return array.reshape(n, 2, array.shape[0] // n // 2, -1).swapaxes(1, 2).reshape(array.shape)


def vocabulary_of(tokenizer: Tokenizer, size: int) -> Vocabulary:
    """Return what a GGUF file says about `size` tokens.

    Raises:
        ValueError: llama.cpp has no such tokenizer, as far as this writer knows.
    """
    if not isinstance(tokenizer, PretrainedTokenizer):
        return Vocabulary(tokens=byte_characters(), types=[_NORMAL] * size, merges=["a b"], pre="default", end=0)
    fast = getattr(tokenizer.tokenizer, "backend_tokenizer", None)
    rules = {} if fast is None else json.loads(fast.to_str())
    model, pre = rules.get("model", {}), _pre_tokenizer(rules.get("pre_tokenizer"))
    if model.get("type") != "BPE" or pre is None:
        raise ValueError(
            "is only written with byte-level BPE tokenizers like those of GPT-2 and SmolLM, got another; "
            "export bf16 and run llama.cpp's convert_hf_to_gguf.py on that folder"
        )
    tokens, types = [f"[PAD{index}]" for index in range(size)], [_UNUSED] * size
    for token, index in model["vocab"].items():
        tokens[index], types[index] = token, _NORMAL
    for added in rules.get("added_tokens", ()):
        tokens[added["id"]], types[added["id"]] = added["content"], _CONTROL if added["special"] else _USER_DEFINED
    merges = [merge if isinstance(merge, str) else " ".join(merge) for merge in model["merges"]]
    end, template = tokenizer.tokenizer.eos_token_id or 0, tokenizer.tokenizer.chat_template
    template = template if isinstance(template, str) else None
    return Vocabulary(tokens=tokens, types=types, merges=merges, pre=pre, end=end, chat_template=template)


def _pre_tokenizer(rule: dict[str, Any] | None) -> str | None:
    """Return llama.cpp's name of the rule that cuts text into words; `None` for one that is not known here."""
    parts = [] if rule is None else rule["pretokenizers"] if rule["type"] == "Sequence" else [rule]
    kinds = [part["type"] for part in parts]
    if kinds == ["Digits", "ByteLevel"] and parts[0]["individual_digits"]:
        return "smollm"
    return "gpt-2" if kinds == ["ByteLevel"] else None
