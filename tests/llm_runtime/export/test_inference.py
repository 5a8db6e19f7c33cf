"""The loss is that of transformers, and a request's figures follow from its seconds and joules."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM

from trainpilot.llm_runtime.energy.meter import EnergyReading, NoMeter, RecordedMeter
from trainpilot.llm_runtime.export.inference import RequestCost, Transformers, mean_loss, measure_turn_about
from trainpilot.llm_runtime.timing import Cost

COST = RequestCost(
    prompt_tokens=100,
    new_tokens=50,
    prefill=Cost(time_s=0.2, energy_j=1.0),
    request=Cost(time_s=0.7, energy_j=4.0),
    energy_source="measured_counter",
    spread=1.1,
)


def model() -> LlamaForCausalLM:
    torch.manual_seed(0)
    shape: dict[str, Any] = {
        "hidden_size": 16,
        "intermediate_size": 32,
        "num_hidden_layers": 1,
        "num_attention_heads": 2,
    }
    made: LlamaForCausalLM = LlamaForCausalLM(LlamaConfig(vocab_size=50, **shape)).eval()
    return made


def test_the_loss_is_the_mean_over_all_tokens(monkeypatch: pytest.MonkeyPatch) -> None:
    windows = np.random.default_rng(0).integers(0, 50, (7, 9))
    with torch.no_grad():
        ids = torch.from_numpy(windows)
        expected = float(model()(input_ids=ids, labels=ids).loss)

    assert mean_loss(model(), windows) == pytest.approx(expected, rel=1e-6)
    monkeypatch.setattr("trainpilot.llm_runtime.export.inference.LOSS_TOKENS_AT_ONCE", 20)
    assert mean_loss(model(), windows) == pytest.approx(expected, rel=1e-6)


def test_figures_of_a_request_by_hand() -> None:
    assert COST.prefill_tokens_per_s == pytest.approx(500)  # 100 tokens in 0.2 s
    assert COST.decode_tokens_per_s == pytest.approx(100)  # 50 tokens in the other 0.5 s
    assert COST.prefill_j_per_token == pytest.approx(0.01)
    assert COST.decode_j_per_token == pytest.approx(0.06)


def test_what_is_unknown_stays_so() -> None:
    noisy = replace(COST, request=Cost(time_s=0.2, energy_j=0.9))
    unmetered = replace(COST, prefill=Cost(time_s=0.2, energy_j=None), request=Cost(time_s=0.7, energy_j=None))

    assert noisy.decode_tokens_per_s is None
    assert noisy.decode_j_per_token is None
    assert unmetered.prefill_j_per_token is None
    assert unmetered.decode_j_per_token is None
    assert RequestCost.from_json(unmetered.to_json()) == unmetered


def test_generation_with_the_cache_is_that_of_transformers(monkeypatch: pytest.MonkeyPatch) -> None:
    prompt, chosen = np.arange(5), []
    own = torch.Tensor.argmax
    runtime_model: Any = model()

    def noting(logits: torch.Tensor, *arguments: Any, **options: Any) -> torch.Tensor:
        chosen.append(token := own(logits, *arguments, **options))
        return token

    ids = torch.from_numpy(prompt)[None]
    expected = runtime_model.generate(ids, max_new_tokens=6, do_sample=False, eos_token_id=None, pad_token_id=0)
    with monkeypatch.context() as patched:
        patched.setattr(torch.Tensor, "argmax", noting)
        Transformers(runtime_model, prompt, 6).request()

    assert [int(token) for token in chosen] == expected[0, 5:].tolist()


class Counting:
    """Counts what it is asked for."""

    def __init__(self) -> None:
        self.calls = {"prefill": 0, "request": 0}

    def prefill(self) -> None:
        self.calls["prefill"] += 1

    def request(self) -> None:
        self.calls["request"] += 1
        sum(range(2000))


def test_runtimes_are_measured_in_turn() -> None:
    runtimes = {"one": Counting(), "other": Counting()}

    found = measure_turn_about(runtimes, NoMeter("a test"), "cpu", prompt_tokens=3, new_tokens=2, limit_s=0.01)

    assert list(found) == ["one", "other"]
    assert all(each.prefill.energy_j is None and each.energy_source is None for each in found.values())
    assert all(each.prefill.time_s > 0 and each.request.time_s > 0 for each in found.values())
    assert all(count > 8 for runtime in runtimes.values() for count in runtime.calls.values())


def test_the_joules_name_their_source() -> None:
    readings = [EnergyReading(time_s=i / 10, energy_j=2.0 * i, source="measured_counter") for i in range(500)]

    found = measure_turn_about(
        {"one": Counting()}, RecordedMeter(readings), "cpu", prompt_tokens=3, new_tokens=2, limit_s=0.01
    )

    assert found["one"].energy_source == "measured_counter"
    assert found["one"].request.energy_j == pytest.approx(20.0 * found["one"].request.time_s)  # 2 J every 0.1 s
