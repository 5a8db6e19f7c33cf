"""The law gives its published numbers, agrees with measured optima, and its advice fits into a run."""

from __future__ import annotations

import math

import pytest
from torch import nn
from transformers import LlamaConfig, LlamaForCausalLM

from trainpilot.llm_runtime.layers import body_parameters
from trainpilot.llm_runtime.models import PRESETS, body_parameters_of, load_model
from trainpilot.llm_runtime.scaling_laws import Advice, step_law


def test_the_law_by_hand() -> None:
    # 1.797 (10^8)^-0.713 (10^10)^0.307 and 0.580 (10^10)^0.571
    advice = step_law(1e8, 1e10)

    assert advice.learning_rate == pytest.approx(1.797 * 10 ** (-8 * 0.713 + 10 * 0.307), rel=1e-3)
    assert advice.batch_tokens == pytest.approx(0.580 * 10**5.71, rel=2e-3)


@pytest.mark.parametrize(
    ("n_parameters", "tokens", "batch_tokens"),
    [(215e6, 4e9, 194e3), (215e6, 11e9, 345e3), (215e6, 20e9, 625e3), (215e6, 100e9, 2.0e6), (1.07e9, 20e9, 477e3)],
)
def test_the_law_is_near_the_optima_that_were_interpolated_from_its_data(
    n_parameters: float, tokens: float, batch_tokens: float
) -> None:
    assert abs(math.log2(step_law(n_parameters, tokens).batch_tokens / batch_tokens)) < 0.9


def test_the_rates_of_the_law_are_near_the_best_ones_of_its_data() -> None:
    # 2.5e-3 to 6.6e-3 at 215 M from 4 to 100 B tokens, 1.2e-3 at 1.07 B and 20 B
    for n_parameters, tokens, best in ((215e6, 4e9, 2.5e-3), (215e6, 1e11, 6.6e-3), (1.07e9, 2e10, 1.2e-3)):
        assert abs(math.log2(step_law(n_parameters, tokens).learning_rate / best)) < 0.5


@pytest.mark.parametrize(("name", "n", "d"), [("n_parameters", 0, 1e6), ("tokens", 1e6, -1), ("tokens", 1e6, math.nan)])
def test_what_is_no_size_is_refused(name: str, n: float, d: float) -> None:
    with pytest.raises(ValueError, match=f"{name} must be a positive number, got"):
        step_law(n, d)


def test_a_batch_is_a_power_of_two_that_leaves_an_interval_four_steps() -> None:
    advice = Advice(learning_rate=1e-3, batch_tokens=1_400)

    assert advice.batch_size(sequence_length=64, n_sequences=100_000, decisions=50) == 16  # 21.9 sequences
    assert advice.batch_size(sequence_length=50, n_sequences=100_000, decisions=50) == 32  # 28 sequences
    assert advice.batch_size(sequence_length=64, n_sequences=2_000, decisions=50) == 8  # 40 in an interval
    assert advice.batch_size(sequence_length=64, n_sequences=100, decisions=50) == 1
    assert advice.batch_size(sequence_length=4_096, n_sequences=100_000, decisions=50) == 1


def test_a_smaller_batch_gets_a_lower_rate_and_a_larger_one_no_higher() -> None:
    advice = Advice(learning_rate=1e-3, batch_tokens=4_096)

    assert [advice.learning_rate_at(tokens) for tokens in (1_024.0, 4_096.0, 65_536.0)] == [5e-4, 1e-3, 1e-3]


def test_the_body_is_the_model_without_its_vocabulary() -> None:
    config = LlamaConfig(vocab_size=8, hidden_size=16, intermediate_size=32, num_hidden_layers=2, num_attention_heads=2)
    body = 2 * (4 * 16 * 16 + 3 * 16 * 32 + 2 * 16) + 16  # with the gains of the norms
    assert body_parameters(LlamaForCausalLM(config)) == body
    tied = LlamaForCausalLM(LlamaConfig(**{**config.to_dict(), "tie_word_embeddings": True}))
    assert body_parameters(tied) == body
    assert body_parameters(nn.Linear(3, 2)) == 8


@pytest.mark.parametrize("name", PRESETS)
def test_the_body_is_counted_without_making_the_model(name: str) -> None:
    assert body_parameters_of(name) == body_parameters(load_model(name, 0).model)


def test_a_pretrained_model_has_no_count() -> None:
    assert body_parameters_of("some/model-of-the-hub") is None
