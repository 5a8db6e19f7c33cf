"""RAPL on a fake sysfs tree, and the CPU estimate by hand."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from fake_nvml import FakeClock

from trainpilot.llm_runtime.energy.host import CpuEstimateMeter, RaplMeter
from trainpilot.llm_runtime.energy.meter import MeterUnavailableError

MakeMeter = Callable[..., RaplMeter]
RANGE_UJ = 262_143_328_850


def add_zone(folder: Path, name: str, energy_uj: int = 0) -> Path:
    folder.mkdir(parents=True)
    (folder / "name").write_text(f"{name}\n")
    (folder / "max_energy_range_uj").write_text(f"{RANGE_UJ}\n")
    return set_energy(folder, energy_uj)


def set_energy(folder: Path, energy_uj: int) -> Path:
    half_written = folder / "energy_uj.new"
    half_written.write_text(f"{energy_uj}\n")
    half_written.replace(folder / "energy_uj")  # at once, as the kernel shows it
    return folder


def wait_until_seen(meter: RaplMeter, energy_uj: int) -> None:
    deadline = time.monotonic() + 10
    while meter._zones[0]._last_uj != energy_uj and time.monotonic() < deadline:
        time.sleep(0.005)


@pytest.fixture
def package(tmp_path: Path) -> Path:
    return add_zone(tmp_path / "intel-rapl:0", "package-0", 1_000_000_000)


@pytest.fixture
def make_meter(tmp_path: Path) -> Iterator[MakeMeter]:
    meters: list[RaplMeter] = []

    def make(poll_s: float = 3600) -> RaplMeter:
        meters.append(RaplMeter(tmp_path, poll_s=poll_s))
        return meters[-1]

    yield make
    for meter in meters:
        meter.close()


def test_a_package_is_counted_from_the_start(package: Path, make_meter: MakeMeter) -> None:
    meter = make_meter()
    assert meter.read().energy_j == 0.0
    set_energy(package, 1_012_500_000)
    reading = meter.read()

    assert (reading.energy_j, reading.source, reading.power_w) == (12.5, "measured_counter", None)
    assert meter.description == "RAPL energy counters: package-0"


def test_packages_and_memory_are_added_and_nothing_twice(tmp_path: Path, package: Path, make_meter: MakeMeter) -> None:
    zones = [
        package,
        add_zone(tmp_path / "intel-rapl:1", "package-1"),
        add_zone(tmp_path / "intel-rapl:2", "psys"),
        add_zone(tmp_path / "intel-rapl-mmio:0", "package-0"),
        add_zone(package / "intel-rapl:0:0", "core"),
        add_zone(package / "intel-rapl:0:1", "dram"),
        add_zone(tmp_path / "intel-rapl:0:1", "dram"),  # the class folder also lists the sub-zones, flat
    ]
    meter = make_meter()
    for power_of_ten, zone in enumerate(zones):
        set_energy(zone, int((zone / "energy_uj").read_text()) + 10**power_of_ten * 1_000_000)

    assert meter.read().energy_j == 1.0 + 10.0 + 100_000.0
    assert meter.description == "RAPL energy counters: package-0, package-1, dram"


def test_a_counter_wraps_around(package: Path, make_meter: MakeMeter) -> None:
    set_energy(package, RANGE_UJ - 2_000_000)
    meter = make_meter()
    set_energy(package, 3_000_000)
    assert meter.read().energy_j == 5.0
    set_energy(package, 4_000_000)

    assert meter.read().energy_j == 6.0


def test_the_thread_sees_a_wrap_that_no_read_sees(package: Path, make_meter: MakeMeter) -> None:
    meter = make_meter(poll_s=0.005)
    for energy_uj in (100_000_000_000, 200_000_000_000, 37_856_671_150, 137_856_671_150):
        set_energy(package, energy_uj)
        wait_until_seen(meter, energy_uj)

    assert meter.read().energy_j == pytest.approx((RANGE_UJ - 1_000_000_000 + 137_856_671_150) / 1e6)


def test_a_small_step_back_is_no_wrap(package: Path, make_meter: MakeMeter) -> None:
    meter = make_meter()
    set_energy(package, 999_999_900)
    assert meter.read().energy_j == 0.0
    set_energy(package, 1_000_000_100)

    assert meter.read().energy_j == pytest.approx(1e-4)


def test_a_reset_makes_the_energy_unknown(package: Path, make_meter: MakeMeter) -> None:
    set_energy(package, 100_000_000_000)
    meter = make_meter()
    set_energy(package, 0)
    with pytest.warns(RuntimeWarning, match="counter of package-0 fell") as caught:
        lost = [meter.read(), meter.read()]

    assert len(caught) == 1
    assert [(reading.energy_j, reading.source) for reading in lost] == [(None, None)] * 2


def test_a_counter_that_vanishes_makes_the_energy_unknown(package: Path, make_meter: MakeMeter) -> None:
    meter = make_meter()
    (package / "energy_uj").unlink()
    with pytest.warns(RuntimeWarning, match="unknown from now on"):
        assert meter.read().energy_j is None

    set_energy(package, 2_000_000_000)
    assert meter.read().energy_j is None
    assert "energy unknown" in meter.description


def test_no_counters_are_named(tmp_path: Path) -> None:
    with pytest.raises(MeterUnavailableError, match="no RAPL counter under"):
        RaplMeter(tmp_path / "nowhere")


def test_root_only_counters_are_named(package: Path, make_meter: MakeMeter, monkeypatch: pytest.MonkeyPatch) -> None:
    read_text = Path.read_text

    def guarded(path: Path, encoding: str | None = None) -> str:
        if path.name == "energy_uj":
            raise PermissionError(13, "Permission denied", str(path))
        return read_text(path, encoding=encoding)

    monkeypatch.setattr(Path, "read_text", guarded)
    with pytest.raises(MeterUnavailableError, match=r"only root may read .*intel-rapl:0/energy_uj"):
        make_meter()


def test_a_garbled_counter_is_refused(package: Path, make_meter: MakeMeter) -> None:
    (package / "energy_uj").write_text("plenty")
    with pytest.raises(MeterUnavailableError, match="cannot be read"):
        make_meter()


def test_the_estimate_by_hand() -> None:
    wall, cpu = FakeClock(), FakeClock()
    meter = CpuEstimateMeter(idle_w=10.0, watts_per_busy_core=3.0, clock=wall, cpu_clock=cpu)
    assert meter.read().energy_j == 0.0
    wall.now_s += 20
    cpu.now_s += 30
    reading = meter.read()

    assert reading.energy_j == 10 * 20 + 3 * 30
    assert (reading.source, reading.time_s) == ("estimated", 120.0)
    assert meter.description.endswith("10.00 W idle + 3.00 W per busy hardware thread")


def test_the_default_estimate_of_two_busy_threads(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("os.sched_getaffinity", lambda pid: {0, 1}, raising=False)
    wall, cpu = FakeClock(), FakeClock()
    meter = CpuEstimateMeter(clock=wall, cpu_clock=cpu)
    wall.now_s += 10
    cpu.now_s += 20

    assert meter.read().energy_j == pytest.approx(2 * 4.0 * 10)


def test_the_estimate_on_real_clocks_only_rises() -> None:
    meter = CpuEstimateMeter(why="no RAPL here")
    joules = [meter.read().energy_j or 0.0 for _ in range(5)]

    assert joules == sorted(joules)
    assert meter.description.endswith("(no RAPL here)")
