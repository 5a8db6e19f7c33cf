"""A fit of Lightning's Trainer under the callback does what a plain steered loop does, and survives what fits do."""

from __future__ import annotations

import importlib
import sys
import warnings
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from live_runs import DROPOUT, GPT2, LLAMA, case
from steering_loops import SCRIPT, Loop, Script, far
from torch import Tensor
from torch.utils.data import DataLoader, IterableDataset

from trainpilot.agents.bundle import BaseSchedule
from trainpilot.agents.steering.guardrails import GuardrailSettings
from trainpilot.envs.action import KEEP, Action
from trainpilot.llm_runtime.config import RunConfig
from trainpilot.llm_runtime.data.batches import BatchStream
from trainpilot.llm_runtime.optimizer import make_optimizer

pl = pytest.importorskip("lightning.pytorch")
from lightning.pytorch.callbacks import LearningRateMonitor, ModelCheckpoint  # noqa: E402
from lightning.pytorch.plugins.precision import Precision  # noqa: E402
from lightning_runs import ByDecision, Kept, steer, told, trainer  # noqa: E402

from trainpilot.agents.integrations.lightning import LightningSteering, Window  # noqa: E402
from trainpilot.agents.integrations.lightning_settings import LoaderInfo, check_fit, settings_for  # noqa: E402

pytestmark = pytest.mark.filterwarnings("ignore:.*", "error:the run ended")
MICRO = 2
FLAT = BaseSchedule(schedule="constant", warmup_share=0.0)


class Module(pl.LightningModule):  # type: ignore[misc, name-defined]
    """The model of a plain loop, in Lightning's clothes."""

    def __init__(self, loop: Loop) -> None:
        super().__init__()
        self.loop, self.net, self.config = [loop], loop.model, loop.config  # the loop is no sub-module
        self.rates: list[float] = []
        self.calls = 0

    def training_step(self, batch: Tensor) -> Tensor:
        self.calls += 1
        loss = self.loop[0].loss(batch)
        self.log("loss", loss)
        self.log_dict({"rate": self.optimizers().param_groups[0]["lr"]})
        return loss

    def configure_gradient_clipping(self, optimizer: Any, *args: Any, **kwargs: Any) -> None:
        self.rates.append(optimizer.param_groups[0]["lr"])
        super().configure_gradient_clipping(optimizer, *args, **kwargs)

    def validation_step(self, batch: Tensor) -> None:
        self.log("val_loss", self.loop[0].loss(batch))

    def configure_optimizers(self) -> Any:
        return make_optimizer(self.net, self.config)


class Stream:
    """A data loader that can say where it stands."""

    batch_size = MICRO

    def __init__(self, loop: Loop) -> None:
        config, old = loop.config, loop.stream
        self.stream = BatchStream(np.zeros(config.sequence_length + 1), config.sequence_length, config.seed)
        self.stream._windows = old._windows

    def __len__(self) -> int:
        return 10_000

    def __iter__(self) -> Iterator[Tensor]:
        for _ in range(len(self)):
            yield torch.from_numpy(self.stream.take(MICRO))

    def state_dict(self) -> dict[str, int]:
        return self.stream.state_dict()

    def load_state_dict(self, state: dict[str, int]) -> None:
        self.stream.load_state_dict(state)


@pytest.fixture
def config(tmp_path: Path) -> RunConfig:
    return case(tmp_path, LLAMA, tokens=3_200, batch_size=4, decisions=10, pruning="magnitude")


def plain(config: RunConfig, policy: Any = None, **settings: Any) -> Loop:
    usual: dict[str, Any] = {
        "pruning": config.pruning,
        "precisions": ("fp32", "bf16"),
        "min_batch_size": MICRO,
        "max_batch_size": 16,
    }
    return Loop(config, policy or Script(SCRIPT), micro=MICRO, **usual | settings)


def fit(
    loop: Loop, *callbacks: Any, settings: Any = None, ckpt: Any = None, module: Any = Module, **options: Any
) -> tuple[Module, Any, Any]:
    """Fit the loop's model, untouched so far, under its settings; return module, callback and trainer."""
    loop.steering.close()
    module, callback = module(loop), steer(settings or loop.steering.settings, **options.pop("steer", {}))
    policy: Any = loop.steering.settings.policy
    if isinstance(policy, ByDecision):
        policy.callback = callback
    elif isinstance(policy, Script):
        policy.at = 0  # the loop's own steering has asked it once
    own = trainer(*callbacks, callback, **options)
    own.fit(module, Stream(loop), ckpt_path=ckpt)
    return module, callback, own


# The same as a plain loop -----------------------------------------------------------------------------------------


def test_fit_ends_where_a_plain_loop_does_under_all_controls(config: RunConfig) -> None:
    mine = plain(config, gradient_clip=None)
    mine.train()
    logger, options = Kept(), {"gradient_clip_val": None, "log_every_n_steps": 1}
    module, callback, own = fit(plain(config, gradient_clip=None), LearningRateMonitor(), logger=logger, **options)
    ours, theirs = told(callback), told(mine)
    assert [each.requested for each in ours] == [each.requested for each in theirs]
    assert len({each.requested.batch_size for each in ours}) > 2
    assert len({each.requested.sparsity for each in ours}) > 2
    assert {each.precision for each in ours} == {"fp32", "bf16"}
    assert far(mine.model, module.net) == 0.0
    assert [(a.train_loss, a.gradient_norm) for a in ours] == [(b.train_loss, b.gradient_norm) for b in theirs]
    for each in ours:
        assert each.precision == each.requested.precision
        assert each.sparsity == pytest.approx(each.requested.sparsity, abs=1e-3)
        assert each.batch_size == pytest.approx(each.requested.batch_size, rel=0.35)
        assert each.micro_batch_size == MICRO
    assert module.rates == mine.rates
    assert logger.of("lr-AdamW/pg1") == module.rates
    assert logger.of("rate") == pytest.approx(module.rates)  # metrics are float32
    assert own.global_step == len(module.rates) == sum(each.steps for each in ours)


def raised(observation: np.ndarray, masks: np.ndarray) -> Action:
    """Ask for twice the learning rate and the batch, and draw a random number as well."""
    torch.rand(1)
    return (6, 2, *KEEP[2:])


@pytest.mark.parametrize(
    "limits", [{"max_steps": 25}, {"max_steps": 7, "uneven": True}, {"max_epochs": 3, "uneven": True}], ids=str
)
def test_under_advice_the_weights_are_those_of_a_fit_without_steering(tmp_path: Path, limits: dict[str, Any]) -> None:
    """Also where the last step of an epoch and its last batch are short."""
    config = case(tmp_path, GPT2 | DROPOUT, tokens=3_200, batch_size=10, decisions=5)
    uneven = limits.pop("uneven", False)
    usual: dict[str, Any] = {"accelerator": "cpu", "devices": 1, "gradient_clip_val": 1.0, "accumulate_grad_batches": 5}
    quiet = {"enable_checkpointing": False, "enable_progress_bar": False, "enable_model_summary": False}
    ends, logger = [], Kept()
    for advises in (False, True):
        loop = plain(config, raised)
        loop.steering.close()
        taken: Any = list(torch.from_numpy(loop.stream.take(23)))
        rows: Any = DataLoader(taken, batch_size=MICRO)
        bold = GuardrailSettings(cautious=False)  # the policy doubles the learning rate at once
        given = {
            "policy": raised, "mode": "advise", "base_schedule": FLAT, "decisions": 5, "guardrails": bold,
        }  # fmt: skip
        module, callback = Module(loop), steer(given)
        own = pl.Trainer(
            **usual | quiet | limits, callbacks=[callback] if advises else [], logger=logger if advises else False
        )
        torch.manual_seed(1)
        own.fit(module, rows if uneven else Stream(loop))
        ends.append((module.net, torch.get_rng_state(), own.global_step, module.rates))
    (base, numbers, *counts), (mine, same_numbers, *same_counts) = ends
    assert far(base, mine) == 0.0
    assert torch.equal(numbers, same_numbers)
    assert counts == same_counts
    steering = callback.steering
    assert steering is not None
    assert steering.finished
    assert {record.allowed for record in steering.records} == {KEEP}
    assert steering.summary()["advice"]["learning_rate x2"] == 5
    assert logger.of("advice/learning_rate_scale") == [2.0] * 5


def test_the_trainer_clips_and_gets_back_what_it_was_given(config: RunConfig) -> None:
    halved: list[Action] = [(3, 0, 0, 0, 0), *SCRIPT]
    in_fp32: list[Action] = [(rate, batch, 0, pruning, finish) for rate, batch, _, pruning, finish in halved]
    mine = plain(config, Script(in_fp32))
    mine.train()
    module, callback, own = fit(plain(config, Script(in_fp32)), max_steps=51, accumulate_grad_batches=2)
    assert far(mine.model, module.net) < 1e-5  # Lightning sums the norm in another order
    assert any(each.clipped_share > 0 for each in told(callback))
    assert own.global_step == sum(each.steps for each in told(callback)) > 51  # the budget ends the run
    assert (own.max_steps, own.accumulate_grad_batches, type(own.accumulate_grad_batches)) == (51, 2, int)
    assert (own.precision, type(own.precision_plugin).__name__) == ("32-true", "Precision")


def test_a_trainer_in_mixed_precision_may_be_switched_to_fp32(config: RunConfig) -> None:
    _, callback, own = fit(plain(config, precisions=("bf16", "fp32")), precision="bf16-mixed")
    assert [each.precision for each in told(callback)] == ["bf16"] * 5 + ["fp32"] * 5
    assert own.precision == "bf16-mixed"


def test_what_is_left_out_comes_from_the_trainer(config: RunConfig) -> None:
    loop = plain(config)
    given = {"policy": "none", "decisions": 5, "probe": False}
    _, callback, _ = fit(loop, settings=given, max_steps=50, accumulate_grad_batches=6, gradient_clip_val=0.7)
    settings = callback.steering.settings
    assert (settings.sequences, settings.batch_size, settings.gradient_clip) == (600, 12, 0.7)
    assert settings.min_batch_size == 6  # 12 = 6 micro-batches of 2: half of it is whole, a quarter is not
    assert callback.steering.sequences == 600
    assert settings.epoch_sequences is not None
    assert callback.steering.records[-1].telemetry.epochs_seen == 600 / settings.epoch_sequences


# The scale of the gradient ----------------------------------------------------------------------------------------


def test_a_window_counts_from_its_start() -> None:
    window = Window(3, start=5)
    assert [n % window for n in (5, 6, 7, 8, 11)] == [0, 1, 2, 0, 0]
    assert torch.tensor(6.0) / window == 2.0


class Mean(pl.LightningModule):  # type: ignore[misc, name-defined]
    """The gradient of its weight is the mean of what a step was trained on."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = torch.nn.Parameter(torch.zeros(()))
        self.gradients: list[float] = []

    def training_step(self, batch: Tensor, batch_idx: int) -> dict[str, Tensor]:
        return {"loss": (self.weight * batch).mean()}

    def configure_gradient_clipping(self, *args: Any, **kwargs: Any) -> None:
        assert self.weight.grad is not None
        self.gradients.append(float(self.weight.grad))

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.AdamW(self.parameters(), lr=1e-6)


class Endless(IterableDataset[Tensor]):
    """Has no length."""

    def __init__(self, numbers: Tensor) -> None:
        self.numbers = numbers

    def __iter__(self) -> Iterator[Tensor]:
        return iter(self.numbers)


@pytest.mark.parametrize("sized", [True, False])
@pytest.mark.parametrize(
    ("n", "means"), [(23, [2.5, 8.5, 14.5, 20.0, 5.5, 17.0]), (19, [2.5, 8.5, 14.5, 18.0, 5.5, 15.0])]
)
def test_step_is_the_mean_over_its_sequences_at_the_end_of_an_epoch_too(
    n: int, means: list[float], sized: bool
) -> None:
    numbers = torch.arange(n, dtype=torch.float32)
    loader = DataLoader(numbers if sized else Endless(numbers), batch_size=2)  # type: ignore[arg-type]
    settings = {"policy": Script([KEEP, (3, 2, 0, 0, 0)]), "decisions": 2, "max_batch_size": 12, "probe": False}
    module, callback = Mean(), steer(settings | ({} if sized else {"sequences": 2 * n}))
    trainer(callback, max_epochs=2, accumulate_grad_batches=3, gradient_clip_val=None).fit(module, loader)
    assert module.gradients == pytest.approx(means)
    assert callback.steering is not None
    assert callback.steering.sequences == 2 * n
    assert [each.batch_size for each in told(callback)] == [n / 4, n / 2]


def test_a_run_whose_data_end_early_says_so() -> None:
    loader = DataLoader(Endless(torch.arange(20.0)), batch_size=2)
    callback = steer({"policy": "none", "decisions": 2, "sequences": 30, "probe": False})
    with pytest.warns(UserWarning, match="ended at 20 of its 30 sequences"):
        trainer(callback, max_epochs=1, gradient_clip_val=None).fit(Mean(), loader)


# Probe and validation ---------------------------------------------------------------------------------------------


def test_the_probe_looks_and_leaves_no_trace(config: RunConfig) -> None:
    logged = [Kept(), Kept()]
    keep = {"policy": lambda *_: KEEP}
    (blind, _, _), (module, callback, _) = (
        fit(plain(config, **keep, probe=probe), logger=logger, log_every_n_steps=1)
        for probe, logger in zip((False, True), logged, strict=True)
    )
    mine = plain(config, **keep, probe=True)
    mine.train()
    probed = [each.probe_linear for each in told(callback)]
    theirs = [each.probe_linear for each in told(mine)]
    assert [each is None for each in probed] == [each is None for each in theirs]
    assert [each for each in probed if each] == pytest.approx([each for each in theirs if each], rel=1e-2, abs=1e-6)
    n_probes = sum(each is not None for each in probed)
    assert n_probes > 2
    assert module.calls == blind.calls + 3 * n_probes
    assert far(blind.net, module.net) == 0.0
    unseen, seen = ([row for row in each.rows if "run/decision" not in row[1]] for each in logged)
    assert unseen == seen, "but for the decisions, whose seconds differ"


def test_validation_and_checkpoints_within_a_step_change_nothing(config: RunConfig, tmp_path: Path) -> None:
    class Saves(pl.Callback):  # type: ignore[misc, name-defined]
        def on_train_batch_end(self, trainer: Any, module: Any, outputs: Any, batch: Any, batch_idx: int) -> None:
            if batch_idx in (40, 41):
                trainer.save_checkpoint(tmp_path / "one.ckpt")

    class Validates(Module):
        def val_dataloader(self) -> Any:
            return Stream(self.loop[0])

    alone, quiet, _ = fit(plain(config))
    often = {"limit_val_batches": 2, "val_check_interval": 7, "num_sanity_val_steps": 1}
    module, callback, _ = fit(plain(config), Saves(), module=Validates, steer={"monitor": "val_loss"}, **often)
    assert far(alone.net, module.net) == 0.0
    losses = [each.validation_loss or 0.0 for each in told(callback)]
    assert losses[1] > losses[-1] > 0
    assert all(each.evaluation_time_s > 0 for each in told(callback))
    assert [a.train_loss for a in told(quiet)] == [b.train_loss for b in told(callback)]


# Going on ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("step", [7, 21])
def test_a_fit_that_was_interrupted_goes_on_bit_for_bit(config: RunConfig, tmp_path: Path, step: int) -> None:
    saves = ModelCheckpoint(tmp_path, filename="{step}", every_n_train_steps=7, save_top_k=-1)
    limits = {
        "max_steps": 100,
        "enable_checkpointing": True,
        "default_root_dir": tmp_path,
        "accumulate_grad_batches": 2,
    }
    whole, first, _ = fit(plain(config, ByDecision(), probe=True), saves, **limits)
    late, second, own = fit(plain(config, ByDecision(), probe=True), ckpt=tmp_path / f"step={step}.ckpt", **limits)
    assert 0 < late.calls < whole.calls
    assert far(whole.net, late.net) == 0.0
    assert whole.rates[step:] == late.rates
    assert [each.requested for each in told(second)] == [each.requested for each in told(first)]
    assert [each.train_loss for each in told(second)] == [each.train_loss for each in told(first)]
    own.save_checkpoint(tmp_path / "end.ckpt")
    idle, third, _ = fit(plain(config, ByDecision(), probe=True), ckpt=tmp_path / "end.ckpt", **limits)
    assert idle.calls == 0
    assert len(told(third)) == config.decisions


@pytest.mark.parametrize("given", [False, True])
def test_the_module_s_scheduler_becomes_the_base_schedule(config: RunConfig, given: bool) -> None:
    class Scheduled(Module):
        def configure_optimizers(self) -> Any:
            optimizer = super().configure_optimizers()
            scheduler = torch.optim.lr_scheduler.StepLR(optimizer, 10, gamma=0.5)
            return {"optimizer": optimizer, "lr_scheduler": {"scheduler": scheduler, "interval": "step"}}

    loop = plain(config, policy="none")
    settings = replace(loop.steering.settings, base_schedule=FLAT if given else None)
    module, _, own = fit(loop, settings=settings, module=Scheduled)
    peak = config.base_learning_rate
    assert module.rates == pytest.approx([peak if given else peak * 0.5 ** (i // 10) for i in range(50)], rel=1e-12)
    assert not own.lr_scheduler_configs


# Bad uses ---------------------------------------------------------------------------------------------------------


def manual(loop: Loop) -> None:
    module = Module(loop)
    module.automatic_optimization = False
    trainer(steer(loop.steering.settings), gradient_clip_val=None).fit(module, Stream(loop))


def with_scheduler_of_losses(loop: Loop) -> None:
    class Scheduled(Module):
        def configure_optimizers(self) -> Any:
            optimizer = super().configure_optimizers()
            scheduler = torch.optim.lr_scheduler.ReduceLROnPlateau(optimizer)
            return {"optimizer": optimizer, "lr_scheduler": {"scheduler": scheduler, "monitor": "loss"}}

    settings = replace(loop.steering.settings, base_schedule=None)
    trainer(steer(settings)).fit(Scheduled(loop), Stream(loop))


def another_writer(loop: Loop) -> None:
    class Writes(Module):
        def on_train_batch_end(self, *args: Any) -> None:
            self.trainer.optimizers[0].param_groups[0]["lr"] = 0.1

    trainer(steer(loop.steering.settings)).fit(Writes(loop), Stream(loop))


def batches_larger_than_said(loop: Loop) -> None:
    fit(loop, steer={"micro_batch_size": 1})


def no_budget(loop: Loop) -> None:
    fit(loop, settings={"policy": "none"})


def unsized_batches(loop: Loop) -> None:
    class Unsized(Stream):
        batch_size = None  # type: ignore[assignment]

    trainer(steer(loop.steering.settings)).fit(Module(loop), Unsized(loop))


def _fit(**options: Any) -> Callable[[Loop], None]:
    def use(loop: Loop) -> None:
        fit(loop, **options)

    return use


def _settings(**changes: Any) -> Callable[[Loop], None]:
    def use(loop: Loop) -> None:
        fit(loop, settings=replace(loop.steering.settings, **changes))

    return use


BAD: dict[str, tuple[Callable[[Loop], None], str]] = {
    "manual": (manual, "Steering itself"),
    "scheduler": (with_scheduler_of_losses, "follow from the number of steps alone, got ReduceLROnPlateau"),
    "writer": (another_writer, "something else writes it"),
    "precision": (_fit(precision="bf16-true"), "32-true or bf16-mixed"),
    "clipping": (_fit(gradient_clip_val=0.5), "gradient_clip must be what"),
    "least steps": (_fit(min_steps=3), "min_epochs and min_steps"),
    "few steps": (_fit(max_steps=40), "max_steps x batch_size give, 160, got 200"),
    "no budget": (no_budget, "the budget, must be given"),
    "odd batch": (_settings(batch_size=5), "multiple of the 2 sequences"),
    "two batches": (_fit(accumulate_grad_batches=4), "accumulate_grad_batches = 8, got 4"),
    "small batch": (_settings(min_batch_size=1), "min_batch_size must be at least 2"),
    "micro-batch": (batches_larger_than_said, "micro_batch_size must be at least the 2 sequences"),
    "no batch size": (unsized_batches, "micro_batch_size must be given"),
    "bf16": (_fit(precision="bf16-mixed"), "precisions must begin with bf16"),
    "field": (_fit(settings={"polcy": "none"}), "fields of SteeringSettings, got polcy"),
}


@pytest.mark.parametrize("name", BAD)
def test_bad_uses_get_one_clear_line(config: RunConfig, name: str) -> None:
    use, says = BAD[name]
    loop = plain(config, "none")
    loop.steering.close()
    with pytest.raises(ValueError, match=says) as caught, warnings.catch_warnings():
        use(loop)
    assert "\n" not in str(caught.value)


def test_a_trainer_of_the_library_s_old_name_is_recognised() -> None:
    old: Any = type("Trainer", (), {"__module__": "pytorch_lightning.trainer.trainer"})()
    with pytest.raises(ValueError, match=r"got one of pytorch_lightning, .* write `import lightning.pytorch as pl`"):
        check_fit(old, pl.LightningModule())


def test_a_batch_that_the_loader_holds_is_told(config: RunConfig) -> None:
    info = LoaderInfo(micro_batch_size=16, world_size=1, accumulate=1, epoch_sequences=800, max_epochs=1, max_steps=-1)
    usual: Any = SimpleNamespace(gradient_clip_algorithm="norm", gradient_clip_val=1.0)
    with pytest.warns(UserWarning, match="the batch size cannot fall below 16, one batch of the data loader"):
        settings = settings_for(usual, {"decisions": 5}, info, Precision())
    assert settings.min_batch_size == 16
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        settings_for(usual, {"decisions": 5, "policy": "none"}, info, Precision())
        settings_for(usual, {"decisions": 5, "min_batch_size": 16}, info, Precision())
        assert settings_for(usual, {"decisions": 5}, replace(info, accumulate=2), Precision()).min_batch_size == 16


def test_without_lightning_it_says_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    name = "trainpilot.agents.integrations.lightning"
    for part in (name, f"{name}_settings"):
        monkeypatch.delitem(sys.modules, part)
    monkeypatch.setitem(sys.modules, "lightning.pytorch", None)
    with pytest.raises(ImportError, match="pip install lightning"):
        importlib.import_module(name)


def test_checkpoints_of_version_0_1_find_the_callback() -> None:
    assert LightningSteering().state_key == "SteeringCallback"


def test_two_optimisers_are_lightnings_own_to_refuse(config: RunConfig) -> None:
    class Two(Module):
        def configure_optimizers(self) -> Any:
            return [make_optimizer(self.net, self.config) for _ in range(2)]

    loop = plain(config, "none")
    loop.steering.close()
    with pytest.raises(RuntimeError, match="only supported with manual optimization"):
        trainer(steer(loop.steering.settings)).fit(Two(loop), Stream(loop))
