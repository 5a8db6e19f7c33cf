"""Models from presets, config files, folders and the Hub's cache; what cannot be used is refused in one line."""

from __future__ import annotations

import json
import math
import time
from pathlib import Path
from typing import Any

import pytest
import torch
from huggingface_hub import constants
from live_runs import GPT2, LLAMA, advance, case, live_run, text_by_rule
from tokenizers import ByteLevelBPETokenizer
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedTokenizerFast,
)

from trainpilot.llm_runtime.data.corpus import ByteTokenizer, PretrainedTokenizer
from trainpilot.llm_runtime.data.text_sources import content_digest
from trainpilot.llm_runtime.layers import body_parameters
from trainpilot.llm_runtime.models import (
    PRESETS,
    LoadedModel,
    body_parameters_of,
    context_length,
    load_model,
)

SIZES: dict[str, Any] = {
    "hidden_size": 16,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "max_position_embeddings": 64,
}
CONFIGS: dict[str, dict[str, Any]] = {
    "llama": LLAMA,
    "gpt2": GPT2,
    "gpt_neox": {"model_type": "gpt_neox", "intermediate_size": 32, **SIZES},
    "qwen2": {"model_type": "qwen2", "intermediate_size": 32, "num_key_value_heads": 1, **SIZES},
    "opt": {"model_type": "opt", "ffn_dim": 32, "word_embed_proj_dim": 16, **SIZES},
}


def write_config(folder: Path, content: Any) -> str:
    path = folder / "model.json"
    path.write_text(content if isinstance(content, str) else json.dumps(content), encoding="utf-8")
    return str(path)


def one_line(raised: pytest.ExceptionInfo[ValueError]) -> str:
    message = str(raised.value)
    assert "\n" not in message
    return message


# From scratch -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("preset", "millions"),
    [
        ("llama-nano", 0.2),
        ("llama-micro", 1),
        ("llama-mini", 5),
        ("gpt2-nano", 0.2),
        ("gpt2-micro", 1),
        ("phi-nano", 0.13),
    ],
)
def test_preset_sizes(preset: str, millions: float) -> None:
    loaded = load_model(preset, seed=0)

    assert loaded.n_parameters == pytest.approx(millions * 1e6, rel=0.25)
    assert not loaded.pretrained
    assert isinstance(loaded.tokenizer, ByteTokenizer)
    assert context_length(loaded.model.config) == (512 if preset == "phi-nano" else 1_024)
    assert loaded.model.config.vocab_size == 256


def test_all_presets_are_tested() -> None:
    assert set(PRESETS) == {"llama-nano", "llama-micro", "llama-mini", "gpt2-nano", "gpt2-micro", "phi-nano"}


def test_presets_have_no_dropout() -> None:
    ids = torch.arange(32).unsqueeze(0)
    for preset in ("llama-nano", "gpt2-nano", "phi-nano"):
        model = load_model(preset, seed=0).model.train()
        assert torch.equal(model(ids).logits, model(ids).logits)


@pytest.mark.parametrize("family", CONFIGS)
def test_config_file_trains(family: str, tmp_path: Path) -> None:
    run = live_run(case(tmp_path, CONFIGS[family]), probe=True)

    telemetry = advance(run)

    assert run.loaded.model.config.model_type == family
    assert run.loaded.model.config.vocab_size == 256
    assert telemetry.steps == 10
    assert 0 < telemetry.train_loss < 8
    assert telemetry.probe_linear is not None


def test_config_of_a_published_model_is_cut_to_bytes(tmp_path: Path) -> None:
    # What such files carry besides sizes: ids beyond 256, a 16-bit format, a chat model's leftovers.
    published = CONFIGS["qwen2"] | {
        "architectures": ["Qwen2ForCausalLM"],
        "bos_token_id": 151_643,
        "eos_token_id": [151_645, 151_643],
        "pad_token_id": 151_643,
        "vocab_size": 151_936,
        "torch_dtype": "bfloat16",
        "transformers_version": "4.40.0",
        "use_cache": False,
    }

    loaded = load_model(write_config(tmp_path, published), seed=0)

    assert {parameter.dtype for parameter in loaded.model.parameters()} == {torch.float32}
    assert loaded.model.get_input_embeddings().weight.shape == (256, 16)


def test_folder_with_a_config_alone_is_from_scratch(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text(json.dumps(LLAMA), encoding="utf-8")
    assert not load_model(str(tmp_path), seed=0).pretrained


def weights_of(loaded: LoadedModel) -> list[torch.Tensor]:
    return [parameter.detach() for parameter in loaded.model.parameters()]


def test_one_seed_one_model() -> None:
    torch.manual_seed(1)
    first = weights_of(load_model("llama-nano", seed=4))
    torch.manual_seed(2)
    again, other = (weights_of(load_model("llama-nano", seed=seed)) for seed in (4, 5))

    assert all(torch.equal(a, b) for a, b in zip(first, again, strict=True))
    assert not all(torch.equal(a, b) for a, b in zip(first, other, strict=True))


def test_making_a_model_draws_no_random_numbers_of_others() -> None:
    torch.manual_seed(3)
    expected = torch.rand(2)
    torch.manual_seed(3)
    load_model("llama-nano", seed=0)
    assert torch.equal(torch.rand(2), expected)


# Refusals ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("content", "rule"),
    [
        ("{not json", "is not readable JSON"),
        ("[1, 2]", "must be a transformers config with a 'model_type'"),
        ({"hidden_size": 16}, "must be a transformers config with a 'model_type'"),
        ({"model_type": "nonsense"}, "is not a usable config"),
        (LLAMA | {"hidden_size": 15}, "not a multiple of the number of attention heads"),
        (LLAMA | {"hidden_size": "sixteen"}, "hidden_size"),
        (LLAMA | {"num_attention_heads": 4, "num_key_value_heads": 3}, "no causal model can be built"),
        (GPT2 | {"n_head": 3}, "must be divisible by num_heads"),
        ({"model_type": "vit"}, "no causal model can be built from this config"),
    ],
)
def test_wrong_config_file(content: Any, rule: str, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"^model: ") as raised:
        load_model(write_config(tmp_path, content), seed=0)
    assert rule in one_line(raised)


def test_no_such_config_file(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="presets are llama-nano") as raised:
        load_model(str(tmp_path / "nowhere.json"), seed=0)
    assert "nowhere.json" in one_line(raised)


def test_unknown_name_is_refused_quickly() -> None:
    start = time.monotonic()
    with pytest.raises(ValueError, match="'nobody/no-such-model' is neither a preset") as raised:
        load_model("nobody/no-such-model", seed=0)
    assert time.monotonic() - start < 5
    assert "download it first and give its folder" in one_line(raised)


def test_a_hub_out_of_reach_is_asked_once(monkeypatch: pytest.MonkeyPatch) -> None:
    nowhere, waits = "http://127.0.0.1:9", list[float]()
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(constants, "HUGGINGFACE_CO_URL_TEMPLATE", nowhere + "/{repo_id}/resolve/{revision}/{filename}")
    monkeypatch.setattr(constants, "ENDPOINT", nowhere)
    monkeypatch.setattr(time, "sleep", waits.append)  # the Hub's client waits between two tries
    with pytest.raises(ValueError, match="could not be loaded as a Hub id") as raised:
        load_model("nobody/no-such-model", seed=0)
    assert one_line(raised)
    assert waits == []


def test_sequences_longer_than_the_context(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="sequence_length must not exceed the model's context of 64 tokens, got 65"):
        live_run(case(tmp_path, sequence_length=65, tokens=10_000))
    assert live_run(case(tmp_path, sequence_length=64, tokens=10_000)).finished is False


# Pretrained -------------------------------------------------------------------------------------------------


@pytest.fixture
def saved(tmp_path: Path) -> Path:
    """Save a tiny LLaMA and a byte-level tokenizer trained on the text of the tests."""
    folder = tmp_path / "saved"
    trained = ByteLevelBPETokenizer()
    trained.train_from_iterator([text_by_rule(4_096)], vocab_size=300, special_tokens=["<end>"])
    tokenizer = PreTrainedTokenizerFast(  # type: ignore[no-untyped-call]
        tokenizer_object=trained._tokenizer, eos_token="<end>"
    )
    tokenizer.save_pretrained(folder)
    sizes = {key: value for key, value in LLAMA.items() if key != "model_type"}
    torch.manual_seed(11)
    LlamaForCausalLM(LlamaConfig(vocab_size=len(tokenizer), **sizes)).save_pretrained(folder)
    return folder


def test_saved_folder_is_fine_tuned(saved: Path, tmp_path: Path) -> None:
    run = live_run(case(tmp_path, str(saved)), probe=True)

    assert run.loaded.pretrained
    assert isinstance(run.loaded.tokenizer, PretrainedTokenizer)
    assert run.loaded.tokenizer.vocabulary == run.loaded.model.config.vocab_size
    expected = AutoModelForCausalLM.from_pretrained(saved).state_dict()
    assert all(torch.equal(value, expected[name]) for name, value in run.loaded.model.state_dict().items())
    # Words of several letters became one token: fewer tokens than bytes.
    assert run.corpus.bytes_per_token > 2

    telemetry = advance(run)

    assert telemetry.train_loss == pytest.approx(math.log(run.loaded.tokenizer.vocabulary), rel=0.5)
    assert not telemetry.diverged
    assert run.evaluate() > 0


def test_saved_again_it_is_an_ordinary_folder(saved: Path, tmp_path: Path) -> None:
    run = live_run(case(tmp_path, str(saved), pruning="width"))
    advance(run)
    advance(run, sparsity=0.5)
    loss = run.evaluate()

    run.loaded.save(tmp_path / "again")
    again = live_run(case(tmp_path, str(tmp_path / "again")))

    assert again.loaded.pretrained
    assert again.corpus.key == run.corpus.key
    assert again.evaluate() == pytest.approx(loss, abs=1e-5)


@pytest.mark.parametrize("model", [LLAMA, GPT2], ids=["llama", "gpt2"])
def test_plain_transformers_generates_with_a_model_of_bytes(model: dict[str, Any], tmp_path: Path) -> None:
    loaded = load_model(write_config(tmp_path, model), seed=0)
    loaded.save(tmp_path / "bytes")
    again: Any = AutoModelForCausalLM.from_pretrained(tmp_path / "bytes")
    tokenizer: Any = AutoTokenizer.from_pretrained(tmp_path / "bytes")

    assert all(torch.equal(a, b) for a, b in zip(weights_of(loaded), again.parameters(), strict=True))
    text = "Zwölf\tlines,  don't \r\n\n 飛行 <s> <|endoftext|> Ā ▁ \x00 end "
    ids = tokenizer(text)["input_ids"]
    assert ids == list(text.encode()) == list(loaded.tokenizer.encode(text))
    assert tokenizer.decode(ids) == text
    assert len(tokenizer) == again.config.vocab_size == 256
    assert again.generation_config.eos_token_id == 0  # generation ends with the document
    made = again.generate(**tokenizer("def ", return_tensors="pt"), max_new_tokens=4, min_new_tokens=4, do_sample=False)
    assert made[0, :4].tolist() == list(b"def ")
    assert made.shape == (1, 8)


def test_a_saved_model_of_bytes_trains_on(tmp_path: Path) -> None:
    run = live_run(case(tmp_path, LLAMA))
    advance(run)
    run.loaded.save(tmp_path / "bytes")
    again = live_run(case(tmp_path, str(tmp_path / "bytes")))

    assert again.loaded.pretrained
    assert isinstance(again.loaded.tokenizer, ByteTokenizer)
    assert again.corpus.key == run.corpus.key
    assert again.evaluate() == pytest.approx(run.evaluate(), abs=1e-5)


def test_a_folder_of_bytes_as_version_0_2_saved_it(tmp_path: Path) -> None:
    load_model("llama-nano", seed=0).model.save_pretrained(tmp_path / "bytes")  # without a tokenizer

    loaded = load_model(str(tmp_path / "bytes"), seed=0)
    assert loaded.pretrained
    assert isinstance(loaded.tokenizer, ByteTokenizer)


def test_only_our_own_tokenizer_is_taken_for_bytes(saved: Path, tmp_path: Path) -> None:
    ByteTokenizer().save(tmp_path)
    assert ByteTokenizer.lies_in(tmp_path)
    assert not ByteTokenizer.lies_in(saved)
    assert not ByteTokenizer.lies_in(tmp_path / "nowhere")
    for damage in ('"vocab": {', "{"), ('"added_tokens": []', '"added_tokens": [1]'):
        ByteTokenizer().save(tmp_path)
        file = tmp_path / "tokenizer.json"
        file.write_text(file.read_text(encoding="utf-8").replace(*damage), encoding="utf-8")
        assert not ByteTokenizer.lies_in(tmp_path)


def test_sixteen_bit_weights_are_widened(saved: Path) -> None:
    AutoModelForCausalLM.from_pretrained(saved, dtype=torch.bfloat16).save_pretrained(saved)
    assert {p.dtype for p in load_model(str(saved), seed=0).model.parameters()} == {torch.float32}


# From scratch with a tokenizer ------------------------------------------------------------------------------


@pytest.fixture
def without_weights(saved: Path) -> Path:
    """Return the folder with its tokenizer of 300 ids and its config, but without weights."""
    (saved / "model.safetensors").unlink()
    return saved


def state_vocabulary(folder: Path, size: int | None) -> None:
    config = json.loads((folder / "config.json").read_text())
    config.pop("vocab_size")
    (folder / "config.json").write_text(json.dumps(config if size is None else config | {"vocab_size": size}))


def test_a_folder_without_weights_is_trained_with_its_tokenizer(without_weights: Path, tmp_path: Path) -> None:
    run = live_run(case(tmp_path, str(without_weights)))

    assert not run.loaded.pretrained
    assert isinstance(run.loaded.tokenizer, PretrainedTokenizer)
    assert run.corpus.vocabulary == run.loaded.model.config.vocab_size == 300
    assert run.corpus.bytes_per_token > 2
    assert advance(run).train_loss == pytest.approx(math.log(300), rel=0.5)
    assert body_parameters_of(str(without_weights)) == body_parameters(run.loaded.model)


@pytest.mark.parametrize(("stated", "used"), [(None, 300), (320, 320)])
def test_the_config_of_such_a_folder_may_have_room(without_weights: Path, stated: int | None, used: int) -> None:
    state_vocabulary(without_weights, stated)

    loaded: Any = load_model(str(without_weights), seed=0).model
    assert loaded.get_input_embeddings().weight.shape[0] == used


def test_a_config_too_small_for_its_tokenizer(without_weights: Path) -> None:
    state_vocabulary(without_weights, 299)
    with pytest.raises(ValueError, match=r"^model: vocab_size in .* must be at least 300, .*, got 299; ") as raised:
        load_model(str(without_weights), seed=0)
    one_line(raised)


def test_a_damaged_tokenizer_without_weights(without_weights: Path) -> None:
    (without_weights / "tokenizer.json").write_text("{")
    with pytest.raises(ValueError, match=r"^model: the tokenizer in .* cannot be loaded") as raised:
        load_model(str(without_weights), seed=0)
    one_line(raised)


def test_a_tokenizer_counts_in_the_digest_where_it_is_newly_used(without_weights: Path, tmp_path: Path) -> None:
    config = case(tmp_path, str(without_weights))
    with_tokenizer = content_digest(config)
    for file in without_weights.glob("tokenizer*"):
        file.rename(file.with_suffix(".old"))
    without = content_digest(config)

    assert with_tokenizer != without


@pytest.mark.parametrize("model", [LLAMA, GPT2], ids=["llama", "gpt2"])
def test_a_trained_tokenizer_is_saved_with_its_model(model: dict[str, Any], tmp_path: Path) -> None:
    run = live_run(case(tmp_path, model | {"vocab_size": 9}, vocabulary=300))  # a config's own size does not count
    telemetry = advance(run)
    run.save(tmp_path / "saved")

    assert run.corpus.vocabulary == run.loaded.model.config.vocab_size == 300
    assert telemetry.train_loss == pytest.approx(math.log(300), rel=0.2)
    # A test loss of ln 2 nats/token is one bit per token.
    assert run.corpus.test_bits_per_byte(math.log(2)) == pytest.approx(len(run.corpus.test) / run.corpus.n_test_bytes)
    tokenizer: Any = AutoTokenizer.from_pretrained(tmp_path / "saved")
    plain: Any = AutoModelForCausalLM.from_pretrained(tmp_path / "saved")
    ids = tokenizer("the pilot reads", return_tensors="pt")
    written = plain.generate(**ids, max_new_tokens=4, do_sample=False)
    assert tokenizer.decode(written[0]).startswith("the pilot reads")
    assert plain.generation_config.eos_token_id == tokenizer.eos_token_id == 0
    again = live_run(case(tmp_path, str(tmp_path / "saved")))
    assert again.corpus.key == run.corpus.key


def test_a_vocabulary_needs_a_model_without_a_tokenizer(without_weights: Path, tmp_path: Path) -> None:
    for name in (str(without_weights), "owner/name"):
        with pytest.raises(ValueError, match=rf"^vocabulary must be left out for '{name}', .*, got 300$") as raised:
            live_run(case(tmp_path, name, vocabulary=300))
        one_line(raised)


def test_a_vocabulary_too_large_for_the_text(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"^vocabulary must be at most .* got 4096; lower it") as raised:
        live_run(case(tmp_path, vocabulary=4096))
    one_line(raised)


def test_folder_without_its_tokenizer(saved: Path) -> None:
    for file in [*saved.glob("tokenizer*"), *saved.glob("special*")]:
        file.unlink()
    with pytest.raises(ValueError, match=r"^model: ") as raised:
        load_model(str(saved), seed=0)
    one_line(raised)


def test_damaged_weights(saved: Path) -> None:
    (saved / "model.safetensors").write_bytes(b"not weights")
    with pytest.raises(ValueError, match=r"^model: ") as raised:
        load_model(str(saved), seed=0)
    one_line(raised)
