"""A steered Hugging Face Trainer trains as the plain one does, and leaves behind nothing that was not there."""

from __future__ import annotations

import math
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from huggingface_runs import (
    IN_FP32,
    WATCHED,
    Seen,
    WholeLoop,
    arguments,
    logged,
    pairs,
    plain,
    records,
    rows,
    steered_trainer,
    t5,
)
from live_runs import DROPOUT, GPT2, LLAMA, case
from steering_loops import far
from torch.nn import functional as F
from transformers import (
    BertConfig,
    BertForMaskedLM,
    ProgressCallback,
    SchedulerType,
    Trainer,
)

from trainpilot.agents.integrations.huggingface import SteeredTrainer, SteeringMixin
from trainpilot.agents.integrations.huggingface_callback import SteeringCallback
from trainpilot.agents.steering.guardrails import GuardrailSettings
from trainpilot.envs.action import KEEP, Action
from trainpilot.llm_runtime.config import RunConfig
from trainpilot.llm_runtime.energy.meter import NoMeter


@pytest.fixture
def config(tmp_path: Path) -> RunConfig:
    return case(tmp_path, LLAMA, tokens=3_200, batch_size=4, decisions=10, pruning="none")


# The same as the Trainer ------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "options",
    [
        {"num_train_epochs": 3},
        {"label_smoothing_factor": 0.1},
        {"neftune_noise_alpha": 5.0},
        {"gradient_checkpointing": True},
        {"dataloader_num_workers": 2},
        {"average_tokens_across_devices": False},
        {"num_train_epochs": 3, "train_sampling_strategy": "group_by_length"},
    ],
    ids=" ".join,
)
@pytest.mark.filterwarnings("ignore")
def test_without_a_policy_the_weights_are_those_of_the_plain_trainer(
    config: RunConfig, tmp_path: Path, options: dict[str, Any]
) -> None:
    usual: dict[str, Any] = {
        "lr_scheduler_type": "constant", "per_device_train_batch_size": 4, "train_sampling_strategy": "random",
        "gradient_accumulation_steps": 1,
    }  # fmt: skip
    if "train_sampling_strategy" not in options:  # its groups would be of other sizes
        usual |= {"per_device_train_batch_size": 2, "gradient_accumulation_steps": 2}
    ends, steered = [], {"steering": WATCHED, "meter": NoMeter("a test")}
    kinds: list[tuple[Any, dict[str, Any]]] = [(Trainer, {}), (SteeredTrainer, steered)]
    for kind, own in kinds:
        loop = plain(config, [KEEP])
        loop.steering.close()
        data = rows(loop, 24)
        torch.manual_seed(1)
        trainer: Any = kind(loop.model, arguments(tmp_path, **usual | options), train_dataset=data, **own)
        trainer.train()
        ends.append(trainer)
    assert ends[1].settings.base_schedule.schedule == "constant"
    assert far(ends[0].model, ends[1].model) == 0.0
    assert ends[0].state.global_step == ends[1].state.global_step
    assert logged(ends[0], "loss") == logged(ends[1], "loss")


@pytest.mark.parametrize("comes", ["by name", "with the optimiser"])
@pytest.mark.filterwarnings("ignore")
def test_a_schedule_of_any_kind_is_that_of_the_plain_trainer(config: RunConfig, tmp_path: Path, comes: str) -> None:
    usual: dict[str, Any] = {"max_steps": 20, "per_device_train_batch_size": 4, "gradient_accumulation_steps": 1}
    if comes == "by name":
        usual |= {"lr_scheduler_type": "cosine_with_min_lr", "warmup_steps": 5}
        usual |= {"lr_scheduler_kwargs": {"min_lr_rate": 0.2}}
    ends: list[Any] = []
    kinds: list[tuple[Any, dict[str, Any]]] = [(Trainer, {}), (SteeredTrainer, {"steering": WATCHED})]
    for kind, given in kinds:
        own = dict(given)
        loop = plain(config, [KEEP])
        loop.steering.close()
        if comes != "by name":
            halved = torch.optim.lr_scheduler.StepLR(loop.optimizer, 7, gamma=0.5)
            own["optimizers"] = (loop.optimizer, halved)
        torch.manual_seed(1)
        trainer: Any = kind(loop.model, arguments(tmp_path, **usual), train_dataset=rows(loop, 24), **own)
        trainer.train()
        ends.append(trainer)
    assert logged(ends[0], "learning_rate") == pytest.approx(logged(ends[1], "learning_rate"), rel=1e-12)
    assert len(set(logged(ends[1], "learning_rate"))) > 2
    assert far(ends[0].model, ends[1].model) < 1e-7


def raised(observation: np.ndarray, masks: np.ndarray) -> Action:
    """Ask for twice the learning rate and the batch, and draw a random number as well."""
    torch.rand(1)
    return (6, 2, *KEEP[2:])


BOLD = GuardrailSettings(cautious=False)  # the policies here double the rate at once, or end early
ADVICE: dict[str, Any] = {"policy": raised, "mode": "advise", "decisions": 5, "guardrails": BOLD}


UNEVEN: list[dict[str, Any]] = [
    {"num_train_epochs": 3},  # epochs whose last step and last micro-batch are short
    {"num_train_epochs": 2.5},
    {"max_steps": 14},
    {"num_train_epochs": 3, "dataloader_drop_last": True},
]


@pytest.mark.parametrize(("kind", "options"), [("callback", UNEVEN[0]), *(("trainer", each) for each in UNEVEN)])
@pytest.mark.filterwarnings("ignore")
def test_under_advice_the_weights_are_those_of_the_plain_trainer(
    tmp_path: Path, kind: str, options: dict[str, Any]
) -> None:
    config = case(tmp_path, GPT2 | DROPOUT, tokens=3_200, batch_size=4, decisions=10)
    own: dict[str, Any] = {"max_grad_norm": 0.0} if kind == "callback" else {}
    own |= {"lr_scheduler_type": "constant", "train_sampling_strategy": "random"}
    own |= {"gradient_accumulation_steps": 2, "per_device_train_batch_size": 2}
    ends: list[Any] = []
    for advises in (False, True):
        loop = plain(config, [KEEP])
        loop.steering.close()
        data = rows(loop, 23)
        given: dict[str, Any] = {}
        callback = SteeringCallback(ADVICE | {"gradient_clip": None}, meter=NoMeter("a test"))
        if advises:
            given = {"callbacks": [callback]} if kind == "callback" else {"steering": ADVICE, "eval_dataset": data[:4]}
        torch.manual_seed(1)
        args = arguments(tmp_path, **options | own)
        make = SteeredTrainer if advises and kind == "trainer" else Trainer
        trainer: Any = make(loop.model, args, train_dataset=data, **given)
        trainer.train()
        ends.append((trainer, torch.get_rng_state(), callback))
    (plainly, numbers, _), (advised, same_numbers, callback) = ends
    assert far(plainly.model, advised.model) == 0.0
    assert torch.equal(numbers, same_numbers)
    assert logged(plainly, "loss") == logged(advised, "loss")
    assert plainly.state.global_step == advised.state.global_step
    steering = callback.steering if kind == "callback" else advised.steering
    assert {record.allowed for record in steering.records} == {KEEP}
    assert steering.summary()["advice"]["learning_rate x2"] == 5
    assert logged(advised, "advice/learning_rate_scale") == [2.0] * 5


@pytest.mark.filterwarnings("ignore")
def test_under_advice_even_a_loss_that_is_summed_over_micro_batches_stays(tmp_path: Path) -> None:
    """T5 accepts the number of items and ignores it; steering averages its loss, the plain Trainer does not."""
    ends: list[Any] = []
    kinds: list[tuple[Any, dict[str, Any]]] = [(Trainer, {}), (SteeredTrainer, {"steering": ADVICE})]
    for kind, own in kinds:
        args = arguments(tmp_path, per_device_train_batch_size=4, gradient_accumulation_steps=2, num_train_epochs=4)
        args.lr_scheduler_type = SchedulerType.CONSTANT
        ends.append(kind(t5(), args, train_dataset=pairs(), **own))
        ends[-1].train()
    assert far(ends[0].model, ends[1].model) == 0.0


def bert(kind: type = BertForMaskedLM) -> Any:
    torch.manual_seed(1)
    sizes: dict[str, Any] = {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 1}
    none: dict[str, Any] = {"hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0}
    return kind(BertConfig(vocab_size=32, num_attention_heads=2, **sizes, **none))


def mean_loss(outputs: Any, labels: torch.Tensor, num_items_in_batch: Any = None) -> torch.Tensor:
    return F.cross_entropy(outputs["logits"].flatten(0, 1), labels.flatten())


@pytest.mark.parametrize(("model", "own"), [(t5, None), (bert, mean_loss)], ids=["of the model", "of a function"])
def test_loss_that_ignores_the_number_of_items_is_averaged_not_summed(
    tmp_path: Path, model: Callable[[], Any], own: Any
) -> None:
    losses, norms = [], []
    for micro, accumulate in ((8, 1), (4, 2)):
        args = arguments(
            tmp_path, per_device_train_batch_size=micro, gradient_accumulation_steps=accumulate, max_grad_norm=1e9
        )
        trainer: Any = SteeredTrainer(
            model(), args, train_dataset=pairs(), steering=WATCHED, meter=NoMeter("a test"), compute_loss_func=own
        )
        trainer.train()
        losses.append(logged(trainer, "loss"))
        norms.append(logged(trainer, "grad_norm"))
        assert records(trainer)[0].telemetry.train_loss < 2 * math.log(32)
    assert losses[1] == pytest.approx(losses[0], rel=1e-4)
    assert norms[1] == pytest.approx(norms[0], rel=1e-3)


def test_first_label_is_not_counted_only_where_the_loss_leaves_it_out(tmp_path: Path) -> None:
    class Own(BertForMaskedLM):  # type: ignore[no-untyped-call]
        loss_type = None  # type: ignore[assignment]

    gpt2 = plain(case(tmp_path, GPT2, tokens=1_280, batch_size=4, decisions=4), [KEEP])
    gpt2.steering.close()
    steered = {
        name: SteeredTrainer(model, arguments(tmp_path), train_dataset=pairs(), steering=WATCHED)
        for name, model in {"bert": bert(), "own": bert(Own), "t5": t5(), "gpt2": gpt2.model}.items()
    }
    assert {name: trainer._loss_shifts_labels for name, trainer in steered.items()} == {
        "bert": False, "own": False, "t5": False, "gpt2": True,
    }  # fmt: skip


# What the interval does not pay for -------------------------------------------------------------------------------


def test_evaluating_and_saving_after_an_epoch_cost_the_interval_nothing(config: RunConfig, tmp_path: Path) -> None:
    loop = plain(config, [KEEP])
    data = rows(loop, 32)
    trainer = steered_trainer(
        loop, tmp_path, train_dataset=data, eval_dataset=data, steering={"policy": "none", "decisions": 6},
        args_num_train_epochs=3, args_eval_strategy="epoch", args_save_strategy="epoch",
    )  # fmt: skip
    for event in ("on_evaluate", "on_save"):
        trainer.add_callback(Seen(event, lambda n, _: time.sleep(0.1)))
    begun = time.perf_counter()
    trainer.train()
    wall_s = time.perf_counter() - begun
    told = [record.telemetry for record in records(trainer)]
    apart_s = sum(each.evaluation_time_s for each in told)
    assert apart_s > 2 * 0.2  # the third comes after the last interval
    assert sum(each.time_s for each in told) < wall_s - apart_s - 0.2


def test_other_callbacks_see_the_epoch_and_each_end_of_one_once(config: RunConfig, tmp_path: Path) -> None:
    loop = plain(config, [KEEP])
    seen: list[float] = []
    ends = Seen("on_epoch_end")
    trainer = steered_trainer(
        loop, tmp_path, train_dataset=rows(loop, 20), steering=WATCHED, args_num_train_epochs=2,
        callbacks=[Seen("on_step_end", lambda _, state: seen.append(state.epoch)), ends],
    )  # fmt: skip
    trainer.train()
    assert seen == pytest.approx([step / 5 for step in range(1, 11)])
    assert ends.n == 2


def test_speed_is_told_of_what_was_trained_on_though_the_run_ends_early(config: RunConfig, tmp_path: Path) -> None:
    finish: list[Action] = [KEEP] * 6 + [(*KEEP[:4], 1), KEEP]
    trainer = steered_trainer(plain(config, finish, guardrails=BOLD), tmp_path)
    told = trainer.train().metrics
    assert trainer.steering.sequences < 200
    assert told["train_samples_per_second"] * told["train_runtime"] == pytest.approx(
        trainer.steering.sequences, rel=1e-2
    )


def test_the_progress_bar_ends_where_the_run_does_and_shows_no_decisions(
    config: RunConfig, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    halved: list[Action] = [KEEP, (KEEP[0], 0, *KEEP[2:]), KEEP]
    totals: list[int] = []

    def look(_: int, state: Any) -> None:
        callbacks = trainer.callback_handler.callbacks
        bars: list[Any] = [each.training_bar for each in callbacks if isinstance(each, ProgressCallback)]
        totals.extend(bar.total for bar in bars if bar is not None)

    sees = [Seen("on_step_end", look)]
    trainer = steered_trainer(
        plain(config, halved), tmp_path, args_disable_tqdm=False, callbacks=sees, args_logging_steps=1_000
    )
    trainer.train()
    assert totals[0] == 50
    assert totals[-1] == trainer.state.global_step > 50
    assert len(logged(trainer, "run/decision")) == 10
    assert "run/decision" not in capsys.readouterr().out


# What is left behind ----------------------------------------------------------------------------------------------


def test_a_trainer_gives_optimiser_model_and_workers_back(config: RunConfig, tmp_path: Path) -> None:
    doubled: list[Action] = [KEEP, (KEEP[0], 2, *KEEP[2:]), KEEP]
    loop = plain(config, doubled)
    hooks = len(loop.model.model.layers[0].self_attn.q_proj._forward_hooks)
    trainer = steered_trainer(loop, tmp_path, args_dataloader_num_workers=1)
    for _ in range(2):
        trainer.settings.policy.at = 0
        trainer.train()
        assert [record.telemetry.requested.batch_size for record in records(trainer)][:3] == [4, 8, 8]
        group = loop.optimizer.param_groups[0]
        assert group["betas"] == pytest.approx((0.9, 0.95), abs=1e-12)
        assert group["initial_lr"] == 1e-2
        assert len(loop.model.model.layers[0].self_attn.q_proj._forward_hooks) < hooks + 1
        assert trainer.stream._batches is None


def test_an_error_in_a_run_leaves_nothing_of_it_behind(config: RunConfig, tmp_path: Path) -> None:
    def stop(n: int, _: Any) -> None:
        if n == 12:
            raise KeyboardInterrupt

    loop = plain(config, IN_FP32)
    trainer = steered_trainer(loop, tmp_path, callbacks=[Seen("on_step_end", stop)])
    with pytest.raises(KeyboardInterrupt):
        trainer.train()
    assert loop.optimizer.param_groups[0]["betas"] == pytest.approx((0.9, 0.95), abs=1e-12)
    assert trainer.stream._batches is None
    Trainer(loop.model, arguments(tmp_path, max_steps=1), train_dataset=rows(loop, 8)).train()


# Going back and going on ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("order", ["sequential", "random", "group_by_length"])
def test_a_rollback_takes_model_and_data_back_to_the_beginning(config: RunConfig, tmp_path: Path, order: str) -> None:
    def run(fault: int) -> tuple[Any, Seen]:
        loop, ends, passes = plain(config, [KEEP]), Seen("on_epoch_end"), 0
        data = [{name: value[: 8 + i % 5] for name, value in row.items()} for i, row in enumerate(rows(loop, 8))]
        trainer = steered_trainer(
            loop, tmp_path, train_dataset=data, callbacks=[ends], args_train_sampling_strategy=order,
            args_max_steps=50, args_per_device_train_batch_size=2, data_collator=padded,
        )  # fmt: skip

        def spoil(module: Any, _: Any, output: Any) -> Any:
            nonlocal passes
            passes += module.training
            if fault and fault <= passes < fault + 6:  # three of an interval's five steps
                output.loss = output.loss * math.nan
            return output

        loop.model.register_forward_hook(spoil)
        torch.manual_seed(1)
        trainer.train()
        return trainer, ends

    (clean, ends), (spoilt, spoilt_ends) = run(0), run(3)
    assert len(spoilt.steering.summary()["rollbacks"]) == 1
    assert far(clean.model, spoilt.model) == 0.0
    assert clean.steering.sequences == spoilt.steering.sequences == 200
    assert ends.n == spoilt_ends.n == 25
    spoilt.train()
    assert spoilt.steering.peak_learning_rate == 1e-2


def padded(rows: list[dict[str, torch.Tensor]]) -> dict[str, torch.Tensor]:
    def side_by_side(name: str, fill: int) -> torch.Tensor:
        return torch.nn.utils.rnn.pad_sequence([row[name] for row in rows], batch_first=True, padding_value=fill)

    return {"input_ids": side_by_side("input_ids", 0), "labels": side_by_side("labels", -100)}


def saved(loop: WholeLoop, folder: Path, **options: Any) -> Any:
    return steered_trainer(loop, folder, args_save_strategy="steps", args_save_steps=25, steering=WATCHED, **options)


def test_a_run_that_has_finished_is_resumed_without_a_step(config: RunConfig, tmp_path: Path) -> None:
    whole, again = (saved(plain(config, [KEEP]), tmp_path) for _ in range(2))
    whole.train()
    told = again.train(resume_from_checkpoint=str(tmp_path / "out" / "checkpoint-50"))
    assert told.global_step == again.state.global_step == 50
    assert far(whole.model, again.model) == 0.0


def test_run_is_resumed_in_the_micro_batches_it_was_counted_in(config: RunConfig, tmp_path: Path) -> None:
    saved(plain(config, [KEEP]), tmp_path).train()
    checkpoint = str(tmp_path / "out" / "checkpoint-25")
    halved = {"args_per_device_train_batch_size": 2, "args_gradient_accumulation_steps": 2}
    with pytest.raises(ValueError, match="per_device_train_batch_size must be 4, as when the state was saved, got 2"):
        saved(plain(config, [KEEP]), tmp_path, **halved).train(resume_from_checkpoint=checkpoint)
    anew = saved(plain(config, [KEEP]), tmp_path, args_ignore_data_skip=True, **halved)
    anew.train(resume_from_checkpoint=checkpoint)
    assert anew.steering.sequences == 200
    assert anew.stream.state_dict()["drawn"] == 50  # the 100 that were left, from the epoch's beginning


# What is measured on ----------------------------------------------------------------------------------------------


def test_only_labelled_data_are_validated_on_and_others_are_read_anew(config: RunConfig, tmp_path: Path) -> None:
    loop = plain(config, [KEEP])
    bare = [{"input_ids": row["input_ids"]} for row in rows(loop, 8)]
    trainer = steered_trainer(loop, tmp_path, eval_dataset=bare, steering=WATCHED)
    trainer.train()
    assert trainer.steering.validation_loss is None
    assert math.isnan(trainer._validate())
    trainer.eval_dataset = rows(loop, 8)
    one = trainer._validate()
    trainer.eval_dataset = rows(loop, 8)
    assert one > 0
    assert trainer._validate() != one


def test_a_budget_in_epochs_leaves_out_what_the_loader_drops(config: RunConfig, tmp_path: Path) -> None:
    loop = plain(config, [KEEP])
    options: dict[str, Any] = {"args_dataloader_drop_last": True, "args_num_train_epochs": 2, "steering": WATCHED}
    trainer = steered_trainer(loop, tmp_path, train_dataset=rows(loop, 30), **options)
    trainer.train()
    assert trainer.settings.sequences == 2 * 28
    assert trainer.state.epoch == pytest.approx(2.0)


def test_the_context_of_a_class_of_ones_own_is_entered(config: RunConfig, tmp_path: Path) -> None:
    entered = 0

    class Own(Trainer):
        def compute_loss_context_manager(self) -> Any:
            nonlocal entered
            entered += 1
            return super().compute_loss_context_manager()

    class Steered(SteeringMixin, Own):
        pass

    steered_trainer(plain(config, [KEEP]), tmp_path, trainer=Steered).train()
    assert entered == 50
