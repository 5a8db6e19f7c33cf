"""Steering in a loop that is not ours does what a live run does under the same policy, and survives what loops do."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from live_runs import LLAMA, case, live_run
from steering_loops import SCRIPT, Loop, Script, asked, far

from trainpilot.agents.controller import Controller, Policy
from trainpilot.agents.steering.steering import Steering
from trainpilot.envs.action import KEEP, Action
from trainpilot.envs.decision import Preference
from trainpilot.llm_runtime.config import RunConfig
from trainpilot.llm_runtime.energy.meter import NoMeter
from trainpilot.llm_runtime.live_run import LiveRun
from trainpilot.llm_runtime.telemetry import Telemetry


def steered(config: RunConfig, policy: Policy) -> tuple[LiveRun, list[Telemetry]]:
    """Return a live run under the same policy."""
    run, told = live_run(config), []
    controller = Controller(policy, run.base_limits(), Preference.parse("quality=1"))
    last: Telemetry | None = None
    while not run.finished:
        last = run.advance(controller.decide(last), 1 / config.decisions)
        told.append(last)
    return run, told


@pytest.fixture
def config(tmp_path: Path) -> RunConfig:
    return case(tmp_path, LLAMA, tokens=6_400, batch_size=4, decisions=10, pruning="magnitude")


def loop(config: RunConfig, policy: str | Policy, **settings: Any) -> Loop:
    return Loop(config, policy, pruning=config.pruning, precisions=("fp32", "bf16"), **settings)


def test_plain_loop_ends_where_a_live_run_does_under_all_controls(config: RunConfig) -> None:
    run, told = steered(config, Script(SCRIPT))
    mine = loop(config, Script(SCRIPT))
    mine.train()
    records = [record.telemetry for record in mine.steering.records]
    assert [each.requested for each in records] == [each.requested for each in told]
    assert len({each.requested.batch_size for each in told}) > 2
    assert {each.precision for each in records} == {"fp32", "bf16"}
    assert far(run.loaded.model, mine.model) == 0.0


def test_what_is_asked_for_is_in_force(config: RunConfig) -> None:
    mine = loop(config, Script(SCRIPT))
    mine.train()
    for record in mine.steering.records:
        told = record.telemetry
        assert told.precision == told.requested.precision
        assert told.sparsity == pytest.approx(told.requested.sparsity, abs=1e-3)
        assert told.batch_size == pytest.approx(told.requested.batch_size, rel=0.35)  # the last step may be cut short
    assert mine.rates[-1] == pytest.approx(mine.steering.records[-1].telemetry.learning_rate)


def test_micro_batches_change_nothing(config: RunConfig) -> None:
    in_fp32: list[Action] = [(rate, batch, 0, pruning, finish) for rate, batch, _, pruning, finish in SCRIPT]
    one, other = loop(config, Script(in_fp32)), loop(config, Script(in_fp32))
    other.micro = 1
    one.train()
    other.train()
    assert far(one.model, other.model) < 1e-4  # sums in another order


def test_parameter_groups_keep_the_ratio_of_their_rates(config: RunConfig) -> None:
    mine = loop(config, Script(SCRIPT))
    mine.steering.close()
    mine.optimizer.param_groups[1]["lr"] *= 0.1
    steer_again(mine)
    mine.train()
    first, second = (group["lr"] for group in mine.optimizer.param_groups)
    assert second == pytest.approx(0.1 * first)


def steer_again(mine: Loop, **settings: Any) -> None:
    """Give a loop whose steering was closed a new one, of the model and optimiser that it has by now."""
    wanted = replace(mine.steering.settings, policy=Script(SCRIPT), **settings)
    mine.steering = Steering(mine.model, mine.optimizer, wanted, meter=NoMeter("a test"))


def test_a_rate_in_a_tensor_is_changed_in_place(config: RunConfig) -> None:
    plain, mine = loop(config, Script(SCRIPT)), loop(config, Script(SCRIPT))
    mine.steering.close()
    groups = mine.optimizer.param_groups
    for group in groups:
        group["lr"] = torch.tensor(group["lr"], dtype=torch.float64)
    rates = [group["lr"] for group in groups]
    steer_again(mine)
    plain.train()
    mine.train()
    assert all(group["lr"] is rate for group, rate in zip(groups, rates, strict=True))
    assert far(plain.model, mine.model) < 1e-6
    mine.steering.close()
    assert float(rates[0]) == pytest.approx(config.base_learning_rate)


@pytest.mark.slow
def test_a_compiled_model_is_steered_as_it_is_otherwise(config: RunConfig) -> None:
    plain, mine = loop(config, Script(SCRIPT), probe=True), loop(config, Script(SCRIPT))
    mine.steering.close()
    mine.model = torch.compile(mine.model, backend="eager")  # type: ignore[assignment]
    steer_again(mine, probe=True)
    plain.train()
    mine.train()
    assert asked(mine) == asked(plain)
    theirs, ours = ([record.telemetry for record in each.steering.records] for each in (plain, mine))
    assert [each.precision for each in ours] == [each.precision for each in theirs]
    assert [each.train_loss for each in ours] == pytest.approx([each.train_loss for each in theirs], rel=1e-3)
    # Traced attention may take other kernels: one float32 rounding for each of the 15 steps before bf16.
    rounding = 15 * torch.finfo(torch.float32).eps
    for mine_in_fp32, plain_in_fp32 in zip(ours[:2], theirs[:2], strict=True):
        assert mine_in_fp32.train_loss == pytest.approx(plain_in_fp32.train_loss, rel=rounding)


@pytest.mark.parametrize("at", [7, 20])
def test_a_run_that_was_saved_goes_on_bit_for_bit(config: RunConfig, at: int) -> None:
    whole, first, second = (loop(config, Script(SCRIPT), probe=True) for _ in range(3))
    whole.train()
    first.train(at)
    kept = first.steering.state_dict()
    second.model.load_state_dict(first.model.state_dict())
    second.optimizer.load_state_dict(first.optimizer.state_dict())
    second.stream.load_state_dict(first.stream.state_dict())
    second.steering.load_state_dict(kept)
    second.steering.controller.controller.policy.at = first.steering.controller.controller.policy.at  # type: ignore[attr-defined]
    second.train()
    assert far(whole.model, second.model) == 0.0
    assert asked(second) == asked(whole)


def test_the_probe_reads_the_curvature_as_a_live_run_does(config: RunConfig) -> None:
    mine = loop(config, lambda *_: KEEP, probe=True)
    mine.train()
    live = LiveRun(config, meter=NoMeter("a test"))
    theirs = [live.advance(config.start(), 1 / config.decisions) for _ in range(config.decisions)]
    ours = [record.telemetry for record in mine.steering.records]
    assert far(live.loaded.model, mine.model) < 1e-5  # looking changes nothing
    assert [one.probe_linear is None for one in ours] == [one.probe_linear is None for one in theirs]
    sizes = [(a.relative_update, b.relative_update) for a, b in zip(ours, theirs, strict=True) if a.relative_update]
    assert all(0.5 < a / b < 2 for a, b in sizes if b)


def test_a_loop_whose_step_fails_may_try_again(config: RunConfig) -> None:
    mine = loop(config, "none")
    before = [p.detach().clone() for p in mine.model.parameters()]

    def spilt() -> torch.Tensor:
        raise RuntimeError("spilt coffee")

    with pytest.raises(RuntimeError, match="spilt coffee"), mine.steering.step() as step:
        step.backward(spilt)
    assert all(torch.equal(a, b) for a, b in zip(before, mine.model.parameters(), strict=True))
    mine.train()
    assert mine.steering.finished


def test_other_optimisers_keep_their_batch(config: RunConfig) -> None:
    mine = loop(replace(config, pruning="none"), "none")
    plain = torch.optim.SGD(mine.model.parameters(), lr=0.1)
    settings = replace(mine.steering.settings, policy=Script([(3, 2, 0, 0, 0)] * 10), pruning="none")
    mine.optimizer, mine.steering = plain, Steering(mine.model, plain, settings, meter=NoMeter("a test"))
    mine.train()
    assert {record.telemetry.requested.batch_size for record in mine.steering.records} == {4}


# Bad uses ---------------------------------------------------------------------------------------------------------


def two_controllers(mine: Loop) -> None:
    Steering(mine.model, mine.optimizer, mine.steering.settings)


def another_scheduler(mine: Loop) -> None:
    scheduler = torch.optim.lr_scheduler.StepLR(mine.optimizer, 1)
    for _ in range(3):
        mine.one_step()
        scheduler.step()


def two_steps_at_once(mine: Loop) -> None:
    with mine.steering.step(), mine.steering.step():
        pass


def too_few_sequences(mine: Loop) -> None:
    with mine.steering.step() as step:
        step.backward(lambda: mine.loss(torch.from_numpy(mine.stream.take(1))), sequences=1)


def too_many_sequences(mine: Loop) -> None:
    with mine.steering.step() as step:
        step.backward(lambda: mine.loss(torch.from_numpy(mine.stream.take(9))), sequences=9)


def after_the_end(mine: Loop) -> None:
    mine.train()
    mine.one_step()


def save_in_a_step(mine: Loop) -> None:
    with mine.steering.step():
        mine.steering.state_dict()


def other_settings(mine: Loop) -> None:
    state = mine.steering.state_dict()
    mine.steering.close()
    settings = replace(mine.steering.settings, sequences=999)
    Steering(mine.model, mine.optimizer, settings).load_state_dict(state)


def strange_parameters(mine: Loop) -> None:
    other = torch.optim.AdamW([torch.nn.Parameter(torch.ones(2))])
    Steering(mine.model, other, mine.steering.settings)


def too_short(mine: Loop) -> None:
    mine.steering.close()
    Steering(mine.model, mine.optimizer, replace(mine.steering.settings, sequences=10))


def no_such_policy(mine: Loop) -> None:
    mine.steering.close()
    Steering(mine.model, mine.optimizer, replace(mine.steering.settings, policy="defualt"))


BAD: list[tuple[Callable[[Loop], None], str]] = [
    (two_controllers, "one controller, .* or make the optimizer anew, as in a notebook cell that is run twice"),
    (another_scheduler, "something else writes it"),
    (two_steps_at_once, "one `with steering.step"),
    (too_few_sequences, "add up to the step's batch_size"),
    (too_many_sequences, "add up to the step's batch_size"),
    (after_the_end, "has not finished"),
    (save_in_a_step, "between two steps"),
    (other_settings, "sequences must be what it was"),
    (strange_parameters, "parameters of the model"),
    (too_short, "at least one step"),
    (no_such_policy, "no policy named"),
]


@pytest.mark.parametrize(("use", "says"), BAD, ids=[use.__name__ for use, _ in BAD])
def test_bad_uses_get_one_clear_line(config: RunConfig, use: Callable[[Loop], None], says: str) -> None:
    with pytest.raises(ValueError, match=says) as caught:
        use(loop(config, "none"))
    assert "\n" not in str(caught.value)
