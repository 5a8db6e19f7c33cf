"""On a model that comes trained the learning rate stays near the user's; one from scratch is not mistaken for it."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from live_runs import GPT2, LLAMA, case
from steering_loops import Loop
from torch import nn
from torch.nn import functional as F
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedModel

from trainpilot.agents.steering.guardrails import GuardrailSettings
from trainpilot.agents.steering.model_checks import is_pretrained, looks_trained, near_learning_rate
from trainpilot.agents.steering.settings import SteeringSettings
from trainpilot.agents.steering.steering import Steering
from trainpilot.envs.action import KEEP, LEARNING_RATE_FACTORS, Action
from trainpilot.llm_runtime.config import RunConfig
from trainpilot.llm_runtime.energy.meter import NoMeter

DOUBLE: Action = (LEARNING_RATE_FACTORS.index(2.0), *KEEP[1:])


def always_up(*_: Any) -> Action:
    return DOUBLE


@pytest.fixture(params=[LLAMA, GPT2], ids=["llama", "gpt2"])
def config(tmp_path: Path, request: pytest.FixtureRequest) -> RunConfig:
    return case(tmp_path, request.param, tokens=6_400, batch_size=4, decisions=10)


def trained(config: RunConfig, folder: Path) -> PreTrainedModel:
    """Return a model that was trained for a few steps, as it comes from a folder."""
    mine = Loop(config, "none")
    mine.train(5)
    mine.model.save_pretrained(folder)
    loaded: PreTrainedModel = AutoModelForCausalLM.from_pretrained(folder)
    return loaded


def test_a_loaded_model_comes_trained_and_a_new_one_does_not(config: RunConfig, tmp_path: Path) -> None:
    loaded = trained(config, tmp_path / "model")
    assert is_pretrained(loaded)
    assert is_pretrained(nn.Sequential(loaded)), "wrapped, as by DistributedDataParallel"
    new = AutoModelForCausalLM.from_config(AutoConfig.from_pretrained(tmp_path / "model"))
    assert new.name_or_path, "the config carries the folder's name"
    assert not is_pretrained(new)
    mine = Loop(config, "none")
    mine.train(5)
    assert not is_pretrained(mine.model), "trained here, and loaded from nowhere"


def test_adapters_on_a_trained_model_come_trained(config: RunConfig, tmp_path: Path) -> None:
    peft = pytest.importorskip("peft")
    target = "c_attn" if "gpt2" in config.model else "q_proj"
    lora = peft.LoraConfig(r=2, target_modules=[target], fan_in_fan_out=target == "c_attn")
    assert is_pretrained(peft.get_peft_model(trained(config, tmp_path / "model"), lora))


@pytest.mark.parametrize(
    ("settings", "highest"),
    [
        ({}, 64.0),
        ({"fine_tuning": True}, 2.0),
        ({"fine_tuning": True, "learning_rate_range": (1e-6, 4e-2)}, 4.0),
    ],
    ids=["from scratch", "fine-tuned", "with a range of its own"],
)
def test_the_learning_rate_rises_no_further_than_it_may(
    tmp_path: Path, settings: dict[str, Any], highest: float
) -> None:
    bounds = GuardrailSettings(cautious=False, learning_rate_range=settings.get("learning_rate_range"))
    options: dict[str, Any] = {"guardrails": bounds, "fine_tuning": settings.get("fine_tuning")}
    mine = Loop(case(tmp_path, LLAMA, tokens=6_400, batch_size=4, decisions=10), always_up, **options)
    mine.train()
    scales = [record.telemetry.requested.learning_rate_scale for record in mine.steering.records]
    assert max(scales) == highest
    refused = any("learning rate would leave" in reason for r in mine.steering.records for reason in r.refusals)
    assert refused is (highest < 64)


def test_a_run_from_scratch_that_goes_on_keeps_its_bounds(config: RunConfig, tmp_path: Path) -> None:
    first = Loop(config, always_up)
    first.train(20)
    first.model.save_pretrained(tmp_path / "model")
    second = Loop(config, always_up, fine_tuning=None)
    second.steering.fine_tuning = True  # what its weights, loaded by name, would say
    second.steering.load_state_dict(first.steering.state_dict())
    assert not second.steering.fine_tuning
    assert second.steering.controller.guardrails.settings.learning_rate_range is None


def test_bounds_are_counted_from_the_user_s_rate() -> None:
    bounds = near_learning_rate(GuardrailSettings(max_rollbacks=1), 1e-3)
    assert bounds.learning_rate_range == (1e-6, 2e-3)
    assert bounds.max_rollbacks == 1
    own = GuardrailSettings(learning_rate_range=(1e-4, 1e-2))
    assert near_learning_rate(own, 1e-3) is own


def test_the_policy_s_domain_names_it(tmp_path: Path) -> None:
    config = case(tmp_path, LLAMA, tokens=64_000, batch_size=4, decisions=50)
    scratch_alone = Path(__file__).parents[2] / "golden" / "version_0_1" / "default.safetensors"
    with pytest.warns(UserWarning, match="fine_tuning True is outside of False"):
        Loop(config, str(scratch_alone), fine_tuning=True)


class Plain(nn.Module):
    """A language model that does not say where it comes from."""

    def __init__(self, outputs: int = 256) -> None:
        super().__init__()
        self.embed = nn.Embedding(256, 4)
        self.out = nn.Linear(4, outputs)

    def forward(self, rows: torch.Tensor) -> torch.Tensor:
        return F.cross_entropy(self.out(self.embed(rows[:, :-1])).flatten(0, 1), rows[:, 1:].flatten())


def test_a_first_loss_far_below_that_of_a_new_model_tells() -> None:
    assert not looks_trained(Plain(), 5.5)  # ln 256 = 5.545
    assert not looks_trained(Plain(), 3.4)
    assert looks_trained(Plain(), 3.3)  # 0.6 x 5.545 = 3.327
    assert not looks_trained(Plain(outputs=2), 0.7), "a classifier, not a language model"
    assert not looks_trained(nn.Linear(4, 256), 0.7), "no vocabulary"


def test_a_plain_model_that_comes_trained_keeps_near_its_rate() -> None:
    rows = torch.zeros(8, 64, dtype=torch.long)  # a text that is soon learnt

    def steered(model: Plain, **settings: Any) -> Steering:
        optimizer = torch.optim.Adam(model.parameters(), lr=1e-2)
        options: dict[str, Any] = {
            "sequences": 400,
            "batch_size": 4,
            "policy": always_up,
            "decisions": 10,
            "probe": False,
        }
        run = Steering(model, optimizer, SteeringSettings(**options | settings), meter=NoMeter("a test"))
        while not run.finished:
            with run.step() as step:
                step.backward(model, batch=rows[: step.batch_size])
        return run

    torch.manual_seed(0)
    model = Plain()
    first = steered(model, policy="none")
    assert not first.fine_tuning
    first.close()
    again = steered(model)
    assert again.fine_tuning
    assert max(record.telemetry.requested.learning_rate_scale for record in again.records) <= 2
    again.close()
    assert not steered(model, fine_tuning=False).fine_tuning
