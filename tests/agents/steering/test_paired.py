"""A paired contract tries what a policy does against a shadow of the base schedule, and goes on from the better one."""

from __future__ import annotations

import copy
import io
import json
import math
from collections.abc import Callable
from functools import cache
from typing import Any

import numpy as np
import pytest
import torch
from fakes import ToyPlant, make_telemetry
from random_rows import Rows
from torch import nn

from trainpilot.agents.bundle import BaseSchedule
from trainpilot.agents.controller import Policy, keep
from trainpilot.agents.steering.contract import QualityContract
from trainpilot.agents.steering.guarded_controller import RollbackController
from trainpilot.agents.steering.guardrails import GuardrailSettings
from trainpilot.agents.steering.paired import HELD, LOST, PairedWatch
from trainpilot.agents.steering.saved_state import SavedContract
from trainpilot.agents.steering.settings import SteeringSettings
from trainpilot.agents.steering.steering import Steering
from trainpilot.envs.action import KEEP, Action
from trainpilot.llm_runtime.energy.meter import NoMeter
from trainpilot.llm_runtime.process_group import OneProcess

TWICE, HALF = (6, *KEEP[1:]), (0, *KEEP[1:])
FREE = GuardrailSettings(cautious=False, max_reversals=99)


class Run:
    """Two hundred steps of two rows, in twenty intervals. The clock goes on by a second in each step."""

    def __init__(self, policy: Policy = keep, *, rate: float = 1e-2, **settings: Any) -> None:
        torch.manual_seed(0)
        self.model = nn.Sequential(nn.Linear(4, 8), nn.Tanh(), nn.Dropout(0.1), nn.Linear(8, 1))
        self.optimizer = torch.optim.AdamW(self.model.parameters(), lr=rate)
        self.rows, self.now, self.steps = Rows(), 0.0, 0
        options: dict[str, Any] = {
            "sequences": 400, "batch_size": 2, "decisions": 20, "policy": policy, "guardrails": FREE,
            "base_schedule": BaseSchedule(schedule="constant", warmup_share=0.0),
        }  # fmt: skip
        self.logged: list[tuple[int, float]] = []
        self.steering = Steering(
            self.model, self.optimizer, SteeringSettings(**options | settings), data=self.rows,
            meter=NoMeter("a test"), clock=lambda: self.now,
            on_decision=lambda r: self.logged.append((r.telemetry.decision, r.telemetry.requested.learning_rate_scale)),
        )  # fmt: skip

    def go(self, steps: int = 10**9, loss: Callable[[float], float] = lambda scale: 0.0) -> Run:
        """Train; `loss` is added to each step's, by its learning-rate scale."""
        while not self.steering.finished and steps:
            with self.steering.step() as step:
                self.now += 1
                rows, more = self.rows.take(step.batch_size), loss(self.steering.loop.controls.learning_rate_scale)
                step.backward(lambda batch: (self.model(batch)[:, 0] - batch.sum(1)).square().mean() + more, batch=rows)  # noqa: B023
            self.steps += 1
            steps -= 1
        return self

    def scales(self) -> list[float]:
        """Return the scale of each interval that the run is made of."""
        found = {
            each.telemetry.decision: each.telemetry.requested.learning_rate_scale for each in self.steering.records
        }
        return [found[decision] for decision in range(len(found))]

    def weights(self) -> torch.Tensor:
        return torch.cat([p.detach().flatten() for p in self.model.parameters()])


def plan(*actions: Action) -> Policy:
    """Return a policy that takes these actions, and then keeps everything."""
    left = list(actions)
    return lambda observation, masks: left.pop(0) if left else KEEP


def paired(share: float = 0.5, agreed: float = 0.01, **terms: Any) -> QualityContract:
    return QualityContract(paired=share, max_loss_increase=agreed, max_slowdown=1e9, **terms)


def watched(share: float = 0.5, agreed: float = 0.01) -> PairedWatch:
    watch = PairedWatch(paired(share, agreed))
    watch.on_trial = True
    return watch


# What a trial decides ----------------------------------------------------------------------------------------------


def test_costs_of_trials_add_up() -> None:
    watch = watched()
    assert watch.judge(0.004)
    assert watch.judge(0.005)
    assert not watch.judge(0.002)  # 0.011
    assert watch.cost == pytest.approx(0.009)
    assert watch.judge(-0.5)
    assert watch.cost == 0
    assert watch.lead == 0  # how fast the losses fall is not known yet
    assert not watch.judge(0.011)
    assert watch.trials == {"passed": 3, "lost": 2}


def line(watch: PairedWatch, count: int, fall: float = 1.0, speed: float = 1.0) -> PairedWatch:
    """Observe so many intervals in which the loss falls by `fall` over the whole budget, the last one at a speed."""
    for index in range(1, count + 1):
        share = index / 50
        telemetry = make_telemetry(decision=index, budget_used=share, train_loss=9 - fall * share)
        watch.observe(telemetry, speed=speed if index == count else 1.0)
    return watch


def test_a_gain_is_a_lead_in_budget_that_is_worth_less_later() -> None:
    watch = line(watched(), 10, fall=5.0)
    assert watch.judge(-0.05)
    assert watch.lead == pytest.approx(0.01)  # the losses fall by 5 nats/token over the whole budget
    assert watch.judge(0.059)
    later = line(watched(), 10)
    later.lead = 0.01
    assert not later.judge(0.021)
    assert later.judge(0.019)


def test_a_low_rate_is_better_only_by_more_than_it_hides() -> None:
    watch = line(watched(agreed=0.0), 20, speed=0.5)
    assert not watch.judge(-0.24)  # half of the 0.5 nats that are left in the later half
    assert watch.judge(-0.26)
    assert watch.lead == 0
    assert line(watched(agreed=0.0), 20, speed=2.0).judge(-0.001)


def test_lost_weights_lose_a_trial_and_lost_shadows_win_it() -> None:
    assert not watched().judge(math.nan)
    assert not watched().judge(math.inf)
    assert watched().judge(None)


def test_controls_are_held_for_the_rest_of_a_round() -> None:
    watch = watched(share=0.2)  # a trial of two intervals in ten
    watch.judge(0.0)
    held = [observed(watch, 0.1 + index / 100) for index in range(10)]
    assert held == [True] * 8 + [False] * 2  # the first is the trial's own last interval


def test_the_wait_doubles_with_each_loss_in_a_row() -> None:
    watch, waits = watched(share=1.0), []
    for difference in (1.0, 1.0, 1.0, 0.0):
        watch.judge(difference)
        waits.append(watch.hold - 1)
    assert waits == [0, 2, 6, 0]


def observed(watch: PairedWatch, share: float) -> bool:
    watch.observe(make_telemetry(budget_used=share, train_loss=2.0))
    return watch.holds is not None


def test_withheld_learning_shares_what_was_agreed() -> None:
    watch = line(watched(), 20, speed=0.5)
    assert watch.withheld() == pytest.approx(0.01)  # 1 nat x a half of a fiftieth of the budget
    assert watch.judge(0.0)
    assert not watch.judge(0.001)
    assert watch.least_speed(0.5, 1.0, 1.0) == 1.0
    watch.on_trial = True
    assert watch.least_speed(0.5, 1.0, 1.0) == 0.5  # the trial will tell
    assert watch.summary()["loss_increase"] == pytest.approx(0.01)
    assert watch.summary()["held"] is True


def test_lost_time_breaks_a_paired_contract() -> None:
    watch = PairedWatch(QualityContract(paired=0.2, max_slowdown=0.1))
    watch.note_shadow(make_telemetry(time_s=2.0))
    broken = [watch.observe(make_telemetry(budget_used=0.5 + i / 50, time_s=3.0)) for i in range(4)]
    assert broken[2] is None
    assert broken[3] == "50% more seconds per token than the base schedule, agreed 10%"
    assert not watch.harmed


def test_the_state_of_a_watch_passes_through_json() -> None:
    watch = watched()
    watch.judge(0.004)
    watch.count(20, 3.0, None, recorded=False)
    state = json.loads(json.dumps(watch.state_dict(), allow_nan=False))
    again = PairedWatch(watch.contract)
    again.load_state_dict(SavedContract.from_json(state).to_json())
    assert again.summary() == watch.summary()
    assert again.state_dict() == watch.state_dict()


# What a run makes of it --------------------------------------------------------------------------------------------


def test_a_policy_that_changes_nothing_costs_nothing() -> None:
    run, plain = Run(contract=paired()).go(), Run().go()
    assert torch.equal(run.weights(), plain.weights())
    assert run.steps == plain.steps
    assert run.steering.summary()["contract"]["paired"]["sequences"] == 0


def test_a_trial_that_is_passed_leaves_no_trace() -> None:
    run, plain = Run(plan(TWICE), contract=paired(agreed=1e9)).go(), Run(plan(TWICE)).go()
    assert torch.equal(run.weights(), plain.weights())
    assert [r.telemetry.train_loss for r in run.steering.records] == [
        r.telemetry.train_loss for r in plain.steering.records
    ]
    told = run.steering.summary()
    assert told["contract"]["paired"]["passed"] == 5  # at the decisions 0, 4, 8, 12 and 16
    assert told["contract"]["paired"]["sequences"] == 5 * 2 * 20
    assert told["time_s"] == run.steps == 200 + 5 * 20
    assert told["contract"]["paired"]["time_s"] == 5 * 20


def test_a_trial_that_is_lost_leaves_the_base_schedule() -> None:
    run = Run(plan(TWICE), contract=paired(agreed=0.0)).go(loss=lambda scale: float(scale != 1))
    assert torch.equal(run.weights(), Run().go().weights())
    assert run.scales() == [1.0] * 20
    assert run.logged[:4] == [(0, 2.0), (1, 2.0), (0, 1.0), (1, 1.0)]
    assert [list(record.refusals) for record in run.steering.records[2:5]] == [[LOST], [LOST], []]
    told = run.steering.summary()
    assert told["contract"]["paired"] | {"time_s": 20.0} == {
        "passed": 0, "lost": 1, "withheld": 0.0, "sequences": 40, "time_s": 20.0, "energy_j": None,
    }  # fmt: skip
    assert told["time_s"] == run.steps == 220


def test_between_trials_everything_is_refused() -> None:
    run = Run(plan(TWICE, KEEP, HALF, TWICE), contract=paired(agreed=1e9)).go()
    assert run.scales()[:4] == [2.0] * 4
    assert run.steering.summary()["refusals"][HELD] == 2


def test_weights_that_are_lost_in_a_trial_cost_no_rollback() -> None:
    run = Run(plan(TWICE), contract=paired()).go(loss=lambda scale: math.nan if scale != 1 else 0.0)
    assert torch.equal(run.weights(), Run().go().weights())
    assert run.steering.summary()["rollbacks"] == []


def test_a_shadow_that_is_lost_leaves_the_run_as_it_is() -> None:
    lost = Run(plan(TWICE), contract=paired()).go(loss=lambda scale: math.nan if scale == 1 else 0.0)
    assert torch.equal(lost.weights(), Run(plan(TWICE)).go().weights())
    assert lost.steering.summary()["contract"]["paired"]["lost"] == 0


def test_a_trial_at_the_very_end_is_decided_too() -> None:
    run = Run(plan(KEEP, KEEP, KEEP, TWICE), contract=paired(agreed=1.0))
    run.go(loss=lambda scale: 5.0 if scale != 1 and run.steering.sequences >= 380 else 0.0)
    assert run.scales() == [1.0] * 3 + [2.0] * 16 + [1.0]
    assert run.steering.finished
    told = run.steering.summary()["contract"]["paired"]
    assert (told["passed"], told["lost"]) == (4, 1)  # the trials begin at the decisions 3, 7, 11, 15 and 19


def wanders(observation: np.ndarray, masks: np.ndarray) -> Action:
    """Move the learning rate as the observation has it: the same after a resume."""
    return (int(3.5 + 3 * np.sin(100 * observation.sum())), *KEEP[1:])


def saved(run: Run) -> tuple[Any, ...]:
    """Return what a file brings back of a run that is killed now."""
    file = io.BytesIO()
    torch.save(
        [run.steering.state_dict(), run.model.state_dict(), run.optimizer.state_dict(), run.rows.at,
         torch.get_rng_state()], file,
    )  # fmt: skip
    file.seek(0)
    return tuple(torch.load(file, weights_only=True))


def resumed(run: Run, state: tuple[Any, ...]) -> Run:
    steering, model, optimizer, run.rows.at, random = state
    run.model.load_state_dict(model)
    run.optimizer.load_state_dict(optimizer)
    run.steering.load_state_dict(steering)
    torch.set_rng_state(random)
    return run


@cache
def whole_run(agreed: float) -> Run:
    return Run(wanders, decisions=10, contract=paired(agreed=agreed)).go()


@pytest.mark.parametrize(("steps", "agreed"), [(10, 0.05), (30, 0.0), (40, 0.05), (50, 0.05), (70, 0.0), (90, 0.05)])
def test_a_killed_run_goes_on_to_the_last_bit(steps: int, agreed: float) -> None:
    whole = whole_run(agreed)
    state = saved(Run(wanders, decisions=10, contract=paired(agreed=agreed)).go(steps))
    again = resumed(Run(wanders, decisions=10, contract=paired(agreed=agreed)), state).go()
    assert torch.equal(again.weights(), whole.weights())
    assert [r.telemetry.train_loss for r in again.steering.records] == [
        r.telemetry.train_loss for r in whole.steering.records
    ]
    told = [run.steering.summary()["contract"]["paired"] for run in (whole, again)]
    assert told[0]["passed"] + told[0]["lost"] > 1
    assert {name: told[0][name] for name in ("passed", "lost", "sequences", "withheld")} == {
        name: told[1][name] for name in ("passed", "lost", "sequences", "withheld")
    }


# What is refused ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("value", [0, 0.04, 1.1, -1, math.nan, math.inf, "x", True, [0.5]])
def test_a_share_outside_its_range_is_refused(value: Any) -> None:
    with pytest.raises(ValueError, match=r"paired must be a share of the intervals in \[0.05, 1.0\] or None, got"):
        QualityContract(paired=value)


@pytest.mark.parametrize("beside", [{"reference": [(0.1, 2.0), (1.0, 1.0)]}, {"from_start": True}])
def test_pairs_stand_alone(beside: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match=f"paired must be None beside {next(iter(beside))}"):
        QualityContract(paired=0.2, **beside)


def test_what_cannot_be_trained_on_twice_is_refused_in_a_line() -> None:
    model = nn.Linear(4, 1)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    plain: dict[str, Any] = {"batch_size": 2, "decisions": 20, "contract": paired()}
    with pytest.raises(ValueError, match=r"without paired .* got no data; give Steering\(data=...\)"):
        Steering(model, optimizer, SteeringSettings(sequences=400, **plain), meter=NoMeter("a test"))
    settings = SteeringSettings(budget="60s", **plain)
    with pytest.raises(ValueError, match="without paired under a budget in seconds or joules"):
        Steering(model, optimizer, settings, data=Rows(), meter=NoMeter("a test"))

    class Two(OneProcess):
        world_size = 2

    with pytest.raises(ValueError, match="without paired in several processes, got 2"):
        Steering(model, optimizer, SteeringSettings(sequences=400, **plain), data=Rows(), ranks=Two())
    with pytest.raises(ValueError, match="without paired where a framework makes the loop"):
        Run(contract=paired()).steering.expect_external_scheduler()
    with pytest.raises(ValueError, match="without paired for a plant"):
        RollbackController(Run(contract=paired()).steering.controller, ToyPlant())


def test_advice_under_a_paired_contract_trains_nothing_twice() -> None:
    run = Run(plan(TWICE), mode="advise", contract=paired()).go()
    assert run.steps == 200
    assert torch.equal(run.weights(), Run().go().weights())


@pytest.mark.parametrize("steps", [15, 35])
def test_a_damaged_trial_is_refused_and_changes_nothing(steps: int) -> None:
    contract = paired(agreed=1e9)
    state = Run(plan(TWICE), contract=contract).go(steps).steering.state_dict()
    held = "start" if steps == 15 else "end"
    other = Run(plan(TWICE), contract=contract)
    before = json.dumps(other.steering.controller.state_dict())
    for path, value in [
        (("n_records",), -1), (("snapshot",), "x"), (("shadow",), 7), (("point",), None), (("point", "seen"), [-1]),
        ((held,), None), ((held,), 7), ((held, "loop"), None), ((held, "loop", "weights"), {}), ((held, "random"), 7),
        ((held, "loop", "weights", "0.weight"), torch.full((8, 4), math.nan)), ((held, "progress"), {}),
        ((held, "progress", "sequences"), -1), ((held, "loop", "optimizer"), {}),
    ]:  # fmt: skip
        damaged = copy.deepcopy(state)
        inner = damaged["trial"]
        for name in path[:-1]:
            inner = inner[name]
        inner[path[-1]] = value
        with pytest.raises(ValueError, match=r".+") as refused:
            other.steering.load_state_dict(damaged)
        assert str(refused.value).isprintable(), path
        assert json.dumps(other.steering.controller.state_dict()) == before
        assert not other.steering.pairing.shadowing or other.steering.sequences == 0  # type: ignore[union-attr]
    with pytest.raises(ValueError, match="contract must have paired"):
        Run(plan(TWICE)).steering.load_state_dict(state)


@pytest.mark.parametrize("method", ["state_dict", "load_state_dict"])
def test_data_that_fail_leave_the_run_to_its_base_schedule(method: str) -> None:
    run = Run(plan(TWICE, KEEP, KEEP, KEEP, TWICE, KEEP, KEEP, KEEP), contract=paired(0.5, agreed=10.0)).go(45)
    pairing = run.steering.pairing
    assert pairing is not None
    assert pairing.watch.sequences

    def broken(*_: object) -> Any:
        raise OSError("gone")

    run.rows.__dict__[method] = broken
    pairing.watch.hold = 0
    with pytest.warns(UserWarning, match="the run goes on under its base schedule") as told:
        run.go()
    assert any(f"data.{method} raised OSError: gone" in str(each.message) for each in told)
    assert run.steering.finished
    assert run.steering.progress.sequences == 400
    scales = [each.telemetry.requested.learning_rate_scale for each in run.steering.records]
    assert scales[-4:] == [1.0] * 4
    contract = run.steering.summary()["contract"]
    assert contract["held"] is False
