"""Cuts of a model by what they cost on a held text: sizes, their order, and a number of parameters."""

from __future__ import annotations

import copy
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest
import torch
from pruning_models import VOCABULARY, layers, logits, model_of, tiny_model
from transformers import PreTrainedModel, Qwen2Config

from trainpilot.llm_runtime.cuts import (
    Cut,
    Part,
    count_parameters,
    cut_to_parameters,
    cut_to_sizes,
    part_fault,
    part_size,
    size_of_share,
)
from trainpilot.llm_runtime.export.inference import mean_loss


def wide_model(n_blocks: int = 3) -> PreTrainedModel:
    """Return a random model of 64 channels and four groups of one head, all of which matter."""
    sizes: dict[str, Any] = {"num_hidden_layers": n_blocks, "hidden_size": 16, "intermediate_size": 64}
    heads: dict[str, Any] = {"num_attention_heads": 4, "num_key_value_heads": 4}
    torch.manual_seed(3)
    model = model_of(Qwen2Config(**sizes, **heads, vocab_size=VOCABULARY, max_position_embeddings=32))
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if parameter.ndim == 2:
                parameter.mul_(20 if "lm_head" in name else 10 if "layers" in name else 1)
    return model


def own_text(model: PreTrainedModel) -> npt.NDArray[np.int64]:
    """Return windows of the text that a model is surest of, so that most cuts cost it something."""
    starts = torch.arange(3, 9)[:, None]
    written: Any = model.generate(starts, max_new_tokens=8, do_sample=False, eos_token_id=None)  # type: ignore[operator]
    return written.numpy()  # type: ignore[no-any-return]


def without_effect(model: PreTrainedModel, block: int) -> None:
    with torch.no_grad():
        layers(model)[block].self_attn.o_proj.weight.zero_()
        layers(model)[block].mlp.down_proj.weight.zero_()


def test_shares_become_the_nearest_sizes_that_there_are() -> None:
    model = wide_model()
    assert [part_size(model, part) for part in ("ffn", "heads", "depth")] == [64, 4, 3]
    assert [size_of_share(model, "ffn", share) for share in (0.5, 0.55, 0.01)] == [32, 32, 8]
    assert [size_of_share(model, "heads", share) for share in (0.5, 0.3, 0.01)] == [2, 1, 1]
    assert [size_of_share(model, "depth", share) for share in (0.67, 0.5, 0.1)] == [2, 2, 1]
    with pytest.raises(ValueError, match=r"depth must leave fewer than all 3 blocks, got 0.95, which leaves all"):
        size_of_share(model, "depth", 0.95)


def test_the_cheaper_cut_comes_first_and_the_model_stays() -> None:
    model = wide_model()
    without_effect(model, 1)  # a block costs nothing
    before, found, windows = logits(model).clone(), list[Cut](), own_text(model)

    smaller, cuts = cut_to_sizes(model, {"ffn": 8, "heads": 1, "depth": 2}, windows, found.append)

    assert (cuts[0].part, cuts[0].size_before, cuts[0].size) == ("depth", 3, 2)
    assert {each.part for each in cuts} == {"ffn", "heads", "depth"}
    assert cuts[0].loss == pytest.approx(mean_loss(model, windows), abs=1e-6)
    assert cuts[-1].loss == mean_loss(smaller, windows)
    assert cuts[-1].n_parameters == count_parameters(smaller)
    assert cuts == found
    assert torch.equal(logits(model), before)
    assert [part_size(smaller, part) for part in ("ffn", "heads", "depth")] == [8, 1, 2]


def test_a_number_of_parameters_is_reached_by_cuts_that_cost_nothing() -> None:
    model = wide_model()
    without_effect(model, 0)
    without_effect(model, 2)
    one_block = sum(p.numel() for p in layers(model)[0].parameters())
    wanted = count_parameters(model) - 2 * one_block

    smaller, cuts = cut_to_parameters(model, wanted, own_text(model), least={"ffn": 64})

    # Heads of the idle blocks go with those of the busy one, so a block is the cheapest cut.
    assert [each.part for each in cuts] == ["depth", "depth"]
    assert count_parameters(smaller) == wanted
    assert torch.equal(
        layers(smaller)[0].mlp.down_proj.weight,
        layers(model)[1].mlp.down_proj.weight,
    )


def test_a_search_respects_the_least_sizes_and_says_what_it_reached() -> None:
    model = wide_model(n_blocks=2)
    with pytest.raises(
        ValueError, match=r"parameters must be at least [\d,]+, what is left once ffn, heads, depth are cut"
    ):
        cut_to_parameters(model, 10, own_text(model))

    least: dict[Part, int] = {"heads": 4, "depth": 2}
    wanted = count_parameters(model) - 2000
    smaller, _ = cut_to_parameters(model, wanted, own_text(model), least=least)

    assert part_size(smaller, "heads") == 4
    assert part_size(smaller, "depth") == 2
    assert part_size(smaller, "ffn") < 64


def test_gpt2_is_cut_without_its_heads() -> None:
    model = tiny_model("gpt2")
    assert part_fault(model, "ffn") is part_fault(model, "depth") is None
    smaller, cuts = cut_to_parameters(model, count_parameters(model) - 2000, own_text(model))
    assert {each.part for each in cuts} <= {"ffn", "depth"}
    assert count_parameters(smaller) <= count_parameters(model) - 2000


def test_cuts_repeat_to_the_last_bit() -> None:
    model = wide_model()
    first, _ = cut_to_sizes(copy.deepcopy(model), {"ffn": 24, "depth": 2}, own_text(model))
    second, _ = cut_to_sizes(model, {"ffn": 24, "depth": 2}, own_text(model))
    assert torch.equal(logits(first), logits(second))
