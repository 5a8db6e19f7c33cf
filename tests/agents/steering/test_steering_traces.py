"""Steering takes back what went wrong wherever that happens, and leaves nothing behind in what belongs to the user."""

from __future__ import annotations

import copy
import math
import pickle
from collections.abc import Callable
from functools import partial
from typing import Any

import pytest
import torch
from random_rows import Rows
from torch import nn

from trainpilot.agents.bundle import BaseSchedule
from trainpilot.agents.controller import keep
from trainpilot.agents.steering.contract import QualityContract
from trainpilot.agents.steering.guardrails import GuardrailSettings
from trainpilot.agents.steering.settings import SteeringSettings
from trainpilot.agents.steering.steering import Steering
from trainpilot.envs.action import KEEP, Action
from trainpilot.llm_runtime.energy.meter import EnergyMeter, EnergyReading, NoMeter

Loss = Callable[[nn.Module, torch.Tensor], torch.Tensor]
FASTER_AND_LARGER: list[Action] = [(4, 2, 0, 0, 0), KEEP]


class Drift(nn.Module):
    """Keeps a running mean that is not in its state."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.linear = nn.Linear(4, 1)
        self.mean: torch.Tensor
        self.register_buffer("mean", torch.zeros(()), persistent=False)

    def forward(self, rows: torch.Tensor) -> torch.Tensor:
        out: torch.Tensor = self.linear(rows)
        if self.training:
            self.mean = 0.9 * self.mean + 0.1 * out.detach().mean()
        return out - self.mean


class PartOnly(nn.Sequential):
    """Saves its last layer only, as users of adapters do."""

    def state_dict(self, *args: Any, **named: Any) -> dict[str, Any]:  # type: ignore[override]
        return {name: each for name, each in super().state_dict(*args, **named).items() if not name.startswith("0.")}


def net() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(4, 8), nn.Tanh(), nn.Dropout(0.0), nn.Linear(8, 1))


def loss_of(model: nn.Module, rows: torch.Tensor) -> torch.Tensor:
    loss: torch.Tensor = ((model(rows).squeeze(-1) - rows.sum(1)) ** 2).mean() + 1.0
    return loss


def spoilt(*steps: int) -> Loss:
    """Return a loss that is not a number in these steps, counted from 1; six of an interval's ten are its loss."""
    done = 0

    def loss(model: nn.Module, rows: torch.Tensor) -> torch.Tensor:
        nonlocal done
        done += 1
        return loss_of(model, rows * (math.nan if done in steps else 1.0))

    return loss


class Steered:
    """A hundred steps of four rows, in ten intervals."""

    def __init__(self, model: nn.Module | None = None, *, data: bool = False, rate: float = 1e-2, **settings: Any):
        self.model = model if model is not None else net()
        self.optimizer = torch.optim.AdamW([p for p in self.model.parameters() if p.requires_grad], lr=rate)
        self.rows = Rows()
        options: dict[str, Any] = {
            "sequences": 400, "batch_size": 4, "decisions": 10, "policy": keep, "probe": False,
            "base_schedule": BaseSchedule(schedule="constant", warmup_share=0.0),
        }  # fmt: skip
        wanted = SteeringSettings(**options | settings)
        data_of = self.rows if data else None
        self.now = 0.0
        self.steering = Steering(
            self.model, self.optimizer, wanted, data=data_of, meter=NoMeter("a test"), clock=lambda: self.now
        )

    def go(self, steps: int = 10**9, loss: Loss = loss_of) -> Steered:
        while not self.steering.finished and steps:
            with self.steering.step() as step:
                rows = self.rows.take(step.batch_size)
                step.backward(lambda rows=rows: loss(self.model, rows))  # type: ignore[misc]
            self.now += 1
            steps -= 1
        return self

    @property
    def sound(self) -> bool:
        tensors = [*self.model.parameters(), *self.model.buffers()]
        return all(bool(torch.isfinite(each).all()) for each in tensors)

    @property
    def rollbacks(self) -> int:
        return len(self.steering.summary()["rollbacks"])


# What is taken back -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("data", [False, True], ids=["data go on", "data go back"])
def test_a_loss_that_breaks_in_the_last_interval_is_taken_back(data: bool) -> None:
    run = Steered(data=data).go(loss=spoilt(*range(93, 100)))
    assert run.sound
    assert run.rollbacks == 1


@pytest.mark.parametrize(("method", "error"), [("state_dict", RuntimeError), ("load_state_dict", SystemExit)])
def test_data_whose_position_fails_go_on(
    method: str, error: type[BaseException], monkeypatch: pytest.MonkeyPatch
) -> None:
    def fails(*_: Any) -> Any:
        raise error("no position")

    monkeypatch.setattr(Rows, method, fails)
    with pytest.warns(RuntimeWarning, match=f"data.{method} raised {error.__name__}: no position") as caught:
        run = Steered(data=True).go(loss=spoilt(*range(93, 100)))
    assert len(caught) == 1
    other = Steered().go(loss=spoilt(*range(93, 100)))
    assert run.rollbacks == other.rollbacks == 1
    assert run.rows.at == other.rows.at
    assert all(map(torch.equal, run.model.parameters(), other.model.parameters()))


@pytest.mark.parametrize(("bad", "data", "taken_back"), [(1, False, 0), (1, True, 1), (2, False, 1)])
def test_what_a_bad_batch_spoils_is_taken_back_where_that_costs_nothing(bad: int, data: bool, taken_back: int) -> None:
    def loss(model: nn.Module, rows: torch.Tensor) -> torch.Tensor:
        spoils = 240 < run.rows.at <= 240 + 40 * bad  # as many intervals
        return loss_of(model, rows) * (100.0 if spoils else 1.0)

    run = Steered(data=data)
    run.go(loss=loss)
    assert run.rollbacks == taken_back
    assert run.steering.finished


def test_data_that_spoil_the_run_each_time_are_passed_by() -> None:
    def loss(model: nn.Module, rows: torch.Tensor) -> torch.Tensor:
        return loss_of(model, rows * (math.nan if 200 < run.rows.at <= 228 else 1.0))

    run = Steered(data=True, guardrails=GuardrailSettings(spike=1e6, spike_share=1e6))
    run.go(loss=loss)
    assert run.sound
    assert run.rollbacks == 2
    assert run.steering.finished


def test_a_run_that_goes_on_has_something_to_go_back_to() -> None:
    first, second = Steered().go(42), Steered()
    second.model.load_state_dict(first.model.state_dict())
    second.optimizer.load_state_dict(first.optimizer.state_dict())
    second.steering.load_state_dict(first.steering.state_dict())
    second.go(loss=spoilt(*range(2, 8)))
    assert second.sound
    assert second.rollbacks == 1
    assert second.steering.summary()["fallen_back"] is None


def test_lost_weights_are_taken_back_after_the_policy_was_left_out_too() -> None:
    def fails(*_: Any) -> Action:
        raise ZeroDivisionError

    run = Steered(policy=fails).go(loss=spoilt(*range(72, 79)))
    assert run.sound
    assert "5 times running" in run.steering.summary()["fallen_back"]


@pytest.mark.parametrize("make", [Drift, lambda: PartOnly(*net())], ids=["buffer", "state in part"])
def test_all_that_training_changes_is_taken_back(make: Callable[[], nn.Module]) -> None:
    run = Steered(make()).go(loss=spoilt(*range(52, 59)))
    assert run.sound
    assert run.rollbacks == 1


def test_a_snapshot_holds_what_is_trained_and_no_more() -> None:
    model = net()
    for parameter in model[0].parameters():
        parameter.requires_grad_(False)
    run = Steered(model)
    kept = run.steering.rollback_copy._copy
    assert kept is not None
    assert sum(tensor.numel() for tensor in kept["loop"]["weights"].values()) == 9


def test_all_changes_since_the_snapshot_are_held_after_a_rollback() -> None:
    """Under a contract the snapshot is older than the change that broke it."""

    def doubles(*_: Any) -> Action:
        return (3, 2, 0, 0, 0)

    known = [(share, 1e-9) for share in (0.0, 1.0)]
    contract = QualityContract(max_loss_increase=1e-6, reference=known, from_start=True, max_slowdown=1e9)
    run = Steered(policy=doubles, contract=contract, data=True).go()
    assert run.rollbacks >= 1
    first = run.steering.summary()["rollbacks"][0]["after_decision"]
    after = [r for r in run.steering.records if r.telemetry.decision <= first][0:1]
    assert after, "there are intervals before it"
    sizes = [record.telemetry.requested.batch_size for record in run.steering.records[first + 1 :]]
    assert set(sizes[:3]) == {4}


# What is left as it was ---------------------------------------------------------------------------------------------


def test_the_probe_leaves_no_trace_in_modes_and_random_numbers() -> None:
    def noisy(model: nn.Module, rows: torch.Tensor) -> torch.Tensor:
        return loss_of(model, rows + 0.1 * torch.randn_like(rows))

    def run(probe: bool) -> Steered:
        made = Steered(probe=probe)
        made.model[2].eval()  # type: ignore[index]
        torch.manual_seed(1)
        return made.go(30, noisy)

    looked, unlooked = run(True), run(False)
    assert any(record.telemetry.probe_linear is not None for record in looked.steering.records)
    pairs = zip(looked.model.parameters(), unlooked.model.parameters(), strict=True)
    assert all(torch.equal(one, other) for one, other in pairs)
    assert not looked.model[2].training  # type: ignore[index]
    assert looked.model.training


def test_a_probe_looks_at_no_more_than_it_needs_where_it_is_told_how() -> None:
    looked: list[int] = []

    def part(run: Steered, rows: torch.Tensor) -> Callable[[int], torch.Tensor]:
        def probe_loss(count: int) -> torch.Tensor:
            looked.append(count)
            return loss_of(run.model, rows[:count])

        return probe_loss

    run = Steered(probe=True, sequences=8_000, batch_size=100)  # 800 in an interval, of which a probe takes 0.5 %
    while not run.steering.finished:
        with run.steering.step() as step:
            for rows in run.rows.take(step.batch_size).split(50):
                step.backward(partial(loss_of, run.model, rows), len(rows), probe_loss=part(run, rows))
    assert set(looked) == {4}
    probed = [record.telemetry.probe_linear for record in run.steering.records]
    assert len(looked) == 3 * sum(each is not None for each in probed) > 0


def test_a_probe_of_text_without_a_loss_tells_nothing() -> None:
    def loss(model: nn.Module, rows: torch.Tensor) -> torch.Tensor:
        return loss_of(model, rows) * (1.0 if model.training else math.nan)

    run = Steered(probe=True).go(loss=loss)
    assert run.sound
    assert run.rollbacks == 0
    assert {record.telemetry.probe_linear for record in run.steering.records} == {None}
    assert any(record.telemetry.probe_time_s == 0 for record in run.steering.records)


def test_memory_that_a_probe_lacks_costs_the_probe_alone() -> None:
    def short(model: nn.Module, rows: torch.Tensor) -> torch.Tensor:
        if not torch.is_grad_enabled():
            raise torch.OutOfMemoryError("out of memory")
        return loss_of(model, rows)

    run = Steered(probe=True).go(loss=short)
    assert run.steering.finished
    assert all(record.telemetry.probe_linear is None for record in run.steering.records)


def test_weights_may_be_unfrozen_between_a_step_and_its_probe() -> None:
    model = net()
    model[0].weight.requires_grad_(False)
    run = Steered(model, probe=True)
    run.optimizer.param_groups[0]["params"].append(model[0].weight)
    run.go(9)
    model[0].weight.requires_grad_(True)
    run.go(1)
    assert len(run.steering.records) == 1


def test_what_lies_between_two_intervals_is_off_the_clock() -> None:
    run = Steered().go(20)
    run.steering.pause()
    run.now += 1000
    inside = run.steering.state_dict()["readings"]["evaluation_s"]
    run.steering.resume()
    run.go(15)
    run.steering.pause()
    run.now += 50
    run.steering.resume()
    run.go(5)
    told = [record.telemetry for record in run.steering.records]
    assert inside == 1000
    assert [t.time_s for t in told[1:4]] == [10, 10, 10]
    assert [t.evaluation_time_s for t in told[1:4]] == [0, 1000, 50]


def test_joules_of_a_pause_are_left_out() -> None:
    class Counter(EnergyMeter):
        description = "ten watts"

        def read(self) -> EnergyReading:
            return EnergyReading(time_s=run.now, energy_j=10 * run.now, source="measured_counter")

    run = Steered()
    run.steering.loop.recorder.stopwatch.meter = Counter()
    run.go(5)
    run.steering.pause()
    run.now += 1000
    run.steering.resume()
    run.go(15)
    assert [record.telemetry.energy_j for record in run.steering.records] == [90, 100]  # the first begins with its step


def test_validation_is_off_the_clock_and_leaves_modes_alone() -> None:
    run = Steered()
    run.model[2].eval()  # type: ignore[index]

    def validate() -> float:
        assert not run.model.training
        run.now += 500
        return 1.5

    run.steering.validate = validate
    run.go()
    assert max(record.telemetry.time_s for record in run.steering.records) <= 10
    assert run.steering.validation_loss == 1.5
    assert run.model.training
    assert not run.model[2].training  # type: ignore[index]


def test_a_failed_optimiser_step_can_be_made_again() -> None:
    run = Steered()
    real = run.optimizer.step

    def fails(*_: Any, **__: Any) -> None:
        run.optimizer.step = real  # type: ignore[method-assign]
        raise torch.OutOfMemoryError("out of memory")

    run.optimizer.step = fails  # type: ignore[method-assign, assignment]
    with pytest.raises(torch.OutOfMemoryError):
        run.go(1)
    run.go(1)
    assert run.steering.state_dict()["course"]["sequences"] == 4


@pytest.mark.parametrize("what", ["on_decision", "validate"])
def test_a_failing_log_loses_no_record(what: str) -> None:
    calls = 0

    def fails(*_: Any) -> float:
        nonlocal calls
        calls += 1
        if calls == 1:
            raise OSError("disk full")
        return 1.0

    run = Steered()
    setattr(run.steering, what, fails)
    while not run.steering.finished:
        try:
            run.go()
        except OSError:
            run.now += 1
    assert [record.telemetry.decision for record in run.steering.records] == list(range(10))
    assert sum(record.telemetry.interval_tokens for record in run.steering.records) == 400


def test_close_gives_everything_back() -> None:
    script = iter([(4, 2, 0, 0, 0), *[KEEP] * 100])
    run = Steered(policy=lambda *_: next(script))
    run.go(12)
    assert run.optimizer.param_groups[0]["betas"] != (0.9, 0.999)
    run.steering.close()
    assert run.optimizer.param_groups[0]["lr"] == pytest.approx(1e-2)
    assert run.optimizer.param_groups[0]["betas"] == pytest.approx((0.9, 0.999))
    assert not run.steering.rollback_copy.exists
    assert not any(module._forward_hooks for module in run.model.modules())


def test_a_steered_model_can_be_copied_and_pickled() -> None:
    run = Steered().go(3)
    for other in (copy.deepcopy(run.model), pickle.loads(pickle.dumps(run.model))):
        other(torch.zeros(1, 4))


def test_a_constructor_that_fails_leaves_nothing() -> None:
    model = net()
    with pytest.raises(ValueError, match="preference"):
        Steered(model, preference="quality=-1")
    assert not any(module._forward_hooks for module in model.modules())


def test_a_policy_cannot_write_into_what_is_recorded() -> None:
    def spoils(observation: Any, masks: Any) -> Action:
        observation[:] = math.nan
        masks[:] = False
        return KEEP

    run = Steered(policy=spoils).go()
    assert run.steering.summary()["fallen_back"] is None
    assert not run.steering.summary()["refusals"]


# Bounds -------------------------------------------------------------------------------------------------------------


def test_a_rate_above_its_range_is_refused() -> None:
    bounds = GuardrailSettings(learning_rate_range=(1e-4, 1e-3))
    with pytest.raises(ValueError, match=r"learning_rate_range must hold the run's own learning rate, 0\.01, got"):
        Steered(guardrails=bounds)


def test_a_rollback_stays_within_the_range() -> None:
    bounds = GuardrailSettings(learning_rate_range=(1e-2, 1e-2))
    run = Steered(guardrails=bounds).go(loss=spoilt(*range(32, 39), *range(52, 59)))
    assert run.rollbacks == 2
    assert {record.telemetry.learning_rate for record in run.steering.records} == {1e-2}


def test_another_base_schedule_is_refused_where_a_run_goes_on() -> None:
    state = Steered().go(5).steering.state_dict()
    other = Steered(base_schedule=BaseSchedule(schedule="linear", warmup_share=0.0))
    with pytest.raises(ValueError, match="base_schedule must be what it was"):
        other.steering.load_state_dict(state)


def test_a_reference_tells_nothing_beyond_its_end() -> None:
    contract = QualityContract(reference=[(0.1, 100.0), (0.5, 100.0)], max_slowdown=1e9)
    run = Steered(contract=contract).go()
    assert run.steering.summary()["contract"]["held"] is None
