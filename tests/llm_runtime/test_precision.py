"""Which number formats a device lacks, which pay, and the cache of what was measured."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from live_runs import case, live_run, same_bits, weights
from torch import nn

from trainpilot.llm_runtime import precision as number_format
from trainpilot.llm_runtime import timing
from trainpilot.llm_runtime.config import PRECISIONS, Precision
from trainpilot.llm_runtime.precision import (
    autocast,
    cached_step_seconds,
    double_device,
    lacking,
    masked_precisions,
    measure_step_seconds,
    name_of,
    synchronise,
)

CPU, CUDA = torch.device("cpu"), torch.device("cuda:0")


@pytest.fixture
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("TRAINPILOT_CACHE", str(tmp_path))
    return tmp_path / "precision"


@pytest.fixture
def highest() -> Iterator[None]:
    before = torch.get_float32_matmul_precision()
    yield
    torch.set_float32_matmul_precision(before)


class Step:
    """Takes so many milliseconds in each precision, by a clock of its own, and counts."""

    now_s = 0.0

    def __init__(self, **milliseconds: float) -> None:
        self.milliseconds = milliseconds
        self.calls: list[Precision] = []

    def __call__(self, precision: Precision) -> None:
        self.calls.append(precision)
        Step.now_s += self.milliseconds[precision] / 1_000


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> None:
    """Measure by the clock of the steps: on a busy machine a sleep takes any time."""
    monkeypatch.setattr(timing, "time", SimpleNamespace(perf_counter=lambda: Step.now_s))


# Devices ----------------------------------------------------------------------------------------------------


def test_cpu_lacks_tf32_and_fp16() -> None:
    reasons = lacking(CPU)
    assert set(reasons) == {"tf32", "fp16"}
    assert "cpu" in reasons["tf32"]


@pytest.mark.parametrize(
    ("capability", "missing"),
    [((9, 0), set()), ((8, 0), set()), ((7, 5), {"tf32", "bf16"}), ((7, 0), {"tf32", "bf16"})],
)
def test_gpus(capability: tuple[int, int], missing: set[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: capability)
    reasons = lacking(CUDA)
    assert set(reasons) == missing
    assert all("8.0" in reason for reason in reasons.values())


def test_other_devices_train_in_fp32_alone() -> None:
    assert set(lacking(torch.device("xpu"))) == set(PRECISIONS) - {"fp32"}


@pytest.mark.parametrize(("macos", "missing"), [(15, {"tf32", "fp16"}), (13, {"tf32", "fp16", "bf16"})])
def test_apple_s_gpu_has_bf16_from_macos_14_on(macos: int, missing: set[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.backends.mps, "is_macos_or_newer", lambda major, minor: (macos, 0) >= (major, minor))
    assert set(lacking(torch.device("mps"))) == missing


def test_a_torch_without_apple_s_gpu_has_none_of_its_precisions() -> None:
    assert set(lacking(torch.device("mps"))) == set(PRECISIONS) - {"fp32"}


def test_float64_of_apple_s_gpu_is_on_the_cpu() -> None:
    assert double_device(torch.device("mps")) == CPU
    assert double_device(CUDA) == CUDA


def test_apple_s_gpu_is_waited_for(monkeypatch: pytest.MonkeyPatch) -> None:
    waited: list[bool] = []
    monkeypatch.setattr(torch.mps, "synchronize", lambda: waited.append(True))
    synchronise(torch.device("mps"))
    synchronise(CPU)
    assert waited == [True]


# Formats ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("precision", "dtype"), [("fp32", torch.float32), ("bf16", torch.bfloat16)])
def test_autocast_on_a_cpu(precision: Precision, dtype: torch.dtype) -> None:
    layer = nn.Linear(4, 4)
    with autocast(precision, CPU):
        output = layer(torch.ones(1, 4))
    assert output.dtype == dtype
    assert name_of(output.dtype, CPU) == precision
    assert layer.weight.dtype == torch.float32


@pytest.mark.usefixtures("highest")
def test_tf32_is_a_switch_of_the_process() -> None:
    for precision, setting in (("tf32", "high"), ("fp32", "highest")):
        with autocast(precision, CUDA):  # type: ignore[arg-type]
            assert torch.get_float32_matmul_precision() == setting
            assert name_of(torch.float32, CUDA) == precision
            assert name_of(torch.float32, CPU) == "fp32"


def test_names_of_sixteen_bit_formats() -> None:
    assert name_of(torch.bfloat16, CUDA) == "bf16"
    assert name_of(torch.float16, CUDA) == "fp16"


# What pays --------------------------------------------------------------------------------------------------


@pytest.mark.usefixtures("cache", "clock")
def test_a_faster_format_pays() -> None:
    reasons = masked_precisions(CPU, Step(fp32=5, bf16=1), "a model")
    assert set(reasons) == {"tf32", "fp16"}


@pytest.mark.usefixtures("cache", "clock")
def test_a_slower_format_does_not_pay() -> None:
    reasons = masked_precisions(CPU, Step(fp32=2, bf16=6), "a model")

    assert set(reasons) == {"tf32", "fp16", "bf16"}
    assert reasons["bf16"].startswith("measured here: ")
    assert reasons["bf16"].endswith(" of the fp32 step time")
    assert float(reasons["bf16"].split()[2]) == 3.0


@pytest.mark.parametrize(("ratio", "pays"), [(0.94, True), (0.95, True), (0.96, False), (1.0, False)])
def test_border_of_what_pays(ratio: float, pays: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    seconds = {"fp32": 2.0, "bf16": 2.0 * ratio}
    monkeypatch.setattr(number_format, "cached_step_seconds", lambda *args: seconds)
    assert ("bf16" not in masked_precisions(CPU, Step(), "a model")) == pays


@pytest.mark.usefixtures("clock")
def test_measured_in_turns_and_the_first_round_does_not_count() -> None:
    step = Step(fp32=1, bf16=1)

    def slow_start(precision: Precision) -> None:
        if len(step.calls) < 2:
            Step.now_s += 0.1
        step(precision)

    seconds = measure_step_seconds(CPU, slow_start, ["fp32", "bf16"], rounds=1)

    assert step.calls == ["fp32", "bf16"] * 2
    assert list(seconds.values()) == pytest.approx([0.001, 0.001])


# Cache ------------------------------------------------------------------------------------------------------


def test_measured_once(cache: Path) -> None:
    first, again = Step(fp32=2, bf16=1), Step(fp32=2, bf16=1)

    seconds = cached_step_seconds(CPU, first, "a model", ["fp32", "bf16"])
    from_cache = cached_step_seconds(CPU, again, "a model", ["fp32", "bf16"])

    assert len(first.calls) == 12
    assert again.calls == []
    assert from_cache == seconds
    (file,) = cache.iterdir()
    assert json.loads(file.read_text(encoding="utf-8"))["measured"].endswith("|a model")


@pytest.mark.usefixtures("cache")
def test_another_model_or_more_threads_are_measured_anew(monkeypatch: pytest.MonkeyPatch) -> None:
    cached_step_seconds(CPU, Step(fp32=1), "a model", ["fp32"])
    other, threads = Step(fp32=1), Step(fp32=1)

    cached_step_seconds(CPU, other, "another model", ["fp32"])
    monkeypatch.setattr(torch, "get_num_threads", lambda: 64)
    cached_step_seconds(CPU, threads, "a model", ["fp32"])

    assert len(other.calls) == len(threads.calls) == 6


@pytest.mark.parametrize(
    "content",
    [
        "",
        "{",
        "[]",
        "3",
        "{}",
        '{"seconds": null}',
        '{"seconds": []}',
        '{"seconds": ["fp32", "bf16"]}',
        '{"seconds": {"fp32": 1.0}}',
        '{"seconds": {"fp32": 0.0, "bf16": 1.0}}',
        '{"seconds": {"fp32": null, "bf16": 1.0}}',
        '{"seconds": {"fp32": "fast", "bf16": 1.0}}',
    ],
)
def test_damaged_cache_is_measured_anew(content: str, cache: Path) -> None:
    cached_step_seconds(CPU, Step(fp32=1, bf16=1), "a model", ["fp32", "bf16"])
    (file,) = cache.iterdir()
    file.write_text(content, encoding="utf-8")
    step = Step(fp32=1, bf16=1)

    seconds = cached_step_seconds(CPU, step, "a model", ["fp32", "bf16"])

    assert len(step.calls) == 12
    assert json.loads(file.read_text(encoding="utf-8"))["seconds"] == seconds


def test_cache_that_cannot_be_written(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    blocker = tmp_path / "file"
    blocker.write_text("in the way", encoding="utf-8")
    monkeypatch.setenv("TRAINPILOT_CACHE", str(blocker))
    assert set(cached_step_seconds(CPU, Step(fp32=1), "a model", ["fp32"])) == {"fp32"}


# In a run ---------------------------------------------------------------------------------------------------


@pytest.mark.usefixtures("cache")
def test_limits_of_a_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    run = live_run(case(tmp_path))
    before = weights(run)
    timed: list[Precision] = []
    rehearse = run.trainer.rehearse

    def recorded(batch: np.ndarray, precision: Precision) -> None:
        timed.append(precision)
        rehearse(batch, precision)

    monkeypatch.setattr(run.trainer, "rehearse", recorded)

    masked = run.limits().masked_precisions

    assert {"tf32", "fp16"} <= set(masked) <= {"tf32", "fp16", "bf16"}
    assert timed == ["fp32", "bf16"] * 6
    assert same_bits(weights(run), before)
    assert run.stream.state_dict() == {"position": 0}
    assert run.trainer.optimizer.state == {}
    assert all(parameter.grad is None for parameter in run.loaded.model.parameters())


def test_the_starting_precision_is_never_masked(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    seconds = {"fp32": 1.0, "bf16": 3.0}
    monkeypatch.setattr(number_format, "cached_step_seconds", lambda *args: seconds)
    assert "bf16" in live_run(case(tmp_path)).limits().masked_precisions
    assert "bf16" not in live_run(case(tmp_path, precision="bf16")).limits().masked_precisions


@pytest.mark.parametrize(
    ("batch_size", "tokens", "smallest", "largest"),
    [
        (2, 3_200, 1, 5),  # 20 sequences in an interval leave four steps of 5
        (2, 320_000, 1, 32),  # 16 times the start
        (64, 160_000, 4, 250),  # an interval of 1,000
        (16, 3_200, 1, 16),  # the start itself is always allowed
    ],
)
def test_range_of_the_batch(batch_size: int, tokens: int, smallest: int, largest: int, tmp_path: Path) -> None:
    limits = live_run(case(tmp_path, batch_size=batch_size, tokens=tokens)).base_limits()
    assert (limits.min_batch_size, limits.max_batch_size) == (smallest, largest)
    assert limits.start.batch_size == batch_size
    assert limits.decisions == 10
