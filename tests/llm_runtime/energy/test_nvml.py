"""The real pynvml on a fake NVML library: joules, falls to weaker sources, and which GPU is which."""

from __future__ import annotations

import math
import time
import warnings
from collections.abc import Callable, Iterator

import numpy as np
import pytest
from fake_nvml import (
    FUNCTION_NOT_FOUND,
    GPU_IS_LOST,
    NOT_SUPPORTED,
    UUIDS,
    FakeClock,
    FakeNvml,
)

from trainpilot.llm_runtime.energy.meter import EnergyReading, MeterUnavailableError
from trainpilot.llm_runtime.energy.nvml import NvmlMeter

MakeMeter = Callable[..., NvmlMeter]


@pytest.fixture
def nvml(monkeypatch: pytest.MonkeyPatch) -> FakeNvml:
    return FakeNvml(monkeypatch)


@pytest.fixture
def clock() -> FakeClock:
    return FakeClock()


@pytest.fixture
def make_meter(nvml: FakeNvml, clock: FakeClock) -> Iterator[MakeMeter]:
    """Make meters that sample only when they are read, and close them."""
    meters: list[NvmlMeter] = []

    def make(gpus: list[int | str] | None = None) -> NvmlMeter:
        meters.append(NvmlMeter(gpus, sample_s=3600, clock=clock))
        return meters[-1]

    yield make
    for meter in meters:
        meter.close()


def test_one_gpu_is_read_by_its_counter(nvml: FakeNvml, make_meter: MakeMeter, clock: FakeClock) -> None:
    meter = make_meter()
    first = meter.read()
    nvml.add(joules=1234.5)
    clock.now_s += 4
    second = meter.read()

    assert (first.energy_j, first.time_s) == (0.0, 100.0)
    assert (second.energy_j, second.time_s) == (1234.5, 104.0)
    assert second.source == "measured_counter"
    assert (second.power_w, second.power_limit_w, second.utilisation) == (300.0, 700.0, 0.5)
    assert (second.memory_used_bytes, second.memory_total_bytes) == (2000, 8000)
    assert meter.description == f"NVML: Fake H200 ({UUIDS[0]}): energy counter"


def test_two_gpus_are_summed(nvml: FakeNvml, make_meter: MakeMeter) -> None:
    nvml.reset(2)
    nvml.set(1, power_mw=100_000, busy_percent=100)
    meter = make_meter()
    nvml.add(0, joules=10)
    nvml.add(1, joules=5)
    reading = meter.read()

    assert reading.energy_j == 15.0
    assert (reading.power_w, reading.power_limit_w, reading.utilisation) == (400.0, 1400.0, 0.75)
    assert (reading.memory_used_bytes, reading.memory_total_bytes) == (4000, 16000)


def test_instant_power_is_preferred_to_the_running_average(nvml: FakeNvml, make_meter: MakeMeter) -> None:
    nvml.set(instant_error=0, instant_mw=412_000)

    assert make_meter().read().power_w == 412.0
    assert nvml.get("power_calls") == 0


@pytest.mark.parametrize(
    ("metric", "field"),
    [
        ("limit_error", "power_limit_w"),
        ("busy_error", "utilisation"),
        ("memory_error", "memory_used_bytes"),
        ("power_error", "power_w"),
    ],
)
def test_each_metric_fails_on_its_own(nvml: FakeNvml, make_meter: MakeMeter, metric: str, field: str) -> None:
    nvml.set(**{metric: NOT_SUPPORTED})
    meter = make_meter()
    nvml.add(joules=2)
    reading = meter.read()

    assert getattr(reading, field) is None
    assert (reading.energy_j, reading.source) == (2.0, "measured_counter")


def test_a_power_of_zero_is_unknown(nvml: FakeNvml, make_meter: MakeMeter) -> None:
    nvml.set(power_mw=0)

    assert make_meter().read().power_w is None


@pytest.mark.parametrize("error", [NOT_SUPPORTED, FUNCTION_NOT_FOUND])
def test_without_a_counter_power_is_integrated(
    nvml: FakeNvml, make_meter: MakeMeter, clock: FakeClock, error: int
) -> None:
    nvml.set(energy_error=error)
    meter = make_meter()
    clock.now_s += 2
    nvml.set(power_mw=500_000)
    ramp = meter.read()
    clock.now_s += 1
    flat = meter.read()

    assert ramp.energy_j == pytest.approx(2 * (300 + 500) / 2)
    assert flat.energy_j == pytest.approx(800 + 500)
    assert flat.source == "measured_power"
    assert "power integrated" in meter.description


def test_a_library_without_the_counter_function(monkeypatch: pytest.MonkeyPatch) -> None:
    FakeNvml(monkeypatch, "-DNO_ENERGY_COUNTER")
    meter = NvmlMeter(sample_s=3600)

    assert meter.read().source == "measured_power"
    meter.close()


def test_the_sampling_thread_follows_the_clock(nvml: FakeNvml) -> None:
    nvml.set(energy_error=NOT_SUPPORTED, power_mw=100_000)
    meter = NvmlMeter(sample_s=0.01)
    start = meter.read()
    enough, deadline = nvml.get("power_calls") + 3, time.monotonic() + 10
    while nvml.get("power_calls") < enough and time.monotonic() < deadline:
        time.sleep(0.01)
    sampled = nvml.get("power_calls")
    end = meter.read()
    meter.close()

    assert sampled >= enough
    assert start.energy_j is not None
    assert end.energy_j is not None
    assert end.energy_j - start.energy_j == pytest.approx(100 * (end.time_s - start.time_s), rel=1e-6)


def test_closing_ends_the_thread_and_nvml(nvml: FakeNvml) -> None:
    nvml.set(energy_error=NOT_SUPPORTED)
    meter = NvmlMeter(sample_s=0.005)
    assert nvml.get("started") == 1
    meter.close()
    meter.close()
    calls = nvml.get("power_calls")
    time.sleep(0.03)

    assert nvml.get("power_calls") == calls
    assert nvml.get("started") == 0
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert meter.read().energy_j is None


def test_neither_counter_nor_power(nvml: FakeNvml, make_meter: MakeMeter) -> None:
    nvml.set(energy_error=NOT_SUPPORTED, power_error=NOT_SUPPORTED)
    meter = make_meter()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        reading = meter.read()

    assert (reading.energy_j, reading.source, reading.power_w) == (None, None, None)
    assert reading.memory_used_bytes == 2000
    assert "neither an energy counter nor power" in meter.description


def test_one_unknown_part_makes_the_sum_unknown(nvml: FakeNvml, make_meter: MakeMeter) -> None:
    nvml.reset(2)
    nvml.set(1, energy_error=NOT_SUPPORTED, power_error=NOT_SUPPORTED)
    reading = make_meter().read()

    assert (reading.energy_j, reading.source, reading.power_w) == (None, None, None)


def test_a_sum_carries_its_weakest_source(nvml: FakeNvml, make_meter: MakeMeter, clock: FakeClock) -> None:
    nvml.reset(2)
    nvml.set(1, energy_error=NOT_SUPPORTED)
    meter = make_meter()
    nvml.add(0, joules=7)
    clock.now_s += 1
    reading = meter.read()

    assert reading.energy_j == pytest.approx(307.0)
    assert reading.source == "measured_power"


def test_a_lost_gpu_warns_once_and_stays_unknown(nvml: FakeNvml, make_meter: MakeMeter) -> None:
    meter = make_meter()
    nvml.add(joules=3)
    assert meter.read().energy_j == 3.0
    nvml.set(all_error=GPU_IS_LOST)
    with pytest.warns(RuntimeWarning, match="unknown from now on"):
        lost = meter.read()
    nvml.set(all_error=0)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        later = meter.read()

    assert (lost.energy_j, lost.source, lost.memory_used_bytes) == (None, None, None)
    assert (later.energy_j, later.source) == (None, None)
    assert "stopped answering" in meter.description


def test_a_counter_that_fails_midway_goes_on_by_power(nvml: FakeNvml, make_meter: MakeMeter, clock: FakeClock) -> None:
    meter = make_meter()
    nvml.add(joules=50)
    meter.read()
    nvml.set(energy_error=NOT_SUPPORTED)
    clock.now_s += 2
    by_power = meter.read()
    nvml.set(energy_error=0)
    clock.now_s += 1
    later = meter.read()

    assert by_power.energy_j == pytest.approx(50 + 2 * 300)
    assert later.energy_j == pytest.approx(50 + 3 * 300)
    assert by_power.source == later.source == "measured_power"


def test_a_counter_that_is_reset_never_gives_negative_joules(nvml: FakeNvml, make_meter: MakeMeter) -> None:
    meter = make_meter()
    nvml.set(energy_mj=0)
    with pytest.warns(RuntimeWarning, match="fell from 5000.0 J to 0.0 J"):
        assert meter.read().energy_j is None

    assert meter.read().energy_j is None


# Numbers that cannot be true ----------------------------------------------------------------------------------------


def readings(meter: NvmlMeter, clock: FakeClock, times: int = 2, every_s: float = 1.0) -> list[EnergyReading]:
    """Read now, and again after so many seconds."""
    found = []
    for _ in range(times):
        found.append(meter.read())
        clock.now_s += every_s
    return found


def frozen(nvml: FakeNvml) -> None:
    """Leave the counter as it is."""


def at_zero(nvml: FakeNvml) -> None:
    nvml.set(energy_mj=0)


@pytest.mark.parametrize("counter", [frozen, at_zero])
def test_a_counter_that_stands_still_is_replaced_by_the_power(
    nvml: FakeNvml, make_meter: MakeMeter, clock: FakeClock, counter: Callable[[FakeNvml], None]
) -> None:
    counter(nvml)
    meter = make_meter()
    clock.now_s += 3600
    with pytest.warns(
        RuntimeWarning, match="integral of the power from now on.* stood still for 3600 s at 300 W"
    ) as caught:
        reading, later = readings(meter, clock)
    assert len(caught) == 1
    assert (reading.energy_j, reading.source) == (3600 * 300.0, "measured_power")
    assert (later.energy_j, later.source) == (3601 * 300.0, "measured_power")


def test_a_counter_that_freezes_early_in_an_interval_is_found(
    nvml: FakeNvml, make_meter: MakeMeter, clock: FakeClock
) -> None:
    meter = make_meter()
    nvml.add(joules=300)
    clock.now_s += 1000
    with pytest.warns(RuntimeWarning, match="rose by no more than 300 J in 1000 s at 300 W"):
        assert meter.read().energy_j == 300_000


def test_a_counter_that_freezes_is_found_by_short_readings_too(
    nvml: FakeNvml, make_meter: MakeMeter, clock: FakeClock
) -> None:
    meter = make_meter()
    with pytest.warns(RuntimeWarning, match="stood still"):
        *_, reading = readings(meter, clock, 11, every_s=0.3)
    assert reading.source == "measured_power"
    assert 0.6 * 3 * 300 < (reading.energy_j or 0) <= 3 * 300.1


@pytest.mark.parametrize("counter_mj", [2**63 - 1, -1, 200_000_000], ids=["largest", "all ones", "driver reloaded"])
def test_a_counter_that_rises_beyond_the_limit_is_replaced_by_the_power(
    nvml: FakeNvml, make_meter: MakeMeter, clock: FakeClock, counter_mj: int
) -> None:
    meter = make_meter()
    nvml.set(energy_mj=counter_mj)
    clock.now_s += 1
    with pytest.warns(RuntimeWarning, match="rose by .* J in 1 s at a power limit of 700 W") as caught:
        reading, _ = readings(meter, clock)
    assert len(caught) == 1
    assert (reading.energy_j, reading.source) == (300.0, "measured_power")


@pytest.mark.parametrize("counter_mj", [5_000_000, 2**63 - 1], ids=["frozen", "largest"])
def test_without_power_an_impossible_counter_is_unknown_or_left(
    nvml: FakeNvml, make_meter: MakeMeter, clock: FakeClock, counter_mj: int
) -> None:
    nvml.set(power_error=NOT_SUPPORTED)
    meter = make_meter()
    nvml.set(energy_mj=counter_mj)
    clock.now_s += 1
    if counter_mj == 5_000_000:  # nothing says that power was drawn
        assert meter.read().energy_j == 0.0
        return
    with pytest.warns(RuntimeWarning, match="energy is unknown from now on.* rose by"):
        reading = meter.read()
    assert (reading.energy_j, reading.source) == (None, None)


def test_without_a_limit_no_gpu_draws_more_than_any_does(
    nvml: FakeNvml, make_meter: MakeMeter, clock: FakeClock
) -> None:
    nvml.set(limit_error=NOT_SUPPORTED)
    meter = make_meter()
    nvml.add(joules=10_000)
    clock.now_s += 1
    with pytest.warns(RuntimeWarning, match="at a power limit of 3000 W"):
        assert meter.read().energy_j == 300.0


@pytest.mark.parametrize("kept", [NOT_SUPPORTED, 0], ids=["integrated", "with a counter"])
def test_an_impossible_power_is_never_integrated(
    nvml: FakeNvml, make_meter: MakeMeter, clock: FakeClock, kept: int
) -> None:
    nvml.set(energy_error=kept)
    meter = make_meter()
    nvml.set(power_mw=0xFFFFFFFF)
    nvml.add(joules=300)
    clock.now_s += 1
    if not kept:
        reading = meter.read()
        assert (reading.energy_j, reading.source, reading.power_w) == (300.0, "measured_counter", None)
        return
    with pytest.warns(RuntimeWarning, match="returned 4.29497e.06 W, more than 1400 W") as caught:
        reading, _ = readings(meter, clock)
    assert len(caught) == 1
    assert (reading.energy_j, reading.source, reading.power_w) == (None, None, None)


@pytest.mark.parametrize("counter_error", [0, NOT_SUPPORTED], ids=["counter", "power"])
def test_mig_that_is_switched_on_midway_makes_the_energy_unknown(
    nvml: FakeNvml, make_meter: MakeMeter, clock: FakeClock, counter_error: int
) -> None:
    nvml.set(energy_error=counter_error)
    meter = make_meter()
    clock.now_s += 1
    nvml.add(joules=300)
    assert meter.read().energy_j == 300
    nvml.set(mig=1)
    nvml.add(joules=300)
    clock.now_s += 1
    with pytest.warns(RuntimeWarning, match="energy is unknown from now on.* MIG") as caught:
        reading, _ = readings(meter, clock)
    assert len(caught) == 1
    assert (reading.energy_j, reading.source, reading.power_w) == (None, None, None)


@pytest.mark.parametrize("now_s", [50.0, math.nan, -math.inf])
def test_a_clock_that_cannot_be_true_gives_no_joules(
    nvml: FakeNvml, make_meter: MakeMeter, clock: FakeClock, now_s: float
) -> None:
    nvml.set(energy_error=NOT_SUPPORTED)
    meter = make_meter()
    clock.now_s += 1
    assert meter.read().energy_j == 300
    clock.now_s = now_s
    with pytest.warns(RuntimeWarning, match="clock .* from now on seconds are the system's") as caught:
        readings = [meter.read() for _ in range(3)]
    assert len(caught) == 1
    assert all(300 <= (each.energy_j or 0) < 300 + 60 * 300 for each in readings)
    assert all(101 <= each.time_s < 161 for each in readings)


def test_full_power_in_steps_of_the_counter_is_believed(
    nvml: FakeNvml, make_meter: MakeMeter, clock: FakeClock
) -> None:
    """The counter moves every 0.1 s, and readings come at any time."""
    nvml.set(power_mw=720_000)
    meter = make_meter()
    random, told_s = np.random.default_rng(0), 0.0
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        for wait_s in [*random.uniform(0.001, 0.3, 300), 1800.0, 0.001, 0.05]:
            clock.now_s += wait_s
            seconds = math.floor((clock.now_s - 100) * 10) / 10
            nvml.add(joules=720 * (seconds - told_s))
            told_s = seconds
            reading = meter.read()
    assert reading.source == "measured_counter"
    assert reading.energy_j == pytest.approx(720 * told_s, rel=1e-3)


def test_a_driver_that_does_not_start(nvml: FakeNvml, make_meter: MakeMeter) -> None:
    nvml.set(init_error=9)

    with pytest.raises(MeterUnavailableError, match="NVML does not start"):
        make_meter()


# Which GPU an index, a UUID or torch means --------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("visible", "expected"),
    [
        ("1", [1]),
        ("2,0", [2, 0]),
        ("0,7,1", [0]),
        ("1,-1,0", [1]),
        (UUIDS[2], [2]),
        ("GPU-bb, GPU-aa", [1, 0]),
    ],
)
def test_cuda_visible_devices(
    nvml: FakeNvml, make_meter: MakeMeter, monkeypatch: pytest.MonkeyPatch, visible: str, expected: list[int]
) -> None:
    nvml.reset(3)
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", visible)

    assert make_meter().uuids == [UUIDS[index] for index in expected]


@pytest.mark.parametrize("visible", ["", "-1", "9", "GPU-", "0,0", "nonsense"])
def test_no_visible_gpu_is_refused(
    nvml: FakeNvml, make_meter: MakeMeter, monkeypatch: pytest.MonkeyPatch, visible: str
) -> None:
    nvml.reset(2)
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", visible)

    with pytest.raises(MeterUnavailableError, match="no NVIDIA GPU is visible"):
        make_meter()
    assert nvml.get("started") == 0


def test_indices_follow_the_pci_order(nvml: FakeNvml, make_meter: MakeMeter, monkeypatch: pytest.MonkeyPatch) -> None:
    nvml.reset(2)
    nvml.set(0, bus=90)
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "0")

    assert make_meter().uuids == [UUIDS[1]]


def test_wanted_gpus_are_counted_among_the_visible(
    nvml: FakeNvml, make_meter: MakeMeter, monkeypatch: pytest.MonkeyPatch
) -> None:
    nvml.reset(3)
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "2,1")

    assert make_meter([0]).uuids == [UUIDS[2]]
    assert make_meter(["GPU-bb"]).uuids == [UUIDS[1]]
    with pytest.raises(MeterUnavailableError, match="GPU 2 is not among the 2 visible"):
        make_meter([2])


def test_unlike_gpus_in_an_unknown_order_are_not_guessed(
    nvml: FakeNvml, make_meter: MakeMeter, monkeypatch: pytest.MonkeyPatch
) -> None:
    nvml.reset(2)
    nvml.set_text(1, name="Fake T4")
    assert make_meter().uuids == UUIDS[:2]
    with pytest.raises(MeterUnavailableError, match="CUDA_DEVICE_ORDER=PCI_BUS_ID"):
        make_meter([0])
    monkeypatch.setenv("CUDA_DEVICE_ORDER", "PCI_BUS_ID")

    assert make_meter([0]).uuids == [UUIDS[0]]


def test_torch_knows_best_once_cuda_is_initialised(
    nvml: FakeNvml, make_meter: MakeMeter, monkeypatch: pytest.MonkeyPatch
) -> None:
    nvml.reset(3)
    nvml.set_text(1, name="Fake T4")
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "0")
    nvml.torch_reports([uuid.removeprefix("GPU-") for uuid in (UUIDS[2], UUIDS[0])])

    assert make_meter().uuids == [UUIDS[2], UUIDS[0]]
    assert make_meter([1]).uuids == [UUIDS[0]]


def test_mig_mode_has_no_energy(nvml: FakeNvml, make_meter: MakeMeter) -> None:
    nvml.set(mig=1)
    meter = make_meter()
    reading = meter.read()

    assert (reading.energy_j, reading.source, reading.power_w) == (None, None, None)
    assert reading.memory_total_bytes is None
    assert "MIG" in meter.description


@pytest.mark.parametrize("reported_by_torch", [False, True])
def test_a_mig_slice_tells_its_memory_only(
    nvml: FakeNvml, make_meter: MakeMeter, monkeypatch: pytest.MonkeyPatch, reported_by_torch: bool
) -> None:
    nvml.set_text(5, uuid="MIG-12345678")
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "MIG-12345678")
    nvml.torch_reports(["12345678"] if reported_by_torch else None)
    reading = make_meter().read()

    assert (reading.energy_j, reading.power_w, reading.utilisation) == (None, None, None)
    assert reading.memory_total_bytes == 8000


def test_an_unknown_mig_slice_is_refused(
    nvml: FakeNvml, make_meter: MakeMeter, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "MIG-none")

    with pytest.raises(MeterUnavailableError, match="no device MIG-none"):
        make_meter()
