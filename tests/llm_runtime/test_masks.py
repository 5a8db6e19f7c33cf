"""Masks: which weights they may touch, exactly how many, and that these stay zero through training."""

from __future__ import annotations

import io
from collections.abc import Callable

import pytest
import torch
from pruning_models import FAMILIES, logits, tiny_model, train_step
from torch import Tensor, nn
from transformers import AutoModelForCausalLM

from trainpilot.llm_runtime.masks import Criterion, WeightMasks, prunable_parameters
from trainpilot.llm_runtime.schedules import cubic_sparsity

CRITERIA: tuple[Criterion, ...] = ("magnitude", "evolution")
DEVICES = [
    "cpu",
    pytest.param(
        "cuda",
        marks=[
            pytest.mark.gpu,
            pytest.mark.skipif(not torch.cuda.is_available(), reason="needs an NVIDIA GPU"),
        ],
    ),
]


class TwoMatrices(nn.Module):
    """Layers [1, 4] and [2, 2] with given weights, and a head that must not be touched."""

    def __init__(self, first: list[float], second: list[float]) -> None:
        super().__init__()
        self.first, self.second = nn.Linear(4, 1), nn.Linear(2, 2)
        self.layers = nn.ModuleList([self.first, self.second])
        self.head = nn.Linear(2, 2)
        self.set(first, second)

    def set(self, first: list[float], second: list[float]) -> None:
        self.first.weight.data.copy_(torch.tensor(first).view(1, 4))
        self.second.weight.data.copy_(torch.tensor(second).view(2, 2))

    def weights(self) -> list[list[float]]:
        return [self.first.weight.flatten().tolist(), self.second.weight.flatten().tolist()]


def masked_tensors(masks: WeightMasks) -> dict[str, Tensor]:
    return {name: ~mask for name, mask in masks.state_dict()["masks"].items()}


def masked_count(masks: WeightMasks) -> int:
    return sum(int(mask.sum()) for mask in masked_tensors(masks).values())


@pytest.mark.parametrize(
    ("progress", "expected"), [(-1, 0.0), (0, 0.0), (0.5, 0.7), (0.75, 0.7875), (1, 0.8), (2, 0.8)]
)
def test_cubic_sparsity_by_hand(progress: float, expected: float) -> None:
    assert cubic_sparsity(0.0, 0.8, progress) == pytest.approx(expected)
    assert cubic_sparsity(0.4, 0.4, progress) == pytest.approx(0.4)


@pytest.mark.parametrize(
    ("family", "per_layer"),
    [
        (
            "llama",
            {f"self_attn.{x}_proj" for x in "qkvo"} | {f"mlp.{x}_proj" for x in ("gate", "up", "down")},
        ),
        ("gpt2", {"attn.c_attn", "attn.c_proj", "mlp.c_fc", "mlp.c_proj"}),
        (
            "gpt_neox",
            {"attention.query_key_value", "attention.dense", "mlp.dense_h_to_4h", "mlp.dense_4h_to_h"},
        ),
        ("opt", {f"self_attn.{x}_proj" for x in ("q", "k", "v", "out")} | {"fc1", "fc2"}),
    ],
)
def test_only_matrices_of_the_blocks_are_prunable(family: str, per_layer: set[str]) -> None:
    stack = {"llama": "model.layers", "gpt2": "transformer.h", "gpt_neox": "gpt_neox.layers"}
    prefix = stack.get(family, "model.decoder.layers")
    model = tiny_model(family)
    found = prunable_parameters(model)
    assert set(found) == {f"{prefix}.{layer}.{name}.weight" for layer in range(2) for name in per_layer}
    assert all(parameter is model.get_parameter(name) for name, parameter in found.items())
    assert all(parameter.ndim == 2 for parameter in found.values())


def test_shared_matrices_count_once_and_tied_embeddings_not_at_all() -> None:
    model = nn.Module()
    model.embedding = nn.Embedding(4, 4)
    model.layers = nn.ModuleList([nn.Linear(4, 4), nn.Linear(4, 4), nn.Linear(4, 4)])
    model.layers[1].weight = model.layers[0].weight
    model.layers[2].weight = model.embedding.weight
    assert list(prunable_parameters(model)) == ["layers.0.weight"]


@pytest.mark.parametrize("device", DEVICES)
def test_magnitude_zeroes_the_smallest_of_all_matrices(device: str) -> None:
    model = TwoMatrices([0.1, -5.0, 0.3, 4.0], [-0.2, 3.0, -0.4, 2.0]).to(device)
    head = model.head.weight.clone()
    masks = WeightMasks(model, "magnitude")
    masks.prune_to(3 / 8)
    kept = [[0.0, -5.0, 0.0, 4.0], [0.0, 3.0, -0.4, 2.0]]
    assert [pytest.approx(row) for row in kept] == model.weights()
    assert masks.sparsity() == 3 / 8
    assert masks.threshold_r is None
    assert torch.equal(model.head.weight, head)


@pytest.mark.parametrize("device", DEVICES)
def test_evolution_measures_each_matrix_by_its_own_spread(device: str) -> None:
    # |Wbar| is (1, 2, 3, 4) and (8, 16, 24, 32), of spread 1.29099 and 8 times that: both matrices have the
    # scores (1, 2, 3, 4) / 1.29099, and ties go to the first. Magnitude would take all three from the first.
    model = TwoMatrices([1.0, -2.0, 3.0, 4.0], [8.0, 16.0, -24.0, 32.0]).to(device)
    masks = WeightMasks(model, "evolution")
    masks.observe()
    masks.prune_to(3 / 8)
    assert model.weights() == [[0.0, 0.0, 3.0, 4.0], [0.0, 16.0, -24.0, 32.0]]
    assert masks.threshold_r == pytest.approx(2 / 1.2909944)


def test_evolution_ranks_by_the_path_not_by_the_last_weight() -> None:
    # Wbar_2 = (w_1 + 2 w_2) / 3 = (0, 4, 2, 3) in the first matrix: weight 0 ends at 2, its mean is 0.
    model = TwoMatrices([-4.0, 4.0, 2.0, 3.0], [2.0, 3.0, 4.0, 5.0])
    masks = WeightMasks(model, "evolution")
    masks.observe()
    model.set([2.0, 4.0, 2.0, 3.0], [2.0, 3.0, 4.0, 5.0])
    masks.observe()
    masks.prune_to(1 / 8)
    assert model.weights() == [[0.0, 4.0, 2.0, 3.0], [2.0, 3.0, 4.0, 5.0]]


def test_a_masked_weight_counts_even_where_its_mean_is_no_longer_small() -> None:
    model = TwoMatrices([1.0, 2.0, 3.0, 4.0], [2.0, 3.0, 4.0, 5.0])
    masks = WeightMasks(model, "evolution")
    masks.observe()
    masks.prune_to(1 / 8)
    model.set([0.0, -1.0, -1.5, 4.0], [2.0, 3.0, 4.0, 5.0])  # the means become (1/3, 0, 0, 4)
    masks.observe()
    masks.prune_to(2 / 8)
    assert model.weights() == [[0.0, 0.0, -1.5, 4.0], [2.0, 3.0, 4.0, 5.0]]


def test_ties_are_cut_at_the_exact_count_lowest_index_first() -> None:
    model = TwoMatrices([1.0, 1.0, 1.0, 0.0], [1.0, 1.0, 1.0, 1.0])
    masks = WeightMasks(model, "magnitude")
    masks.prune_to(0.5)
    assert model.weights() == [[0.0, 0.0, 0.0, 0.0], [1.0, 1.0, 1.0, 1.0]]
    assert masked_count(masks) == 4


@pytest.mark.parametrize("criterion", CRITERIA)
def test_equal_weights_have_no_spread_and_still_meet_the_count(criterion: Criterion) -> None:
    masks = WeightMasks(TwoMatrices([0.0] * 4, [1.0] * 4), criterion)
    masks.prune_to(5 / 8)
    assert masked_count(masks) == 5


@pytest.mark.parametrize("criterion", CRITERIA)
@pytest.mark.parametrize("family", FAMILIES)
def test_counts_are_exact_and_masks_only_grow(family: str, criterion: Criterion) -> None:
    model = tiny_model(family)
    total = sum(weight.numel() for weight in prunable_parameters(model).values())
    masks, previous = WeightMasks(model, criterion), None
    for seed, sparsity in enumerate((0.0, 0.1, 0.333, 0.9)):
        with torch.no_grad():  # other weights are the smallest at each pruning
            for weight in prunable_parameters(model).values():
                weight.copy_(torch.randn(weight.shape, generator=torch.Generator().manual_seed(seed)))
        masks.apply()
        masks.observe()
        masks.prune_to(sparsity)
        assert masked_count(masks) == round(sparsity * total)
        assert masks.sparsity() == pytest.approx(round(sparsity * total) / total, abs=1e-12)
        current = masked_tensors(masks)
        assert previous is None or all((current[name] >= previous[name]).all() for name in current)
        previous = current
    masks.prune_to(0.2)
    assert masked_count(masks) == round(0.9 * total)


def test_running_mean_equals_its_definition() -> None:
    model = tiny_model("llama")
    weights = prunable_parameters(model)
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.05)
    masks = WeightMasks(model, "evolution")
    path: list[dict[str, Tensor]] = []
    for step in range(7):
        train_step(model, optimizer, step)
        masks.observe()
        path.append({name: weight.detach().double().clone() for name, weight in weights.items()})
    state = masks.state_dict()
    assert state["steps"] == 7
    for name, mean in state["mean"].items():
        direct = sum(t * w[name] for t, w in enumerate(path, start=1)) / sum(range(1, 8))
        torch.testing.assert_close(mean.double(), direct, rtol=1e-5, atol=1e-6)


def test_mean_of_bfloat16_weights_is_kept_in_float32() -> None:
    model = tiny_model("llama").bfloat16()
    masks = WeightMasks(model, "evolution")
    masks.observe()
    masks.prune_to(0.5)
    assert {mean.dtype for mean in masks.state_dict()["mean"].values()} == {torch.float32}
    assert masks.sparsity() == pytest.approx(0.5, abs=1e-4)


@pytest.mark.parametrize("criterion", CRITERIA)
@pytest.mark.parametrize("family", ["gpt2", "llama"])
def test_masked_weights_stay_zero_through_adamw(family: str, criterion: Criterion) -> None:
    model = tiny_model(family)
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.01)
    masks = WeightMasks(model, criterion)
    train_step(model, optimizer)
    masks.observe()
    masks.prune_to(0.5)
    zero = masked_tensors(masks)
    start = logits(model)
    for step in range(3):
        train_step(model, optimizer, step)
        masks.apply()
        masks.observe()
        weights = prunable_parameters(model)
        assert all((weights[name][mask] == 0).all() for name, mask in zero.items())
    assert masks.sparsity() == pytest.approx(0.5, abs=1e-4)
    assert not torch.allclose(logits(model), start)


def test_apply_without_masks_leaves_training_untouched() -> None:
    plain, watched = tiny_model("gpt2"), tiny_model("gpt2")
    masks = WeightMasks(watched, "evolution")
    steps: list[Callable[[], None]] = [lambda: None, lambda: (masks.apply(), masks.observe())[0]]
    for model, after in zip((plain, watched), steps, strict=True):
        optimizer = torch.optim.AdamW(model.parameters(), lr=0.01)
        for step in range(2):
            train_step(model, optimizer, step)
            after()
    assert torch.equal(logits(plain), logits(watched))


@pytest.mark.parametrize("criterion", CRITERIA)
def test_state_goes_round_a_file_bit_for_bit(criterion: Criterion) -> None:
    model = tiny_model("qwen2")
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.01)
    masks = WeightMasks(model, criterion)
    for step in range(3):
        train_step(model, optimizer, step)
        masks.observe()
        masks.prune_to(0.1 * step)
    file = io.BytesIO()
    torch.save(masks.state_dict(), file)
    file.seek(0)
    other = WeightMasks(tiny_model("qwen2", seed=1), criterion)
    other.load_state_dict(torch.load(file, weights_only=True))
    first, second = masks.state_dict(), other.state_dict()
    assert {**first, "masks": 0, "mean": 0} == {**second, "masks": 0, "mean": 0}
    assert len(first["mean"]) == (14 if criterion == "evolution" else 0)
    for part in ("masks", "mean"):
        assert first[part].keys() == second[part].keys()
        assert all(torch.equal(first[part][name], second[part][name]) for name in first[part])
    other.apply()
    assert other.sparsity() == masks.sparsity()


def test_a_state_is_a_copy_and_can_take_masks_back() -> None:
    model = tiny_model("opt")
    masks = WeightMasks(model, "evolution")
    before = masks.state_dict()
    masks.observe()
    masks.prune_to(0.5)
    assert masked_count(masks) > 0
    masks.load_state_dict(before)
    assert masked_count(masks) == 0
    assert masks.steps == 0


def test_a_pruned_model_saves_and_loads_plain(tmp_path: object) -> None:
    model = tiny_model("gpt2")
    WeightMasks(model, "magnitude").prune_to(0.5)
    model.save_pretrained(str(tmp_path))
    loaded = AutoModelForCausalLM.from_pretrained(str(tmp_path))
    assert torch.equal(logits(model), logits(loaded))
    assert WeightMasks(loaded, "magnitude").sparsity() == pytest.approx(0.5, abs=1e-4)


def test_faulty_arguments_are_named() -> None:
    masks = WeightMasks(tiny_model("llama"), "magnitude")
    for sparsity in (-0.1, 1.0, float("nan")):
        with pytest.raises(ValueError, match="sparsity must be in"):
            masks.prune_to(sparsity)
    with pytest.raises(ValueError, match="criterion must be one of magnitude, evolution, got 'random'"):
        WeightMasks(tiny_model("llama"), "random")  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="ModuleList"):
        WeightMasks(nn.Linear(2, 2), "magnitude")
    with pytest.raises(ValueError, match="criterion of the state"):
        masks.load_state_dict(WeightMasks(tiny_model("llama"), "evolution").state_dict())
    with pytest.raises(ValueError, match="differ in"):
        masks.load_state_dict(WeightMasks(tiny_model("gpt2"), "magnitude").state_dict())
