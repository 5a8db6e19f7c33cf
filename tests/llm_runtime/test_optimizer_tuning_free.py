"""Schedule-free AdamW and Prodigy in a live run: the packages' own optimisers, and a run that stays what it was."""

from __future__ import annotations

import sys
from dataclasses import asdict
from pathlib import Path
from typing import Any

import pytest
import torch
from live_runs import advance, case, live_run, same_bits, weights
from prodigyopt import Prodigy
from schedulefree import AdamWScheduleFree
from torch import Tensor, nn
from torch.optim import Optimizer
from transformers import AutoModelForCausalLM

from trainpilot.llm_runtime.config import RunConfig
from trainpilot.llm_runtime.live_run import LiveRun
from trainpilot.llm_runtime.optimizer import averaged_weights, change_batch, effective_learning_rate, make_optimizer

SETTINGS: dict[str, dict[str, Any]] = {
    "schedule-free": {"optimizer": "schedule-free", "schedule": "constant", "base_learning_rate": 3e-2},
    "prodigy": {"optimizer": "prodigy", "schedule": "cosine", "base_learning_rate": 1.0},
}
MEASURED = ("time_s", "probe_time_s", "switch_time_s", "evaluation_time_s", "memory_share")

names = pytest.mark.parametrize("name", SETTINGS)


def run_of(name: str, folder: Path, *, probe: bool = False, **options: Any) -> LiveRun:
    return live_run(case(folder, **(SETTINGS[name] | options)), probe=probe)


def go_on(run: LiveRun, intervals: int) -> list[str]:
    records = [asdict(advance(run)) for _ in range(intervals)]
    return [repr({key: value for key, value in record.items() if key not in MEASURED}) for record in records]


def state_of(optimizer: Optimizer) -> str:
    torch.set_printoptions(precision=17, threshold=10**9)
    try:
        return repr(optimizer.state_dict())
    finally:
        torch.set_printoptions(profile="default")


# Training ----------------------------------------------------------------------------------------------------


@names
def test_the_loss_falls_by_more_than_half_a_nat(name: str, tmp_path: Path) -> None:
    run = run_of(name, tmp_path, tokens=9_600, warmup_tokens=320)
    start = run.evaluate()

    while not run.finished:
        telemetry = advance(run)
        assert not telemetry.diverged

    assert run.evaluate() < start - 0.5


@names
def test_steps_are_those_of_the_package_in_a_plain_loop(name: str, tmp_path: Path) -> None:
    run = run_of(name, tmp_path, warmup_tokens=96, weight_decay=0.3)  # 96 tokens: three steps of warm-up
    model = run_of(name, tmp_path).loaded.model
    groups = [
        {"params": [p for p in model.parameters() if p.ndim >= 2], "weight_decay": 0.3},
        {"params": [p for p in model.parameters() if p.ndim < 2], "weight_decay": 0.0},
    ]
    peak = run.config.base_learning_rate
    if name == "prodigy":
        plain: Any = Prodigy(groups, lr=peak, use_bias_correction=True, safeguard_warmup=True)
    else:
        # The package's own warm-up, where the run's comes from the base schedule.
        plain = AdamWScheduleFree(groups, lr=peak, warmup_steps=3)
        plain.train()
    batches = run.stream.peek(6 * 2).reshape(6, 2, 17)

    for step, batch in enumerate(torch.from_numpy(batches)):
        rate = peak * min(1.0, (step + 1) / 3)
        if name == "prodigy":
            for group in plain.param_groups:
                group["lr"] = rate
        logits = model(input_ids=batch[:, :-1]).logits
        torch.autograd.backward(nn.functional.cross_entropy(logits.flatten(0, 1), batch[:, 1:].flatten()))
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        plain.step()
        plain.zero_grad()
        run.trainer.set_learning_rate(rate)
        run.trainer.step(batches[step])
        for (key, mine), theirs in zip(weights(run).items(), model.state_dict().values(), strict=True):
            assert torch.allclose(mine, theirs, rtol=1e-5, atol=1e-7), f"{key} after step {step}"
    assert effective_learning_rate(run.trainer.optimizer) == pytest.approx(peak * plain.param_groups[0].get("d", 1.0))


@names
def test_decay_on_matrices_only(name: str) -> None:
    model = nn.Sequential(nn.Linear(4, 3), nn.LayerNorm(3))
    decayed, others = make_optimizer(model, RunConfig(**SETTINGS[name], weight_decay=0.3)).param_groups

    assert [tuple(p.shape) for p in decayed["params"]] == [(3, 4)]
    assert [tuple(p.shape) for p in others["params"]] == [(3,), (3,), (3,)]
    assert (decayed["weight_decay"], others["weight_decay"]) == (0.3, 0.0)


def test_prodigy_guards_its_estimate_where_there_is_warm_up() -> None:
    model = nn.Linear(2, 2)
    for warmup_tokens, guarded in ((None, True), (1, True), (0, False)):
        config = RunConfig(optimizer="prodigy", base_learning_rate=1.0, warmup_tokens=warmup_tokens)
        optimizer = make_optimizer(model, config)
        assert {group["safeguard_warmup"] for group in optimizer.param_groups} == {guarded}


# What is said about it ---------------------------------------------------------------------------------------


def test_the_learning_rate_of_prodigy_is_its_factor_times_its_estimate(tmp_path: Path) -> None:
    run = run_of("prodigy", tmp_path, base_learning_rate=0.5, schedule="constant", warmup_tokens=0)

    learning_rate = advance(run).learning_rate

    group = run.trainer.optimizer.param_groups[0]
    assert group["lr"] == 0.5
    assert group["d"] > 1e-6  # where every estimate begins
    assert learning_rate == 0.5 * group["d"]


@names
def test_what_adam_buffers_tell_is_unknown(name: str, tmp_path: Path) -> None:
    run = run_of(name, tmp_path, probe=True)

    telemetry = advance(run)

    assert telemetry.steps == 10
    unknown = (telemetry.noise_scale, telemetry.relative_update, telemetry.probe_linear, telemetry.probe_quadratic)
    assert unknown == (None, None, None, None)


@names
def test_a_change_of_batch_is_refused_before_anything_has_changed(name: str, tmp_path: Path) -> None:
    run = run_of(name, tmp_path)
    advance(run)
    before, state = weights(run), state_of(run.trainer.optimizer)
    limits = run.base_limits()
    assert (limits.min_batch_size, limits.max_batch_size) == (2, 2)

    message = (
        f"^batch_size changes need optimizer 'adamw', got 4 after 2 under '{name}'; keep the batch or take 'adamw'$"
    )
    with pytest.raises(ValueError, match=message):
        advance(run, batch_size=4, precision="bf16")

    assert (run.trainer.controls.batch_size, run.trainer.controls.precision) == (2, "fp32")
    assert same_bits(weights(run), before)
    assert state_of(run.trainer.optimizer) == state
    advance(run)  # goes on


@names
def test_buffers_are_never_rescaled_for_a_batch(name: str) -> None:
    optimizer = make_optimizer(nn.Linear(2, 2), RunConfig(**SETTINGS[name]))
    change_batch(optimizer, 1.0)
    with pytest.raises(AssertionError):
        change_batch(optimizer, 2.0)


@names
def test_a_missing_package_is_named(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    package = {"schedule-free": "schedulefree", "prodigy": "prodigyopt"}[name]
    monkeypatch.setitem(sys.modules, package, None)
    with pytest.raises(
        ValueError, match=f"^optimizer '{name}' needs the package {package}; run: pip install {package}$"
    ):
        make_optimizer(nn.Linear(2, 2), RunConfig(**SETTINGS[name]))


# Averaged weights --------------------------------------------------------------------------------------------


def averages_by_hand(run: LiveRun) -> dict[str, Tensor]:
    """Solve y = beta1 x + (1 - beta1) z for the average x."""
    averages = {}
    for name, y in run.loaded.model.named_parameters():
        z = run.trainer.optimizer.state[y]["z"]
        averages[name] = (y.detach().double() - 0.1 * z.double()) / 0.9
    return averages


def test_evaluation_sees_the_averaged_weights_and_leaves_the_others(tmp_path: Path) -> None:
    run = run_of("schedule-free", tmp_path)
    advance(run)
    before, state = weights(run), state_of(run.trainer.optimizer)

    first, second = run.evaluate(), run.evaluate()

    assert first == second
    assert same_bits(weights(run), before)
    assert state_of(run.trainer.optimizer) == state
    with torch.no_grad():
        for name, average in averages_by_hand(run).items():
            run.loaded.model.get_parameter(name).copy_(average)
    for group in run.trainer.optimizer.param_groups:
        group["train_mode"] = False  # what lies in the model now is the average
    assert run.evaluate() == pytest.approx(first, abs=1e-5)
    run.loaded.model.load_state_dict(before)
    assert abs(run.evaluate() - first) > 1e-3  # the training weights have another loss


def test_looking_changes_nothing(tmp_path: Path) -> None:
    looked_at, left_alone = (run_of("schedule-free", tmp_path) for _ in range(2))
    looked_at.evaluate()
    losses = []
    for _ in range(4):
        losses.append(advance(looked_at).train_loss)
        looked_at.evaluate()
        looked_at.test()
        looked_at.save(tmp_path / "model")

    assert losses == [advance(left_alone).train_loss for _ in range(4)]
    assert same_bits(weights(looked_at), weights(left_alone))


def test_an_evaluation_that_fails_leaves_the_training_weights(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    run = run_of("schedule-free", tmp_path)
    advance(run)
    before = weights(run)

    def fail(_sequences: Tensor) -> Tensor:
        raise RuntimeError("of the test")

    with monkeypatch.context() as patch:
        patch.setattr(run.trainer, "loss", fail)
        with pytest.raises(RuntimeError, match="of the test"):
            run.evaluate()

    assert same_bits(weights(run), before)
    advance(run)  # the optimiser is in training mode again


def test_a_block_inside_another_does_nothing(tmp_path: Path) -> None:
    run = run_of("schedule-free", tmp_path)
    advance(run)
    before = weights(run)
    with averaged_weights(run.trainer.optimizer):
        averages = weights(run)
        with averaged_weights(run.trainer.optimizer):
            assert same_bits(weights(run), averages)
        assert same_bits(weights(run), averages)
    assert same_bits(weights(run), before)
    assert not same_bits(averages, before)


@pytest.mark.parametrize("name", [*SETTINGS, "adamw"])
def test_the_saved_model_is_the_one_that_was_evaluated(name: str, tmp_path: Path) -> None:
    run = live_run(case(tmp_path, **SETTINGS.get(name, {})))
    advance(run)
    loss, before = run.evaluate(), weights(run)

    run.save(tmp_path / "model")

    assert same_bits(weights(run), before)
    saved = AutoModelForCausalLM.from_pretrained(tmp_path / "model").state_dict()
    assert same_bits(saved, before) == (name != "schedule-free")
    run.loaded.model.load_state_dict(saved)
    with torch.no_grad():
        run.trainer.optimizer.state.clear()  # so that schedule-free takes the weights as they are
    assert run.evaluate() == loss


# Snapshots ---------------------------------------------------------------------------------------------------


@names
def test_goes_on_bit_for_bit(name: str, tmp_path: Path) -> None:
    run = run_of(name, tmp_path, warmup_tokens=320)
    go_on(run, 2)
    run.evaluate()
    snapshot = run.snapshot()
    torch.save(snapshot, tmp_path / "snapshot.pt")
    start, state = weights(run), state_of(run.trainer.optimizer)
    expected, end, loss = go_on(run, 3), weights(run), run.evaluate()
    assert not same_bits(start, end)

    fresh = run_of(name, tmp_path, warmup_tokens=320)
    for again, content in ((run, snapshot), (fresh, torch.load(tmp_path / "snapshot.pt", weights_only=True))):
        again.restore(content)
        assert same_bits(weights(again), start)
        assert state_of(again.trainer.optimizer) == state
        assert go_on(again, 3) == expected
        assert same_bits(weights(again), end)
        assert again.evaluate() == loss


@names
def test_goes_back_to_before_the_first_step(name: str, tmp_path: Path) -> None:
    run = run_of(name, tmp_path)
    snapshot = run.snapshot()
    expected, end = go_on(run, 2), weights(run)

    run.restore(snapshot)

    assert go_on(run, 2) == expected
    assert same_bits(weights(run), end)


@names
def test_half_precision_trains_too(name: str, tmp_path: Path) -> None:
    run = run_of(name, tmp_path, precision="bf16")
    telemetry = advance(run)
    assert telemetry.precision == "bf16"
    assert not telemetry.diverged
