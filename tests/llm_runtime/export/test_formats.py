"""Every format is written as its formula says, and plain transformers loads it."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from trainpilot.llm_runtime.export import formats
from trainpilot.llm_runtime.export.formats import (
    FORMATS,
    block_matrices,
    format_fault,
    load_format,
    packed_bytes,
    weight_bytes,
    write_format,
)
from trainpilot.llm_runtime.models import LoadedModel, load_model, load_saved
from trainpilot.llm_runtime.quantisation import binary_codes, integer_codes, powers_of_two

LLAMA: dict[str, Any] = {
    "model_type": "llama",
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 64,
}
GPT2: dict[str, Any] = {"model_type": "gpt2", "n_embd": 32, "n_layer": 2, "n_head": 2, "n_positions": 64}
PHI: dict[str, Any] = {
    "model_type": "phi",
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
}
TOKENS = torch.arange(40).reshape(2, 20)


def saved(folder: Path, config: dict[str, Any] = LLAMA, **changes: Any) -> tuple[LoadedModel, Path]:
    """Return a model of random weights, and the folder that it is saved in."""
    file = folder / "model.json"
    file.write_text(json.dumps(config | changes), encoding="utf-8")
    loaded = load_model(str(file), 0)
    loaded.save(folder / "saved")
    return load_saved(folder / "saved"), folder / "saved"


def write(name: str, loaded: LoadedModel, source: Path, group_size: int = 32) -> tuple[Path, float]:
    """Write a format, or skip the test where its package is missing."""
    if FORMATS[name].missing:
        pytest.skip(f"needs the package {FORMATS[name].package}")
    folder = source.parent / name
    folder.mkdir()
    return folder, write_format(name, loaded, source, folder, group_size)


def logits(model: Any) -> Tensor:
    with torch.inference_mode():
        found: Tensor = model(TOKENS).logits
    return found


def matrices(model: Any) -> dict[str, Tensor]:
    """Return the weights of the blocks, once a forward pass has unpacked them."""
    logits(model)
    return {name: module.weight.detach().float() for name, module in block_matrices(model).items()}


ROUNDINGS = {
    "bf16": lambda weight: weight.bfloat16().float(),
    "int8": lambda weight: integer_codes(weight, 8, None, torch.bfloat16).weights(),
    "int4": lambda weight: integer_codes(weight, 4, 32, torch.bfloat16).weights(),
    "pot": powers_of_two,
    "pot2": lambda weight: powers_of_two(weight, terms=2),
    "bcq": lambda weight: binary_codes(weight, 3, 32),
}


@pytest.mark.parametrize("name", ROUNDINGS)
def test_the_loaded_weights_are_those_of_the_formula(tmp_path: Path, name: str) -> None:
    loaded, source = saved(tmp_path)
    exact = matrices(loaded.model)
    folder, _ = write(name, loaded, source)

    found = matrices(load_format(name, folder))

    assert found.keys() == exact.keys()
    assert len(found) == 14
    for layer, weight in exact.items():
        assert torch.equal(found[layer], ROUNDINGS[name](weight)), layer


@pytest.mark.parametrize("name", FORMATS)
def test_a_format_loads_predicts_and_leaves_the_model_as_it_was(tmp_path: Path, name: str) -> None:
    loaded, source = saved(tmp_path)
    before = logits(loaded.model)
    folder, bits = write(name, loaded, source)

    again = logits(load_format(name, folder))

    assert torch.equal(logits(loaded.model), before)
    assert torch.isfinite(again).all()
    assert 0 < float((again - before).norm() / before.norm()) < 0.6
    assert FORMATS[name].bits <= bits <= FORMATS[name].bits + 1


def test_bits_by_hand(tmp_path: Path) -> None:
    # Of the 14 matrices, two have rows of 64 weights and 32 rows: 4,096 of 18,432 weights. The others have rows of 32.
    loaded, source = saved(tmp_path)
    _, bits = write("pot", loaded, source)

    n_wide, n_all = 2 * 32 * 64, sum(weight.numel() for weight in matrices(loaded.model).values())
    assert n_all == 2 * (32 * 32 + 2 * 16 * 32 + 32 * 32 + 3 * 32 * 64)
    assert bits == pytest.approx((4.125 * n_wide + 4.25 * (n_all - n_wide)) / n_all)
    rest = loaded.n_parameters - n_all
    assert packed_bytes("pot", loaded, bits) == round(n_all * bits / 8 + 2 * rest)
    assert packed_bytes("bf16", loaded, 16) is None


def test_smaller_formats_have_smaller_files(tmp_path: Path) -> None:
    loaded, source = saved(tmp_path, hidden_size=128, intermediate_size=384)
    sizes = [weight_bytes(source), *(weight_bytes(write(name, loaded, source)[0]) for name in ("bf16", "int8", "int4"))]

    assert sizes == sorted(sizes, reverse=True)
    assert sizes[3] < 0.3 * sizes[0]


def test_rows_that_no_group_divides_share_one_scale(tmp_path: Path) -> None:
    loaded, source = saved(tmp_path, hidden_size=40, intermediate_size=80)
    exact = matrices(loaded.model)
    folder, bits = write("int4", loaded, source)

    found = matrices(load_format("int4", folder))

    assert all(
        torch.equal(found[name], integer_codes(weight, 4, None, torch.bfloat16).weights())
        for name, weight in exact.items()
    )
    assert 4 + 16 / 80 < bits < 4 + 16 / 40


def test_what_an_architecture_lacks_is_one_line(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(formats, "find_spec", lambda name: object())
    gpt2, _ = saved(tmp_path, GPT2)

    assert format_fault("bf16", gpt2) is None
    assert format_fault("bcq", gpt2) is None
    assert format_fault("int4", gpt2) == "needs layers of nn.Linear, got Conv1D in the architecture 'gpt2'"
    assert format_fault("int8-torchao", gpt2) == "needs layers of nn.Linear, got Conv1D in the architecture 'gpt2'"
    assert format_fault("gguf-q8", gpt2) == "is only written for the architecture llama, got 'gpt2'"


def test_rows_that_gguf_cannot_cut_are_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(formats, "find_spec", lambda name: object())
    loaded, _ = saved(tmp_path, hidden_size=40)

    assert format_fault("gguf-q4", loaded) == "needs rows of a multiple of 32 weights, got hidden_size 40"


def test_a_missing_package_is_named_with_its_extra(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(formats, "find_spec", lambda name: None)
    loaded, _ = saved(tmp_path)

    assert format_fault("int8", loaded) == (
        'needs the package compressed-tensors, got no such package; run: pip install "trainpilot[export]"'
    )
    assert 'pip install "trainpilot[torchao]"' in (format_fault("int8-torchao", loaded) or "")
    assert format_fault("bf16", loaded) is None


@pytest.mark.parametrize("name", ["pot", "bcq"])
def test_conv1d_is_rounded_by_outputs(tmp_path: Path, name: str) -> None:
    loaded, source = saved(tmp_path, GPT2)
    exact = matrices(loaded.model)
    folder, _ = write(name, loaded, source)

    found = matrices(load_format(name, folder))

    assert all(torch.equal(found[layer].T, ROUNDINGS[name](weight.T)) for layer, weight in exact.items())


def test_biases_and_other_layouts_are_kept(tmp_path: Path) -> None:
    loaded, source = saved(tmp_path, PHI)
    folder, _ = write("int8", loaded, source)

    again = logits(load_format("int8", folder))

    assert float((again - logits(loaded.model)).norm() / again.norm()) < 0.1


def test_a_quantised_model_is_not_quantised_again(tmp_path: Path) -> None:
    loaded, source = saved(tmp_path)
    folder, _ = write("int8", loaded, source)

    with pytest.raises(ValueError, match="is quantised already; give the model that it was made from"):
        load_saved(folder)


def test_a_model_without_tokenizer_must_be_one_of_bytes(tmp_path: Path) -> None:
    _, source = saved(tmp_path)
    config = json.loads((source / "config.json").read_text())
    (source / "config.json").write_text(json.dumps(config | {"vocab_size": 300}))
    for file in source.glob("tokenizer*"):
        file.unlink()

    with pytest.raises(ValueError, match="has no tokenizer; save it there with"):
        load_saved(source)
