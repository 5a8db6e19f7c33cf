"""Energy by Zeus: a fake of its package in a process of its own, faults of that process, and who gets the meter."""

from __future__ import annotations

import gc
import importlib.util
import json
import os
import platform
import sys
import time
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from trainpilot.experiments import doctor
from trainpilot.llm_runtime import energy
from trainpilot.llm_runtime.energy import CpuEstimateMeter, NoMeter, select_meter
from trainpilot.llm_runtime.energy import host as energy_host
from trainpilot.llm_runtime.energy import zeus as energy_zeus
from trainpilot.llm_runtime.energy.host import RaplMeter
from trainpilot.llm_runtime.energy.meter import MeterUnavailableError, WrongMachineError
from trainpilot.llm_runtime.energy.plausible import PlausibleMeter
from trainpilot.llm_runtime.energy.zeus import PYTHON, ZeusMeter, hardware_for

FAKE = Path(__file__).parents[2] / "helpers" / "fake_zeus"
Make = Callable[..., ZeusMeter]


@pytest.fixture
def state(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[..., None]:
    """Set what the fake package reports, also while it runs."""
    file = tmp_path / "state.json"
    monkeypatch.setenv("FAKE_ZEUS", str(file))
    monkeypatch.setenv("PYTHONPATH", str(FAKE))
    monkeypatch.delenv(PYTHON, raising=False)
    monkeypatch.delenv("ROCR_VISIBLE_DEVICES", raising=False)

    def write(**values: Any) -> None:
        beside = tmp_path / "new.json"
        beside.write_text(json.dumps(values), encoding="utf-8")
        os.replace(beside, file)

    return write


@pytest.fixture
def make(state: Callable[..., None]) -> Iterator[Make]:
    """Make meters of the fake package, which are closed at the end."""
    made: list[ZeusMeter] = []

    def one(*arguments: Any, **settings: Any) -> ZeusMeter:
        made.append(ZeusMeter(*arguments, command=[sys.executable, "-S"], **settings))
        return made[-1]

    yield one
    for meter in made:
        meter.close()


def gpu(**values: Any) -> dict[str, Any]:
    """Return an AMD GPU of the fake: millijoules, milliwatts."""
    return {"energy": 1_000_000, "trusted": True, "instant": 300_000, "limit": 750_000, **values}


def by_script(tmp_path: Path, text: str) -> list[str]:
    """Return the command of an interpreter that runs a program of the test's own, whatever it is given."""
    program = tmp_path / "program.py"
    program.write_text("import os, sys, time\n" + text, encoding="utf-8")
    shell = tmp_path / "python"
    shell.write_text(f'#!/bin/sh\nexec "{sys.executable}" -S "{program}"\n', encoding="utf-8")
    shell.chmod(0o755)
    return [str(shell)]


ABOUT = 'print(\'{"what": "a GPU", "scope": "device", "uuids": [], "resolution_s": 0.5}\', flush=True)\n'


# What is read -----------------------------------------------------------------------------------------------


def test_the_counter_of_an_amd_gpu_counts_from_the_start(state: Callable[..., None], make: Make) -> None:
    state(gpus=[gpu(), gpu(energy=5_000_000, instant=200_000)])
    meter = make("amd", [1])
    state(gpus=[gpu(), gpu(energy=5_002_500, instant=200_000)])
    found = meter.read()

    assert (found.energy_j, found.source) == (2.5, "measured_counter")
    assert (found.power_w, found.power_limit_w) == (200.0, 750.0)
    assert (meter.scope, list(meter.uuids), meter.resolution_s) == ("device", ["AMD-uuid-1"], 0.5)
    assert meter.description == "Zeus: Fake MI300X (HIP 1): energy counter"
    assert meter.idle_w == 0.0


def test_all_gpus_are_summed_and_what_one_lacks_is_unknown(state: Callable[..., None], make: Make) -> None:
    state(gpus=[gpu(), gpu(limit=None, instant=0, average=100_000)])
    meter = make("amd")
    state(gpus=[gpu(energy=1_001_000), gpu(energy=1_002_000, limit=None, instant=0, average=100_000)])
    found = meter.read()

    assert (found.energy_j, found.power_w, found.power_limit_w) == (3.0, 400.0, None)
    assert list(meter.uuids) == ["AMD-uuid-0", "AMD-uuid-1"]


def test_power_is_integrated_where_zeus_trusts_no_counter(state: Callable[..., None], make: Make) -> None:
    state(gpus=[gpu(trusted=False)])
    meter = make("amd", [0])
    start = meter.read()
    time.sleep(0.3)
    end = meter.read()

    assert start.energy_j is not None
    assert end.energy_j is not None
    assert end.source == "measured_power"
    assert "power integrated over time" in meter.description
    # 300 W over the seconds between; the process reads its clock a little before this one does
    assert end.energy_j - start.energy_j == pytest.approx(300 * (end.time_s - start.time_s), rel=0.2, abs=15)


def test_apple_silicon_is_an_estimate_of_the_whole_chip(state: Callable[..., None], make: Make) -> None:
    chip = {"cpu_total_mj": 1_000, "gpu_mj": 2_000, "gpu_sram_mj": None, "dram_mj": 500, "ane_mj": 0}
    state(apple=chip)
    meter = make("soc")
    state(apple={**chip, "cpu_total_mj": 3_000, "gpu_mj": 9_000, "efficiency_cores_mj": [7]})
    found = meter.read()

    assert (found.energy_j, found.source, found.power_w) == (9.0, "estimated", None)
    assert meter.scope == "machine"
    assert meter.description == "Zeus: Apple silicon's energy model: cpu + gpu + dram + ane"


@pytest.mark.parametrize(("total", "joules"), [(4_000.0, 6.0), (None, 3.0)])
def test_a_jetson_counts_its_input_or_else_its_rails(
    state: Callable[..., None], make: Make, total: float | None, joules: float
) -> None:
    state(jetson={"cpu_energy_mj": 1_000.0, "gpu_energy_mj": 1_000.0, "total_energy_mj": total})
    meter = make("soc")
    later = None if total is None else 10_000.0
    state(jetson={"cpu_energy_mj": 2_000.0, "gpu_energy_mj": 3_000.0, "total_energy_mj": later})
    found = meter.read()

    assert (found.energy_j, found.source) == (joules, "measured_power")


# What is not there ------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("hardware", "reported", "reason"),
    [
        ("amd", {"gpus": None}, "the package amdsmi does not start"),
        ("amd", {"gpus": []}, "no AMD GPU is visible"),
        ("amd", {"gpus": [gpu(trusted=False, instant=0)]}, "reports neither a counter that Zeus trusts nor its power"),
        ("soc", {}, "No observable SoC was found"),
        ("soc", {"apple": {}}, "the chip has none of the sensors"),
    ],
)
def test_what_zeus_cannot_read_is_said(
    state: Callable[..., None], make: Make, hardware: Any, reported: dict[str, Any], reason: str
) -> None:
    state(**reported)
    with pytest.raises(MeterUnavailableError, match=reason):
        make(hardware)


def test_an_interpreter_without_zeus_is_named(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv(PYTHON, str(tmp_path / "none"))
    with pytest.raises(MeterUnavailableError, match="none does not start: "):
        ZeusMeter("soc")
    monkeypatch.setenv("PYTHONPATH", "")
    with pytest.raises(MeterUnavailableError, match="No module named 'zeus'"):
        ZeusMeter("soc", command=[sys.executable, "-S"])
    monkeypatch.delenv(PYTHON)
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(MeterUnavailableError, match="Zeus is not installed, and TRAINPILOT_ZEUS_PYTHON names no"):
        ZeusMeter("soc")


def test_gpus_that_rocr_renumbers_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("ROCR_VISIBLE_DEVICES", "2,3")
    with pytest.raises(MeterUnavailableError, match="ROCR_VISIBLE_DEVICES"):
        ZeusMeter("amd", [0])


# Faults of the process --------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("then", "reason"),
    [
        ("sys.exit(3)\n", "its process ended"),
        ("sys.stdin.readline(); os.kill(os.getpid(), 9)\n", "its process ended"),
        ("time.sleep(60)\n", "its process did not answer for 0.5 s"),
        ("sys.stdin.readline(); print('no JSON', flush=True); time.sleep(60)\n", "it answered 'no JSON"),
        ("sys.stdin.readline(); print('[1]', flush=True); time.sleep(60)\n", r"it answered \[1\]"),
        ('sys.stdin.readline(); print(\'{"error": "lost the GPU"}\', flush=True)\n', "lost the GPU"),
    ],
)
def test_a_process_that_fails_ends_no_run(tmp_path: Path, then: str, reason: str) -> None:
    meter = ZeusMeter("amd", command=by_script(tmp_path, ABOUT + then), answer_s=0.5)
    with pytest.warns(RuntimeWarning, match=f"energy is unknown from now on; Zeus: {reason}"):
        found = meter.read()
    assert (found.energy_j, found.source) == (None, None)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert meter.read().energy_j is None  # and says so once
    assert "energy unknown" in meter.description
    assert meter._process.returncode is not None
    meter.close()


@pytest.mark.parametrize(
    ("text", "reason"),
    [
        ("time.sleep(60)\n", "did not answer for 0.5 s"),
        ("print('{}', flush=True); time.sleep(60)\n", "it began with {}"),
        ("sys.stdout.buffer.write(b'\\xff\\n')\n", "it answered '\ufffd"),
    ],
)
def test_a_process_that_does_not_begin_is_no_meter(tmp_path: Path, text: str, reason: str) -> None:
    with pytest.raises(MeterUnavailableError, match=reason):
        ZeusMeter("amd", command=by_script(tmp_path, text), start_s=0.5)


def test_a_gpu_that_stops_answering_is_unknown_from_then_on(state: Callable[..., None], make: Make) -> None:
    state(gpus=[gpu(trusted=False)])
    meter = make("amd", [0])
    state(gpus=[gpu(trusted=False, instant=0)])
    with pytest.warns(RuntimeWarning, match="no longer reports its power"):
        assert meter.read().energy_j is None


def test_a_counter_that_lies_is_replaced_by_the_power(state: Callable[..., None], make: Make) -> None:
    state(gpus=[gpu()])
    meter = PlausibleMeter(make("amd", [0]))
    assert meter.read().source == "measured_counter"
    time.sleep(0.1)
    state(gpus=[gpu(energy=2_000_000)])  # 1 kJ in a tenth of a second
    with pytest.warns(RuntimeWarning, match="power times seconds is taken instead"):
        found = meter.read()

    assert found.source == "measured_power"
    assert found.energy_j is not None
    assert found.energy_j < 750 * 1.1 * 10


def alive(pid: int) -> bool:
    """Return whether a process runs, by Linux; one that has ended may still wait for its parent."""
    try:
        return Path(f"/proc/{pid}/stat").read_text(encoding="ascii").rpartition(")")[2].split()[0] not in "ZX"
    except OSError:
        return False


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
def test_what_the_process_began_ends_with_it(tmp_path: Path) -> None:
    begin = (
        "import subprocess\n"
        "pid = subprocess.Popen(['sleep', '60'], stdin=-3, stdout=-3).pid\n"
        'print(\'{"what": "%d", "scope": "machine", "uuids": [], "resolution_s": 1}\' % pid, flush=True)\n'
        "sys.stdin.readline()\n"
    )
    closed, dropped = (ZeusMeter("soc", command=by_script(tmp_path, begin)) for _ in range(2))
    processes = [meter._process.pid for meter in (closed, dropped)]
    processes += [int(meter.description.removeprefix("Zeus: ")) for meter in (closed, dropped)]
    assert all(map(alive, processes))
    closed.close()
    closed.close()
    assert closed.read().energy_j is None
    del dropped
    gc.collect()

    end_s = time.monotonic() + 10
    while any(map(alive, processes)) and time.monotonic() < end_s:
        time.sleep(0.01)
    assert not any(map(alive, processes))


# Who gets it ------------------------------------------------------------------------------------------------


def machine(
    monkeypatch: pytest.MonkeyPatch,
    tmp_path: Path,
    *,
    system: str,
    arm: bool = True,
    rocm: bool = False,
    torch: Any = None,
) -> None:
    """Pretend another machine."""
    loaded = {} if torch is None else {"torch": torch}
    monkeypatch.setattr(energy_zeus, "sys", SimpleNamespace(platform=system, modules=loaded, executable=sys.executable))
    monkeypatch.setattr(platform, "machine", lambda: "arm64" if arm else "x86_64")
    monkeypatch.setattr(energy_zeus, "JETSON", (tmp_path / "tegra",))
    (tmp_path / "kfd").touch()
    monkeypatch.setattr(energy_zeus, "ROCM_DRIVER", tmp_path / ("kfd" if rocm else "no-kfd"))


def found_here() -> dict[str, str | None]:
    """Return what Zeus would read for each kind of device."""
    found: dict[str, str | None] = {}
    for device_type in ("cpu", "cuda", "mps"):
        try:
            found[device_type] = hardware_for(device_type)
        except WrongMachineError:
            found[device_type] = None
    return found


def test_each_machine_has_its_hardware(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    machine(monkeypatch, tmp_path, system="darwin")
    assert found_here() == {"cpu": "soc", "cuda": None, "mps": "soc"}
    machine(monkeypatch, tmp_path, system="darwin", arm=False)
    assert found_here() == {"cpu": None, "cuda": None, "mps": None}
    machine(monkeypatch, tmp_path, system="linux", rocm=True)
    assert found_here() == {"cpu": None, "cuda": "amd", "mps": None}
    (tmp_path / "tegra").touch()
    assert found_here() == {"cpu": "soc", "cuda": "soc", "mps": None}


@pytest.mark.parametrize(("hip", "expected"), [("6.4", "amd"), (None, None)])
def test_cuda_is_amd_where_torch_is_made_for_it(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, hip: str | None, expected: str | None
) -> None:
    torch = SimpleNamespace(version=SimpleNamespace(hip=hip))
    machine(monkeypatch, tmp_path, system="linux", rocm=True, torch=torch)

    assert found_here()["cuda"] == expected


def test_select_meter_takes_zeus_where_it_reads(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, state: Callable[..., None]
) -> None:
    machine(monkeypatch, tmp_path, system="darwin")
    monkeypatch.setattr(energy_zeus, "interpreter", lambda: [sys.executable, "-S"])
    state(apple={"gpu_mj": 1})
    for device in ("cpu", "mps"):
        meter = select_meter(device)
        assert isinstance(meter, PlausibleMeter)
        assert isinstance(meter.meter, ZeusMeter)
        assert meter.scope == "machine"
        meter.close()
    state()
    monkeypatch.setattr(energy_host, "RaplMeter", lambda: RaplMeter(tmp_path))
    estimate = select_meter("cpu")
    assert isinstance(estimate, CpuEstimateMeter)
    assert "No observable SoC was found" in estimate.description
    unknown = select_meter("mps")
    assert isinstance(unknown, NoMeter)
    assert "No observable SoC was found" in unknown.description


def test_other_machines_hear_nothing_of_zeus(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    machine(monkeypatch, tmp_path, system="linux", arm=False)
    monkeypatch.setattr(energy_host, "RaplMeter", lambda: RaplMeter(tmp_path))

    assert "Zeus" not in select_meter("cpu").description
    assert select_meter("mps").description == "energy unknown: no meter reads the device 'mps'"
    assert {"zeus_gpu", "zeus_soc"} <= set(doctor._meters())
    assert energy.CANDIDATES[-1].name == "cpu_estimate"
