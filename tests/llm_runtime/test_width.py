"""Width: removed channels are the small ones, the optimiser follows, and a saved model is an ordinary one."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
from pruning_models import FAMILIES, WIDTH, logits, model_of, tiny_model, train_step
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, PreTrainedModel

from trainpilot.llm_runtime.width import channels_for, ffn_width, remove_channels, resize

KEEP = 16
# Per layer: each parameter that holds channels, as the end of its name, and the dimension they lie along.
GATED = {"gate_proj.weight": 0, "up_proj.weight": 0, "down_proj.weight": 1}
CHANNELS: dict[str, dict[str, int]] = {
    "llama": {**GATED, "gate_proj.bias": 0, "up_proj.bias": 0},
    "qwen2": GATED,
    "qwen3": GATED,
    "mistral": GATED,
    "gpt2": {"c_fc.weight": 1, "c_fc.bias": 0, "mlp.c_proj.weight": 0},
    "gpt_neox": {"dense_h_to_4h.weight": 0, "dense_h_to_4h.bias": 0, "dense_4h_to_h.weight": 1},
    "opt": {"fc1.weight": 0, "fc1.bias": 0, "fc2.weight": 1},
    "phi": {"fc1.weight": 0, "fc1.bias": 0, "fc2.weight": 1},
}
CONFIG_FIELD = {"gpt2": "n_inner", "opt": "ffn_dim"}


def channel_parameters(model: PreTrainedModel, family: str) -> list[dict[str, int]]:
    """Return, for each of the two layers, the full parameter names with the dimension of the channels."""
    layers: list[dict[str, int]] = [{}, {}]
    for name, _ in model.named_parameters():
        for end, dim in CHANNELS[family].items():
            if name.endswith(f".{end}"):
                layers[1 if ".1." in name else 0][name] = dim
    assert [len(layer) for layer in layers] == [len(CHANNELS[family])] * 2
    return layers


def kept_channels(model: PreTrainedModel, layer: dict[str, int], n_keep: int) -> Tensor:
    """Find the largest channels by a plain loop over them."""
    parameters = dict(model.named_parameters())
    norms = [
        sum(
            float(parameters[name].select(dim, channel).detach().double().square().sum()) for name, dim in layer.items()
        )
        for channel in range(WIDTH)
    ]
    largest = sorted(range(WIDTH), key=lambda channel: -norms[channel])[:n_keep]
    return torch.tensor(sorted(largest))


def zero_channels(model: PreTrainedModel, layer: dict[str, int], kept: Tensor) -> None:
    removed = torch.tensor([channel for channel in range(WIDTH) if channel not in kept.tolist()])
    with torch.no_grad():
        for name, dim in layer.items():
            model.get_parameter(name).index_fill_(dim, removed, 0.0)


def adamw(model: PreTrainedModel, fused: bool = False) -> torch.optim.AdamW:
    return torch.optim.AdamW(model.parameters(), lr=0.01, fused=fused)


@pytest.mark.parametrize(
    ("sparsity", "width0", "multiple", "expected"),
    [
        (0.0, 64, 8, 64),
        (0.5, 64, 8, 32),
        (0.3, 64, 8, 48),  # 44.8
        (0.4, 64, 8, 40),  # 38.4
        (0.25, 16, 8, 16),  # 12, half-way
        (0.99, 64, 8, 8),
        (0.0, 20, 8, 20),
        (0.05, 22, 8, 22),  # 24 would be more than there are
        (0.5, 4, 8, 4),
        (0.3, 10, 1, 7),
    ],
)
def test_channels_for_by_hand(sparsity: float, width0: int, multiple: int, expected: int) -> None:
    assert channels_for(sparsity, width0, multiple) == expected


@pytest.mark.parametrize("family", FAMILIES)
def test_removal_equals_the_dense_model_with_those_channels_zero(family: str) -> None:
    model = tiny_model(family)
    dense = copy.deepcopy(model)
    for layer in channel_parameters(dense, family):
        zero_channels(dense, layer, kept_channels(dense, layer, KEEP))
    before = logits(model)
    remove_channels(model, None, KEEP)
    torch.testing.assert_close(logits(model), logits(dense), rtol=1e-5, atol=1e-5)
    assert not torch.allclose(logits(model), before, atol=1e-3)


@pytest.mark.parametrize("family", FAMILIES)
def test_removing_empty_channels_leaves_the_logits(family: str) -> None:
    model = tiny_model(family)
    some = torch.randperm(WIDTH, generator=torch.Generator().manual_seed(3))[:KEEP]
    for layer in channel_parameters(model, family):
        zero_channels(model, layer, some)
    before = logits(model)
    remove_channels(model, None, KEEP)
    torch.testing.assert_close(logits(model), before, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("family", FAMILIES)
def test_shapes_attributes_and_config_are_the_narrow_ones(family: str) -> None:
    model = tiny_model(family)
    identities = {name: id(parameter) for name, parameter in model.named_parameters()}
    for parameter in model.parameters():
        parameter.grad = torch.zeros_like(parameter)
    remove_channels(model, None, KEEP)
    assert {name: id(parameter) for name, parameter in model.named_parameters()} == identities
    for layer in channel_parameters(model, family):
        for name, dim in layer.items():
            parameter = model.get_parameter(name)
            assert parameter.shape[dim] == KEEP
            assert parameter.grad is None
            assert parameter.is_contiguous()
    assert ffn_width(model) == KEEP
    assert getattr(model.config, CONFIG_FIELD.get(family, "intermediate_size")) == KEEP
    # A model made anew from the config has the same shapes and describes itself in the same words.
    fresh = model_of(model.config)
    assert repr(fresh) == repr(model)
    for module, twin in zip(model.modules(), fresh.modules(), strict=True):
        numbers = {name: value for name, value in vars(module).items() if isinstance(value, int)}
        assert numbers == {name: vars(twin)[name] for name in numbers} | {"training": module.training}


@pytest.mark.parametrize("family", FAMILIES)
def test_saves_and_loads_plain(family: str, tmp_path: Path) -> None:
    model = tiny_model(family)
    remove_channels(model, None, KEEP)
    model.save_pretrained(tmp_path)
    answer: Any = AutoModelForCausalLM.from_pretrained(tmp_path, output_loading_info=True)
    loaded, report = answer
    assert not report["missing_keys"]
    assert not report["unexpected_keys"]
    assert torch.equal(logits(model), logits(loaded))


@pytest.mark.parametrize("fused", [False, True])
@pytest.mark.parametrize("family", FAMILIES)
def test_optimiser_state_is_cut_with_the_weights(family: str, fused: bool) -> None:
    model = tiny_model(family)
    optimizer = adamw(model, fused)
    loss = train_step(model, optimizer)
    layers = channel_parameters(model, family)
    kept = [kept_channels(model, layer, KEEP) for layer in layers]
    before = {name: copy.copy(optimizer.state[parameter]) for name, parameter in model.named_parameters()}
    remove_channels(model, optimizer, KEEP)
    cut = {name: (dim, kept[i]) for i, layer in enumerate(layers) for name, dim in layer.items()}
    for name, parameter in model.named_parameters():
        state = optimizer.state[parameter]
        assert state["step"] == 1
        for key in ("exp_avg", "exp_avg_sq"):
            expected = before[name][key]
            if name in cut:
                expected = expected.index_select(*cut[name])
            assert torch.equal(state[key], expected)
    assert len(optimizer.state) == len(before)

    # It goes on exactly as a narrow model that starts with these weights and this state. The first loss is
    # still alive here, as it is in most training loops.
    twin = copy.deepcopy(model)
    twin_optimizer = adamw(twin, fused)
    twin_optimizer.load_state_dict(copy.deepcopy(optimizer.state_dict()))
    for step in (1, 2):
        train_step(model, optimizer, step)
        train_step(twin, twin_optimizer, step)
    assert loss.requires_grad
    for parameter, other in zip(model.parameters(), twin.parameters(), strict=True):
        assert torch.equal(parameter, other)


def test_removal_in_steps_before_the_first_optimiser_step() -> None:
    model = tiny_model("llama")
    optimizer = adamw(model)
    for n_keep in (WIDTH, 20, 12, 1):
        remove_channels(model, optimizer, n_keep)
        assert ffn_width(model) == n_keep
        assert not optimizer.state
    train_step(model, optimizer)


def test_momentum_and_half_precision_weights() -> None:
    model = tiny_model("gpt2").bfloat16()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.01, momentum=0.9)
    train_step(model, optimizer)
    remove_channels(model, optimizer, KEEP)
    for parameter in model.parameters():
        assert parameter.dtype == torch.bfloat16
        assert optimizer.state[parameter]["momentum_buffer"].shape == parameter.shape
    train_step(model, optimizer)
    assert logits(model).isfinite().all()


def test_equal_norms_keep_the_lower_channels() -> None:
    model = tiny_model("qwen2")
    layer = channel_parameters(model, "qwen2")[0]
    with torch.no_grad():
        for name in layer:
            model.get_parameter(name).fill_(0.5)
        up = model.get_parameter("model.layers.0.mlp.up_proj.weight")
        up[:, 0] = torch.where(torch.arange(WIDTH) % 2 == 0, 0.5, -0.5)  # of equal size, yet to be told apart
    remove_channels(model, None, 4)
    assert up[:, 0].tolist() == [0.5, -0.5, 0.5, -0.5]


@pytest.mark.parametrize("family", FAMILIES)
def test_resize_there_and_back_then_loading_restores_the_model(family: str, tmp_path: Path) -> None:
    model = tiny_model(family)
    optimizer = adamw(model)
    loss = train_step(model, optimizer)
    wide_state = copy.deepcopy((model.state_dict(), optimizer.state_dict()))
    wide = logits(model)
    remove_channels(model, optimizer, KEEP)
    narrow_state, narrow = copy.deepcopy(model.state_dict()), logits(model)

    for width, state, expected in (
        (WIDTH, wide_state[0], wide),
        (KEEP, narrow_state, narrow),
        (WIDTH, wide_state[0], wide),
    ):
        resize(model, width)
        assert ffn_width(model) == width
        assert getattr(model.config, CONFIG_FIELD.get(family, "intermediate_size")) == width
        model.load_state_dict(state)
        assert torch.equal(logits(model), expected)
    optimizer.load_state_dict(wide_state[1])
    train_step(model, optimizer)
    assert loss.requires_grad
    model.save_pretrained(tmp_path)
    assert torch.equal(logits(AutoModelForCausalLM.from_pretrained(tmp_path)), logits(model))


def test_gpt2_without_a_stated_width() -> None:
    config = copy.deepcopy(tiny_model("gpt2").config)
    config.n_inner = None
    model = model_of(config)
    assert ffn_width(model) == 64
    remove_channels(model, None, 40)
    assert model.config.n_inner == 40


def test_faulty_arguments_are_named_and_change_nothing() -> None:
    model = tiny_model("llama")
    before = logits(model)
    for n_keep in (0, WIDTH + 1):
        with pytest.raises(ValueError, match=rf"n_keep must be in \[1, {WIDTH}\]"):
            remove_channels(model, None, n_keep)
    with pytest.raises(ValueError, match="width must be at least 1"):
        resize(model, 0)
    for arguments in ((1.0, 64, 8), (-0.1, 64, 8)):
        with pytest.raises(ValueError, match="sparsity must be in"):
            channels_for(*arguments)
    with pytest.raises(ValueError, match="at least 1, got 64 and 0"):
        channels_for(0.5, 64, 0)
    setattr(model.config, "model_type", "bloom")  # noqa: B010  a class variable by its annotation
    for call in (lambda: ffn_width(model), lambda: remove_channels(model, None, 8), lambda: resize(model, 8)):
        with pytest.raises(ValueError, match=r"gpt2, gpt_neox, llama, mistral, opt, phi, qwen2, qwen3 .* got 'bloom'"):
            call()
    assert torch.equal(logits(model), before)


def test_layers_of_another_kind_are_refused() -> None:
    model = tiny_model("opt")
    model.model.decoder.layers[0].fc1 = nn.Bilinear(2, 2, 2)
    with pytest.raises(ValueError, match=r"nn\.Linear or Conv1D, got Bilinear"):
        ffn_width(model)


def test_factored_optimiser_state_is_refused_and_nothing_changes() -> None:
    model = tiny_model("gpt_neox")
    optimizer = torch.optim.Adafactor(model.parameters())
    train_step(model, optimizer)
    before = logits(model)
    with pytest.raises(ValueError, match="Adafactor keeps 'row_var'"):
        remove_channels(model, optimizer, KEEP)
    assert torch.equal(logits(model), before)
