"""Every bad setting of a run is refused with its name, the rule and the value; good ones give the derived numbers."""

from __future__ import annotations

import math
import re
import subprocess
import sys
from typing import Any

import pytest

from trainpilot.llm_runtime.config import Controls, RunConfig
from trainpilot.llm_runtime.live_run import resolve_device
from trainpilot.llm_runtime.schedules import PARTS

WHOLE = "must be a whole number of at least"

BAD: list[tuple[str, Any, str]] = [
    ("tokens", 0, f"tokens {WHOLE} 1, got 0"),
    ("tokens", 1e6, f"tokens {WHOLE} 1, got 1000000.0"),
    ("tokens", "1000000", f"tokens {WHOLE} 1, got '1000000'"),
    ("batch_size", 0, f"batch_size {WHOLE} 1, got 0"),
    ("batch_size", 2.5, f"batch_size {WHOLE} 1, got 2.5"),
    ("sequence_length", -1, f"sequence_length {WHOLE} 1, got -1"),
    ("decisions", 0, f"decisions {WHOLE} 1, got 0"),
    ("seed", -1, f"seed {WHOLE} 0, got -1"),
    ("base_learning_rate", 0.0, "base_learning_rate must be a positive number, got 0.0"),
    ("base_learning_rate", -1e-3, "base_learning_rate must be a positive number, got -0.001"),
    ("base_learning_rate", math.inf, "base_learning_rate must be a positive number, got inf"),
    ("base_learning_rate", math.nan, "base_learning_rate must be a positive number, got nan"),
    ("base_learning_rate", "1e-3", "base_learning_rate must be a positive number, got '1e-3'"),
    ("gradient_clip", 0.0, "gradient_clip must be a positive number, got 0.0"),
    ("gradient_clip", math.nan, "gradient_clip must be a positive number, got nan"),
    ("beta1", 1.0, "beta1 must be in [0, 1), got 1.0"),
    ("beta1", -0.1, "beta1 must be in [0, 1), got -0.1"),
    ("beta2", 1.5, "beta2 must be in [0, 1), got 1.5"),
    ("beta2", math.nan, "beta2 must be in [0, 1), got nan"),
    ("weight_decay", -0.1, "weight_decay must be a number >= 0, got -0.1"),
    ("weight_decay", math.nan, "weight_decay must be a number >= 0, got nan"),
    ("schedule", "poly", "schedule must be one of linear, cosine, wsd, constant, got 'poly'"),
    ("precision", "fp8", "precision must be one of fp32, tf32, bf16, fp16, got 'fp8'"),
    ("pruning", "random", "pruning must be one of none, magnitude, evolution, width, got 'random'"),
    ("pruning_importance", "size", "pruning_importance must be one of weight, activation, got 'size'"),
    (
        "pruning_importance",
        "activation",
        "pruning_importance must be 'weight' where pruning is not 'width', got 'activation'",
    ),
    ("optimizer", "sgd", "optimizer must be one of adamw, schedule-free, prodigy, got 'sgd'"),
    ("text", (), "text must name at least one source, got none; the default is 'stdlib'"),
    ("warmup_tokens", -1, "warmup_tokens must be a whole number of at least 0, got -1"),
    ("warmup_share", 1.0, "warmup_share must be in [0, 1), got 1.0"),
    ("warmup_share", math.nan, "warmup_share must be in [0, 1), got nan"),
    ("vocabulary", 255, "vocabulary must be a whole number of at least 256, got 255"),
    ("vocabulary", 65_537, "vocabulary must be a whole number of at most 65536, got 65537"),
    ("vocabulary", 2e3, "vocabulary must be a whole number of at least 256, got 2000.0"),
    ("budget", "0s", "budget must be above 0, got 0s"),
    ("budget", "1M", "budget must be in seconds or joules, got '1M'; give tokens=1000000"),
    ("warmup_tokens", 1_000_000, "warmup_tokens must be in [0, tokens), got 1000000"),
]


@pytest.mark.parametrize(("name", "value", "message"), BAD)
def test_bad_value(name: str, value: Any, message: str) -> None:
    with pytest.raises(ValueError, match=f"^{re.escape(message)}$"):
        RunConfig(**{name: value})


def test_budget_gives_every_decision_a_step() -> None:
    RunConfig(tokens=51_200, batch_size=16, sequence_length=64, decisions=50)
    with pytest.raises(ValueError, match="tokens must give every decision at least one step") as raised:
        RunConfig(tokens=51_199, batch_size=16, sequence_length=64, decisions=50)
    assert "50 decisions x batch_size 16 x sequence_length 64 = 51,200, got 51,199" in str(raised.value)
    assert "raise the budget or lower one of the three" in str(raised.value)


def test_a_budget_in_seconds_takes_the_place_of_tokens() -> None:
    config = RunConfig(budget="10min", batch_size=1_000, warmup_share=0.1)  # tokens would be too few for that batch
    budget = config.measured_budget()
    assert budget is not None
    assert (budget.amount, budget.currency) == (600.0, "time_s")
    schedule = config.base_schedule()
    assert (schedule.budget_tokens, schedule.warmup_tokens) == (PARTS, PARTS // 10)
    assert RunConfig(budget="50kJ").base_schedule().warmup_tokens == PARTS // 50
    assert RunConfig(warmup_share=0.1).warmup() == 100_000
    with pytest.raises(ValueError, match=r"^budget must be in tokens for that, got 10min; give tokens instead$"):
        config.n_sequences()


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        (
            {"warmup_tokens": 5, "warmup_share": 0.1},
            "warmup_tokens cannot be combined with warmup_share, got 5 and 0.1",
        ),
        ({"warmup_tokens": 5, "budget": "9s"}, "warmup_tokens must be left out under budget 9s, got 5"),
    ],
)
def test_warm_up_is_given_once_and_as_a_share_of_seconds(settings: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=f"^{re.escape(message)}; give"):
        RunConfig(**settings)


def test_newer_fields_are_written_only_where_they_are_set() -> None:
    assert not {"vocabulary", "budget", "warmup_share"} & {*RunConfig().to_json(), *RunConfig().settings()}
    config = RunConfig(budget="9s", warmup_share=0.1, vocabulary=2048)
    assert config.to_json()["budget"] == config.settings()["budget"] == "9s"
    assert config.to_json()["vocabulary"] == config.settings()["vocabulary"] == 2048
    assert RunConfig.from_json(config.to_json()) == config
    assert RunConfig.from_json(RunConfig().to_json()) == RunConfig()


@pytest.mark.parametrize("optimizer", ["schedule-free", "prodigy"])
@pytest.mark.parametrize("pruning", ["magnitude", "evolution", "width"])
def test_only_adamw_prunes(optimizer: Any, pruning: Any) -> None:
    RunConfig(pruning=pruning)
    RunConfig(optimizer=optimizer)
    message = f"pruning must be 'none' with optimizer '{optimizer}', got '{pruning}'; only optimizer 'adamw' can prune"
    with pytest.raises(ValueError, match=f"^{re.escape(message)}$"):
        RunConfig(optimizer=optimizer, pruning=pruning)


def test_derived_numbers_by_hand() -> None:
    config = RunConfig(tokens=100_000, batch_size=8, sequence_length=96, decisions=20, precision="bf16")

    assert config.n_sequences() == 1_041  # 99,936 tokens; the last 64 make no sequence
    assert config.warmup() == 2_000
    assert config.base_schedule().budget_tokens == 99_936
    assert config.start() == Controls(batch_size=8, precision="bf16")
    assert RunConfig(warmup_tokens=77).warmup() == 77


def test_start_touches_nothing() -> None:
    start = RunConfig().start()
    assert (start.learning_rate_scale, start.sparsity, start.finish) == (1.0, 0.0, False)


@pytest.mark.parametrize("name", ["tpu", "cpu:x", ""])
def test_unknown_device(name: str) -> None:
    with pytest.raises(ValueError, match=f"^device must be auto, cpu, cuda or mps, got '{name}'$"):
        resolve_device(name)


def test_no_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("torch.cuda.is_available", lambda: False)
    assert resolve_device("auto").type == "cpu"
    with pytest.raises(ValueError, match=r"^device: 'cuda:1' needs an NVIDIA GPU .* use 'cpu' or 'auto'$"):
        resolve_device("cuda:1")


def test_a_mac_s_gpu_that_is_not_there_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("torch.backends.mps.is_available", lambda: False)
    with pytest.raises(ValueError, match=r"^device: 'mps' needs a Mac with Apple silicon .* use 'cpu' or 'auto'$"):
        resolve_device("mps")


def test_a_mac_s_gpu_is_taken_by_name_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("torch.cuda.is_available", lambda: False)
    monkeypatch.setattr("torch.backends.mps.is_available", lambda: True)
    assert resolve_device("mps").type == "mps"
    assert resolve_device("auto").type == "cpu"
    with pytest.raises(ValueError, match=r"^device: 'mps:1' is not there, as torch sees 1 of that type; use 'mps'$"):
        resolve_device("mps:1")


def test_a_gpu_is_taken_if_there_is_one(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("torch.cuda.is_available", lambda: True)
    monkeypatch.setattr("torch.cuda.device_count", lambda: 2)
    assert resolve_device("auto").type == "cuda"
    assert resolve_device("cuda:1").index == 1
    with pytest.raises(ValueError, match=r"^device: 'cuda:2' is not there, as torch sees 2 .*; use 'cuda'$"):
        resolve_device("cuda:2")


def test_can_be_read_without_torch() -> None:
    code = "import sys, trainpilot.llm_runtime.config; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
