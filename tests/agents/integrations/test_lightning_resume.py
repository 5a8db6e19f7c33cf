"""A fit under the callback goes on from any checkpoint, may be repeated, and leaves nothing behind."""

from __future__ import annotations

import time
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from steering_loops import SCRIPT, far
from torch import Tensor, nn

pl = pytest.importorskip("lightning.pytorch")
from lightning.pytorch.callbacks import OnExceptionCheckpoint  # noqa: E402
from lightning.pytorch.strategies import FSDPStrategy, ModelParallelStrategy  # noqa: E402
from lightning_runs import ByDecision, Kept, steer, told, trainer  # noqa: E402

from trainpilot.agents.integrations.lightning import LightningSteering  # noqa: E402
from trainpilot.agents.integrations.lightning_settings import check_fit  # noqa: E402

pytestmark = pytest.mark.filterwarnings("ignore:.*", "error:the run ended")


class Line(pl.LightningModule):  # type: ignore[misc, name-defined]
    """Finds the slope of a line."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.net = nn.Sequential(nn.Linear(1, 4), nn.BatchNorm1d(4), nn.Linear(4, 1))
        self.net[1].eval()
        self.calls = 0
        self.pause_s = 0.0

    def training_step(self, batch: Tensor) -> Tensor:
        self.calls += 1
        loss: Tensor = (self.net(batch) - 3 * batch).square().mean()
        self.log("loss", loss)
        return loss

    def validation_step(self, batch: Tensor) -> None:
        time.sleep(self.pause_s)
        self.log("val_loss", (self.net(batch) - 3 * batch).square().mean())

    def test_step(self, batch: Tensor) -> None:
        pass

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.AdamW(self.parameters(), lr=1e-2)


class Rows:
    """Two rows at a time, and a position that a checkpoint can hold."""

    batch_size = 2

    def __init__(self, length: int = 10_000, at: int = 0) -> None:
        self.length, self.at = length, at

    def __len__(self) -> int:
        return self.length

    def __iter__(self) -> Iterator[Tensor]:
        for _ in range(self.length):
            self.at += 1
            yield torch.tensor([[self.at % 7], [self.at % 5]], dtype=torch.float32)

    def state_dict(self) -> dict[str, int]:
        return {"at": self.at}

    def load_state_dict(self, state: dict[str, int]) -> None:
        self.at = state["at"]


class At(pl.Callback):  # type: ignore[misc, name-defined]
    """Does something at the end of one batch."""

    def __init__(self, batch: int, do: Any) -> None:
        self.batch, self.do = batch, do

    def on_train_batch_end(self, trainer: Any, module: Any, outputs: Any, batch: Any, batch_idx: int) -> None:
        if batch_idx == self.batch:
            self.do(trainer)


def steering(**settings: Any) -> LightningSteering:
    policy = ByDecision()
    policy.callback = steer({"policy": policy, "decisions": len(SCRIPT), "sequences": 400, "batch_size": 4} | settings)
    return policy.callback


def fit(*callbacks: Any, ckpt: Any = None, at: int = 0, **options: Any) -> tuple[Line, LightningSteering, Any]:
    """Fit a line with steering in the last place."""
    module, callback = Line(), steering()
    own = trainer(*callbacks, callback, **options)
    own.fit(module, Rows(at=at), ckpt_path=ckpt)
    return module, callback, own


WITHIN, BETWEEN = 26, 27
"""Batches at whose end a step is open, and one is over, in the midst of an interval at twice the starting batch."""


def test_a_checkpoint_of_a_callback_that_comes_first_is_up_to_date(tmp_path: Path) -> None:
    path = tmp_path / "one.ckpt"
    whole, first, _ = fit(At(BETWEEN, lambda own: own.save_checkpoint(path)))
    late, second, _ = fit(ckpt=path)
    assert 0 < late.calls < whole.calls
    assert far(whole, late) == 0.0
    assert [each.train_loss for each in told(second)] == [each.train_loss for each in told(first)]


def test_a_checkpoint_of_a_fit_that_was_stopped_goes_on(tmp_path: Path) -> None:
    def stop(own: Any) -> None:
        own.should_stop = True

    whole, first, _ = fit()
    fit(At(BETWEEN, stop))[2].save_checkpoint(tmp_path / "end.ckpt")
    late, second, _ = fit(ckpt=tmp_path / "end.ckpt", at=BETWEEN + 1)  # for Lightning the epoch is over
    assert 0 < late.calls < whole.calls
    assert far(whole, late) < 1e-5
    assert [each.requested for each in told(second)] == [each.requested for each in told(first)]


def test_a_checkpoint_written_after_an_exception_goes_on(tmp_path: Path) -> None:
    def fail(own: Any) -> None:
        raise RuntimeError("power cut")

    whole, _, _ = fit()
    with pytest.raises(RuntimeError, match="power cut"):
        fit(At(BETWEEN, fail), OnExceptionCheckpoint(tmp_path), enable_checkpointing=True)
    late, _, _ = fit(ckpt=tmp_path / "on_exception.ckpt")
    assert 0 < late.calls < whole.calls
    assert far(whole, late) < 1e-5


@pytest.mark.parametrize("batch", [WITHIN, BETWEEN])
def test_a_fit_that_goes_on_logs_the_steps_it_makes(tmp_path: Path, batch: int) -> None:
    path, logger = tmp_path / "one.ckpt", Kept()
    saved = []

    def save(own: Any) -> None:
        own.save_checkpoint(path)
        saved.append(own.global_step)

    fit(At(batch, save))
    _, _, own = fit(ckpt=path, logger=logger, log_every_n_steps=1)
    steps = [step for step, metrics in logger.rows if "loss" in metrics]
    assert steps[0] == saved[0]
    assert steps[-1] == own.global_step - 1


def test_testing_a_checkpoint_has_no_bearing_on_the_next_fit(tmp_path: Path) -> None:
    module, callback, own = fit()
    own.save_checkpoint(tmp_path / "end.ckpt")
    own.test(Line(), Rows(1), ckpt_path=tmp_path / "end.ckpt", verbose=False)
    again = Line()
    trainer(callback).fit(again, Rows())
    assert again.calls == module.calls
    assert callback.steering is not None
    assert callback.steering.sequences == 400


SHORT = {"policy": "none", "decisions": 2, "probe": False}


def test_a_second_fit_of_a_trainer_makes_the_steps_that_its_limit_leaves() -> None:
    callback = steer(SHORT)
    own = trainer(callback, max_steps=10)
    own.fit(Line(), Rows())
    own.fit(idle := Line(), Rows())
    assert idle.calls == 0
    own.fit_loop.epoch_loop.max_steps = 16
    own.fit(more := Line(), Rows())
    assert (more.calls, own.global_step) == (6, 16)
    assert callback.steering is not None
    assert callback.steering.end_sequences == 12


def test_a_second_fit_of_a_trainer_makes_the_epochs_that_its_limit_leaves() -> None:
    callback = steer(SHORT)
    own = trainer(callback, max_epochs=2)
    own.fit(Line(), Rows(5))
    own.fit_loop.max_epochs = 3
    own.fit(more := Line(), Rows(5))
    assert more.calls == 5
    assert callback.steering is not None
    assert callback.steering.finished


def test_a_second_fit_goes_on_from_its_checkpoint(tmp_path: Path) -> None:
    path = tmp_path / "one.ckpt"

    def fits(*, resumed: bool) -> Line:
        callback = steer(SHORT)
        own = trainer(callback, At(5, lambda own: own.save_checkpoint(path)), max_steps=10)
        if not resumed:
            own.fit(Line(), Rows())
        own.fit_loop.epoch_loop.max_steps = 20
        own.fit(module := Line(), Rows(), ckpt_path=path if resumed else None)
        assert callback.steering is not None
        assert callback.steering.sequences == 20
        return module

    whole = fits(resumed=False)
    assert far(whole, fits(resumed=True)) == 0.0


def test_the_optimiser_is_left_as_it_was(tmp_path: Path) -> None:
    _, _, own = fit(At(BETWEEN, lambda own: own.save_checkpoint(tmp_path / "one.ckpt")))
    groups = torch.load(tmp_path / "one.ckpt")["optimizer_states"][0]["param_groups"]
    fresh = Line().configure_optimizers().param_groups
    assert set(groups[0]) == set(own.optimizers[0].param_groups[0]) == set(fresh[0])
    assert own.optimizers[0].param_groups[0]["lr"] == fresh[0]["lr"]
    assert own.optimizers[0].param_groups[0]["betas"] == pytest.approx(fresh[0]["betas"])


# Validation -------------------------------------------------------------------------------------------------------


def test_validation_costs_no_interval_its_time() -> None:
    module, callback = Line(), steer({"policy": "none", "decisions": 4, "sequences": 16}, monitor="val_loss")
    module.pause_s = 1.0  # long beside two steps, on a busy machine as well
    own = trainer(callback, val_check_interval=2, limit_val_batches=1, num_sanity_val_steps=0)
    own.fit(module, Rows(), Rows(1))
    assert max(each.time_s for each in told(callback)) < module.pause_s
    assert [each.evaluation_time_s >= module.pause_s for each in told(callback)] == [False, True, True, True]
    assert callback.steering is not None
    before = callback.steering.validation_loss
    module.pause_s = 0.0
    for weight in module.parameters():
        nn.init.zeros_(weight)
    own.validate(module, Rows(1), verbose=False)
    assert callback.steering.validation_loss == before


def test_a_probe_leaves_a_layer_in_the_mode_that_it_finds() -> None:
    callback = steer({"policy": "none", "decisions": 5, "sequences": 100})
    trainer(callback).fit(module := Line(), Rows())
    assert any(each.probe_linear is not None for each in told(callback))
    assert not module.net[1].training
    assert module.net[0].training


# Other uses -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("batches", [1, 5])
def test_a_quick_try_needs_no_budget(batches: int) -> None:
    given = {"sequences": 4_000, "batch_size": 8, "min_batch_size": 4}
    callback = steer(given)
    own = trainer(callback, fast_dev_run=batches, accumulate_grad_batches=4)
    own.fit(Line(), Rows(), Rows())
    assert own.global_step == batches
    assert len(told(callback)) == 1


class Lost(Line):
    """Has no finite loss in some of its steps."""

    lost = range(60, 61)

    def training_step(self, batch: Tensor) -> Tensor:
        return super().training_step(batch) * (float("nan") if self.calls in self.lost else 1.0)


def test_a_step_without_a_finite_gradient_is_skipped() -> None:
    callback = steering()
    trainer(callback).fit(module := Lost(), Rows())
    assert callback.steering is not None
    told = callback.steering.summary()
    assert (told["skipped_steps"], told["rollbacks"]) == (1, [])
    assert all(weight.isfinite().all() for weight in module.parameters())


def test_a_spike_takes_a_module_back_that_writes_its_state_in_its_own_way() -> None:
    class Slim(Lost):
        lost = range(60, 76)

        def state_dict(self, *args: Any, **kwargs: Any) -> dict[str, Any]:
            return {name: each for name, each in super().state_dict(*args, **kwargs).items() if "net.2" in name}

    callback = steering()
    trainer(callback).fit(module := Slim(), Rows())
    assert callback.steering is not None
    assert callback.steering.summary()["rollbacks"]
    assert all(weight.isfinite().all() for weight in module.parameters())


def test_an_optimiser_that_calls_its_closure_again_is_refused() -> None:
    class Searches(Line):
        def configure_optimizers(self) -> torch.optim.Optimizer:
            return torch.optim.LBFGS(self.parameters(), lr=1e-2)

    with pytest.raises(ValueError, match="must evaluate a step once, as Adam does, got LBFGS"):
        trainer(steer({"policy": "none", "decisions": 2, "sequences": 20}), gradient_clip_val=None).fit(
            Searches(), Rows()
        )


@pytest.mark.parametrize("kind", [FSDPStrategy, ModelParallelStrategy])
def test_only_one_device_and_ddp_are_steered(kind: Any) -> None:
    own: Any = SimpleNamespace(lr_scheduler_configs=[], min_epochs=None, min_steps=None, strategy=kind())
    with pytest.raises(ValueError, match=f"strategy must be a single device or DDP, got {kind.__name__}"):
        check_fit(own, Line())
