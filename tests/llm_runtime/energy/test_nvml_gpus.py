"""Which GPU an index, a UUID or torch means: the real pynvml on a fake NVML library."""

from __future__ import annotations

from collections.abc import Callable, Iterator

import pytest
from fake_nvml import UUIDS, FakeNvml

from trainpilot.llm_runtime.energy.meter import MeterUnavailableError
from trainpilot.llm_runtime.energy.nvml import NvmlMeter

MakeMeter = Callable[..., NvmlMeter]


@pytest.fixture
def nvml(monkeypatch: pytest.MonkeyPatch) -> FakeNvml:
    return FakeNvml(monkeypatch)


@pytest.fixture
def make_meter(nvml: FakeNvml) -> Iterator[MakeMeter]:
    meters: list[NvmlMeter] = []

    def make(gpus: list[int | str] | None = None) -> NvmlMeter:
        meters.append(NvmlMeter(gpus))
        return meters[-1]

    yield make
    for meter in meters:
        meter.close()


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
