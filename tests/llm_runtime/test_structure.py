"""Cuts of heads and blocks: what does least goes, the optimiser follows, and plain transformers loads the rest."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
from pruning_models import FAMILIES, WIDTH, layers, logits, model_of, tiny_model, tokens, train_step
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, GPT2Config, LlamaConfig, PhiConfig, PreTrainedModel, Qwen2Config

from trainpilot.llm_runtime.importance import block_influences, channel_activations, head_activations
from trainpilot.llm_runtime.structure import (
    BLOCKS,
    OUTPUT_LAYERS,
    blocks,
    group_counts,
    heads_fault,
    heads_of,
    output_layers,
    remove_blocks,
    remove_groups,
)
from trainpilot.llm_runtime.width import closing_layers, remove_channels

GROUPED = sorted(OUTPUT_LAYERS)
SIZES: dict[str, Any] = {
    "vocab_size": 32, "hidden_size": 24, "intermediate_size": 16, "num_hidden_layers": 3,
    "num_attention_heads": 6, "num_key_value_heads": 3, "max_position_embeddings": 32,
}  # fmt: skip


def grouped_model(family: str) -> PreTrainedModel:
    """Return a random model of three groups of two heads of four columns each."""
    kind = type(tiny_model(family).config)
    torch.manual_seed(1)
    own = {"head_dim": 4} if family in ("qwen3", "mistral") else {}
    model = model_of(kind(**SIZES | own))
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.1 * torch.randn_like(parameter))
    return model


def zero_groups(model: PreTrainedModel, groups: list[int], size: int) -> None:
    """Let groups of heads, of `size` columns together, say nothing."""
    with torch.no_grad():
        for layer in output_layers(model):
            for group in groups:
                layer.weight[:, group * size : (group + 1) * size] = 0


def reloaded(model: PreTrainedModel, folder: Path) -> PreTrainedModel:
    model.save_pretrained(folder)
    answer: Any = AutoModelForCausalLM.from_pretrained(folder, output_loading_info=True)
    loaded, report = answer
    assert not report["missing_keys"]
    assert not report["unexpected_keys"]
    assert not report["mismatched_keys"]
    return loaded  # type: ignore[no-any-return]


@pytest.mark.parametrize("family", GROUPED)
def test_a_cut_group_is_a_group_that_says_nothing(family: str, tmp_path: Path) -> None:
    model = grouped_model(family)
    assert (heads_of(model).groups, heads_of(model).per_group, heads_of(model).size) == (3, 2, 4)
    silent = copy.deepcopy(model)
    zero_groups(silent, [1], 8)
    # The norms of the groups are 9.0, 5.7 and 8.0.
    remove_groups(model, None, 2, [torch.tensor([9.0, 0.1, 4.0, 4.0, 0.2, 8.0])] * 3)

    torch.testing.assert_close(logits(model), logits(silent), rtol=1e-4, atol=1e-5)
    assert (model.config.num_key_value_heads, model.config.num_attention_heads) == (2, 4)
    loaded = reloaded(model, tmp_path)
    assert torch.equal(logits(loaded), logits(model))
    assert repr(loaded) == repr(model)
    generated: Any = loaded.generate(tokens()[:, :4], max_new_tokens=3, do_sample=False, use_cache=True)  # type: ignore[operator]
    assert generated.shape == (2, 7)


@pytest.mark.parametrize("family", FAMILIES)
def test_a_cut_block_is_a_block_that_is_passed_over(family: str, tmp_path: Path) -> None:
    config = tiny_model(family).config
    config.num_hidden_layers = 3
    if getattr(config, "layer_types", None):
        config.layer_types = ["full_attention"] * 3
    torch.manual_seed(2)
    model = model_of(config).eval()  # type: ignore[no-untyped-call]
    expected = copy.deepcopy(model)
    layers(expected)[1].forward = lambda hidden_states, *_, **__: hidden_states

    remove_blocks(model, None, 2, torch.tensor([0.3, 0.1, 0.2]))

    assert torch.equal(logits(model), logits(expected))
    assert [each.layer_idx for each in model.modules() if hasattr(each, "layer_idx")] in ([0, 1], [0, 0, 1, 1])
    loaded = reloaded(model, tmp_path)
    assert loaded.config.num_hidden_layers == 2
    assert torch.equal(logits(loaded), logits(model))
    generated: Any = loaded.generate(tokens()[:, :4], max_new_tokens=3, do_sample=False, use_cache=True)  # type: ignore[operator]
    assert generated.shape == (2, 7)


def test_the_optimiser_follows_heads_and_layers() -> None:
    model = grouped_model("qwen2")
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.01)
    train_step(model, optimizer)
    query, key = layers(model)[0].self_attn.q_proj.weight, layers(model)[0].self_attn.k_proj.weight
    momenta = optimizer.state[query]["exp_avg"].clone(), optimizer.state[key]["exp_avg"].clone()

    remove_groups(model, optimizer, 2, [torch.tensor([1.0, 1.0, 0.0, 0.0, 1.0, 1.0])] * 3)
    remove_blocks(model, optimizer, 1, torch.tensor([1.0, 0.0, 0.0]))

    rows = torch.tensor([*range(8), *range(16, 24)])
    assert torch.equal(optimizer.state[query]["exp_avg"], momenta[0][rows])
    assert torch.equal(optimizer.state[key]["exp_avg"], momenta[1][torch.tensor([*range(4), *range(8, 12)])])
    left = {id(parameter) for parameter in model.parameters()}
    assert {id(p) for group in optimizer.param_groups for p in group["params"]} == left
    assert {id(p) for p in optimizer.state} == left
    twin = copy.deepcopy(model)
    twin_optimizer = torch.optim.AdamW(twin.parameters(), lr=0.01)
    twin_optimizer.load_state_dict(copy.deepcopy(optimizer.state_dict()))
    train_step(model, optimizer)
    train_step(twin, twin_optimizer)
    assert all(torch.equal(one, other) for one, other in zip(model.parameters(), twin.parameters(), strict=True))


def mean_inputs(model: PreTrainedModel, layers: list[nn.Module]) -> list[Tensor]:
    """Find the mean absolute inputs of layers by keeping them all."""
    kept: list[list[Tensor]] = [[] for _ in layers]
    handles = [
        layer.register_forward_pre_hook(lambda _, inputs, own=own: own.append(inputs[0]))
        for layer, own in zip(layers, kept, strict=True)
    ]
    logits(model)
    for handle in handles:
        handle.remove()
    return [own[0].reshape(-1, own[0].shape[-1]).abs().mean(dim=0) for own in kept]


@pytest.mark.parametrize("family", FAMILIES)
def test_channels_count_by_their_mean_absolute_activation(family: str) -> None:
    model = tiny_model(family)
    expected = mean_inputs(model, closing_layers(model))
    model.train()

    found = channel_activations(model, tokens(), at_once=1)

    assert model.training
    assert [tuple(each.shape) for each in found] == [(WIDTH,)] * 2
    for one, other in zip(found, expected, strict=True):
        torch.testing.assert_close(one.float(), other, rtol=1e-5, atol=1e-7)
    assert all(torch.equal(*pair) for pair in zip(found, channel_activations(model, tokens(), 1), strict=True))


def test_heads_count_by_the_norm_of_their_columns() -> None:
    model = grouped_model("llama")
    expected = [each.view(6, 4).norm(dim=1) for each in mean_inputs(model, list(output_layers(model)))]

    found = head_activations(model, tokens(), at_once=2)

    for one, other in zip(found, expected, strict=True):
        torch.testing.assert_close(one.float(), other, rtol=1e-5, atol=1e-7)


@pytest.mark.parametrize("family", sorted(BLOCKS))
def test_a_block_that_changes_nothing_has_no_influence(family: str) -> None:
    model = tiny_model(family)
    with torch.no_grad():
        for name, parameter in layers(model)[0].named_parameters():
            if any(end in name for end in ("o_proj", "out_proj", "c_proj", "dense", "down_proj", "fc2")):
                parameter.zero_()

    found = block_influences(model, tokens(), at_once=1)

    assert found.shape == (2,)
    assert abs(float(found[0])) < 1e-6
    assert 1e-4 < float(found[1]) < 2


def test_activations_keep_other_channels_than_weights() -> None:
    # The first channel has large weights and a bias that silences it; the second is small and speaks.
    model = tiny_model("opt")
    for block in layers(model):
        with torch.no_grad():
            block.fc1.weight[:2] = torch.tensor([5.0, 0.01])[:, None]
            block.fc1.bias[:2] = torch.tensor([-1e4, 50.0])
            block.fc2.weight[:, :2] = torch.tensor([5.0, 0.01])
    by_weight = copy.deepcopy(model)
    found = channel_activations(model, tokens(), at_once=2)
    assert all(float(each[0]) == 0 for each in found)
    assert all(int(each.argmax()) == 1 for each in found)

    remove_channels(model, None, 1, found)
    remove_channels(by_weight, None, 1)

    assert [block.fc1.bias[0].item() for block in layers(model)] == [50.0, 50.0]
    assert [block.fc1.bias[0].item() for block in layers(by_weight)] == [-1e4, -1e4]


def test_importance_of_another_shape_is_refused_and_nothing_changes() -> None:
    model = tiny_model("llama")
    with pytest.raises(ValueError, match=rf"importance must be a number for each of {WIDTH} channels in each of 2"):
        remove_channels(model, None, 8, [torch.ones(WIDTH)])
    assert closing_layers(model)[0].in_features == WIDTH


def test_llama_keeps_head_counts_that_divide_the_hidden_size() -> None:
    llama = model_of(LlamaConfig(**SIZES | {"hidden_size": 40, "num_attention_heads": 10, "num_key_value_heads": 5}))
    qwen2 = model_of(Qwen2Config(**SIZES | {"hidden_size": 40, "num_attention_heads": 10, "num_key_value_heads": 5}))
    assert group_counts(llama) == [1, 2, 4, 5]  # 6 heads do not divide 40
    assert group_counts(qwen2) == [1, 2, 3, 4, 5]
    with pytest.raises(ValueError, match="n_keep must be one of 1, 2, 4, 5 groups of heads, got 3"):
        remove_groups(llama, None, 3, [torch.ones(10)] * 3)


def test_parts_that_an_architecture_lacks_are_named() -> None:
    gpt2, phi = tiny_model("gpt2"), model_of(PhiConfig(**SIZES, qk_layernorm=True))
    assert "got 'gpt2'; elsewhere a head has hidden size / heads columns" in (heads_fault(gpt2) or "")
    assert "norm as wide as hidden size / heads" in (heads_fault(phi) or "")
    with pytest.raises(ValueError, match="heads can only be cut in llama"):
        head_activations(gpt2, tokens(), 2)
    scaled = model_of(GPT2Config(n_embd=16, n_layer=2, n_head=2, vocab_size=32, scale_attn_by_inverse_layer_idx=True))
    with pytest.raises(ValueError, match="depth cannot be cut where attention is scaled by the number of the block"):
        remove_blocks(scaled, None, 1, torch.ones(2))
    with pytest.raises(ValueError, match=r"n_keep must be in \[1, 2\], the blocks of the model, got 0"):
        remove_blocks(gpt2, None, 0, torch.ones(2))
    setattr(gpt2.config, "model_type", "bloom")  # noqa: B010  a class variable by its annotation
    with pytest.raises(ValueError, match=r"depth can only be cut in gpt2, .*, got 'bloom'"):
        remove_blocks(gpt2, None, 1, torch.ones(2))
    with pytest.raises(ValueError, match=r"model_type must be one of .* to lose blocks, got 'bloom'"):
        blocks(gpt2)


def test_factored_state_is_refused_before_heads_are_cut() -> None:
    model = grouped_model("llama")
    optimizer = torch.optim.Adafactor(model.parameters())
    train_step(model, optimizer)
    before = logits(model)
    with pytest.raises(ValueError, match="Adafactor keeps 'row_var'"):
        remove_groups(model, optimizer, 1, [torch.ones(6)] * 3)
    assert torch.equal(logits(model), before)
