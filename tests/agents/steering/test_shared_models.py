"""A model that processes share in a way that is not supported is refused when steering is made."""

from __future__ import annotations

from typing import Any, cast

import pytest
import torch
from torch import nn
from torch.distributed.fsdp import FullyShardedDataParallel
from torch.distributed.tensor import Replicate, Shard
from torch.distributed.tensor.placement_types import _StridedShard

from trainpilot.agents.steering import model_checks
from trainpilot.agents.steering.settings import SteeringSettings
from trainpilot.agents.steering.steering import Steering


def of_deepspeed(name: str, module: str, base: type) -> Any:
    return type(name, (base,), {"__module__": f"deepspeed.runtime.{module}"})


def divided(*placements: Any) -> nn.Module:
    """Return a model whose weight says how it is divided, as a DTensor does."""
    model: Any = nn.Sequential(nn.Linear(2, 2))
    model[0].weight.placements = placements
    return cast("nn.Module", model)


def refused(model: nn.Module, optimizer: Any = None) -> str:
    optimizer = optimizer or torch.optim.AdamW([nn.Parameter(torch.ones(2))])
    with pytest.raises(
        ValueError, match="must be shared by processes in DistributedDataParallel or fully_shard"
    ) as says:
        Steering(model, optimizer, SteeringSettings(sequences=100, batch_size=2))
    assert "\n" not in str(says.value)
    return str(says.value)


def test_deepspeed_is_refused_by_its_engine_and_by_its_optimizer() -> None:
    engine = of_deepspeed("DeepSpeedEngine", "engine", nn.Linear)
    assert refused(engine(2, 2)).startswith("model must be")
    optimizer = of_deepspeed("DeepSpeedZeroOptimizer", "zero.stage_1_and_2", torch.optim.AdamW)
    model = nn.Linear(2, 2)
    assert refused(model, optimizer(model.parameters())).startswith("optimizer must be")


def test_fsdp1_is_refused_wherever_it_is_in_the_model() -> None:
    sharded = FullyShardedDataParallel.__new__(FullyShardedDataParallel)
    nn.Module.__init__(sharded)
    assert "FSDP1" in refused(nn.Sequential(nn.Linear(2, 2), sharded))


def test_tensor_parallelism_is_refused_alone_and_beside_fsdp2(monkeypatch: pytest.MonkeyPatch) -> None:
    assert "tensor parallelism, 0.weight in S(0)" in refused(divided(Shard(0)))
    monkeypatch.setattr(model_checks, "FSDPModule", nn.Sequential)
    assert "tensor parallelism" in refused(divided(_StridedShard(0, split_factor=2), Shard(0)))


def test_shards_of_fsdp2_are_no_tensor_parallelism(monkeypatch: pytest.MonkeyPatch) -> None:
    model_checks.check_parallel(divided(Replicate()))
    monkeypatch.setattr(model_checks, "FSDPModule", nn.Sequential)
    model_checks.check_parallel(divided(Shard(0)))
    model_checks.check_parallel(divided(Replicate(), Shard(0)))  # hybrid: copies of the shards
