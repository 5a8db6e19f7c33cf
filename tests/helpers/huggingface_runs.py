"""Steered Hugging Face Trainers of the same run as a plain loop, and what they recorded."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from steering_loops import SCRIPT, Loop, Script
from torch.nn import functional as F
from torch.utils.data import IterableDataset
from transformers import (
    T5Config,
    T5ForConditionalGeneration,
    Trainer,
    TrainerCallback,
    TrainingArguments,
)

from trainpilot.agents.controller import DecisionRecord
from trainpilot.agents.integrations.huggingface import SteeredTrainer
from trainpilot.envs.action import Action
from trainpilot.llm_runtime.config import RunConfig
from trainpilot.llm_runtime.energy.meter import NoMeter

IN_FP32: list[Action] = [(rate, batch, 0, pruning, finish) for rate, batch, _, pruning, finish in SCRIPT]
Rows = list[dict[str, torch.Tensor]]


class WholeLoop(Loop):
    """A plain loop that feeds a sequence's last token too, as Trainers do; its output is not used."""

    def loss(self, batch: torch.Tensor) -> torch.Tensor:
        logits = self.model(input_ids=batch, use_cache=False).logits[:, :-1]
        return F.cross_entropy(logits.float().flatten(0, 1), batch[:, 1:].flatten())


class Stream(IterableDataset):  # type: ignore[type-arg]
    """Data without a length."""

    def __init__(self, rows: Rows) -> None:
        self.rows = rows

    def __iter__(self) -> Iterator[dict[str, torch.Tensor]]:
        return iter(self.rows)


def plain(config: RunConfig, script: list[Action] = SCRIPT, **settings: Any) -> WholeLoop:
    options = {"pruning": config.pruning, "precisions": ("fp32", "bf16"), "micro": 4, "max_batch_size": 8} | settings
    return WholeLoop(config, Script(script), **options)


def rows(loop: Loop, n: int = 200) -> Rows:
    """Return the sequences that a plain loop would train on, in its order."""
    return [{"input_ids": row, "labels": row} for row in torch.from_numpy(loop.stream.take(n))]


def arguments(folder: Path, **options: Any) -> TrainingArguments:
    usual: dict[str, Any] = {
        "output_dir": str(folder / "out"), "per_device_train_batch_size": 4, "num_train_epochs": 1, "logging_steps": 1,
        "train_sampling_strategy": "sequential", "save_strategy": "no", "report_to": [], "use_cpu": True,
        "learning_rate": 1e-2, "disable_tqdm": True, "seed": 1, "optim": "adamw_torch", "weight_decay": 0.1,
    }  # fmt: skip
    return TrainingArguments(**usual | options)


def steered_trainer(loop: WholeLoop, folder: Path, trainer: type = SteeredTrainer, **options: Any) -> Any:
    """Return a steered Trainer of the same run as a plain loop that has not begun; options begin with `args_`."""
    loop.steering.close()
    given = {name.removeprefix("args_"): options.pop(name) for name in list(options) if name.startswith("args_")}
    policy = loop.steering.settings.policy
    assert isinstance(policy, Script)
    usual = {
        "args": arguments(folder, **given),
        "train_dataset": rows(loop),
        "steering": replace(loop.steering.settings, policy=Script(policy.actions)),
        "optimizers": (loop.optimizer, None),
        "meter": NoMeter("a test"),
    }
    return trainer(loop.model, **usual | options)


def records(trainer: Any) -> list[DecisionRecord]:
    found: list[DecisionRecord] = trainer.steering.records
    return found


def asked(steered: Any) -> list[Any]:
    return [record.telemetry.requested for record in steered.steering.records]


def logged(trainer: Trainer, name: str) -> list[float]:
    return [entry[name] for entry in trainer.state.log_history if name in entry]


def decided(checkpoint: Path) -> int:
    """Return how many decisions a script had made before the one that a new run asks it for at its beginning."""
    return len(torch.load(checkpoint / "steering.pt")["steering"]["controller"]["records"])


def rows_looked_at(model: torch.nn.Module) -> list[int]:
    """Return a list that gets the number of sequences of each forward pass that is no training."""
    looked: list[int] = []

    def see(module: torch.nn.Module, _: Any, inputs: dict[str, Any]) -> None:
        if not module.training:
            looked.append(len(inputs["input_ids"]))

    model.register_forward_pre_hook(see, with_kwargs=True)
    return looked


WATCHED: dict[str, Any] = {"policy": "none", "decisions": 5}


class Seen(TrainerCallback):
    """Calls a function at an event of the Trainer's loop, and counts."""

    def __init__(self, event: str, then: Callable[[int, Any], None] = lambda _, state: None) -> None:
        self.n, self.then = 0, then
        setattr(self, event, self.call)

    def call(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        self.n += 1
        self.then(self.n, state)


def t5() -> Any:
    torch.manual_seed(1)
    kind: Any = T5Config
    sizes = {"vocab_size": 32, "d_model": 16, "d_kv": 8, "d_ff": 32, "num_layers": 1, "num_heads": 2}
    return T5ForConditionalGeneration(kind(**sizes, dropout_rate=0.0, decoder_start_token_id=0))


def pairs(n: int = 64) -> list[dict[str, torch.Tensor]]:
    tokens = torch.randint(1, 32, (n, 6), generator=torch.Generator().manual_seed(1))
    return [{"input_ids": row, "labels": row} for row in tokens]
