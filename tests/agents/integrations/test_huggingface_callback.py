"""A callback steers a plain Hugging Face Trainer where that is exact, and gives back what it took."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from huggingface_runs import (
    IN_FP32,
    WATCHED,
    Seen,
    Stream,
    WholeLoop,
    arguments,
    asked,
    decided,
    logged,
    pairs,
    plain,
    rows,
    rows_looked_at,
    t5,
)
from live_runs import LLAMA, case
from steering_loops import SCRIPT, Script, far
from torch import nn
from torch.nn import functional as F
from transformers import Trainer
from transformers.modeling_outputs import CausalLMOutput

from trainpilot.agents.integrations.huggingface_callback import SteeringCallback
from trainpilot.agents.steering.steering import Steering
from trainpilot.envs.action import KEEP
from trainpilot.llm_runtime.config import RunConfig
from trainpilot.llm_runtime.energy.meter import NoMeter


@pytest.fixture
def config(tmp_path: Path) -> RunConfig:
    return case(tmp_path, LLAMA, tokens=3_200, batch_size=4, decisions=10, pruning="magnitude")


def with_callback(loop: WholeLoop, folder: Path, data: Any, given: Any = None, **options: Any) -> Any:
    """Return a plain Trainer with a callback that steers it."""
    loop.steering.close()
    policy = loop.steering.settings.policy
    assert isinstance(policy, Script)
    settings = replace(loop.steering.settings, policy=Script(policy.actions))
    callback = SteeringCallback(settings if given is None else given, meter=NoMeter("a test"))
    evaluated = options.pop("eval_dataset", None)
    usual = {"max_grad_norm": 0.0, "max_steps": 100, "per_device_train_batch_size": 2, "gradient_accumulation_steps": 2}
    trainer: Any = Trainer(
        loop.model, arguments(folder, **usual | options), train_dataset=data, callbacks=[callback],
        optimizers=(loop.optimizer, None), eval_dataset=evaluated,
    )  # fmt: skip
    callback.trainer = trainer
    trainer.steered_by = callback
    return trainer


def test_callback_changes_all_controls_of_a_stream_where_steps_align(config: RunConfig, tmp_path: Path) -> None:
    aligned = plain(config)
    aligned.micro = 2
    aligned.steering.close()
    settings = replace(aligned.steering.settings, policy=Script(SCRIPT), min_batch_size=2, max_batch_size=8)
    aligned.steering = Steering(aligned.model, aligned.optimizer, settings, grain=8, meter=NoMeter("a test"))
    aligned.train()
    loop = plain(config)
    trainer = with_callback(loop, tmp_path, Stream(rows(loop)))
    trainer.train()
    steering = trainer.steered_by.steering
    assert asked(trainer.steered_by) == asked(aligned)
    assert len({each.batch_size for each in asked(aligned)}) == 3
    assert far(aligned.model, trainer.model) < 1e-5
    assert logged(trainer, "learning_rate") == aligned.rates
    assert {record.telemetry.precision for record in steering.records} == {"fp32", "bf16"}
    assert steering.sequences == 200
    assert len(logged(trainer, "loss/train")) == 10


def test_intervals_in_steps_keep_their_distance_in_sequences(config: RunConfig, tmp_path: Path) -> None:
    loop = plain(config, [(3, 0, 0, 0, 0), *[KEEP] * 9])  # 2 sequences a step instead of 4
    data = rows(loop)
    saved: list[int] = []
    trainer = with_callback(loop, tmp_path, Stream(data), logging_steps=5, save_strategy="steps", save_steps=20)
    trainer.add_callback(Seen("on_save", lambda n, state: saved.append(state.global_step)))
    trainer.train()
    assert {each.batch_size for each in asked(trainer.steered_by)} == {2}
    losses = [entry["step"] for entry in trainer.state.log_history if "loss" in entry]
    assert losses == [*range(10, trainer.state.global_step + 1, 10)]
    assert saved == [40, 80, trainer.state.global_step]


def test_a_callback_leaves_the_batch_of_data_with_a_length(config: RunConfig, tmp_path: Path) -> None:
    loop = plain(config, min_batch_size=4, max_batch_size=4)
    loop.micro = 2
    loop.train()
    other = plain(config)
    trainer = with_callback(other, tmp_path, rows(other), max_steps=50)
    trainer.train()
    assert {each.batch_size for each in asked(trainer.steered_by)} == {4}
    assert trainer.steered_by.steering.records[-1].telemetry.epochs_seen == 1.0
    assert far(loop.model, trainer.model) < 1e-5
    assert logged(trainer, "learning_rate") == loop.rates


def test_a_callback_probes_validates_and_goes_on_bit_for_bit(config: RunConfig, tmp_path: Path) -> None:
    def trainer() -> Any:
        loop = plain(config, IN_FP32, probe=True)
        data = rows(loop)
        return with_callback(
            loop, tmp_path, data, max_steps=50, save_strategy="steps", save_steps=17, eval_strategy="steps",
            eval_steps=17, eval_dataset=data[:8],
        )  # fmt: skip

    whole, second = trainer(), trainer()
    looked = rows_looked_at(whole.model)
    whole.train()
    checkpoint = tmp_path / "out" / "checkpoint-17"
    second.steered_by._given.policy.at = decided(checkpoint)
    second.train(resume_from_checkpoint=str(checkpoint))
    assert far(whole.model, second.model) == 0.0
    told = [record.telemetry for record in whole.steered_by.steering.records]
    assert looked.count(1) == 3 * sum(each.probe_linear is not None for each in told) > 0
    assert told[-1].validation_loss == logged(whole, "eval_loss")[-2]  # the last one comes after the end


def test_the_gradient_is_measured_once_where_the_trainer_is_known(
    config: RunConfig, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    measured: list[float] = []
    clip = torch.nn.utils.clip_grad_norm_

    def seen(*args: Any, **named: Any) -> torch.Tensor:
        measured.append(float(norm := clip(*args, **named)))
        return norm

    loop = plain(config, IN_FP32)
    trainer = with_callback(loop, tmp_path, rows(loop), max_steps=50, logging_steps=1)
    monkeypatch.setattr(torch.nn.utils, "clip_grad_norm_", seen)
    trainer.train()
    assert len(measured) == trainer.state.global_step == 50
    assert logged(trainer, "grad_norm") == pytest.approx(measured)


def test_evaluating_and_saving_after_an_epoch_cost_the_interval_nothing(config: RunConfig, tmp_path: Path) -> None:
    loop = plain(config, [KEEP])
    data = rows(loop, 32)
    trainer = with_callback(
        loop, tmp_path, data, WATCHED, max_steps=-1, num_train_epochs=3, eval_strategy="epoch", save_strategy="epoch",
        eval_dataset=data,
    )  # fmt: skip
    for event in ("on_evaluate", "on_save"):
        trainer.add_callback(Seen(event, lambda n, _: time.sleep(0.1)))
    begun = time.perf_counter()
    trainer.train()
    wall_s = time.perf_counter() - begun
    told = [record.telemetry for record in trainer.steered_by.steering.records]
    apart_s = sum(each.evaluation_time_s for each in told)
    assert apart_s > 2 * 0.2
    assert sum(each.time_s for each in told) < wall_s - apart_s - 0.2


def test_an_error_in_a_run_does_not_change_where_the_next_begins(config: RunConfig, tmp_path: Path) -> None:
    def stop(n: int, _: Any) -> None:
        if n == 12:
            raise KeyboardInterrupt

    loop = plain(config, IN_FP32)
    trainer = with_callback(loop, tmp_path, Stream(rows(loop)))
    trainer.add_callback(Seen("on_step_end", stop))
    with pytest.raises(KeyboardInterrupt):
        trainer.train()
    assert trainer.args.gradient_accumulation_steps != 2
    trainer.steered_by._given.policy.at = 0
    trainer.train()
    assert asked(trainer.steered_by)[0].batch_size == 4
    assert trainer.args.gradient_accumulation_steps == 2
    assert "compute_loss_context_manager" not in vars(trainer)
    assert not loop.model._forward_hooks
    assert trainer.lr_scheduler.lr_lambdas[0](0) == 1.0  # the Trainer's own
    assert loop.optimizer.param_groups[0]["betas"] == pytest.approx((0.9, 0.95), abs=1e-12)


class Own(nn.Module):
    """A model that knows nothing of how many items a step has."""

    def __init__(self) -> None:
        super().__init__()
        self.table = nn.Embedding(256, 256)

    def forward(self, input_ids: torch.Tensor, labels: torch.Tensor) -> CausalLMOutput:
        return CausalLMOutput(F.cross_entropy(self.table(input_ids)[:, :-1].flatten(0, 1), labels[:, 1:].flatten()))


@pytest.mark.parametrize(("drop_last", "budget"), [(False, 40), (True, 32)])
def test_short_steps_count_as_what_they_are(config: RunConfig, tmp_path: Path, drop_last: bool, budget: int) -> None:
    loop = plain(config, [KEEP])
    loop.model = Own()
    loop.optimizer = torch.optim.AdamW(loop.model.parameters(), lr=1e-2)
    options: dict[str, Any] = {"per_device_train_batch_size": 4, "lr_scheduler_type": "constant"}
    trainer = with_callback(
        loop, tmp_path, rows(loop, 10), {"policy": "none", "decisions": 4}, max_steps=-1, num_train_epochs=4,
        dataloader_drop_last=drop_last, **options,
    )  # fmt: skip
    trainer.train()
    steering = trainer.steered_by.steering
    assert (steering.settings.sequences, steering.finished, trainer.state.global_step) == (
        budget,
        True,
        8 - 4 * drop_last,
    )
    told = [record.telemetry.train_loss for record in steering.records]
    losses = logged(trainer, "loss")
    if drop_last:
        assert told == pytest.approx(losses, rel=1e-3)
    else:  # two steps each: of 8 sequences, and of 2
        assert told == pytest.approx([(a + b) / 2 for a, b in zip(losses[::2], losses[1::2], strict=True)], rel=1e-3)


def test_a_run_that_has_finished_is_resumed_without_a_step(config: RunConfig, tmp_path: Path) -> None:
    whole, again = (
        with_callback(loop, tmp_path, rows(loop), WATCHED, max_steps=50, save_strategy="steps", save_steps=25)
        for loop in (plain(config, [KEEP]), plain(config, [KEEP]))
    )
    whole.train()
    again.train(resume_from_checkpoint=str(tmp_path / "out" / "checkpoint-50"))
    assert again.state.global_step == 50
    assert far(whole.model, again.model) == 0.0


# Bad uses -------------------------------------------------------------------------------------------------------


def clipping_twice(loop: WholeLoop, folder: Path) -> None:
    with_callback(loop, folder, rows(loop), max_grad_norm=1.0).train()


def a_stream_that_ends(loop: WholeLoop, folder: Path) -> None:
    with_callback(loop, folder, Stream(rows(loop, 48))).train()


def too_few_steps(loop: WholeLoop, folder: Path) -> None:
    with_callback(loop, folder, Stream(rows(loop)), max_steps=50).train()


def precision_without_trainer(loop: WholeLoop, folder: Path) -> None:
    trainer = with_callback(loop, folder, Stream(rows(loop)))
    trainer.steered_by.trainer = None
    trainer.train()


def plain_t5(loop: WholeLoop) -> WholeLoop:
    loop.steering.close()
    loop.model = t5()
    loop.optimizer = torch.optim.AdamW(loop.model.parameters(), lr=1e-2)
    return loop


def three_micro_batches(loop: WholeLoop, folder: Path) -> None:
    with_callback(
        loop,
        folder,
        Stream(rows(loop)),
        {"sequences": 300, "policy": "none", "decisions": 5},
        gradient_accumulation_steps=3,
    ).train()


def a_greedy_scheduler(loop: WholeLoop, folder: Path) -> None:
    data = rows(loop)
    options = {"lr_scheduler_type": "reduce_lr_on_plateau", "eval_strategy": "epoch", "eval_dataset": data}
    with_callback(loop, folder, data, max_steps=50, **options).train()


def more_than_is_drawn(loop: WholeLoop, folder: Path) -> None:
    with_callback(loop, folder, rows(loop, 10), WATCHED | {"sequences": 41}, max_steps=-1, num_train_epochs=4).train()


def a_model_that_leaves_the_items_unused(loop: WholeLoop, folder: Path) -> None:
    with_callback(plain_t5(loop), folder, pairs(), WATCHED, max_steps=8).train()


def a_stream_that_is_over(loop: WholeLoop, folder: Path) -> None:
    options = {"save_strategy": "steps", "save_steps": 50}
    trainer = with_callback(
        loop, folder, Stream(rows(loop)), WATCHED | {"sequences": 200, "max_batch_size": 4}, **options
    )
    trainer.train()
    trainer.train(resume_from_checkpoint=str(folder / "out" / "checkpoint-50"))


BAD: list[tuple[Callable[[WholeLoop, Path], None], str]] = [
    (clipping_twice, "max_grad_norm must be 0 .* got 1.0; give TrainingArguments max_grad_norm=0"),
    (a_stream_that_ends, "must not end before the budget"),
    (too_few_steps, "max_steps must be at least 100"),
    (precision_without_trainer, "set callback.trainer"),
    (three_micro_batches, "power of two"),
    (a_greedy_scheduler, "lr_scheduler_type must follow from the number of steps"),
    (more_than_is_drawn, "sequences must be at most 40"),
    (a_model_that_leaves_the_items_unused, "model must use num_items_in_batch"),
    (a_stream_that_is_over, "a run that steering has not ended"),
]


@pytest.mark.parametrize(("use", "says"), BAD, ids=[use.__name__ for use, _ in BAD])
def test_bad_uses_get_one_clear_line(
    config: RunConfig, tmp_path: Path, use: Callable[[WholeLoop, Path], None], says: str
) -> None:
    with pytest.raises(ValueError, match=says) as caught:
        use(plain(config), tmp_path)
    assert "\n" not in str(caught.value)
