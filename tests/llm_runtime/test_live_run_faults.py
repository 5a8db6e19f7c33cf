"""What goes wrong in a run: memory, losses that are not finite, meters. The run copes, or says what to do."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from live_runs import advance, case, live_run, weights

from trainpilot.llm_runtime import precision as number_format
from trainpilot.llm_runtime.config import PRECISIONS
from trainpilot.llm_runtime.energy.meter import EnergyReading, RecordedMeter
from trainpilot.llm_runtime.live_run import LiveRun
from trainpilot.llm_runtime.telemetry import Telemetry

Forward = Callable[..., Any]
EPSILON = torch.finfo(torch.float32).eps


def fail(run: LiveRun, when: Callable[[int], bool], error: Callable[[], None], patch: pytest.MonkeyPatch) -> list[int]:
    """Let the model's forward pass fail `when` it gets so many sequences; return the sizes it was called with."""
    forward: Forward = run.loaded.model.forward
    sizes: list[int] = []

    def failing(*args: Any, **kwargs: Any) -> Any:
        sizes.append(len(kwargs["input_ids"]))
        if when(sizes[-1]):
            error()
        return forward(*args, **kwargs)

    patch.setattr(run.loaded.model, "forward", failing)
    return sizes


def gpu_is_full() -> None:
    raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB")


def ram_is_full() -> None:
    torch.empty(1 << 60, dtype=torch.uint8)


def assert_same_training(left: LiveRun, right: LiveRun, seen: list[Telemetry], expected: list[Telemetry]) -> None:
    assert left.stream.state_dict() == right.stream.state_dict()
    steps = [t.steps for t in expected]
    assert [t.steps for t in seen] == steps
    # Sums in another order: one float32 rounding per step.
    assert [t.train_loss for t in seen] == pytest.approx([t.train_loss for t in expected], rel=sum(steps) * EPSILON)
    for name, weight in weights(right).items():
        assert torch.allclose(weights(left)[name], weight, atol=1e-5), name


# Memory -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("error", [gpu_is_full, ram_is_full])
def test_out_of_memory_halves_the_micro_batch(
    error: Callable[[], None], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = case(tmp_path, batch_size=8)
    run, whole = live_run(config, probe=True), live_run(config, probe=True)
    expected = [advance(whole) for _ in range(3)]
    sizes = fail(run, lambda size: size > 3, error, monkeypatch)

    seen = [advance(run) for _ in range(3)]

    # Eight fails, four fails, and the same batch goes on in twos, as do all others.
    assert sizes[:6] == [8, 4, 2, 2, 2, 2]
    assert set(sizes[6:]) <= {1, 2}  # one sequence: the curvature probe
    assert [t.micro_batch_size for t in seen] == [2, 2, 2]
    assert [t.batch_size for t in seen] == [t.batch_size for t in expected]
    assert_same_training(run, whole, seen, expected)
    assert run.evaluate() == pytest.approx(whole.evaluate(), abs=1e-5)


def test_out_of_memory_in_the_middle_of_a_batch_starts_it_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = case(tmp_path, batch_size=8)
    run, whole = live_run(config), live_run(config)
    expected = [advance(whole)]
    run.trainer.micro_batch_size = 4
    calls: list[int] = []

    def second_call(size: int) -> bool:
        calls.append(size)
        return len(calls) == 2

    sizes = fail(run, second_call, gpu_is_full, monkeypatch)

    seen = [advance(run)]

    assert sizes[:6] == [4, 4, 2, 2, 2, 2]
    assert_same_training(run, whole, seen, expected)


def test_out_of_memory_with_one_sequence_says_what_to_do(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    run = live_run(case(tmp_path, batch_size=4))
    sizes = fail(run, lambda size: True, gpu_is_full, monkeypatch)

    with pytest.raises(ValueError, match=r"^out of memory with a micro-batch of one sequence; lower sequence_length"):
        advance(run)

    assert sizes == [4, 2, 1]


def test_out_of_memory_while_precisions_are_timed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TRAINPILOT_CACHE", str(tmp_path / "cache"))
    run = live_run(case(tmp_path, batch_size=8))
    fail(run, lambda size: size > 4, gpu_is_full, monkeypatch)

    assert run.limits().start.batch_size == 8

    assert run.trainer.micro_batch_size == 4
    assert all(parameter.grad is None for parameter in run.loaded.model.parameters())


def test_probe_of_a_long_interval_keeps_to_the_micro_batch(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    run = live_run(case(tmp_path, tokens=16_000, decisions=1, batch_size=4), probe=True)
    sizes = fail(run, lambda size: size > 2, gpu_is_full, monkeypatch)

    advance(run)

    # 0.5 % of 1,000 sequences, three times.
    assert sizes[-9:] == [2, 2, 1] * 3


def test_out_of_memory_in_the_probe_only_loses_the_probe(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    config = case(tmp_path)
    run, unprobed = live_run(config, probe=True), live_run(config)
    looks: list[int] = []

    def second_look(size: int) -> bool:  # with the weights displaced by one update
        looks.extend([size] if not run.loaded.model.training else [])
        return len(looks) == 2 and not run.loaded.model.training

    fail(run, second_look, gpu_is_full, monkeypatch)

    first, second = advance(run), advance(run)

    assert (first.probe_linear, first.probe_quadratic, first.relative_update) == (None, None, None)
    assert second.probe_linear is not None
    assert [first.train_loss, second.train_loss] == [advance(unprobed).train_loss for _ in range(2)]
    assert run.loaded.model.training


@pytest.mark.parametrize("micro", [1, 2, 3, 5, 7, 8, 100])
def test_gradient_by_micro_batches_is_that_of_the_whole(micro: int, tmp_path: Path) -> None:
    trainer = live_run(case(tmp_path, batch_size=8)).trainer
    batch = torch.randint(256, (8, 17), generator=torch.Generator().manual_seed(0))

    def gradient(size: int) -> tuple[float, list[torch.Tensor]]:
        trainer.optimizer.zero_grad()
        trainer.micro_batch_size = size
        loss = trainer._gradient(batch, "fp32")
        return float(loss), [p.grad.clone() for p in trainer.model.parameters() if p.grad is not None]

    loss, gradients = gradient(8)
    assert len(gradients) == len(list(trainer.model.parameters()))
    loss_in_parts, in_parts = gradient(micro)

    assert loss_in_parts == pytest.approx(loss, rel=8 * EPSILON)  # one rounding for each of up to eight parts
    for whole, parts in zip(gradients, in_parts, strict=True):
        assert torch.allclose(whole, parts, rtol=1e-4, atol=1e-7)


def test_other_errors_pass(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    run = live_run(case(tmp_path))

    def broken() -> None:
        raise RuntimeError("mat1 and mat2 shapes cannot be multiplied")

    sizes = fail(run, lambda size: True, broken, monkeypatch)

    with pytest.raises(RuntimeError, match="mat1 and mat2"):
        advance(run)

    assert sizes == [2]


# Losses -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("pruning", ["none", "magnitude", "evolution", "width"])
def test_divergence_is_reported_and_raises_nothing(pruning: str, tmp_path: Path) -> None:
    run = live_run(case(tmp_path, pruning=pruning), probe=True)
    assert not advance(run).diverged
    with torch.no_grad():
        next(run.loaded.model.parameters()).view(-1)[:] = math.nan

    telemetry = advance(run, sparsity=0.0 if pruning == "none" else 0.25)

    assert telemetry.diverged
    assert math.isnan(telemetry.train_loss)
    assert telemetry.noise_scale is None
    assert Telemetry.from_json(telemetry.to_json()).diverged
    assert telemetry.to_json()["train_loss"] is None
    assert math.isnan(run.evaluate())


def test_a_far_too_large_learning_rate_diverges_or_ends_high(tmp_path: Path) -> None:
    run = live_run(case(tmp_path, base_learning_rate=1e6), probe=True)

    seen = [advance(run) for _ in range(3)]

    assert seen[-1].diverged or seen[-1].train_loss > seen[0].train_loss


def test_overflow_in_float16_skips_the_step_and_the_run_goes_on(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(number_format, "lacking", lambda device: {})
    run = live_run(case(tmp_path, precision="fp16"), probe=True)
    start = weights(run)
    run.trainer.scaler = torch.amp.GradScaler("cpu", init_scale=2.0**60, backoff_factor=2.0**-2)

    telemetry = advance(run)

    assert telemetry.precision == "fp16"
    assert not telemetry.diverged
    assert all(torch.equal(weights(run)[name], start[name]) for name in start)
    assert math.isnan(telemetry.gradient_norm)
    assert telemetry.noise_scale is None
    assert telemetry.relative_update is None

    run.trainer.scaler = torch.amp.GradScaler("cpu", init_scale=2.0**10)
    telemetry = advance(run, precision="fp16")

    assert 0 < telemetry.gradient_norm < 100
    assert telemetry.train_loss < 6
    assert telemetry.noise_scale is not None
    snapshot = run.snapshot()
    expected = advance(run, precision="fp16").train_loss
    run.restore(snapshot)
    assert run.trainer.scaler.get_scale() == 2.0**10
    assert advance(run, precision="fp16").train_loss == expected
    assert {t for t in PRECISIONS} >= {run.trainer.effective_precision()}


# Meters -----------------------------------------------------------------------------------------------------


def reading(energy_j: float | None, power_w: float | None = None) -> EnergyReading:
    source = None if energy_j is None else "measured_counter"
    return EnergyReading(time_s=0.0, energy_j=energy_j, source=source, power_w=power_w)  # type: ignore[arg-type]


def test_joules_are_the_difference_of_two_readings(tmp_path: Path) -> None:
    # Two readings per interval: at its beginning and at its end.
    meter = RecordedMeter([reading(joules) for joules in (10.0, 12.5, 100.0, 140.0)])
    ticks = iter(np.arange(1000) * 0.25)
    run = LiveRun(case(tmp_path), meter=meter, clock=lambda: float(next(ticks)), probe=False)

    first, second = advance(run), advance(run)

    assert (first.energy_j, second.energy_j) == (2.5, 40.0)
    assert first.energy_source == second.energy_source == "measured_counter"
    # The clock is looked at when an interval begins, when its controls are in force, and when it ends.
    assert first.time_s == 0.5
    assert first.switch_time_s == 0.25
    assert first.power_w == 5.0
    assert first.energy_per_token_j == 2.5 / 320
    assert first.tokens_per_s == 640


def test_a_meter_that_falls_silent_stops_nothing(tmp_path: Path) -> None:
    meter = RecordedMeter([reading(1.0), reading(2.0), reading(2.0), reading(None, power_w=70.0), reading(None)])
    run = live_run(case(tmp_path), meter=meter)

    seen = [advance(run) for _ in range(3)]

    assert [t.energy_j for t in seen] == [1.0, None, None]
    assert [t.energy_source for t in seen] == ["measured_counter", None, None]
    assert [t.power_w for t in seen][1:] == [70.0, None]
    assert [t.energy_per_token_j for t in seen][1:] == [None, None]
    assert [t.steps for t in seen] == [10, 10, 10]


def test_a_weaker_source_at_the_end_counts(tmp_path: Path) -> None:
    weaker = replace(reading(5.0), source="measured_power")
    run = live_run(case(tmp_path), meter=RecordedMeter([reading(2.0), weaker]))

    telemetry = advance(run)

    assert (telemetry.energy_j, telemetry.energy_source) == (3.0, "measured_power")


# Time -------------------------------------------------------------------------------------------------------


def test_evaluation_is_timed_apart(tmp_path: Path) -> None:
    ticks = iter(np.arange(1000) * 1.0)
    run = LiveRun(case(tmp_path), meter=RecordedMeter([reading(None)]), clock=lambda: float(next(ticks)), probe=True)
    assert advance(run).evaluation_time_s == 0
    run.evaluate()
    run.evaluate()

    telemetry = advance(run)

    assert telemetry.evaluation_time_s == 2  # two looks of one tick each
    assert telemetry.time_s == 4  # begin, in force, probe's begin and end, end: five looks
    assert telemetry.probe_time_s == 1
    assert advance(run).evaluation_time_s == 0
