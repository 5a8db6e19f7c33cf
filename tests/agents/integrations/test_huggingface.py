"""A steered Hugging Face Trainer does what a plain loop does under the same policy, and goes on where it was killed."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from huggingface_runs import (
    IN_FP32,
    Seen,
    Stream,
    WholeLoop,
    arguments,
    asked,
    decided,
    logged,
    plain,
    records,
    rows,
    rows_looked_at,
    steered_trainer,
)
from live_runs import GPT2, LLAMA, case
from steering_loops import Script, far
from transformers import Trainer

from trainpilot.agents.bundle import BaseSchedule
from trainpilot.agents.integrations.huggingface import SteeredTrainer, SteeringMixin
from trainpilot.agents.integrations.huggingface_data import MicroBatches, SampleStream, cut
from trainpilot.agents.integrations.huggingface_settings import RequestedRun, settings_for
from trainpilot.agents.steering.settings import SteeringSettings
from trainpilot.envs.action import KEEP
from trainpilot.llm_runtime.config import RunConfig
from trainpilot.llm_runtime.energy.meter import NoMeter


@pytest.fixture
def config(tmp_path: Path) -> RunConfig:
    return case(tmp_path, LLAMA, tokens=3_200, batch_size=4, decisions=10, pruning="magnitude")


def test_steered_trainer_ends_where_a_plain_loop_does_under_all_controls(config: RunConfig, tmp_path: Path) -> None:
    loop = plain(config)
    loop.train()
    trainer = steered_trainer(plain(config), tmp_path)
    trainer.train()
    assert far(loop.model, trainer.model) < 1e-5
    assert asked(trainer) == asked(loop)
    assert len({each.batch_size for each in asked(trainer)}) == 3
    assert trainer.state.global_step == trainer.state.max_steps == len(loop.rates)
    assert trainer.state.epoch == pytest.approx(1.0)


def test_micro_batches_that_do_not_divide_the_batch_are_cut_and_weighed(config: RunConfig, tmp_path: Path) -> None:
    loop = plain(config, IN_FP32)
    loop.train()
    trainer = steered_trainer(plain(config, IN_FP32), tmp_path, args_per_device_train_batch_size=3)
    trainer.train()
    assert far(loop.model, trainer.model) < 1e-4  # sums in another order
    assert asked(trainer) == asked(loop)


def test_requested_controls_are_in_force_and_logged_rates_are_used_ones(config: RunConfig, tmp_path: Path) -> None:
    loop = plain(config)
    loop.train()
    trainer = steered_trainer(plain(config), tmp_path)
    trainer.train()
    assert logged(trainer, "learning_rate") == loop.rates
    for record in records(trainer):
        told = record.telemetry
        assert told.precision == told.requested.precision
        assert told.sparsity == pytest.approx(told.requested.sparsity, abs=1e-3)
        assert told.batch_size == pytest.approx(told.requested.batch_size, rel=0.35)
    losses = [record.telemetry.train_loss for record in records(trainer)]
    assert logged(trainer, "loss/train") == pytest.approx(losses)
    assert len(logged(trainer, "controls_effective/learning_rate")) == 10


def test_gpt2_tells_its_true_loss_though_it_names_no_loss_type(tmp_path: Path) -> None:
    config = case(tmp_path, GPT2, tokens=1_280, batch_size=4, decisions=4)
    loop = plain(config, [KEEP])
    loop.train()
    trainer = steered_trainer(plain(config, [KEEP]), tmp_path)
    trainer.train()
    pairs = zip(records(trainer), loop.steering.records, strict=True)
    assert all(a.telemetry.train_loss == pytest.approx(b.telemetry.train_loss, rel=1e-4) for a, b in pairs)


def first_checkpoint(folder: Path) -> Path:
    """Return the earliest checkpoint: its step depends on the batches until then."""
    return min((folder / "out").glob("checkpoint-*"), key=lambda path: int(path.name.partition("-")[2]))


@pytest.mark.parametrize("model", [LLAMA, GPT2 | {"resid_pdrop": 0.1}], ids=["llama", "gpt2 with dropout"])
def test_a_killed_run_goes_on_bit_for_bit(tmp_path: Path, model: dict[str, Any]) -> None:
    config = case(tmp_path, model, tokens=3_200, batch_size=4, decisions=10, pruning="magnitude")
    options: dict[str, Any] = {
        "args_save_strategy": "steps", "args_save_steps": 17, "args_train_sampling_strategy": "random",
        "args_per_device_train_batch_size": 3, "args_max_steps": 50,
    }  # fmt: skip

    def trainer() -> Any:
        loop = plain(config, probe=True)
        return steered_trainer(loop, tmp_path, train_dataset=rows(loop, 70), **options)

    whole, second = trainer(), trainer()
    looked = rows_looked_at(whole.model)
    whole.train()
    checkpoint = first_checkpoint(tmp_path)
    second.settings.policy.at = decided(checkpoint)
    second.train(resume_from_checkpoint=str(checkpoint))
    assert far(whole.model, second.model) == 0.0
    assert asked(second) == asked(whole)
    mine, theirs = ([r.telemetry.train_loss for r in records(each)] for each in (second, whole))
    assert mine == theirs
    assert looked.count(1) == 3 * sum(r.telemetry.probe_linear is not None for r in records(whole)) > 0
    assert second.state.global_step == whole.state.global_step
    assert whole.state.epoch == pytest.approx(200 / 70)


def test_epochs_save_evaluate_and_log_though_steps_go_on_across_them(config: RunConfig, tmp_path: Path) -> None:
    loop = plain(config, [KEEP])
    data = rows(loop, 30)
    trainer = steered_trainer(
        loop, tmp_path, train_dataset=data, eval_dataset=data, steering={"policy": "none", "decisions": 10},
        args_num_train_epochs=3, args_eval_strategy="epoch", args_save_strategy="epoch", args_logging_strategy="epoch",
    )  # fmt: skip
    trainer.train()
    assert trainer.settings.sequences == 90
    assert sorted(path.name for path in (tmp_path / "out").iterdir()) == [
        "checkpoint-15",
        "checkpoint-23",
        "checkpoint-8",
    ]
    assert len(logged(trainer, "eval_loss")) == 3
    told = [record.telemetry for record in records(trainer)]
    assert [each.epochs_seen for each in told] == pytest.approx(
        [each.tokens / told[0].tokens * 0.4 for each in told], rel=0.1
    )
    assert told[-1].epochs_seen == 3.0
    assert sum(each.evaluation_time_s > 0 for each in told) >= 2
    assert all(each.validation_loss is None for each in told)  # measured with the tenth decision, told with the next
    final = trainer.evaluate()["eval_loss"]
    assert trainer.steering.validation_loss == pytest.approx(final, rel=0.05)  # the first 8 batches of the data


@pytest.mark.filterwarnings("error")
def test_the_schedule_that_holds_is_told_where_it_may_not_be_the_one_meant(tmp_path: Path) -> None:
    def settings(given: Any = None, **options: Any) -> SteeringSettings:
        args = arguments(tmp_path, max_steps=100, **options)
        return settings_for({"sequence_length": 8, **(given or {})}, RequestedRun.of(args), args, None)

    with pytest.warns(UserWarning, match=r"base schedule: wsd with 10% warm-up, steering's own, as lr_scheduler_type"):
        assert settings(lr_scheduler_type="linear", warmup_steps=0).base_schedule is None
    linear = BaseSchedule(schedule="linear", warmup_share=0)
    assert settings({"base_schedule": linear}).base_schedule == linear
    assert settings(lr_scheduler_type="linear", warmup_steps=10).base_schedule == replace(linear, warmup_share=0.1)


@pytest.mark.parametrize("given", [{}, {"precisions": ("bf16",)}, {"precisions": ("fp32",)}])
def test_training_in_bf16_is_taken_from_the_arguments(config: RunConfig, tmp_path: Path, given: dict[str, Any]) -> None:
    loop = plain(config, [KEEP])
    args = arguments(tmp_path, bf16=True, num_train_epochs=0.1)
    steering = {"policy": "none", "decisions": 2, **given}
    trainer = steered_trainer(loop, tmp_path, args=args, steering=steering, optimizers=(None, None))
    assert args.bf16, "the user's own arguments stay"
    trainer.train()
    assert {record.telemetry.precision for record in records(trainer)} == {"bf16"}
    assert next(trainer.model.parameters()).dtype == torch.float32


HALVED = [(3, 0, 0, 0, 0), *[KEEP] * 9]  # 2 sequences a step instead of 4, from the first decision on


def test_intervals_in_steps_keep_their_distance_in_sequences(config: RunConfig, tmp_path: Path) -> None:
    loop = plain(config, HALVED)
    data = rows(loop, 30)
    done: dict[str, list[int]] = {"on_evaluate": [], "on_save": [], "on_log": []}

    def noting(at: list[int]) -> Any:
        return lambda n, state: at.append(state.global_step)

    callbacks = [Seen(name, noting(at)) for name, at in done.items()]
    trainer = steered_trainer(
        loop, tmp_path, train_dataset=data, eval_dataset=data[:4], callbacks=callbacks,
        args_eval_strategy="steps", args_eval_steps=10, args_save_strategy="steps", args_save_steps=20,
        args_logging_steps=5, args_save_total_limit=2,
    )  # fmt: skip
    trainer.train()
    assert {each.batch_size for each in asked(trainer)} == {2}
    assert trainer.state.global_step == 100  # of 200 sequences; 50 steps at the batch of the arguments
    assert done["on_evaluate"] == [20, 40, 60, 80, 100]
    assert done["on_save"] == [40, 80, 100]
    losses = [entry["step"] for entry in trainer.state.log_history if "loss" in entry]
    assert losses == [*range(10, 101, 10)]


def test_with_the_batch_of_the_arguments_nothing_changes(config: RunConfig, tmp_path: Path) -> None:
    at: dict[str, list[tuple[str, int]]] = {"plain": [], "steered": []}
    events = ("on_evaluate", "on_save", "on_log")

    def noting(name: str, event: str) -> Any:
        return lambda n, state: at[name].append((event, state.global_step))

    kinds: tuple[tuple[str, Any], ...] = (("plain", Trainer), ("steered", SteeredTrainer))
    for name, kind in kinds:
        loop = plain(config, [KEEP])
        loop.steering.close()
        noted = [Seen(event, noting(name, event)) for event in events]
        options = {"max_steps": 23, "eval_strategy": "steps", "eval_steps": 7, "save_strategy": "steps"}
        more = {"logging_steps": 3, "save_steps": 0.3, "eval_delay": 8, "logging_first_step": True}
        data = rows(loop, 30)
        trainer = kind(
            loop.model, arguments(tmp_path / name, **options | more), train_dataset=data, eval_dataset=data[:4],
            callbacks=noted, **({} if name == "plain" else {"steering": {"policy": "none", "decisions": 1}}),
        )  # fmt: skip
        trainer.train()
    decided = [("on_log", 23)]  # the only decision is logged too
    assert sorted(at["steered"]) == sorted([*at["plain"], *decided])


def test_settings_come_from_the_arguments(config: RunConfig, tmp_path: Path) -> None:
    loop = plain(config, [KEEP])
    options: dict[str, Any] = {
        "args_gradient_accumulation_steps": 2, "args_max_grad_norm": 0.5, "args_lr_scheduler_type": "cosine",
        "args_warmup_steps": 5, "args_num_train_epochs": 2, "optimizers": (None, None),
    }  # fmt: skip
    trainer = steered_trainer(loop, tmp_path, steering={"policy": "none", "decisions": 10}, **options)
    settings = trainer.settings
    assert (settings.batch_size, settings.sequences, settings.sequence_length) == (8, 400, 17)
    assert settings.gradient_clip == 0.5
    assert [settings.base_schedule(step / 50) for step in (1, 5, 50)] == pytest.approx([1 / 5, 1, 0])
    trainer.train()
    assert trainer.state.global_step == 50


def test_tokens_of_rows_of_any_length_are_counted_by_their_mean(config: RunConfig, tmp_path: Path) -> None:
    data = [{"input_ids": list(range(1 + 3 * (i % 2))), "labels": list(range(1 + 3 * (i % 2)))} for i in range(500)]
    loop = plain(config, [KEEP])
    trainer = steered_trainer(loop, tmp_path, train_dataset=data, steering={"policy": "none"})
    assert len(data[0]["input_ids"]) == 1
    assert trainer.settings.sequence_length == 2  # of 1 and 4; the first row alone would say 1


def test_a_stream_without_length_is_begun_anew_until_the_budget_is_used_up(config: RunConfig, tmp_path: Path) -> None:
    loop = plain(config, IN_FP32)
    loop.train()
    other = plain(config, IN_FP32)
    trainer = steered_trainer(other, tmp_path, train_dataset=Stream(rows(other)), args_num_train_epochs=9)
    trainer.train()
    assert far(loop.model, trainer.model) < 1e-5
    again = steered_trainer(plain(config, [KEEP]), tmp_path, train_dataset=Stream(rows(plain(config), 90)))
    again.train()
    assert again.steering.sequences == 200


def test_a_second_training_begins_anew(config: RunConfig, tmp_path: Path) -> None:
    trainer = steered_trainer(
        plain(config, [KEEP]), tmp_path, steering={"policy": "none", "sequences": 80, "decisions": 5}
    )
    for _ in range(2):
        trainer.train()
        assert (trainer.steering.sequences, len(records(trainer))) == (80, 5)


# Adapters and TRL -------------------------------------------------------------------------------------------------


def with_lora(loop: WholeLoop) -> Any:
    peft = pytest.importorskip("peft")
    return peft.get_peft_model(loop.model, peft.LoraConfig(r=2, target_modules=["q_proj", "v_proj"]))


def test_only_adapters_are_stepped_under_lora(config: RunConfig, tmp_path: Path) -> None:
    loop = plain(config, IN_FP32, pruning="none")
    before = {name: p.detach().clone() for name, p in loop.model.named_parameters()}
    loop.steering.close()
    settings = replace(loop.steering.settings, policy=Script(IN_FP32))
    trainer: Any = SteeredTrainer(
        with_lora(loop), arguments(tmp_path), train_dataset=rows(loop), steering=settings, meter=NoMeter("a test")
    )
    trainer.train()
    assert len({each.batch_size for each in asked(trainer)}) == 3
    after = {
        name.replace(".base_layer", "").removeprefix("base_model.model."): p
        for name, p in trainer.model.named_parameters()
    }
    assert all(torch.equal(before[name], after[name]) for name in before)
    assert any("lora_B" in name and p.abs().max() > 0 for name, p in after.items())


def test_pruning_is_refused_under_lora(config: RunConfig, tmp_path: Path) -> None:
    loop = plain(config)
    with pytest.raises(ValueError, match="pruning must be 'none' under PEFT"):
        SteeredTrainer(with_lora(loop), arguments(tmp_path), train_dataset=rows(loop), steering=loop.steering.settings)


def test_the_mixin_steers_trl(config: RunConfig, tmp_path: Path) -> None:
    trl = pytest.importorskip("trl")
    datasets = pytest.importorskip("datasets")
    from tokenizers import Tokenizer, models
    from transformers import PreTrainedTokenizerFast

    class SteeredSFTTrainer(SteeringMixin, trl.SFTTrainer):  # type: ignore[misc,name-defined]
        pass

    loop = plain(config, IN_FP32)
    loop.train()
    other = plain(config, IN_FP32)
    other.steering.close()
    data = datasets.Dataset.from_dict({"input_ids": [row["input_ids"].tolist() for row in rows(other)]})
    words = {"<pad>": 0, "<eos>": 1}
    fast: Any = PreTrainedTokenizerFast
    tokenizer = fast(tokenizer_object=Tokenizer(models.WordLevel(words, "<eos>")), pad_token="<pad>", eos_token="<eos>")
    usual = vars(arguments(tmp_path))
    kept = {name: usual[name] for name in ARGUMENTS}
    trainer: Any = SteeredSFTTrainer(
        other.model, trl.SFTConfig(**kept, bf16=False, gradient_checkpointing=False), train_dataset=data,
        processing_class=tokenizer, optimizers=(other.optimizer, None), meter=NoMeter("a test"),
        steering=replace(other.steering.settings, policy=Script(IN_FP32), probe=True),
    )  # fmt: skip
    trainer.train()
    assert asked(trainer) == asked(loop)
    assert far(loop.model, trainer.model) < 1e-3  # its loss sums in another order
    assert any(record.telemetry.probe_linear is not None for record in records(trainer))


ARGUMENTS = (
    "output_dir", "per_device_train_batch_size", "num_train_epochs", "train_sampling_strategy", "save_strategy",
    "report_to", "use_cpu", "learning_rate", "disable_tqdm", "seed", "logging_steps",
)  # fmt: skip


# The data ---------------------------------------------------------------------------------------------------------


class Numbers(torch.utils.data.DataLoader[Any]):
    def __init__(self, n: int, batch_size: int, **options: Any) -> None:
        data: Any = [{"input_ids": torch.tensor([i])} for i in range(n)]
        super().__init__(data, batch_size, **options)


def numbers(parts: MicroBatches) -> list[int]:
    return [int(i) for part in parts for i in part["input_ids"]]


def test_a_stream_gives_any_number_of_sequences_in_order_and_comes_back() -> None:
    stream = SampleStream(Numbers(5, 2), 2)
    assert numbers(stream.take(3)) == [0, 1, 2]
    state = stream.state_dict()
    parts = stream.take(6)
    assert [len(part["input_ids"]) for part in parts] == [1, 1, 2, 2]
    assert numbers(parts) == [3, 4, 0, 1, 2, 3]
    assert numbers(stream.take(1)) == [4]
    stream.load_state_dict(state)
    assert numbers(stream.take(3)) == [3, 4, 0]
    end = SampleStream(Numbers(4, 2), 2)
    end.take(4)
    other = SampleStream(Numbers(4, 2), 2)
    other.load_state_dict(end.state_dict())
    assert numbers(other.take(2)) == [0, 1]


def test_a_stream_comes_back_to_an_order_that_was_drawn_at_random() -> None:
    stream, other = (SampleStream(Numbers(10, 2, shuffle=True), 2) for _ in range(2))
    stream.take(3)
    state = stream.state_dict()
    rest = numbers(stream.take(7))
    other.load_state_dict(state)
    before = torch.get_rng_state()
    assert numbers(other.take(7)) == rest
    stream.load_state_dict(state)
    assert numbers(stream.take(7)) == rest
    assert torch.equal(torch.get_rng_state(), before)


def test_a_batch_whose_rows_are_not_its_sequences_is_not_divided() -> None:
    with pytest.raises(ValueError, match="one row of pixels for each of 2 sequences, got 3"):
        cut({"input_ids": torch.ones(2, 1), "pixels": torch.ones(3, 1)}, 0, 1)
    flat = [{"input_ids": torch.ones(1, 4), "position_ids": torch.tensor([[0, 1, 0, 1]])}]
    with pytest.raises(ValueError, match=r"one row for each sequence, .* set TRL's packing_strategy='wrapped' or"):
        SampleStream(flat, 2).take(1)  # type: ignore[arg-type]


# Bad uses ---------------------------------------------------------------------------------------------------------


def a_stepped_scheduler(loop: WholeLoop, folder: Path) -> None:
    scheduler = torch.optim.lr_scheduler.LambdaLR(loop.optimizer, lambda _: 1.0)
    loop.optimizer.step()
    scheduler.step()
    steered_trainer(loop, folder, optimizers=(loop.optimizer, scheduler), steering={"policy": "none"})


def with_argument(name: str, value: Any) -> Callable[[WholeLoop, Path], None]:
    def use(loop: WholeLoop, folder: Path) -> None:
        args = arguments(folder)
        setattr(args, name, value)  # as if its library were installed
        steered_trainer(loop, folder, args=args)

    use.__name__ = name
    return use


def no_length(loop: WholeLoop, folder: Path) -> None:
    steered_trainer(loop, folder, train_dataset=Stream(rows(loop)), steering={"policy": "none"})


def half_a_model(loop: WholeLoop, folder: Path) -> None:
    loop.model.to(torch.bfloat16)
    steered_trainer(loop, folder)


def two_batches(loop: WholeLoop, folder: Path) -> None:
    steered_trainer(loop, folder, args_gradient_accumulation_steps=3)


def two_ends(loop: WholeLoop, folder: Path) -> None:
    steered_trainer(loop, folder, args_max_steps=3)


def schedule_from_losses(loop: WholeLoop, folder: Path) -> None:
    kind: dict[str, Any] = {"args_eval_strategy": "epoch", "eval_dataset": rows(loop)[:4]}
    steered_trainer(loop, folder, args_lr_scheduler_type="reduce_lr_on_plateau", steering={"policy": "none"}, **kind)


def schedule_with_strange_options(loop: WholeLoop, folder: Path) -> None:
    kind: dict[str, Any] = {"args_lr_scheduler_type": "cosine", "args_lr_scheduler_kwargs": {"cycles": 1}}
    steered_trainer(loop, folder, steering={"policy": "none"}, **kind)


def strange_field(loop: WholeLoop, folder: Path) -> None:
    steered_trainer(loop, folder, steering={"polcy": "none"})


def foreign_checkpoint(loop: WholeLoop, folder: Path) -> None:
    steered = steered_trainer(loop, folder, args_save_strategy="steps", args_save_steps=5)
    Trainer(
        steered.model, arguments(folder, save_strategy="steps", max_steps=5), train_dataset=steered.train_dataset
    ).train()
    steered.train(resume_from_checkpoint=str(folder / "out" / "checkpoint-5"))


BAD: list[tuple[Callable[[WholeLoop, Path], None], str]] = [
    (with_argument("bf16", True), "precisions must begin with bf16 .* got fp32, bf16; put bf16 first"),
    (with_argument("fp16", True), "fp16 must be off"),
    (with_argument("torch_compile", True), "torch_compile must be off"),
    (with_argument("deepspeed", "ds.json"), "deepspeed must be off"),
    (with_argument("fsdp", "full_shard"), "fsdp must be off"),
    (with_argument("auto_find_batch_size", True), "auto_find_batch_size must be off"),
    (with_argument("enable_jit_checkpoint", True), "enable_jit_checkpoint must be off"),
    (with_argument("max_grad_norm", 2.0), "must be the Trainer's max_grad_norm"),
    (a_stepped_scheduler, "scheduler must not have been stepped"),
    (no_length, "train_dataset without a length"),
    (half_a_model, "trainable weights must be float32"),
    (two_batches, "leave one of the two out"),
    (two_ends, "max_steps x batch"),
    (schedule_from_losses, "lr_scheduler_type must follow from the number of steps"),
    (schedule_with_strange_options, "lr_scheduler_kwargs must be options of lr_scheduler_type 'cosine'"),
    (strange_field, "fields of SteeringSettings, got polcy"),
    (foreign_checkpoint, "must hold steering.pt"),
]


@pytest.mark.parametrize(("use", "says"), BAD, ids=[use.__name__ for use, _ in BAD])
def test_bad_uses_get_one_clear_line(
    config: RunConfig, tmp_path: Path, use: Callable[[WholeLoop, Path], None], says: str
) -> None:
    with pytest.raises(ValueError, match=says) as caught:
        use(plain(config), tmp_path)
    assert "\n" not in str(caught.value)
