"""Which meter a device gets, and recordings that are written and played back."""

from __future__ import annotations

import gc
import os
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest
from fake_nvml import UUIDS, FakeNvml, build_fake_nvml

from trainpilot.agents.integrations.common import counted
from trainpilot.experiments import doctor
from trainpilot.llm_runtime import energy
from trainpilot.llm_runtime.energy import Clock, MeterCandidate, select_meter
from trainpilot.llm_runtime.energy import host as energy_host
from trainpilot.llm_runtime.energy.host import CpuEstimateMeter, RaplMeter
from trainpilot.llm_runtime.energy.meter import (
    EnergyMeter,
    EnergyReading,
    EnergyScope,
    NoMeter,
    RecordedMeter,
    read_recording,
    write_recording,
)
from trainpilot.llm_runtime.energy.nvml import NvmlMeter
from trainpilot.llm_runtime.process import Ticker


def assert_knows_nothing(meter: EnergyMeter, reason: str) -> None:
    assert isinstance(meter, NoMeter)
    assert reason in meter.description
    found = meter.read()
    assert (found.energy_j, found.source, found.power_w) == (None, None, None)
    meter.close()


def test_cuda_gets_the_current_gpu_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    nvml = FakeNvml(monkeypatch)
    nvml.reset(3)
    nvml.torch_reports(UUIDS[:3], current=2)
    for device, uuid in (("cuda", UUIDS[2]), ("cuda:1", UUIDS[1])):
        meter = select_meter(device)
        assert isinstance(meter, NvmlMeter)
        assert meter.uuids == [uuid]
        meter.close()


def test_cuda_without_nvml_is_unknown_not_estimated(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "pynvml", None)

    assert_knows_nothing(select_meter("cuda"), "nvidia-ml-py is not installed")


def test_cuda_with_a_driver_that_does_not_start(monkeypatch: pytest.MonkeyPatch) -> None:
    FakeNvml(monkeypatch).set(init_error=9)

    assert_knows_nothing(select_meter("cuda:0"), "NVML does not start")


def test_the_library_is_found_by_its_own_name_in_a_fresh_interpreter() -> None:
    program = (
        "from trainpilot.llm_runtime.energy import select_meter\n"
        "meter = select_meter('cuda:1')\n"
        "print(meter.description, meter.read().energy_j)\n"
    )
    environment = {**os.environ, "LD_LIBRARY_PATH": str(build_fake_nvml()), "FAKE_NVML_GPUS": "2"}
    environment.pop("CUDA_VISIBLE_DEVICES", None)
    outcome = subprocess.run(
        [sys.executable, "-c", program], capture_output=True, text=True, check=False, env=environment
    )

    assert outcome.stdout.strip() == f"NVML: Fake H200 ({UUIDS[1]}): energy counter 0.0", outcome.stderr


@pytest.mark.parametrize("device", ["mps", "xpu:0", "", "cuda:first"])
def test_other_devices_are_unknown(monkeypatch: pytest.MonkeyPatch, device: str) -> None:
    FakeNvml(monkeypatch)

    assert_knows_nothing(select_meter(device), "energy unknown: ")


def test_no_error_comes_through(monkeypatch: pytest.MonkeyPatch) -> None:
    def explode() -> RaplMeter:
        raise RuntimeError("a driver fault")

    monkeypatch.setattr(energy_host, "RaplMeter", explode)

    assert_knows_nothing(select_meter("cpu"), "a driver fault")


def test_cpu_is_estimated_where_rapl_cannot_be_read(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(energy_host, "RaplMeter", lambda: RaplMeter(tmp_path))
    meter = select_meter("cpu")

    assert isinstance(meter, CpuEstimateMeter)
    assert "no RAPL counter" in meter.description
    assert meter.read().source == "estimated"


def test_cpu_is_measured_where_rapl_can_be_read(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    for name, text in (("name", "package-0"), ("max_energy_range_uj", "65532610987"), ("energy_uj", "5")):
        (tmp_path / "intel-rapl:0").mkdir(exist_ok=True)
        (tmp_path / "intel-rapl:0" / name).write_text(text)
    monkeypatch.setattr(energy_host, "RaplMeter", lambda: RaplMeter(tmp_path))
    meter = select_meter("cpu")

    assert meter.read().source == "measured_counter"
    meter.close()


def test_a_new_meter_is_one_more_candidate(monkeypatch: pytest.MonkeyPatch) -> None:
    class Wall(NoMeter):
        """Measures at the plug."""

        scope: EnergyScope = "machine"

    def open_wall(device: str | None = None, *, why: str = "", clock: Clock | None = None) -> EnergyMeter:
        return Wall(f"asked for {device}")

    monkeypatch.setattr(energy, "CANDIDATES", (MeterCandidate("wall", "tpu", open_wall), *energy.CANDIDATES))

    assert select_meter("tpu:3").description == "energy unknown: asked for tpu:3"
    assert counted(5.0, 1.0, select_meter("tpu"), process="process 0")[0][0].startswith("node ")
    assert "wall" in doctor._meters()


def test_meters_state_their_scope_and_resolution(monkeypatch: pytest.MonkeyPatch) -> None:
    nvml = FakeNvml(monkeypatch)
    with_counter = NvmlMeter()
    nvml.set(energy_error=3)
    without = NvmlMeter()

    assert [meter.resolution_s for meter in (with_counter, without, NoMeter(""))] == [0.5, 1.0, 0.0]
    assert [meter.scope for meter in (with_counter, CpuEstimateMeter(), NoMeter(""))] == [
        "device",
        "process",
        "process",
    ]
    assert RaplMeter.scope == "machine"
    assert list(NoMeter("").uuids) == []
    with_counter.close()
    without.close()


def test_an_estimate_counts_the_idle_draw_over_the_given_clock(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(energy_host, "RaplMeter", lambda: RaplMeter(tmp_path))
    seconds = iter([10.0, 14.0])
    meter = select_meter("cpu", clock=lambda: next(seconds))

    assert meter.read().time_s == 14.0


class Counter:
    """Counts the ticks."""

    def __init__(self) -> None:
        self.ticked = threading.Event()

    def tick(self) -> None:
        self.ticked.set()


def test_a_ticker_ends_with_its_object() -> None:
    counter = Counter()
    ticker = Ticker(counter.tick, 0.005)
    assert counter.ticked.wait(5)
    del counter
    gc.collect()
    deadline = time.monotonic() + 5
    while ticker._thread.is_alive() and time.monotonic() < deadline:
        time.sleep(0.005)

    assert not ticker._thread.is_alive()


def test_a_ticker_needs_an_interval() -> None:
    with pytest.raises(ValueError, match="interval_s must be > 0 seconds, got 0"):
        Ticker(Counter().tick, 0)


# Recordings ---------------------------------------------------------------------------------------------------------


READINGS = [
    EnergyReading(time_s=0.1, energy_j=0.0, source="measured_counter"),
    EnergyReading(
        time_s=1 / 3,
        energy_j=150.0625,
        source="measured_power",
        power_w=301.5,
        power_limit_w=700.0,
        utilisation=0.97,
        memory_used_bytes=150_000_000_000,
        memory_total_bytes=150_754_820_096,
    ),
    EnergyReading(time_s=2.0, energy_j=None, source=None),
]
HEADER = "time_s,energy_j,source,power_w,power_limit_w,utilisation,memory_used_bytes,memory_total_bytes"


def test_round_trip(tmp_path: Path) -> None:
    path = tmp_path / "recording.csv"
    write_recording(path, READINGS)

    assert read_recording(path) == READINGS
    assert path.read_text().splitlines()[:2] == [HEADER, "0.1,0.0,measured_counter,,,,,"]


def test_playback_repeats_the_last_reading(tmp_path: Path) -> None:
    path = tmp_path / "recording.csv"
    write_recording(path, READINGS[:2])
    meter = RecordedMeter(path)

    assert [meter.read() for _ in range(4)] == [READINGS[0], READINGS[1], READINGS[1], READINGS[1]]
    assert meter.description == "2 recorded readings from recording.csv"
    meter.close()


def test_a_list_plays_too() -> None:
    assert RecordedMeter(READINGS).read() is READINGS[0]


def test_an_empty_recording_is_refused() -> None:
    with pytest.raises(ValueError, match="at least 1 reading, got 0"):
        RecordedMeter([])


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("time_s,joules\n0,1\n", "columns missing or unknown: energy_j, joules, memory"),
        ("", "columns missing or unknown"),
        (f"{HEADER}\n,1,estimated,,,,,\n", "line 2: time_s is empty"),
        (f"{HEADER}\n0,many,estimated,,,,,\n", "line 2: energy_j must be a finite number, got 'many'"),
        (f"{HEADER}\n0,nan,estimated,,,,,\n", "energy_j must be a finite number, got 'nan'"),
        (f"{HEADER}\n0,1,guessed,,,,,\n", "source must be one of .*, got 'guessed'"),
        (f"{HEADER}\n0,1,estimated,,,,1.5,\n", "memory_used_bytes must be a finite number, got '1.5'"),
        (f"{HEADER}\n0,1,estimated\n", "line 2: expected 8 cells"),
        (f"{HEADER}\n0,1,estimated,,,,,,9\n", "line 2: expected 8 cells"),
    ],
)
def test_a_faulty_recording_is_named(tmp_path: Path, text: str, message: str) -> None:
    path = tmp_path / "recording.csv"
    path.write_text(text)

    with pytest.raises(ValueError, match=message):
        read_recording(path)
