"""What a loop trains on is what steering counts, and its loss is one of fixed data: anything else is refused."""

from __future__ import annotations

import copy
import pickle
import warnings
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

from trainpilot import Steering, SteeringSettings, batches
from trainpilot.llm_runtime.energy.meter import NoMeter

ROWS = torch.randn(64, 5, generator=torch.Generator().manual_seed(1))

DATA: Any = ROWS


class Halve:
    """A policy that halves the batch at its first decision and keeps from then on."""

    def __init__(self) -> None:
        self.choices = iter([(3, 0, 0, 0, 0)])

    def __call__(self, observation: Any, masks: Any) -> Any:
        return next(self.choices, (3, 1, 0, 0, 0))


class Loop:
    """A regression under steering, with a list of how many rows went through the model in training."""

    def __init__(self, **settings: Any) -> None:
        torch.manual_seed(0)
        self.model = nn.Linear(5, 1)
        self.trained: list[int] = []
        optimizer = torch.optim.AdamW(self.model.parameters(), lr=1e-2)
        usual: dict[str, Any] = {"sequences": 320, "batch_size": 8, "policy": "none", "decisions": 10}
        self.steering = Steering(self.model, optimizer, SteeringSettings(**usual | settings), meter=NoMeter("a test"))

    def loss(self, rows: Tensor) -> Tensor:
        if self.model.training:
            self.trained.append(len(rows))
        squared: Tensor = (self.model(rows) - rows.sum(1, keepdim=True)).square().mean()
        return squared

    def train(self, step: Callable[[Any], None]) -> None:
        while not self.steering.finished:
            with self.steering.step() as each:
                step(each)

    @property
    def told(self) -> list[Any]:
        return [record.telemetry for record in self.steering.records]


# The probe --------------------------------------------------------------------------------------------------------


def test_a_loss_that_draws_new_data_is_refused_at_the_first_probe() -> None:
    loop, data = Loop(), batches(DataLoader(DATA, 8))
    with pytest.raises(ValueError, match="loss must return the same value when it is called again") as caught:
        loop.train(lambda step: step.backward(lambda: loop.loss(data.take(step.batch_size)[0])))
    assert "draw the data before step.backward" in str(caught.value)
    assert loop.steering.sequences < 64, "before the second interval ends"


def test_without_a_probe_it_may_draw_inside() -> None:
    loop, data = Loop(probe=False), batches(DataLoader(DATA, 8))
    loop.train(lambda step: step.backward(lambda: loop.loss(data.take(step.batch_size)[0])))
    assert loop.steering.finished


def test_the_check_changes_no_bit_and_is_made_once() -> None:
    noisy = nn.Dropout(0.5)
    counts: list[int] = []

    def run(*, check: bool) -> nn.Module:
        loop, data = Loop(), batches(DataLoader(DATA, 8))
        loop.steering._checks_loss = check
        calls = 0

        def loss(rows: Tensor) -> Tensor:
            nonlocal calls
            calls += 1
            return loop.loss(noisy(rows) + 0.1 * torch.randn(rows.shape))  # random numbers of torch are held still

        def step(each: Any) -> None:
            (rows,) = data.take(each.batch_size)
            each.backward(lambda: loss(rows))

        loop.train(step)
        counts.append(calls)
        return loop.model

    checked, other = run(check=True), run(check=False)
    assert all(torch.equal(a, b) for a, b in zip(checked.parameters(), other.parameters(), strict=True))
    assert counts[0] == counts[1] + 1


# What is counted --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("size", [16, 8, 3])
def test_batches_of_another_size_than_asked_for_are_refused(size: int) -> None:
    loop = Loop(policy=Halve())  # asks for 4
    rows = next(iter(DataLoader(DATA, size)))
    with pytest.raises(ValueError, match=f"that the step asks for, 4, got a model input of {size} x 5;") as caught:
        loop.train(lambda step: step.backward(lambda: loop.loss(rows)))
    assert "trainpilot.batches(loader)" in str(caught.value)


def test_a_data_loader_cut_to_size_is_trained_on_as_counted() -> None:
    loop, data = Loop(policy=Halve()), batches(DataLoader(TensorDataset(ROWS), 8, shuffle=True))

    def step(each: Any) -> None:
        for batch in data.take(each.batch_size):
            each.backward(lambda batch: loop.loss(batch[0]), batch=batch)

    loop.train(step)
    assert sum(loop.trained) == loop.steering.sequences == 320
    assert sum(each.interval_tokens for each in loop.told) == 320
    assert any(each.probe_linear is not None for each in loop.told)
    assert {each.batch_size for each in loop.told} == {4.0}


def test_the_probe_of_a_batch_takes_its_first_sequences_only() -> None:
    loop, data, probed = Loop(sequences=32_000), batches(DataLoader(DATA, 8)), set[int]()

    def loss(rows: Tensor) -> Tensor:
        if not loop.model.training:
            probed.add(len(rows))
        return loop.loss(rows)

    def step(each: Any) -> None:
        for batch in data.take(each.batch_size):
            each.backward(loss, batch=batch)
        if len(loop.told) == 1:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        loop.train(step)
    assert probed == {8}
    assert loop.told[0].probe_linear is not None


@pytest.mark.parametrize("layout", ["time first", "in two passes", "packed", "all in one row of numbers", "said"])
def test_layouts_of_their_own_are_counted_as_before(layout: str) -> None:
    loop = Loop()
    shape = {"time first": (3, 8, 5), "packed": (1, 5), "all in one row of numbers": (5,)}.get(layout, (8, 5))
    rows = torch.randn(shape)

    def loss() -> Tensor:
        parts = rows.split(4) if layout == "in two passes" else [torch.cat([rows, rows]) if layout == "said" else rows]
        return torch.stack([loop.model(part).square().mean() for part in parts]).mean()

    loop.train(lambda step: step.backward(loss, **({"sequences": 8} if layout == "said" else {})))
    assert loop.steering.sequences == 320


def test_the_watch_is_no_part_of_the_model() -> None:
    loop = Loop()
    with loop.steering.step() as step:
        step.backward(lambda: loop.loss(ROWS[:8]))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        for other in (copy.deepcopy(loop.model), pickle.loads(pickle.dumps(loop.model))):
            other(ROWS)
    hooks = len(loop.model._forward_pre_hooks)
    loop.steering.close()
    assert len(loop.model._forward_pre_hooks) == hooks - 1 == 0


# What cannot be steered -------------------------------------------------------------------------------------------


def test_an_optimizer_that_needs_a_closure_is_refused() -> None:
    model = nn.Linear(2, 1)
    settings = SteeringSettings(sequences=320, batch_size=8, policy="none")
    with pytest.raises(ValueError, match="optimizer must evaluate a step once, as Adam does, got LBFGS, whose step"):
        Steering(model, torch.optim.LBFGS(model.parameters()), settings)


def test_a_peak_that_a_scheduler_hides_is_refused() -> None:
    model = nn.Linear(2, 1)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
    torch.optim.lr_scheduler.OneCycleLR(optimizer, max_lr=1e-3, total_steps=100)
    settings = SteeringSettings(sequences=320, batch_size=8, policy="none")
    with pytest.raises(ValueError, match=r"got one with a OneCycleLR, which hides its peak 0\.001; make the optimizer"):
        Steering(model, optimizer, settings)


def test_weights_of_few_digits_are_told() -> None:
    model = nn.Linear(2, 1).bfloat16()
    settings = SteeringSettings(sequences=400, batch_size=8, policy="none")
    with pytest.warns(UserWarning, match="^weights are bfloat16, in which small updates are lost .* on float32:"):
        Steering(model, torch.optim.AdamW(model.parameters()), settings, meter=NoMeter("a test"))


def test_a_short_run_has_fewer_decisions_and_says_so() -> None:
    with pytest.warns(
        UserWarning, match="decisions: 40 instead of 50, as the budget has no more steps at batch_size 8"
    ):
        loop = Loop(decisions=None)
    loop.train(lambda step: step.backward(loop.loss, batch=ROWS[: step.batch_size]))
    assert len(loop.told) == 40
    with pytest.raises(ValueError, match="at least one step: 50 decisions x batch_size 8 = 400, got 320"):
        Loop(decisions=50)
